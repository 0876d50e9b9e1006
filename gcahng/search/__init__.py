"""Stored embeddings and what is done with them outside training: search, approximate search, clustering."""
