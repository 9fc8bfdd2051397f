"""A place on an object store, as `pathlib.Path` is one on a disk: what is asked of both is asked in the same words. A
directory is there as long as an object stands below it, and needs not be made."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from continual.errors import Misconfigured
from continual.stores.objects import SCHEMES, Objects

_SLASHES = re.compile("/+")
_NO_KEY = re.compile(r"[\\\x00-\x1f\x7f]")
_BUCKET = re.compile("[A-Za-z0-9](?:[A-Za-z0-9_-]|[.](?![.]))*[A-Za-z0-9]")
_LONGEST = 512
"""Bytes of a prefix: a store takes keys of 1,024, and a state needs up to 400 behind it."""
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")
"""What an address begins with, also one of which `Path` has made one slash of two."""


@functools.total_ordering
class ObjectPath:
    """The object with this key in a bucket, or what stands below it."""

    __slots__ = ("key", "objects")

    def __init__(self, objects: Objects, key: str) -> None:
        self.objects = objects
        self.key = _SLASHES.sub("/", key).strip("/")

    def __truediv__(self, name: str | Path) -> ObjectPath:
        return ObjectPath(self.objects, f"{self.key}/{name}")

    def __add__(self, text: str) -> ObjectPath:
        """The key goes on by this text."""
        return ObjectPath(self.objects, self.key + text)

    def __str__(self) -> str:
        return f"{self.objects.url}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """What the last part ends with, from its last dot on."""
        return Path(self.name).suffix

    @property
    def parent(self) -> ObjectPath:
        """What it stands directly below."""
        return ObjectPath(self.objects, self.key.rpartition("/")[0])

    @property
    def parents(self) -> tuple[ObjectPath, ...]:
        """All that it stands below, the nearest first."""
        parts = self.key.split("/")
        return tuple(ObjectPath(self.objects, "/".join(parts[:n])) for n in reversed(range(len(parts))))

    def with_name(self, name: str) -> ObjectPath:
        """What stands beside it under this name."""
        return self.parent / name

    def absolute(self) -> ObjectPath:
        """Itself."""
        return self

    resolve = absolute

    def is_relative_to(self, other: Path | ObjectPath) -> bool:
        """Whether it is, or stands below, the other."""
        return isinstance(other, ObjectPath) and (other == self or other in self.parents)

    def exists(self) -> bool:
        """Whether the object is there, or one below it. Raises OSError."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether the object is there. Raises OSError."""
        try:
            self.objects.head(self.key)
        except FileNotFoundError:
            return False
        return True

    def is_socket(self) -> bool:
        """No."""
        return False

    def is_dir(self) -> bool:
        """Whether any object stands below. Raises OSError."""
        return next(self.objects.below(self.key), None) is not None

    def iterdir(self) -> Iterator[ObjectPath]:
        """What stands directly below. Raises OSError."""
        for name in self.objects.children(self.key):
            yield self / name

    def read_bytes(self) -> bytes:
        """All of the object. Raises OSError."""
        return bytes(self.objects.get(self.key)[0])

    def unlink(self, missing_ok: bool = True) -> None:
        """Deletes the object; where there is none nothing happens. Raises OSError."""
        assert missing_ok, "a store does not say whether there was one"
        self.objects.delete([self.key])

    def mkdir(self, *, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: there are no directories."""


Where: TypeAlias = Path | ObjectPath
"""A place on a disk or on an object store."""


def here(place: Where) -> Path:
    """The directory on this machine of what belongs to a state and is no part of it: the socket of its daemon, what is
    on its way to the Hub. It is the state's own, or of one on an object store one below that for temporary files, for
    this user alone. Raises OSError."""
    if isinstance(place, Path):
        return place
    user = Path(tempfile.gettempdir()) / f"continual-{os.geteuid()}"
    user.mkdir(mode=0o700, exist_ok=True)
    told = user.lstat()
    if not stat.S_ISDIR(told.st_mode) or told.st_uid != os.geteuid() or told.st_mode & 0o077:
        raise PermissionError(errno.EACCES, "is not a directory of this user alone", str(user))
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    found = user / hashlib.sha256(f"{endpoint} {place}".encode()).hexdigest()[:16]
    found.mkdir(mode=0o700, exist_ok=True)
    return found


def where(text: str | Path | ObjectPath, lease: float | None = None) -> Where:
    """The place that a text names: `s3://BUCKET/PREFIX`, `gs://…`, `az://…`, or a path. Raises Misconfigured for one
    without bucket or prefix."""
    if isinstance(text, ObjectPath):
        return text
    if not isinstance(text, str) or not text.startswith(SCHEMES):
        if _ADDRESS.match(str(text)):
            raise Misconfigured(
                f"{text}: write a directory, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX"
            )
        return Path(text)
    scheme, _, rest = text.partition("://")
    bucket, _, prefix = rest.partition("/")
    if bucket and not _BUCKET.fullmatch(bucket):
        told = bucket.rpartition("@")[2]  # credentials may stand before it
        raise Misconfigured(
            f"{scheme}://{told}/…: {told!r} is no name of a bucket, which has letters, digits, '-', '.' and '_' alone; "
            "where the store answers, and credentials, are read from the environment (AWS_ENDPOINT_URL, …)"
        )
    if not bucket or not prefix.strip("/"):
        raise Misconfigured(f"{text}: write {scheme}://BUCKET/PREFIX: a state needs a prefix of its own")
    if {".", ".."} & set(prefix.split("/")) or _NO_KEY.search(text):
        raise Misconfigured(f"{text!r}: use no part '.' or '..', no backslash and no control character")
    if len(prefix.encode("utf-8", "surrogatepass")) > _LONGEST:
        raise Misconfigured(f"{text[:60]}…: a prefix has at most {_LONGEST} bytes: a store takes no longer keys")
    found = Objects(f"{scheme}://{bucket}")
    return ObjectPath(found if lease is None else Objects(found.url, lease), prefix)


def on_disk(path: Path) -> Path:
    """The path itself. Raises Misconfigured where it is an address: that is no file or directory of this machine."""
    if _ADDRESS.match(str(path)):
        raise Misconfigured(f"{path}: this has to be a file or a directory on this machine, and no address")
    return path
