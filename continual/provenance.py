"""Where things come from: versions for the ledger, `continual.json` of an export, and how a release of ours is
recognised."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from continual.errors import Refuse
from continual.records import FoldReport

RELEASE = "continual.json"


@functools.cache
def software() -> Mapping[str, str]:
    """Versions of what computes and stores, for every record."""
    names = ("continual", "torch", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def timed(report: FoldReport, seconds: Mapping[str, float]) -> FoldReport:
    """The report with its stages' seconds completed after the commit."""
    return dataclasses.replace(report, seconds=seconds)


def refuse_own_release(name: str, release: Mapping[str, Any] | None, state_id: str) -> None:
    """Refuses what this very state exported (`release` is the `continual.json` beside it): folding it again would count
    every model twice."""
    if release is not None and release["state"] == state_id:
        raise Refuse(
            "own-release", f"{name}: this is the merged model of this state (record {release.get('seq')}), no fine-tune"
        )
