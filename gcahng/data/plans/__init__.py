"""Which samples make up each batch of an epoch."""
