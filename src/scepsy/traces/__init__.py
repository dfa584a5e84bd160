"""Reading traces: files of spans, from any of the usual instrumentations, to executions."""

from scepsy.traces.reading import Reading, iter_executions, read_executions
from scepsy.traces.records import Tally

__all__ = ["Reading", "Tally", "iter_executions", "read_executions"]
