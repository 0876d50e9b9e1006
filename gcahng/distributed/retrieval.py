"""Retrieval metrics over ranks: each rank brings its part of the embeddings, all get the same result."""
