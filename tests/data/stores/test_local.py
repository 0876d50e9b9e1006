import os
import pickle
import signal
import threading
from pathlib import Path

import pytest
from store_cases import make_folder

from gcahng.data.stores import FileFacts
from gcahng.data.stores.local import LocalStore
from gcahng.data.stores.open_files import OpenFiles
from gcahng.errors import DataError


def open_handles(folder: Path) -> int:
    """Handles of this process on files of a folder."""
    return sum(str(folder) in os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts handles in /proc")


def test_reads_what_is_there(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set")
    store = LocalStore(folder.path)
    store.announce(folder.facts)
    assert store.read("s1.tar", 10, 100) == folder.content["s1.tar"][10:110]
    assert store.read("s1.tar", 99_990, 100) == folder.content["s1.tar"][-10:], "fewer where the file ends"
    assert store.read("s1.tar", 200_000, 100) == b""
    assert store.local_copy("s2.tar").read_bytes() == folder.content["s2.tar"]
    assert not store.distrust("s1.tar"), "reading the only copy again brings the same bytes"


@pytest.mark.parametrize(("size", "word"), [(5, "too long"), (200_000, "cut")])
def test_another_size_than_announced(tmp_path: Path, size: int, word: str) -> None:
    folder = make_folder(tmp_path / "set", count=1)
    message = f"s0.tar is {word}: expected {size} bytes, got 100000. Restore the file"
    with pytest.raises(DataError, match=message):
        LocalStore(folder.path).announce({"s0.tar": FileFacts(size, "0" * 64)})


def test_a_missing_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for ask in (lambda: store.read("a.tar", 0, 1), lambda: store.size("a.tar")):
        with pytest.raises(DataError, match=r"a\.tar cannot be read \(No such file or directory\)\. Restore"):
            ask()


@needs_proc
def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", count=9, size=50)
    files = OpenFiles(limit=3)
    for _ in range(2):
        for name, content in folder.content.items():
            assert files.read(folder.path / name, 0, 50) == content
            assert open_handles(folder.path) <= 3
    assert len(files) == 3
    del files
    assert open_handles(folder.path) == 0


def test_the_files_used_last_stay_open(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", count=3, size=50)
    paths = [folder.path / name for name in folder.content]
    files = OpenFiles(limit=2)
    for path in (paths[0], paths[1], paths[0], paths[2]):
        files.read(path, 0, 1)
    for path in paths:
        path.unlink()
    files.read(paths[0], 0, 1)
    files.read(paths[2], 0, 1)
    with pytest.raises(FileNotFoundError):
        files.read(paths[1], 0, 1)


def test_threads_read_what_they_ask_for_while_files_come_and_go(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", count=12, size=64)
    files = OpenFiles(limit=2)
    wrong: list[str] = []

    def read(start: int) -> None:
        names = list(folder.content)
        for i in range(1500):
            name = names[(start * 5 + i * 7) % 12]
            try:
                if files.read(folder.path / name, 0, 64) != folder.content[name]:
                    wrong.append(name)
            except OSError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


@needs_proc
def test_a_fork_lets_go_of_handles_and_reads(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", count=3)
    store = LocalStore(folder.path)
    for name in folder.content:
        store.read(name, 0, 1)
    store._files.get()._lock.acquire()  # as if another thread were reading at the moment of the fork
    assert open_handles(folder.path) == 3
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        right = store.read("s0.tar", 5, 9) == folder.content["s0.tar"][5:14]
        os._exit(0 if right and open_handles(folder.path) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_pickle_and_close(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", count=1)
    store = LocalStore(folder.path)
    store.read("s0.tar", 0, 1)
    again = pickle.loads(pickle.dumps(store))
    store.close()
    for other in (store, again):
        assert other.read("s0.tar", 1, 4) == folder.content["s0.tar"][1:5]
