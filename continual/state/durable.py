"""The one writer: every write that must survive a power cut goes through here. No knowledge of what is written.

The order is always: write, fsync the file, make its name appear in one step (rename or link), fsync the directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from continual.errors import Halt, Misconfigured, Retry
from continual.timing.clock import stage

_HINTS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied: run as the user that owns it",
    errno.EPERM: "permission denied: run as the user that owns it",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine: close some, or raise its limit",
    errno.ENAMETOOLONG: "the path is too long: use a shorter one",
    errno.ELOOP: "a symbolic link leads to itself: remove it",
    errno.EIO: "the disk cannot read or write it (input/output error): check the disk",
}
_GIVEN = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EINVAL,
}
"""What is wrong with a path that somebody gave: it stays wrong until that person does something."""
_SYNCING = 4
"""Threads that sync: a disk takes several at a time."""


def trouble(error: OSError) -> str:
    """An OSError in words: the path, what is wrong with it, and what to do."""
    said = error.strerror or str(error)
    by_itself = "://" in str(error.filename)  # an object store says what is wrong
    hint = said if by_itself else _HINTS.get(error.errno or 0, said)
    return f"{os.fsdecode(error.filename)}: {hint}" if isinstance(error.filename, str | bytes) else hint


@contextlib.contextmanager
def environment(what: str, then: str = "nothing was settled") -> Iterator[None]:
    """Turns an OSError into Retry that says what was being done, to which path, and what to do about it; `then` is what
    the reader may rely on afterwards."""
    try:
        yield
    except OSError as error:
        raise Retry(f"{what}: {trouble(error)}; {then}") from error


@contextlib.contextmanager
def usable(what: str) -> Iterator[None]:
    """Turns an OSError about a path that a user gave into Misconfigured, where only another path or permission helps;
    any other into Retry, as `environment` does."""
    with environment(what):
        try:
            yield
        except OSError as error:
            if error.errno not in _GIVEN:
                raise
            raise Misconfigured(f"{what}: {trouble(error)}") from error


def sync_file(path: str | Path) -> None:
    """fsync of a file or directory. Raises Halt if it fails: what reached the disk is then unknown."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_open(fd, path)
    finally:
        os.close(fd)


def sync_open(fd: int, path: str | Path) -> None:
    """fsync of the open file or directory `path`. Raises Halt if it fails."""
    try:
        with stage("fsync"):
            os.fsync(fd)
    except OSError as error:
        raise Halt(
            f"fsync of {path} failed ({error.strerror}): what reached the disk is unknown; "
            "check the disk, then start again"
        ) from error


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[int]:
    """A descriptor of `directory`, to be synced after something that must not be left half-way: nothing can then keep
    it from being opened."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def write_bytes(path: str | Path, *parts: bytes | memoryview) -> None:
    """A new file with `parts` as its contents, not yet synced. Raises FileExistsError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for part in parts:
            write_all(fd, memoryview(part))
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of `data` (a view of single bytes), however little a write takes."""
    view = memoryview(data)
    with stage("write", len(view)):
        while view:
            view = view[os.write(fd, view) :]


def write_temporary(path: Path, data: bytes) -> Path:
    """A synced file with `data` beside `path` under a temporary name, which is returned."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_bytes(temporary, data)
        sync_file(temporary)
    except BaseException:
        discard(temporary)
        raise
    return temporary


def discard(temporary: Path) -> None:
    """Removes a temporary file. One that cannot be removed now goes when the state is next opened for writing."""
    with contextlib.suppress(OSError):
        temporary.unlink()


def replace_bytes(path: Path, data: bytes) -> None:
    """Makes `path` hold `data`: the old contents or the new, never anything between."""
    _renamed(write_temporary(path, data), path)


def link_new(path: Path, temporary: Path) -> None:
    """Gives the synced file `temporary` the name `path`, which must be free. Raises Retry if another writer took it,
    OSError only where the file did not get the name."""
    try:
        os.link(temporary, path)
    except OSError as error:
        # an error may be told of a link that was made: NFS does so where the answer was lost and the call repeated
        if not _same(temporary, path):
            if isinstance(error, FileExistsError):
                raise Retry(f"{path}: another writer was first; nothing was settled") from None
            raise
    finally:
        discard(temporary)


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except OSError:
        return False


def _renamed(temporary: Path, path: Path) -> None:
    with opened(path.parent) as directory:
        try:
            os.rename(temporary, path)
        except BaseException:
            discard(temporary)
            raise
        sync_open(directory, path.parent)


def move_away(path: Path, target: Path) -> None:
    """Gives `path` another name in the same directory, durably."""
    with opened(path.parent) as directory:
        os.rename(path, target)
        sync_open(directory, path.parent)


def replace_link(path: Path, target: Path) -> None:
    """Points the symbolic link `path` at `target` (relative where they are neighbours), in one step."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    os.symlink(target.name if target.parent == path.parent else target, temporary)
    _renamed(temporary, path)


def link_tree(source: Path, target: Path) -> bool:
    """Makes `target` a directory of hard links to the files below `source`; False, and nothing is left, where they
    cannot be had or lie on another disk."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def sync_all(paths: Sequence[str | Path]) -> None:
    """fsync of all of these files or directories, on a few threads. Raises OSError, and Halt if an fsync failed."""

    def some(first: int) -> None:
        for path in paths[first::_SYNCING]:
            sync_file(path)

    with stage("fsync"), ThreadPoolExecutor(_SYNCING, "fsync") as pool:
        list(pool.map(some, range(min(_SYNCING, len(paths)))))


def sync_tree(directory: Path, between: Callable[[], None] | None = None) -> None:
    """fsync of every file below `directory`, then of every directory, innermost first; `between` is called between the
    two."""
    files: list[str] = []
    directories: list[str] = []

    def not_listed(error: OSError) -> None:
        raise error  # what is passed over would not be synced

    for root, _, names in os.walk(directory, onerror=not_listed):
        directories.append(root)
        files.extend(os.path.join(root, name) for name in names)
    sync_all(files)
    if between is not None:
        between()
    levels = [path.count(os.sep) for path in directories]
    for depth in sorted(set(levels), reverse=True):  # a directory only after all that is in it
        sync_all([path for path, level in zip(directories, levels, strict=True) if level == depth])


def remove_tree(directory: str | Path) -> None:
    """Deletes a directory with all that is in it; a symbolic link goes, and not what it points at. Raises OSError. For
    directories of many small files: `shutil.rmtree` takes three times as long."""
    if os.path.islink(directory):
        os.unlink(directory)
        return
    with os.scandir(directory) as listed:
        entries = list(listed)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(directory)


def publish_dir(temporary: Path, final: Path) -> None:
    """Syncs the directory `temporary` and gives it the name `final`, which must be free. Raises Misconfigured if it is
    not."""
    sync_tree(temporary)
    if final.exists() or final.is_symlink():
        raise Misconfigured(f"{final} exists")
    with opened(final.parent) as directory:
        try:
            os.rename(temporary, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise Misconfigured(f"{final} exists") from None  # another process was first
        sync_open(directory, final.parent)
