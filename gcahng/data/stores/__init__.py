"""Where the bytes of shards come from: a folder, a web server or an object store."""

from gcahng.data.stores.cache_settings import CacheSettings
from gcahng.data.stores.open import open_store
from gcahng.data.stores.store import FileFacts, ShardStore

__all__ = ["CacheSettings", "FileFacts", "ShardStore", "open_store"]
