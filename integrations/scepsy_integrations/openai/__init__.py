"""The hook for the openai package."""

from scepsy_integrations.openai.hook import Instrumentor

__all__ = ["Instrumentor"]
