"""The cache with several processes: forked workers, ranks of a node, and processes that die."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faulty_server import FaultyServer
from store_cases import IMPATIENT, Folder, cached, names, parts, size_of, wait_until

from gcahng.data.stores import CacheSettings
from gcahng.data.stores.cached import CachedStore
from gcahng.data.stores.http import HttpStore
from gcahng.errors import DataError


def test_a_forked_worker_reads_while_the_parent_fetches(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings
) -> None:
    go = threading.Event()
    server.fault = lambda handler, request: request.name == "s0.tar" and request.range != (512, 520) and not go.wait(20)
    store.expect(names(0), [])
    wait_until(lambda: server.count("s0.tar") > 0)
    mine = store._mine.get()
    parents = mine._prefetcher
    assert parents is not None
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        """As the thread that fetches might at the moment of the fork."""
        with mine._lock, parents._wake:
            held.set()
            over.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(150)
        right = store.read("s0.tar", 512, 9) == folder.content["s0.tar"][512:521]
        right &= store.stats().direct_reads == 1
        store.expect(names(1), [])
        wait_until(lambda: "s1.tar" in cached(settings, folder))
        right &= store.read("s1.tar", 512, 9) == folder.content["s1.tar"][512:521]
        right &= store.stats().cached_reads == 1
        store.close()
        parents.stop()  # as at the exit of a process that was forked: not its thread, not its lock
        os._exit(0 if right else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    over.set()
    holder.join(30)
    go.set()
    assert code == 0
    wait_until(lambda: cached(settings, folder) == names(0, 1))


CHILD = """
import pickle, sys, time
from pathlib import Path
store, present, rounds = pickle.loads(Path(sys.argv[1]).read_bytes())
store.expect(present, [])
print("begun", flush=True)
end = time.monotonic() + 100
while time.monotonic() < end and not all(store.read(name, 0, 5) and store._cache.has_shard(store._facts[name])
                                         for name in present):
    time.sleep(0.02)
store.close()
print(store.stats().shards_fetched, flush=True)
if rounds == "and wait":
    time.sleep(60)
"""


def start_child(tmp_path: Path, store: CachedStore, present: list[str], rounds: str = "") -> "subprocess.Popen[str]":
    path = tmp_path / f"job-{len(list(tmp_path.glob('job-*')))}"
    path.write_bytes(pickle.dumps((store, present, rounds)))
    return subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)


def test_two_processes_fetch_each_shard_once(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings, tmp_path: Path
) -> None:
    children = [start_child(tmp_path, store, names(0, 1, 2)) for _ in range(2)]
    try:
        fetched = [int(child.communicate(timeout=120)[0].split()[1]) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert sum(fetched) == 3
    for name in names(0, 1, 2):
        large = {asked: count for asked, count in server.ranges(name).items() if asked is not None and asked[1] > 100}
        assert large == {(f, min(f + 30_000, 100_000) - 1): 1 for f in range(0, 100_000, 30_000)}
    assert cached(settings, folder) == names(0, 1, 2)


def test_another_process_takes_over_when_one_dies(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings, tmp_path: Path
) -> None:
    go = threading.Event()
    # Ranges of the second half hang until the first process is dead.
    server.fault = lambda handler, request: bool(request.range and request.range[0] >= 60_000 and go.wait(20) and False)
    child = start_child(tmp_path, store, names(0))
    try:
        wait_until(lambda: server.count("s0.tar") >= 4)
        (part,) = parts(settings)
        assert part == folder.facts["s0.tar"].sha256 + ".part"
        assert settings.dir is not None
        assert (settings.dir / "shards" / part).stat().st_size == 100_000, "its room is taken from the start"
        store.expect(names(0), [])
        wait_until(lambda: store._mine.get()._prefetcher is not None)
        assert cached(settings, folder) == []
    finally:
        child.kill()
        child.communicate()
    go.set()
    wait_until(lambda: cached(settings, folder) == names(0))
    assert store.stats().shards_fetched == 1
    assert parts(settings) == []


def test_what_a_dead_process_left_takes_no_room(store: CachedStore, folder: Folder, settings: CacheSettings) -> None:
    assert settings.dir is not None
    shards = settings.dir / "shards"
    shards.mkdir(parents=True)
    (shards / ("0" * 64 + ".part")).write_bytes(bytes(340_000))
    store.expect(names(0, 1, 2), [])
    wait_until(lambda: cached(settings, folder) == names(0, 1, 2))
    assert size_of(settings.dir) == 300_000


def test_the_end_of_the_process_ends_a_download(
    server: FaultyServer, folder: Folder, settings: CacheSettings, tmp_path: Path
) -> None:
    """Neither the thread nor a server that hangs keeps a process from ending, and nothing is left behind."""
    go = threading.Event()
    server.fault = lambda handler, request: bool(request.range and request.range[0] >= 60_000 and go.wait(20) and False)
    program = CHILD.replace("end = time.monotonic() + 100", "time.sleep(0.3); sys.exit(0)")
    path = tmp_path / "job"
    impatient = CachedStore(HttpStore(server.url, IMPATIENT), settings)
    impatient.announce(folder.facts)
    path.write_bytes(pickle.dumps((impatient, names(0), "")))
    try:
        done = subprocess.run([sys.executable, "-c", program, str(path)], timeout=120, capture_output=True, text=True)
    finally:
        go.set()
    assert (done.returncode, done.stderr) == (0, "")
    assert parts(settings) == []


def test_pickle(store: CachedStore, server: FaultyServer, folder: Folder) -> None:
    store.expect(names(0), [])
    wait_until(lambda: store.stats().shards_fetched == 1)
    again = pickle.loads(pickle.dumps(store))
    assert again.read("s0.tar", 512, 9) == folder.content["s0.tar"][512:521]
    assert again.stats().cached_reads == 1
    (folder.path / "s1.tar").write_bytes(b"")
    with pytest.raises(DataError, match="expected a file of 100000 bytes"):
        again.read("s1.tar", 512, 9)
