"""torch, which is loaded when something of it is first used: loading takes longer than most commands do their work in,
and what only looks at a state needs nothing of it.

Every module takes `torch` and `Tensor` from here, and uses torch in its functions alone. `Tensor` is for annotations
and other words about types; to ask whether something is one, write `torch.Tensor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["Dtypes", "Tensor", "load", "torch"]

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
else:

    class _Torch:
        """Stands for the package until something of it is asked for, and has all that is in it from then on."""

        def __getattr__(self, name: str) -> object:
            package = import_module("torch")
            self.__dict__ = package.__dict__  # what is looked for from now on is found as in the package itself
            return getattr(package, name)

    torch = _Torch()
    Tensor = "torch.Tensor"


def load() -> None:
    """Loads torch now: for who is about to use it, and has a better time for it now than then."""
    import_module("torch")


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
