"""Shards, conversion sources, batch plans, transforms, loaders."""
