"""gcahng: graph-guided hard negatives for deep metric learning at scale."""

__version__ = "0.1.0"
