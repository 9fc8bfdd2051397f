"""Where the files of a model are: a directory on this machine (`Folder`), or a repo (`continual.hub.repo`). Everything
that reads a model sees a `Place`. What the files say is for other modules. A place can be pickled: another process that
unpickles it reads the same model, with the rights of its own machine.

Every kind of place passes tests/unit/tensors/test_place_contract.py.

`Weights` are its weight files, open for reading by position; everything small is read whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from continual.errors import Refuse, Retry
from continual.outside import VALUES, shown
from continual.records import FileStat
from continual.tensors.checkpoints import header
from continual.tensors.checkpoints.files import Files, reading, small_file

RELEASE = "continual.json"
"""The file that says that a model is an export of ours, and of which state."""
MOST_FILES = 100_000
"""Files in a model's directory that are looked at."""
_DEEPEST = 8
_PIECE = 4 << 20
"""Bytes of a file that are hashed at a time."""
MANIFESTS = ("modules.json", "model_index.json")
"""Files that say which folders make a model: of sentence-transformers, and of a pipeline of diffusers (`compound`)."""


class Weights(Protocol):
    """Open files of one model. Thread-safe. `stats` says what they were when they were opened."""

    stats: tuple[FileStat, ...]

    def pread(self, file: int, length: int, offset: int) -> bytes:
        """`length` bytes at `offset`. Raises Retry where they cannot be had now, Refuse where they never will be."""
        ...

    def preadv(self, file: int, into: memoryview, offset: int) -> None:
        """Fills `into` from `offset`; raises as `pread`."""
        ...

    def expect(self, extents: Sequence[tuple[int, int, int]]) -> None:
        """Says what will be read, as (file, first byte, bytes) in this order, so that it can be fetched ahead; nothing
        is fetched yet."""
        ...

    def will_need(self, file: int, offset: int, length: int) -> None:
        """Says that this part comes next."""
        ...

    def look_again(self, file: int) -> None:
        """What was read of a file's beginning will be refused. Raises Retry where that was not the file's."""
        ...

    def check_unchanged(self) -> None:
        """Raises Retry naming a file that is not what it was when it was opened."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


class Place(Protocol):
    """Where a model is. Its files are named by their paths in it: `config.json`, `2_Dense/model.safetensors`. What is
    no such path is refused (`outside`).

    `name`: the model's, for people. `origin`: the string that records keep of where it is, without the state of its
    files. `source`: who saw it. `only`: the name of the one weight file that is meant, where a file was named.
    """

    name: str
    origin: str
    source: str

    @property
    def only(self) -> str | None: ...

    @property
    def settled_key(self) -> str | None:
        """The candidate's key where it is known before any file is opened."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit of a repo, where it is known."""
        ...

    @property
    def licence(self) -> str | None:
        """The licence that its card names, if there is one."""
        ...

    def __str__(self) -> str:
        """How messages name it."""
        ...

    def file(self, name: str) -> str:
        """How messages name a file of it."""
        ...

    def must_be_there(self) -> None:
        """Raises Refuse (`gone`) if the model is not there any more, Retry if that cannot be told now."""
        ...

    def names(self, folder: str = "") -> frozenset[str]:
        """Names of the files at its top level, or in one of its folders, dangling links included; none where there is
        no such folder. Raises Retry, and Refuse (`outside`) for a folder that is none of its own."""
        ...

    def present(self, name: str) -> bool:
        """Whether the file can be opened."""
        ...

    def small(self, name: str) -> bytes:
        """The contents of a configuration file. Raises Refuse if it is too large or of a kind that is not read, Retry
        if it cannot be read now."""
        ...

    def open(self, names: Sequence[str]) -> Weights:
        """Opens weight files. Raises Refuse or Retry naming the file."""
        ...

    def files(self) -> frozenset[str]:
        """The paths of all files in it, in all its folders. Raises Refuse (`index`) where there are more than any model
        has, Retry."""
        ...

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file, in hexadecimal: of its bytes, or as the Hub says it, which is compared with them when
        they are read. Raises Refuse and Retry naming the file."""
        ...

    def look(self) -> tuple[FileStat, ...]:
        """Its files in the order of their names, as far as they can be seen. They make the key of a model whose headers
        cannot be read."""
        ...

    def key(self, files: Sequence[FileStat]) -> str:
        """The candidate's key: it differs from that of every other model, and from that of this one with other
        files."""
        ...


class Folder:
    """A model directory, or one safetensors file. `root` is the watched folder its files must lie in, None for a path
    given by hand. Of a watched one a small file is what it was when it was read first, so that what is asked of it
    later (a signature) is asked of what is used: whoever publishes there could exchange it in between."""

    def __init__(self, path: Path, root: Path | None = None, source: str = "hand") -> None:
        self.path = path
        self.root = root
        self.source = source
        self._read: dict[str, str] = {}  # the SHA-256 of small files
        self.name = path.name
        self.origin = str(path.absolute())

    def __getstate__(self) -> dict[str, object]:
        """For another process, whose working directory is another."""
        return {**self.__dict__, "path": self.path.absolute(), "root": self.root and self.root.absolute()}

    @property
    def only(self) -> str | None:
        """The file's name where `path` is one."""
        return self.path.name if os.path.isfile(self.path) else None

    @property
    def settled_key(self) -> None:
        """Not known: it depends on the files."""

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self.path if os.path.isdir(self.path) else self.path.parent

    @property
    def revision(self) -> None:
        """None: a directory has no commits."""

    @property
    def licence(self) -> None:
        """None: no card is read."""

    def __str__(self) -> str:
        return str(self.path)

    def file(self, name: str) -> str:
        """Its path."""
        return str(self.directory / name)

    def must_be_there(self) -> None:
        """Raises Refuse (`gone`) if the path is gone, Retry if the folder it was in cannot be reached."""
        if not os.path.isdir(self.path.parent):
            raise Retry(f"{self.name}: the folder {self.path.parent} cannot be reached; nothing was settled")
        if not _there(self.path):
            raise Refuse("gone", f"{self.name}: {self.path} is not there any more")

    def names(self, folder: str = "") -> frozenset[str]:
        """Names in the directory, or in a folder in it. Raises Retry if it cannot be read now, Refuse (`index`) if it
        holds more files than any model has, Refuse (`outside`)."""
        if not _there(self.path):
            raise Retry(f"{self.path}: is gone, or never was; nothing was settled")
        directory = self._at(folder) if folder else self.directory
        if folder and not os.path.isdir(directory):
            return frozenset()
        with reading(directory), os.scandir(directory) as entries:
            found = frozenset(entry.name for entry in itertools.islice(entries, MOST_FILES + 1))
        if len(found) > MOST_FILES:
            raise Refuse("index", f"{self.path}: holds more than {MOST_FILES} files, which no model has")
        return found

    def present(self, name: str) -> bool:
        """Whether a link to it leads anywhere."""
        return _there(self._at(name))

    def small(self, name: str) -> bytes:
        """At most 64 MiB, of a regular file within `root`. Raises Retry, too, where it was another before."""
        found = small_file(self._at(name), self.root)
        if self.root is not None:
            digest = hashlib.sha256(found).hexdigest()
            if self._read.setdefault(name, digest) != digest:
                raise Retry(f"{self.file(name)}: was exchanged while the model was read; nothing was settled")
        return found

    def open(self, names: Sequence[str]) -> Weights:
        """Opens them. Raises Refuse if one is no regular file or lies outside `root`, Retry if one cannot be opened."""
        return Files([self._at(name) for name in names], self.root, names)

    def files(self) -> frozenset[str]:
        """All that is no folder, links included, and what was read; links to folders are not followed. Raises Retry,
        and Refuse (`index`) for more files, or deeper folders, than any model has."""
        found = set(self._read)
        with reading(self.directory):
            for root, folders, names in os.walk(self.directory, onerror=_raised):
                inner = Path(root).relative_to(self.directory)
                links = {folder for folder in folders if os.path.islink(os.path.join(root, folder))}
                found |= {(inner / name).as_posix() for name in (*names, *links)}
                if len(found) > MOST_FILES or len(inner.parts) >= _DEEPEST:
                    raise Refuse("index", f"{self.path}: holds more files, or deeper folders, than any model has")
        return frozenset(found)

    def sha256(self, name: str) -> str:
        """Reads the file, which has to be a regular one within `root`, unless it was read whole before."""
        if name in self._read:
            return self._read[name]
        weights, digest, at = self.open([name]), hashlib.sha256(), 0
        try:
            size = weights.stats[0].size
            buffer = memoryview(bytearray(min(_PIECE, size)))
            while at < size:
                part = buffer[: min(len(buffer), size - at)]
                weights.preadv(0, part, at)
                digest.update(part)
                at += len(part)
            weights.check_unchanged()
        finally:
            weights.close()
        return digest.hexdigest()

    def look(self) -> tuple[FileStat, ...]:
        """Every file and link in the directory, and in the folders of a model in parts, as far as they can be read."""
        listed = [self.path]
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            listed = sorted(self.path / entry.name for entry in itertools.islice(entries, MOST_FILES))
        if any(file.name in MANIFESTS for file in listed):
            listed += [inner for folder in listed if not folder.is_symlink() for inner in _inside(folder)]
        found = []
        for file in listed[:MOST_FILES]:
            with contextlib.suppress(OSError):
                seen = file.lstat()
                if os.path.isfile(file) or stat.S_ISLNK(seen.st_mode):
                    name = file.relative_to(self.path).as_posix() if file != self.path else file.name
                    found.append(FileStat(name, seen.st_size, seen.st_mtime_ns, seen.st_ino))
        return tuple(found)

    def _at(self, name: str) -> Path:
        """The path of a file of it. Raises Refuse (`outside`) for what is no path in it."""
        if not is_within(name):
            raise Refuse("outside", f"{self.path}: {shown(name)} is no path of a file in it")
        return self.directory / name

    def key(self, files: Sequence[FileStat]) -> str:
        """A hash of the path and of name, size, time and inode of every file."""
        return key_of(self.origin, files)


def is_within(name: str) -> bool:
    """Whether a path that others wrote stays within the folder that it is relative to: no `..`, not absolute, at most a
    few folders deep."""
    parts = name.split("/")
    return len(parts) <= _DEEPEST and all(part not in ("", ".", "..") and "\0" not in part for part in parts)


def _inside(folder: Path) -> list[Path]:
    """The files in a folder, in order, as far as it can be listed."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in itertools.islice(entries, MOST_FILES))
    return []


def key_of(origin: str, files: Sequence[FileStat]) -> str:
    """The key of the candidate that these files of the directory `origin` are."""
    named = "".join(f"\0{file.name}\0{file.size}\0{file.mtime_ns}\0{file.inode}" for file in files)
    seen = hashlib.sha256((origin + named).encode("utf-8", "surrogateescape"))
    return f"folder:{seen.hexdigest()}"


def _raised(error: OSError) -> None:
    raise error  # what is passed over would not be known of


def _there(path: Path) -> bool:
    """Whether a path leads anywhere. It does where that cannot be told: whoever opens it then hears why it cannot be
    opened."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return True


def place_of(where: Path | Place, root: Path | None = None) -> Place:
    """The place of a path; a place is returned as it is."""
    return Folder(where, root) if isinstance(where, Path) else where


def read_json(place: Place, name: str, reason: str = "config", *, values: int = VALUES) -> dict[str, object]:
    """A small JSON object of at most `values` values. Raises Refuse(reason) if the file is none, Retry if it cannot be
    read now."""
    return header.json_object(place.small(name), place.file(name), reason, values=values)


def release_of(place: Place) -> Mapping[str, object] | None:
    """The contents of the `continual.json` beside a model, None where there is none or it is no JSON object of ours.
    Raises Retry if it cannot be read now."""
    if not place.present(RELEASE):
        return None
    try:
        body = header.json_object(place.small(RELEASE), place.file(RELEASE), "config")
    except Refuse:
        return None
    return body if "state" in body else None
