"""Where things come from: versions for the ledger, `continual.json` of an export, and how a release of ours is recognised."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from continual.errors import Refuse
from continual.records import Candidate, FoldReport

RELEASE = "continual.json"


@functools.cache
def software() -> Mapping[str, str]:
    """Versions of what computes and stores, for every record."""
    names = ("continual", "torch", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def timed(report: FoldReport, seconds: Mapping[str, float]) -> FoldReport:
    """The report with its stages' seconds completed after the commit."""
    return dataclasses.replace(report, seconds=seconds)


def release_of(path: Path) -> Mapping[str, Any] | None:
    """The contents of the `continual.json` beside a model, None where there is none or it is no JSON object of ours."""
    try:
        body = json.loads((path / RELEASE).read_bytes())
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) and "state" in body else None


def refuse_own_release(candidate: Candidate, state_id: str) -> None:
    """Refuses what this very state exported: folding it again would count every model twice."""
    release = release_of(candidate.path)
    if release is not None and release["state"] == state_id:
        raise Refuse("own-release", f"{candidate.name}: this is the merged model of this state (record {release.get('seq')}), no fine-tune")


def unreadable(path: Path, source: str) -> Candidate:
    """A candidate whose headers cannot be read, known by its place and the state of its files."""
    path = path.absolute()
    seen = hashlib.sha256(str(path).encode())
    nbytes = 0
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        try:
            stat = file.lstat()
        except OSError:
            continue
        if file.is_file() or file.is_symlink():
            nbytes += stat.st_size
            seen.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}".encode())
    return Candidate(f"folder:{seen.hexdigest()}", path.name, source, str(path), path, "full", (), nbytes)
