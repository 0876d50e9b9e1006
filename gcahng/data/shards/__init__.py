"""Shard folders: manifest, indexes, reading and writing."""
