"""A device that is not the CPU, on a machine that has no other: its tensors say that they lie on CUDA, and an operation
that mixes them with tensors of the CPU fails as it does there.

The numbers are computed on the CPU. What a CUDA kernel rounds otherwise is not seen here, only where tensors lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
DEVICES = [DEVICE, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
"""That device, and CUDA where there is one."""
_COPIES = ("aten::_to_copy", "aten::copy_")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")
"""Operations that CUDA lets mix devices: copies, and indices of the CPU."""


class Elsewhere(Tensor):
    """A tensor of that device; `inner` is where its numbers are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        found.inner = inner
        return found  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = func._schema.name
        asked = given.get("device")
        to_cpu = asked is not None and torch.device(asked).type == "cpu"
        if name not in _COPIES + _INDEXED:
            strangers = [
                leaf
                for leaf in tree_leaves((args, given))
                if isinstance(leaf, Tensor) and not isinstance(leaf, Elsewhere) and leaf.dim()
            ]
            if strangers:
                raise RuntimeError(f"{name}: expected all tensors to be on one device; on the CPU is {strangers[0]!r}")
        if asked is not None:
            given["device"] = torch.device("cpu")
        result = func(*tree_map(_inner, args), **tree_map(_inner, given))
        written = [args[0]] if name.endswith("_") else tree_leaves(given.get("out", ()))
        known = {id(_inner(leaf)): leaf for leaf in tree_leaves(written)}

        def outer(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return known.get(id(leaf)) if id(leaf) in known else leaf.clone() if to_cpu else Elsewhere(leaf)

        return tree_map(outer, result)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        """As CUDA tensors do."""
        raise TypeError("can't convert a CUDA tensor to numpy: copy it to the CPU first")


def _index(part: Any) -> Any:
    """Numbers that pick rows, as torch brings them to a device by itself."""
    there = Elsewhere(torch.tensor(part)) if isinstance(part, list) else part
    return Elsewhere(there) if isinstance(there, Tensor) and not isinstance(there, Elsewhere) else there


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf


class Reachable(TorchFunctionMode):
    """In it that device can be named: tensors are made and moved there. Of one thread, as every mode of torch is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        places = [*args[1:], given.get("device")] if func is Tensor.to else [given.get("device")]
        there = any(isinstance(p, (str, torch.device)) and torch.device(p).type == DEVICE.type for p in places)
        if func is Tensor.tolist:
            return func(_inner(args[0]))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            picked = tree_map(_index, args[1], is_leaf=lambda part: isinstance(part, list))
            args = (args[0], picked, *(v if isinstance(v, Tensor) else torch.tensor(v) for v in args[2:]))
        if func is torch.where and any(isinstance(value, Elsewhere) for value in args):
            like = next(value.dtype for value in args[1:] if isinstance(value, Tensor))
            args = tuple(torch.tensor(v, dtype=like) if isinstance(v, float) else v for v in args)
        if not there:
            return func(*args, **given)
        if func is Tensor.to:
            dtype = next((p for p in (*args[1:], given.get("dtype")) if isinstance(p, torch.dtype)), args[0].dtype)
            found = args[0].to(dtype)
            return found if isinstance(found, Elsewhere) else Elsewhere(found.clone())
        given["device"] = torch.device("cpu")
        return Elsewhere(func(*args, **given))


def lies_on(value: Tensor, device: torch.device) -> bool:
    """Whether a tensor lies on one of DEVICES."""
    return isinstance(value, Elsewhere) if device == DEVICE else value.device.type == device.type
