"""Real object stores on this machine, each a process of its own on loopback, and what stands between one of them and
who asks it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from continual.errors import ContinualError
from continual.state import State
from continual.state.strays import strays
from continual.state.verify import verify
from continual.stores import ObjectPath, Where, where

BUCKET = "bucket"
LIMIT = 60.0


def environment(endpoint: str) -> Mapping[str, str]:
    """What an ordinary client of S3 reads."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testtest",
        "AWS_REGION": "us-east-1",
    }


def has(kind: str) -> bool:
    """Whether this server is installed."""
    if kind == "moto":
        return shutil.which("moto_server") is not None
    return shutil.which("weed") is not None


@contextlib.contextmanager
def serving(kind: str, directory: Path) -> Iterator[str]:
    """The server `moto` or `seaweedfs`, with an empty bucket; gives its address."""
    port = _port()
    with (directory / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(_command(kind, port, directory), stdout=log, stderr=log, cwd=directory)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, address, directory / f"{kind}.log")
            yield address
        finally:
            process.kill()
            process.wait()


def _command(kind: str, port: int, directory: Path) -> list[str]:
    if kind == "moto":
        return [sys.executable, "-c", _MOTO, str(port)]
    (directory / "seaweed").mkdir()
    ports = [f"-{name}.port={_port()}" for name in ("master", "volume", "filer")]
    quiet = ["-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=500", "-master.volumeSizeLimitMB=64"]
    where_ = ["-dir=seaweed", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    return [str(shutil.which("weed")), "server", "-s3", f"-s3.port={port}", *where_, *ports, *quiet]


_MOTO = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=5).close()
            return
        time.sleep(0.05)
    raise AssertionError(f"{address} does not answer: {log.read_text()[-2000:]}")


def _port() -> int:
    """A port that is free, as is the one that seaweedfs takes besides: 10,000 higher."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            if port < 55_000:
                with contextlib.suppress(OSError):
                    other.bind(("127.0.0.1", port + 10_000))
                    return port


def state_at(endpoint: str, prefix: str, monkeypatch: pytest.MonkeyPatch, lease: float = 60.0) -> ObjectPath:
    """A place in the bucket at this address, for one test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    found = where(f"s3://{BUCKET}/{prefix}", lease)
    assert isinstance(found, ObjectPath)
    return found


def findings(path: Where) -> list[str]:
    """What verifying a state finds, and what lies beside it; or why it does not open."""
    try:
        with State.open(path) as opened:
            return verify(opened) + [f"{one.path}: {one.what}" for one in strays(path, opened.format, opened.ledger)]
    except ContinualError as error:
        return [str(error)]
