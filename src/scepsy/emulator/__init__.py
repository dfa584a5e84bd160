"""A process that speaks vLLM's API with the timing of a profile: for trying plans, and tests, without a GPU.

`python -m scepsy.emulator --profile FILE --llm NAME --port P`. The answers mean nothing; how long they are, and when
each token comes, is what the real engine would do by the profile.
"""
