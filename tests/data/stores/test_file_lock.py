import os
import signal
import threading
from pathlib import Path

from gcahng.data.stores.file_lock import LockedFile, lock_file, locked


def is_free(path: Path) -> bool:
    """Whether another process would get the lock; each opening of a file counts as one."""
    lock = lock_file(path, wait=False)
    if lock is None:
        return False
    lock.close()
    return True


def test_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_file(path, wait=False, create=False) is None
    with locked(path):
        assert not is_free(path)
    assert is_free(path)


def test_shared_holders(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holders = [lock_file(path, wait=False, shared=True) for _ in range(2)]
    for holder in holders:
        assert holder is not None
        assert not is_free(path)
        holder.close()
        holder.close()
    assert is_free(path)


def test_a_forked_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = lock_file(path, wait=False)
    assert lock is not None
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            os.fstat(lock.handle)
        except OSError:
            lock.close()  # not its own: nothing happens
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the handle is closed in the child"
    assert not is_free(path), "the parent has its lock"
    lock.close()
    assert is_free(path)


def test_who_waited_for_a_file_that_was_removed_locks_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path, wait=False)
    assert first is not None
    got: list[LockedFile | None] = []
    waiter = threading.Thread(target=lambda: got.append(lock_file(path, wait=True)))
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive()
    path.unlink()
    first.close()
    waiter.join(10)
    (second,) = got
    assert second is not None
    assert os.fstat(second.handle).st_ino == path.stat().st_ino
    second.close()


def test_a_lock_of_a_file_that_was_removed_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path, wait=False)
    path.unlink()
    second = lock_file(path, wait=False)
    assert first is not None
    assert second is not None, "a file of the same name is another one"
    first.close()
    assert not is_free(path)
    second.close()
