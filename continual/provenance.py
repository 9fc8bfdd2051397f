"""Which software wrote a record."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from importlib.metadata import version


@functools.cache
def software() -> Mapping[str, str]:
    """Versions of what computes and stores, for every record."""
    names = ("continual", "torch", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
