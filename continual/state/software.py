"""The versions of what computes and stores: every record of a state has them."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from importlib.metadata import version


@functools.cache
def software() -> Mapping[str, str]:
    """The versions of Python, continual, torch, zarr and numpy, by name."""
    names = ("continual", "torch", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
