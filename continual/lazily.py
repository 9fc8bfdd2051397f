"""What is loaded when something of it is first used: torch, which takes longer than most commands do their work in,
numpy for what only looks at a state, and the modules of a room that only some of its users need.

Every module takes `torch` and `Tensor` from here, and uses torch in its functions alone; those of `state` take `numpy`
so. `Tensor` is for annotations and other words about types; to ask whether something is one, write `torch.Tensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["Dtypes", "Tensor", "from_homes", "load", "numpy", "torch"]

if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
    from torch import Tensor as Tensor
else:

    def _standing_for(package_name: str) -> object:
        """Stands for a package until something of it is asked for, and has all that is in it from then on."""

        class Package:
            def __getattr__(self, name: str) -> object:
                package = import_module(package_name)
                self.__dict__ = package.__dict__  # what is looked for from now on is found as in the package itself
                return getattr(package, name)

        return Package()

    torch, numpy = _standing_for("torch"), _standing_for("numpy")
    Tensor = "torch.Tensor"


def load() -> None:
    """Loads torch now: for who is about to use it, and has a better time for it now than then."""
    import_module("torch")


def from_homes(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose names are loaded when they are first asked for: `homes` says from which
    module of it, or which other one, each comes. Type checkers read the imports beside it."""
    home = {
        name: module if module.startswith("continual.") else f"{package}.{module}"
        for module, names in homes.items()
        for name in names
    }

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return get


class Dtypes(Mapping[str, "torch.dtype"]):
    """Words and the dtypes of torch that they mean. `names`: what torch calls each of them."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __getitem__(self, word: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, self._names[word])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, word: object) -> bool:
        return word in self._names
