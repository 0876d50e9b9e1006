"""How remote shards are kept on this machine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gcahng.errors import ConfigError

CACHE_VARIABLE = "GCAHNG_CACHE"
_MODES = ("shards", "direct")


@dataclass(frozen=True)
class CacheSettings:
    """How remote shards are kept on this machine. Local folders need no cache.

    Attributes:
        dir: Folder of the cache, shared by the processes and runs of a machine. None: see `folder`.
        max_bytes: Bound of the folder's size, files that are being fetched included.
        mode: "shards" fetches whole shards before they are needed; "direct" reads each sample from the remote
            place and keeps manifest, classes and indexes only.
        part_bytes: Size of the ranges that a shard is fetched in.
        parts_at_once: Ranges of a shard that are fetched at the same time.
    """

    dir: Path | None = None
    max_bytes: int = 64 << 30
    mode: Literal["shards", "direct"] = "shards"
    part_bytes: int = 16 << 20
    parts_at_once: int = 4

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"The cache's `mode` must be one of {', '.join(_MODES)}, got {self.mode!r}. Choose one.")
        if self.max_bytes < 0:
            raise ConfigError(f"The cache's `max_bytes` must be 0 or more, got {self.max_bytes}. Raise it.")
        for name in ("part_bytes", "parts_at_once"):
            if getattr(self, name) < 1:
                raise ConfigError(f"The cache's `{name}` must be 1 or more, got {getattr(self, name)}. Raise it.")

    def folder(self) -> Path:
        """`dir`, else $GCAHNG_CACHE, else gcahng/shards in $XDG_CACHE_HOME or ~/.cache."""
        if self.dir is not None:
            return Path(self.dir).expanduser()
        if os.environ.get(CACHE_VARIABLE):
            return Path(os.environ[CACHE_VARIABLE]).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "gcahng" / "shards"
