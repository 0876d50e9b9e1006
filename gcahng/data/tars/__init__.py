"""Plain WebDataset tars without an index: read from front to back, strictly, for embedding and evaluation."""
