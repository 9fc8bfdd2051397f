"""The contract of what a state lies on, asked of a disk and of two object stores."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from continual.errors import Misconfigured, Retry
from continual.state import storing
from continual.stores import ObjectPath, Where, on_disk, where
from tests.helpers import object_stores

pytestmark = pytest.mark.slow


@pytest.fixture(params=["disk", "moto", "seaweedfs"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Where:
    if request.param == "disk":
        return tmp_path
    return object_stores.state_at(request.getfixturevalue(request.param), f"contract/{tmp_path.name}", monkeypatch)


def create(path: Where, data: bytes) -> None:
    with storing.creating(path, data, lambda _step: None) as new:
        new.make()
        new.sync()


def test_put_takes_the_place_of_what_was_there(root: Where) -> None:
    for data in (b"one", b"", b"three" * 1000):
        storing.replace(root / "HEAD", data)
        assert storing.contents(root / "HEAD") == (root / "HEAD").read_bytes() == data
        assert storing.size(storing.below(storing.stem(root), "HEAD")) == len(data)
    with pytest.raises(FileNotFoundError):
        storing.contents(root / "head")


def test_create_takes_no_name_that_is_taken(root: Where) -> None:
    storing.made(root / "commits")
    create(root / "commits/1", b"first")
    with pytest.raises(Retry, match="another writer was first"):
        create(root / "commits/1", b"second")
    assert storing.contents(root / "commits/1") == b"first"
    assert storing.names(root / "commits") == ["1"]


def test_of_sixteen_who_create_one_wins(root: Where) -> None:
    storing.made(root / "commits")
    for turn in range(2):
        ready = threading.Barrier(16)
        file = root / f"commits/{turn}"

        def race(number: int, file: Where = file, ready: threading.Barrier = ready) -> bytes | None:
            ready.wait()
            try:
                create(file, b"%d" % number)
            except Retry:
                return None
            return b"%d" % number

        with ThreadPoolExecutor(16) as pool:
            won = [found for found in pool.map(race, range(16)) if found is not None]
        assert won == [storing.contents(file)]


def test_a_range_is_read_and_no_more(root: Where) -> None:
    storing.replace(root / "x", bytes(range(100)))
    assert storing.some(root / "x", 10, 20) == bytes(range(10, 20))
    assert storing.some(root / "x", 90, 200) == bytes(range(90, 100))
    storing.replace(root / "empty", b"")
    assert storing.some(root / "empty", 0, 10) == storing.contents(root / "empty") == b""
    assert storing.some(root / "x", 100, 200) == storing.some(root / "x", 300, 400) == b""


def test_what_is_below_is_listed(root: Where) -> None:
    names = ["a/%2Fx", "a/.hidden", "a/c.0.0", "a/é", "ab", "b/c/d"]
    for name in names:
        storing.made((root / name).parent)
        storing.replace(root / name, name.encode())
    assert storing.names(root) == ["a", "ab", "b"]
    assert storing.names(root / "a") == sorted(name[2:] for name in names[:4])
    assert storing.names(root / "nothing") == storing.names(root / "ab") == []
    assert storing.sizes(root) == {name: len(name.encode()) for name in names}
    assert storing.sizes(root / "b") == {"c/d": 5}
    found = {entry.name: (entry.exists(), entry.is_file(), entry.is_dir()) for entry in root.iterdir()}
    assert found == {"a": (True, False, True), "ab": (True, True, False), "b": (True, False, True)}


def test_what_is_deleted_is_gone(root: Where) -> None:
    for name in ("a/b/c", "a/d", "ab"):
        storing.made((root / name).parent)
        storing.replace(root / name, b"x")
    storing.remove(root / "a/d")
    storing.remove(root / "a/d")
    assert storing.sizes(root) == {"a/b/c": 1, "ab": 1}
    storing.remove_tree(root / "a")
    assert storing.sizes(root) == {"ab": 1}
    storing.drop_tree(root / "a")
    storing.rename(root / "ab", root / "z")
    assert storing.sizes(root) == {"z": 1}


def test_a_file_taken_besides_outlives_the_one_before(root: Where) -> None:
    storing.replace(root / "x", b"values")
    at = storing.stem(root)
    storing.take(storing.below(at, "x"), storing.below(at, "y"))
    storing.remove(root / "x")
    assert storing.contents(root / "y") == b"values"
    with pytest.raises(FileNotFoundError):
        storing.take(storing.below(at, "x"), storing.below(at, "z"))


@pytest.mark.parametrize("nbytes", [0, 10, (4 << 20) + 7])
def test_a_chunk_is_read_in_pieces_as_it_was_written(root: Where, nbytes: int) -> None:
    data = bytes(i % 251 for i in range(1 << 12)) * (nbytes // (1 << 12) + 1)
    path = storing.below(storing.stem(root), "c.0")
    new = storing.new_chunk(path, nbytes + 6)
    new.write(data[:nbytes])
    new.skip(2)
    new.write(b"tail")
    new.finish()
    new.close()
    whole = data[:nbytes] + b"\0\0tail"
    for step in (3 if nbytes < 100 else 1 << 20, 5 << 20):
        file, found = storing.old_chunk(path), bytearray()
        assert file.nbytes == len(whole)
        while more := file.read_into(memoryview(bytearray(step))[: len(whole)], len(found)):
            piece = bytearray(step)
            assert file.read_into(memoryview(piece), len(found)) == more
            found += piece[:more]
        assert bytes(found) == whole
        assert file.read(4, len(whole) - 4) == b"tail"
        file.close()


@pytest.mark.parametrize("text", ["s3://", "s3://bucket", "s3://bucket/", "s3:///x"])
def test_a_state_needs_a_prefix_of_its_own(text: str) -> None:
    with pytest.raises(Misconfigured, match="a state needs a prefix of its own"):
        where(text)


@pytest.mark.parametrize(
    "bucket",
    ["bucket:80", "user:secret@bucket", "bucket?x", "bucket#f", "%2e%2e", "..", "a..b", "-", "bü", "a b"],
)
def test_what_is_no_name_of_a_bucket_is_no_second_name_of_one(bucket: str) -> None:
    """Else `s3://bucket:80/x` would be where `s3://bucket/x` is."""
    with pytest.raises(Misconfigured, match="is no name of a bucket, which has letters, digits") as told:
        where(f"s3://{bucket}/x")
    assert "secret" not in str(told.value)


def test_a_prefix_leaves_room_for_the_names_behind_it() -> None:
    assert where(f"s3://b-1.x_y/{'ä' * 256}")
    with pytest.raises(Misconfigured, match="a prefix has at most 512 bytes"):
        where(f"s3://bucket/{'ä' * 256}x")


@pytest.mark.parametrize("prefix", ["a/../c", "a/./c", "a\\b", "a\nb", "a\x7fb", "..", "a/."])
def test_a_prefix_that_not_every_store_takes_as_it_is_written_is_refused(prefix: str) -> None:
    with pytest.raises(Misconfigured, match=r"use no part '\.' or '\.\.', no backslash and no control character"):
        where(f"s3://bucket/{prefix}")


def test_a_prefix_may_have_other_odd_characters(root: Where) -> None:
    for odd in ("sp ace", "ü/日本", "a%41+b", "a#b?c*d&e=f", "~x{a}[b]", "a:b'c\"d,e;f", "@x|y^z`", ".hidden"):
        storing.made(root / odd)
        create(root / odd / "x", odd.encode())
        assert storing.sizes(root / odd) == {"x": len(odd.encode())}
        assert storing.contents(root / odd / "x") == odd.encode()


@pytest.mark.parametrize("text", ["s3a://bucket/x", "S3://bucket/x", "s3:/bucket/x", "http://127.0.0.1/x"])
def test_no_directory_has_the_name_of_an_address(text: str) -> None:
    for given in (text, Path(text)):
        with pytest.raises(Misconfigured, match="write a directory, or s3://BUCKET/PREFIX"):
            where(given)
    with pytest.raises(Misconfigured, match="a directory on this machine, and no address"):
        on_disk(Path(text))
    assert where("a:/x") == on_disk(Path("a:/x"))


@pytest.mark.parametrize("text", ["127.0.0.1:9000", "s3.example.org", "ftp://127.0.0.1", "http://", "http://a b", "h"])
def test_what_is_no_address_is_told_of_before_it_is_asked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = object_stores.state_at(text, "x", monkeypatch)
    with pytest.raises(Misconfigured, match="AWS_ENDPOINT_URL, in the environment, is no address: write https://HOST"):
        storing.names(at)


def test_a_password_in_an_address_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continual.stores.objects._RETRIES", {True: (1, 0), False: (1, 0)})
    at = object_stores.state_at("http://user:password@127.0.0.1:1", "x", monkeypatch)
    with pytest.raises(OSError, match=r"HEAD http://127.0.0.1:1/bucket/x in ") as told:
        at.is_file()
    assert "password" not in str(told.value)


class _RanOut(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


class _KeepsAll(_RanOut):
    """Of several objects that are to be deleted one is told to be kept, in an answer that says OK."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        error = b"<Error><Key>x/a</Key><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        body = b'<DeleteResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">' + error + b"</DeleteResult>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_what_is_not_there_keeps_nothing_else_from_being_deleted(tmp_path: Path) -> None:
    """Of these stores the one of a disk says what is not there, as Google's does."""
    store = pytest.importorskip("obstore.store")
    place = where("gs://bucket/x")
    assert isinstance(place, ObjectPath)
    place.objects.__dict__["store"] = store.LocalStore(tmp_path)
    names = [f"x/{number}" for number in range(40)]
    for name in names:
        place.objects.put(name, b"")
    place.objects.delete([names[0], "x/none", *names[1:], "x/none"])
    assert list(tmp_path.rglob("?/*")) == []
    place.objects.delete(["x/none"])


def test_what_may_not_be_deleted_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(_KeepsAll) as address:
        at = object_stores.state_at(address, "x", monkeypatch)
        with pytest.raises(PermissionError, match="the store refuses it"):
            storing.remove(at / "a")


class _Short(_RanOut):
    """An object of ten bytes, on a store with words of its own for a range that is not there."""

    def do_GET(self) -> None:
        self.send_response(400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in (("Content-Length", "10"), ("ETag", '"x"'), ("Last-Modified", formatdate(usegmt=True))):
            self.send_header(name, value)
        self.end_headers()


def test_what_ends_before_a_range_is_told_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(_Short) as address:
        at = object_stores.state_at(address, "x", monkeypatch)
        assert storing.some(at / "x", 10, 20) == b""
        for start in (0, 9):
            with pytest.raises(OSError, match="400 Bad Request"):
                storing.some(at / "x", start, 20)


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_credentials_that_ran_out_are_refused_and_settle_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(_RanOut) as address:
        at = object_stores.state_at(address, "x", monkeypatch)
        with pytest.raises(PermissionError, match="look at the credentials in the environment"):
            storing.contents(at / "HEAD")
        with pytest.raises(PermissionError, match="look at the credentials in the environment"):
            create(at / "commits/1", b"x")


def test_credentials_that_nobody_gave_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    at = object_stores.state_at("http://127.0.0.1:9", "x", monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PermissionError, match="there are no credentials for it in the environment"):
        storing.contents(at / "HEAD")


def test_a_place_is_written_as_it_was_named(tmp_path: Path) -> None:
    assert str(where("s3://bucket/a//b/")) == "s3://bucket/a/b"
    assert where(str(tmp_path)) == tmp_path
    place = where("gs://bucket/a")
    assert isinstance(place, ObjectPath)
    assert place / "b" == where("gs://bucket/a/b")
    assert (place / "b").is_relative_to(place)
    assert not place.is_relative_to(place / "b")
    assert not (place / "b").is_relative_to(where("s3://bucket/a"))


def test_what_the_store_says_is_told_in_words(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = object_stores.state_at(moto, "x", monkeypatch)
    missing = where("s3://no-such-bucket/x")

    def said(look: Callable[[], object]) -> str:
        try:
            look()
        except OSError as error:
            return str(error)
        return "nothing"

    assert "there is no such bucket" in said(lambda: storing.names(missing))
    assert "s3://bucket/x/y" in said(lambda: storing.contents(at / "y"))
