"""Command lines that make and check tar shards."""
