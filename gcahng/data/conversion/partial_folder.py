"""`OUT.partial`: where a conversion works until its shard folder is whole.

It holds `shards/`, which is renamed to OUT at the end, and beside it what must not get into OUT: the journal and the
digests (`gcahng.data.conversion.journal`), the lock, and, for a moment, the folder that OUT replaces (`replaced/`).
Whatever the moment at which a conversion dies, OUT is missing, old or new, but always whole.
"""

import fcntl
import hashlib
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gcahng.data.conversion.fingerprint import differences
from gcahng.data.conversion.journal import DIGESTS_NAME, JOURNAL_NAME, NEW_JOURNAL_NAME, Journal
from gcahng.data.shards.disk import disk_errors, sync
from gcahng.data.shards.manifest import MANIFEST_NAME
from gcahng.errors import DataError, InputError

_SHARDS, _REPLACED, _LOCK = "shards", "replaced", "lock"
# In the order of removal: the journal tells the most, so it goes last.
_OWN_NAMES = (_SHARDS, _REPLACED, DIGESTS_NAME, NEW_JOURNAL_NAME, JOURNAL_NAME, _LOCK)

log = logging.getLogger(__name__)


class PartialFolder:
    """The working folder of one conversion, locked against others; `OUT` appears when the context ends well.

    If it ends with an exception, the folder is kept where a finished tar is in it, and removed otherwise.

    Args:
        out: Final place. Where it is a link, the place that this leads to, which may be on another disk.
        overwrite: Replace a shard folder that exists there.

    Raises:
        InputError: `out` does not end in a name.

    Attributes:
        path: The working folder.
        shards: Where the files of the shard folder are written.
        journal: What is finished.
        published: An earlier run was killed after it had published this conversion, before it had tidied up.
        resumable: `begin` has accepted the conversion, so the same command can go on.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out = _final_place(out)
        self.overwrite = overwrite
        self.path = _beside(self.out)
        self.shards = self.path / _SHARDS
        self.journal: Journal
        self.published = False
        self.resumable = False
        self._handle = -1

    def __enter__(self) -> "PartialFolder":
        """Create or take over the folder.

        Raises:
            DataError: Something is in the way, or another process is at work here.
        """
        if not os.path.exists(self.path):
            self._check_out()
        self._check_own()
        self._lock()
        try:
            self._recover()
            self.journal = Journal(self.path)
            self.published = self._is_published()
            if not self.published:
                self._check_out()
        except BaseException:
            if not (self.path / JOURNAL_NAME).exists():
                self._remove()
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if not self.published:
                    self._publish()
                self._remove()
            elif not self.journal.tars:
                self._remove()
        finally:
            self._unlock()

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Say which conversion this is: go on with what is here, or start anew.

        Args:
            fingerprint: What decides the bytes (`gcahng.data.conversion.fingerprint`).

        Raises:
            DataError: The folder holds another conversion.
        """
        journal = self.journal
        # A command that has --overwrite continues what the same command began, and no other.
        same_command = journal.overwrite or not self.overwrite
        if journal.fingerprint != fingerprint or not same_command:
            if journal.fingerprint is not None and journal.tars and not (self.overwrite or self.published):
                raise DataError(
                    f"{self.path} holds another conversion, of which {journal.num_samples} images are done: expected "
                    f"the same source and options, got {differences(journal.fingerprint, fingerprint)}. Repeat the "
                    "earlier command to continue, or pass --overwrite to start anew, or give another --out."
                )
            self.published = False
            journal.start(fingerprint, self.overwrite)
            self._check_out()
        self.resumable = True
        if not self.published:
            with disk_errors(self.path):
                self.shards.mkdir(exist_ok=True)

    def keep(self, count: int) -> None:
        """Forget all but the first `count` finished tars and delete every other file among the shards."""
        self.journal.keep(count)
        names = {name for tar in self.journal.tars for name in (tar.shard.name, tar.shard.index_name)}
        for path in self.shards.iterdir():
            if path.name not in names:
                _delete(path)

    def advice(self) -> str:
        """What to say after an error: how to go on, if there is something to go on with."""
        if not self.resumable or not self.journal.tars:
            return ""
        journal = self.journal
        return (
            f"{self.path} keeps what is finished ({len(journal.tars)} tars, {journal.num_samples} images): the same "
            "command continues there."
        )

    def _publish(self) -> None:
        self._check_out()
        with disk_errors(self.path):
            manifest = (self.shards / MANIFEST_NAME).read_bytes()
            self.journal.complete(hashlib.sha256(manifest).hexdigest())
            if self.out.exists():
                _delete(self.path / _REPLACED)
                self.out.rename(self.path / _REPLACED)
            self.shards.rename(self.out)
            sync(self.out.parent)

    def _is_published(self) -> bool:
        wanted = self.journal.manifest_sha256
        if not wanted or self.shards.exists():
            return False
        try:
            return hashlib.sha256((self.out / MANIFEST_NAME).read_bytes()).hexdigest() == wanted
        except OSError:
            return False

    def _recover(self) -> None:
        """Undo half of a replacement: killed between its two renames."""
        replaced = self.path / _REPLACED
        if replaced.exists() and not self.out.exists():
            replaced.rename(self.out)
            sync(self.out.parent)

    def _check_out(self) -> None:
        if os.path.ismount(self.out):
            raise DataError(
                f"{self.out} is where a disk is mounted, which cannot be replaced. Give a folder inside of it."
            )
        if os.path.islink(self.out):
            raise DataError(f"{self.out} is a link that leads back to itself. Delete it, or give another --out.")
        if not os.path.exists(self.out) or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not self.overwrite:
            raise DataError(f"{self.out} exists already. Give another --out, or pass --overwrite to replace it.")
        if not (self.out / MANIFEST_NAME).is_file():
            raise DataError(
                f"{self.out} exists and is not a shard folder (it has no {MANIFEST_NAME}), so "
                "--overwrite does not delete it. Give another --out or delete it yourself."
            )

    def _check_own(self) -> None:
        try:
            foreign = sorted(set(os.listdir(self.path)) - set(_OWN_NAMES))
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"Cannot use {self.path} ({error.strerror}). Give another --out.") from None
        if foreign:
            raise DataError(
                f"{self.path} is in the way: expected no such folder or that of a killed conversion, got one with "
                f"{', '.join(foreign[:5])}. Move or delete it, or give another --out."
            )

    def _lock(self) -> None:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # removed since by another conversion, which has ended
                continue
            except OSError as error:
                raise DataError(f"Cannot create {self.path} ({error.strerror}). Give another --out.") from None
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self._handle, 20).decode(errors="replace").strip() or "unknown"
                self._unlock()
                raise DataError(
                    f"Another conversion is writing to {self.path} (process {holder}). Wait until it has ended, or "
                    "give another --out."
                ) from None
            except OSError as error:
                log.warning("%s cannot be locked (%s): start no other conversion there.", self.path, error.strerror)
            if self._lock_is_in_place():
                with suppress(OSError):  # a full disk; the number only helps a message
                    os.ftruncate(self._handle, 0)
                    os.write(self._handle, str(os.getpid()).encode())
                return
            self._unlock()

    def _lock_is_in_place(self) -> bool:
        """Whether the file that was locked is still the one that others see."""
        try:
            return os.path.samestat(os.stat(self.path / _LOCK), os.fstat(self._handle))
        except FileNotFoundError:
            return False

    def _unlock(self) -> None:
        os.close(self._handle)  # which releases the lock
        self._handle = -1

    def _remove(self) -> None:
        try:
            for name in _OWN_NAMES:
                _delete(self.path / name)
            self.path.rmdir()
        except OSError as error:
            log.warning("%s cannot be removed (%s): delete it.", self.path, error.strerror)


def _final_place(out: Path | str) -> Path:
    path = Path(out)
    if path.name in ("", ".."):
        raise InputError(f"`out` must end in the name of the folder to create, got {str(out)!r}.")
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _beside(out: Path) -> Path:
    """The working folder of a conversion to `out`."""
    return out.with_name(out.name + ".partial")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def stopped_message(out: Path | str) -> str:
    """What to tell a user who stopped a conversion to `out`."""
    path = _beside(_final_place(out))
    tars = Journal(path).tars
    if not tars:
        return "stopped: nothing was written"
    images = sum(tar.shard.num_samples for tar in tars)
    return f"stopped: {path} keeps {len(tars)} finished tars ({images} images); the same command continues there"
