import asyncio
import importlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from store_cases import IMPATIENT, QUICK, Folder, make_folder

from gcahng.data.stores import FileFacts, open_store
from gcahng.data.stores.fsspec_files import FsspecStore
from gcahng.data.stores.retry import RetrySettings
from gcahng.errors import ConfigError, DataError

# There is no public way to take an implementation out again.
REGISTRY = importlib.import_module("fsspec.registry")._registry


class FaultyFileSystem(LocalFileSystem):
    """Local files behind faults. `plan` holds what the next calls do."""

    protocol = "faulty"
    plan: list[object] = []
    calls: list[tuple] = []
    instances: list[int] = []

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.instances.append(os.getpid())

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("faulty://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        self.calls.append((Path(path).name, start, end))
        content = super().cat_file(path, start, end, **kwargs)
        fault = self.plan.pop(0) if self.plan else None
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, float):
            time.sleep(fault)
        return fault(content) if callable(fault) else content


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return make_folder(tmp_path / "set", count=2)


@pytest.fixture
def faulty() -> Iterator[type[FaultyFileSystem]]:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    for record in (FaultyFileSystem.plan, FaultyFileSystem.calls, FaultyFileSystem.instances):
        record.clear()
    yield FaultyFileSystem
    REGISTRY.pop("faulty")


def announced(folder: Folder, retry: RetrySettings = QUICK) -> FsspecStore:
    store = FsspecStore(f"faulty://{folder.path}/", retry)
    store.announce(folder.facts)
    return store


def test_memory() -> None:
    system = MemoryFileSystem()
    system.pipe_file("/gcahng-test/set/a.tar", bytes(range(100)))
    try:
        store = FsspecStore("memory://gcahng-test/set", QUICK)
        assert store.read("a.tar", 10, 5) == bytes(range(10, 15))
        assert store.read("a.tar", 90, 50) == bytes(range(90, 100))
        assert store.whole("a.tar") == bytes(range(100))
        assert store.size("a.tar") == 100
        assert open_store("memory://gcahng-test/set").size("a.tar") == 100
        message = "cannot be read: FileNotFoundError: .*Check the URL, the credentials"
        for ask in (lambda: store.read("b.tar", 0, 1), lambda: store.whole("b.tar"), lambda: store.size("b.tar")):
            with pytest.raises(DataError, match=message):
                ask()
    finally:
        system.rm("/gcahng-test", recursive=True)


def test_ranges_only(faulty: type[FaultyFileSystem], folder: Folder) -> None:
    store = announced(folder)
    assert store.read("s1.tar", 512, 70_000) == folder.content["s1.tar"][512:70_512]
    assert faulty.calls == [("s1.tar", 512, 70_512)]
    assert store.traffic.bytes_fetched == 70_000


FAULTS = {
    "lost connection": (OSError("the connection is lost"), "OSError: the connection is lost"),
    "an error of its own": (RuntimeError("throttled"), "RuntimeError: throttled"),
    "cut": (lambda content: content[:-1], "the answer ended 1 bytes early"),
    "too long": (lambda content: content + b"x", "the answer has more than the 9 bytes asked for"),
    "too slow": (1.0, "no answer within 0.4 s"),
    "timeout": (fsspec.asyn.FSTimeoutError(), "no answer within 0.4 s"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(faulty: type[FaultyFileSystem], folder: Folder, name: str) -> None:
    fault, reason = FAULTS[name]
    store = announced(folder, IMPATIENT if name in ("too slow", "timeout") else QUICK)
    faulty.plan[:] = [fault, fault]
    assert store.read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
    assert store.traffic.retries == 2
    faulty.plan[:] = [fault] * 3
    with pytest.raises(DataError, match=rf"bytes 5 to 14, cannot be read: 3 tries, the last one: {reason}\. Check"):
        store.read("s1.tar", 5, 9)


@pytest.mark.parametrize("fault", [PermissionError("no"), FileNotFoundError("gone"), TypeError("a bug")])
def test_faults_that_stay(faulty: type[FaultyFileSystem], folder: Folder, fault: Exception) -> None:
    faulty.plan[:] = [fault]
    with pytest.raises(DataError, match=f"cannot be read: {type(fault).__name__}: {fault}. Check the"):
        announced(folder).read("s1.tar", 5, 9)
    assert len(faulty.calls) == 1


def test_a_file_that_changed(faulty: type[FaultyFileSystem], folder: Folder) -> None:
    store = announced(folder)
    (folder.path / "s1.tar").write_bytes(bytes(7))
    with pytest.raises(DataError, match="expected a file of 100000 bytes, it has 7. The files there are not those"):
        store.read("s1.tar", 5, 9)
    assert len(faulty.calls) == 1


def test_a_folder_is_no_file(faulty: type[FaultyFileSystem], folder: Folder) -> None:
    (folder.path / "sub").mkdir()
    with pytest.raises(DataError, match="it is no file"):
        announced(folder).size("sub")


def test_each_process_has_its_own_instance(faulty: type[FaultyFileSystem], folder: Folder) -> None:
    store = announced(folder)
    store.read("s1.tar", 0, 5)
    store.read("s1.tar", 0, 5)
    assert faulty.instances == [os.getpid()]
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        right = store.read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
        os._exit(0 if right and faulty.instances[1:] == [os.getpid()] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = pickle.loads(pickle.dumps(store))
    assert again.read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
    assert len(faulty.instances) == 2


def test_a_hanging_call_is_left_behind(faulty: type[FaultyFileSystem], folder: Folder) -> None:
    store = announced(folder, IMPATIENT)
    faulty.plan[:] = [1.5]
    start = time.monotonic()
    assert store.read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
    assert time.monotonic() - start < 1.2
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def test_asynchronous_file_systems(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Object stores' file systems are of this kind."""

    class Slow(AsyncFileSystem):
        protocol = "wrapped"
        delays: list[float] = []

        async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
            await asyncio.sleep(self.delays.pop(0) if self.delays else 0)
            return Path(path).read_bytes()[start:end]

        async def _info(self, path: str, **_: object) -> dict:
            return {"name": path, "size": Path(path).stat().st_size, "type": "file"}

    monkeypatch.setitem(REGISTRY, "wrapped", Slow)
    store = FsspecStore(f"wrapped://{folder.path}", IMPATIENT)
    assert store.read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
    Slow.delays[:] = [5.0]
    start = time.monotonic()
    assert store.read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
    assert time.monotonic() - start < 4, "the time limit ends the call"
    assert store.traffic.retries == 1


def test_a_file_system_that_cannot_be_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(LocalFileSystem):
        protocol = "broken"

        def __init__(self, **options: object) -> None:
            raise RuntimeError("no account at https://me:secret@host/?key=secret")

    monkeypatch.setitem(REGISTRY, "broken", Broken)
    store = FsspecStore("broken://bucket", QUICK)
    with pytest.raises(ConfigError, match="of broken://bucket cannot be set up .RuntimeError: no account") as caught:
        store.read("a.tar", 0, 5)
    assert "secret" not in str(caught.value)


def test_no_read_beside_the_announced_file(faulty: type[FaultyFileSystem], folder: Folder) -> None:
    store = announced(folder)
    store.announce({"s1.tar": FileFacts(10, "0" * 64)})
    assert store.read("s1.tar", 5, 9) == folder.content["s1.tar"][5:10]
    assert faulty.calls == [("s1.tar", 5, 10)]
