"""The store for a location: a folder, a web server, or what fsspec knows."""

import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gcahng.data.stores.cache_settings import CacheSettings
from gcahng.data.stores.cached import CachedStore
from gcahng.data.stores.fsspec_files import FsspecStore, is_known
from gcahng.data.stores.http import HttpStore
from gcahng.data.stores.local import LocalStore
from gcahng.data.stores.retry import RetrySettings
from gcahng.data.stores.store import ShardStore
from gcahng.data.stores.urls import redact
from gcahng.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(:/{0,2})")
# These are no place of files, or take code or other files as their argument.
_REFUSED = ("async_wrapper", "asyncwrapper", "asynclocal", "data", "dir", "generic", "pyscript", "reference")


def open_store(
    location: Path | str, cache: CacheSettings | None = None, retry: RetrySettings | None = None
) -> ShardStore:
    """The store of a shard folder. Only remote ones are cached; none is asked for anything yet.

    Args:
        location: A path, `file:`, `http(s)://`, or a URL of a file system that fsspec knows (`s3://`, `gs://`, ...).
        cache: How remote shards are kept on this machine; the defaults if left out.
        retry: How patiently remote places are asked; the defaults if left out.
    Raises:
        ConfigError: The location runs a command, has an unknown scheme, or needs a package that is not installed.
    """
    text = str(location)
    match = _SCHEME.match(text)
    scheme, slashes = (match[1].lower(), match[2]) if match else ("", "")
    if scheme == "pipe":
        raise ConfigError(
            "`pipe:` is refused as a place of shards: it runs a command. Copy the folder, or serve it over https or an "
            "object store."
        )
    if scheme in ("file", "local") and (slashes == "://" or scheme == "file"):
        return LocalStore(_path_of(text, scheme))
    if slashes == ":/" and (scheme in ("http", "https") or is_known(scheme)):
        raise ConfigError(f"{redact(text)!r} lacks a slash after `{scheme}:/`: a URL must stay a string, not a Path.")
    if ("::" in text and "://" in text) or (slashes == "://" and scheme in _REFUSED):
        raise ConfigError(
            f"{redact(text)!r} is refused as a place of shards: expected one place of files, got a chain or a wrapper. "
            "Name the folder itself; the cache is built in."
        )
    if slashes != "://":
        return LocalStore(location)
    if scheme in ("http", "https"):
        return CachedStore(HttpStore(text, retry), cache or CacheSettings())
    if not is_known(scheme):
        raise ConfigError(
            f"{redact(text)!r}: the scheme `{scheme}` is unknown. Use a path, file:, http://, https://, or one that "
            "fsspec knows (s3://, gs://, abfs://, ...)."
        )
    return CachedStore(FsspecStore(text, retry), cache or CacheSettings())


def _path_of(url: str, scheme: str) -> Path:
    if scheme == "local":
        return Path(url.removeprefix("local://"))
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(
            f"{url!r} names the machine {parts.netloc!r}: expected a folder of this one. Write file:///folder."
        )
    return Path(url2pathname(parts.path))
