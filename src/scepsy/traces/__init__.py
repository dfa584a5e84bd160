"""Reading traces: files of spans, from any of the usual instrumentations, to executions."""

from scepsy.traces.reading import Reading, read_executions

__all__ = ["Reading", "read_executions"]
