"""Retrieval metrics: exact, chunked, free of ranks, files and configuration."""

from gcahng.metrics.nearest import nearest
from gcahng.metrics.retrieval import RetrievalResult, retrieval

__all__ = ["RetrievalResult", "nearest", "retrieval"]
