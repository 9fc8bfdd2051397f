"""One bucket of an object store, by keys: put, create (If-None-Match), get with a range, list, delete, copy.

Whatever goes wrong is an OSError, as from a disk: FileNotFoundError and FileExistsError mean what they say,
PermissionError that the store refuses it, EINVAL that the bucket is not there, and any other that the store could not
be asked, or did not answer, so that what became of the request is unknown. Requests that fail so are repeated for some
seconds first.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from continual.errors import Misconfigured
from continual.timing.clock import stage

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

SCHEMES = ("s3://", "gs://", "az://")
LEASE = 60.0
"""Seconds for which a writer or a reader that is not heard of any more keeps what it holds."""
_MANY = 1000
"""Keys that are deleted by one request."""
_RETRIES = {True: (60, 6), False: (8, 3)}
"""Seconds of a request, and how often it is repeated within them."""
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_ASKED = ("/latest/api/token", "/latest/meta-data/", "/computeMetadata/", "/metadata/identity/")
"""What is asked of the machine where the environment has no credentials: paths in AWS, in Google's cloud, in Azure."""
_REFUSED = ("403 Forbidden", "401 Unauthorized", "AccessDenied", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")
"""What an answer has where the credentials will not do; Amazon says of those that ran out that the request is bad."""
_SECRET = re.compile(r"(?<=//)[^/\s@]*@|(?<=[^\s<])\?[^\s)]*")
"""What an address may have that nobody is to see: a password before the host, a signature after the path."""


class Listed(NamedTuple):
    """An object: its path below what was listed, its bytes, and when it was last written, by the store's clock."""

    name: str
    nbytes: int
    modified: datetime


class Objects:
    """The bucket at `url` (`s3://BUCKET`). From any thread. `lease` is in seconds."""

    def __init__(self, url: str, lease: float = LEASE) -> None:
        self.url = url
        self.lease = lease

    def __getstate__(self) -> dict[str, object]:
        """For another process: that has an environment of its own, and no secret travels."""
        return {"url": self.url, "lease": self.lease}

    def __repr__(self) -> str:
        return f"Objects({self.url!r})"

    @functools.cached_property
    def store(self) -> ObjectStore:
        """As obstore has it. Raises Misconfigured where that is not installed, or cannot use what the environment says
        (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …)."""
        return _opened(self.url, patient=True)

    @functools.cached_property
    def _quick(self) -> ObjectStore:
        """The same for what is small and soon worthless: who waits longer for it has lost its lease."""
        return _opened(self.url, patient=False)

    def put(self, key: str, data: bytes | bytearray) -> None:
        """Has the object hold `data`, whether it was there or not. Raises OSError."""
        import obstore

        with self._told(key), stage("write", len(data)):
            obstore.put(self.store, key, data, use_multipart=False)

    def put_now(self, key: str, data: bytes) -> None:
        """The same of a few bytes, which must not take long."""
        import obstore

        with self._told(key):
            obstore.put(self._quick, key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> None:
        """Makes the object, of a few bytes. Raises FileExistsError where there is one, which may be this very one where
        the answer to an earlier try was lost; OSError where that is unknown."""
        import obstore

        with self._told(key):
            obstore.put(self._quick, key, data, mode="create", use_multipart=False)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> tuple[memoryview, int]:
        """The bytes from `start` to before `stop`, or to the end, and how many the object has in all. What is there may
        be less. Raises OSError."""
        import obstore

        ranged = start or stop is not None
        asked = ({"offset": start} if stop is None else (start, stop)) if ranged else None
        try:
            with self._told(key), stage("read"):
                found = obstore.get(self.store, key, options={"range": asked} if asked else {})
                return memoryview(found.bytes()), found.meta["size"]
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise self._missing(key) or error from None
        except OSError:  # it may end before `start`: each kind of store says that in other words
            if not ranged or (nbytes := self.head(key).nbytes) > start:
                raise
            return memoryview(b""), nbytes

    def head(self, key: str) -> Listed:
        """What the store says of an object. Raises OSError."""
        import obstore

        try:
            with self._told(key):
                found = obstore.head(self._quick, key)
                return Listed(key.rpartition("/")[2], found["size"], found["last_modified"])
        except PermissionError as error:
            raise self._missing(key) or error from None

    def _missing(self, key: str) -> FileNotFoundError | None:
        """What is to be raised where there is no such object. Amazon says of one that it may not be read, to who may
        list what is below a prefix and no more: the listing says what is there. Raises OSError."""
        import obstore

        with self._told(key):
            for some in obstore.list(self.store, key.rpartition("/")[0] or None, offset=key[:-1]):
                for one in some:
                    if one["path"] >= key:
                        return None if one["path"] == key else _none(f"{self.url}/{key}")
        return _none(f"{self.url}/{key}")

    def below(self, key: str) -> Iterator[Listed]:
        """Every object whose key goes on after `key/`, by key. Raises OSError."""
        import obstore

        cut = len(key) + 1 if key else 0
        with self._told(key):
            for some in obstore.list(self.store, key or None):
                for one in some:
                    yield Listed(one["path"][cut:], one["size"], one["last_modified"])

    def children(self, key: str) -> list[str]:
        """What stands directly below `key/`: objects, and what other objects stand below. Raises OSError."""
        import obstore

        cut = len(key) + 1 if key else 0
        with self._told(key):
            found = obstore.list_with_delimiter(self.store, key or None)
        paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return sorted({path[cut:].rstrip("/") for path in paths} - {""})

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; one that is not there is no error. Raises OSError."""
        import obstore

        for first in range(0, len(keys), _MANY):
            some = list(keys[first : first + _MANY])
            try:
                with self._told(some[0]):
                    obstore.delete(self.store, some)
            except FileNotFoundError:  # some stores say so of the first that is not there, and leave what is behind it
                for key in some if len(some) > 1 else ():
                    with contextlib.suppress(FileNotFoundError), self._told(key):
                        obstore.delete(self.store, key)

    def copy(self, key: str, to: str) -> None:
        """Copies an object within the bucket: its bytes do not travel. Raises OSError."""
        import obstore

        with self._told(key):
            obstore.copy(self.store, key, to)

    @contextlib.contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """Says what the store says as an OSError that names the object."""
        from obstore import exceptions

        place = f"{self.url}/{key}"
        try:
            yield
        except FileNotFoundError:
            raise _none(place) from None
        except exceptions.AlreadyExistsError:
            raise FileExistsError(errno.EEXIST, "there is such an object", place) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise _refused(place, error) from None
        except (exceptions.BaseError, ValueError) as error:
            text = str(error)
            if "NoSuchBucket" in text or "ContainerNotFound" in text:
                raise OSError(errno.EINVAL, "there is no such bucket: make it first", place) from None
            if any(word in text for word in _ASKED):
                told = f"there are no credentials for it in the environment ({_first(error)})"
                raise PermissionError(errno.EACCES, told, place) from None
            if any(word in text for word in _REFUSED):
                raise _refused(place, error) from None
            raise OSError(errno.EREMOTEIO, _first(error), place) from None


def _none(place: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "there is no such object", place)


def _refused(place: str, error: Exception) -> PermissionError:
    told = f"the store refuses it: look at the credentials in the environment, and at the policy ({_first(error)})"
    return PermissionError(errno.EACCES, told, place)


def _first(error: Exception) -> str:
    """What obstore says, without its inner life."""
    return _SECRET.sub("", " ".join(str(error).partition("\nDebug source")[0].split()))[:300]


def _must_be_an_address(name: str, given: str | None) -> None:
    if not given:
        return
    try:
        address = urlsplit(given)
        good = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        good = False
    if not good or re.search(r"[\s<>\"{}|\\^`]", given):
        raise Misconfigured(f"{name}, in the environment, is no address: write https://HOST or http://HOST:PORT")


def _opened(url: str, *, patient: bool) -> ObjectStore:
    try:
        from obstore import exceptions
        from obstore.store import from_url
    except ImportError:
        raise Misconfigured(
            f"{url} is on an object store: install what reads it with pip install 'continual[s3]'"
        ) from None
    for name in _ENDPOINTS:
        _must_be_an_address(name, os.environ.get(name))
    seconds, retries = _RETRIES[patient]
    client: ClientConfig = {"timeout": f"{seconds}s", "connect_timeout": "5s"}
    if os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")).startswith("http://"):
        client["allow_http"] = True
    retry: RetryConfig = {"max_retries": retries, "retry_timeout": timedelta(seconds=seconds)}
    try:
        return from_url(url, client_options=client, retry_config=retry)
    except (exceptions.BaseError, ValueError) as error:
        raise Misconfigured(f"{url}: {_first(error)}") from None
