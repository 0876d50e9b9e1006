"""Shards in an object store or on another file system that fsspec knows (s3, gs, abfs, sftp, ...)."""

import threading
from typing import Any

import fsspec
import fsspec.asyn
from fsspec.registry import known_implementations

from gcahng.data.stores.per_process import PerProcess
from gcahng.data.stores.remote import Blocks, RemoteStore
from gcahng.data.stores.retry import PermanentFault, RetrySettings, TemporaryFault
from gcahng.data.stores.urls import redact
from gcahng.errors import ConfigError

_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# Faults of a program, not of a network: they would stay.
_BROKEN = (ImportError, TypeError, AttributeError, NotImplementedError)
_REPAIR = "Check the URL, the credentials and the permissions: it must name the folder that holds manifest.json."


def is_known(scheme: str) -> bool:
    """Whether fsspec has a file system for the scheme, installed or not."""
    return scheme in fsspec.available_protocols()


class FsspecStore(RemoteStore):
    """Files of one folder of an fsspec file system, read by byte ranges.

    Each process has its own instance of the file system: instances hold connections and threads, which do not
    survive a fork. Credentials and further options come from where the file system takes them (the environment,
    its own and fsspec's configuration files).

    Args:
        url: scheme://place/folder.
        retry: How patiently the place is asked.
    Raises:
        ConfigError: The file system's package is missing or cannot be set up.
    """

    def __init__(self, url: str, retry: RetrySettings | None = None) -> None:
        super().__init__(redact(url), url, retry or RetrySettings())
        self._scheme = url.partition("://")[0]
        _file_system_class(self._scheme)
        self._url = url.rstrip("/")
        self._system = PerProcess(self._make_system)
        self.ranged = True

    def close(self) -> None:
        self._system.forget()

    def _make_system(self) -> tuple[Any, str]:
        try:
            system, path = fsspec.core.url_to_fs(self._url, skip_instance_cache=True)
        except Exception as error:  # each file system raises what it likes
            raise ConfigError(
                f"The file system of {self.location} cannot be set up ({_text(error)}). {_REPAIR}"
            ) from None
        return system, path.rstrip("/")

    def _size_once(self, name: str) -> int:
        system, folder = self._system.get()
        path = f"{folder}/{name}"
        system.invalidate_cache(folder)
        info = self._call(system, "info", 0, path)
        if info.get("type") == "directory" or info.get("size") is None:
            raise PermanentFault("it is no file", _REPAIR)
        return int(info["size"])

    def _stream_once(self, name: str, offset: int, length: int | None) -> Blocks:
        system, folder = self._system.get()
        path = f"{folder}/{name}"
        if length is None:
            yield self._call(system, "cat_file", 1 << 30, path)
            return
        try:
            block = self._call(system, "cat_file", length, path, start=offset, end=offset + length)
        except TemporaryFault:
            self._check_total(name, self._size_once(name))  # object stores answer a range behind the end with an error
            raise
        if len(block) != length:
            self._check_total(name, self._size_once(name))
        yield block

    def _call(self, system: Any, method: str, num_bytes: int, *args: Any, **kwargs: Any) -> Any:
        """One call with a time limit; faults sorted into those that may pass and those that stay."""
        limit_s = self.retry.limit_s(num_bytes)
        try:
            if isinstance(system, fsspec.asyn.AsyncFileSystem):
                method = "_" + method
                return fsspec.asyn.sync(system.loop, getattr(system, method), *args, timeout=limit_s, **kwargs)
            return _call_in_thread(getattr(system, method), limit_s, *args, **kwargs)
        except _PERMANENT as error:
            raise PermanentFault(_text(error), _REPAIR) from None
        except _BROKEN as error:
            raise PermanentFault(_text(error), f"Check the package behind {self._scheme}://.") from None
        except TimeoutError:  # fsspec's own is one of these
            raise TemporaryFault(f"no answer within {limit_s:.3g} s") from None
        except Exception as error:  # the file systems' network errors have no base class in common
            raise TemporaryFault(_text(error)) from None


def _file_system_class(scheme: str) -> Any:
    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = known_implementations.get(scheme, {}).get("class", "").partition(".")[0]
        repair = f"`pip install {package}`" if package not in ("", "fsspec") else "the package that it names"
        raise ConfigError(
            f"{scheme}:// needs a package that is not installed ({error}). Install it: {repair}."
        ) from None


def _call_in_thread(function: Any, limit_s: float, *args: Any, **kwargs: Any) -> Any:
    """Call a function that has no time limit of its own. One that hangs is left behind in its thread."""
    answer: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(function(*args, **kwargs))
        except BaseException as error:  # it is raised below, in the thread that asked
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError
    return answer[0]


def _text(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}")[:300]
