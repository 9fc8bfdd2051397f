"""A file system mounted for a test: a small one that can be full, or one that is read-only. It takes root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(path: Path, *options: str) -> Iterator[None]:
    """Mounts a file system at `path` while the block runs. Where that is not allowed the test is skipped, and the end
    of the run says so."""
    done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"NOT TESTED, run it as root: mount {' '.join(options)}: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
