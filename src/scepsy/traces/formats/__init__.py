"""File formats: where the spans lie in each, whatever their dialect. One small module each."""
