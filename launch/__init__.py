"""Command lines for training and evaluation."""
