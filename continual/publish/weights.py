"""Writing a safetensors file: its header, and tensors at their offsets, in any order. What the tensors are is not known
here.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header padded with spaces,
tensors back to back).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from blake3 import blake3

from continual.lazily import torch
from continual.timing.clock import stage


class Placed(NamedTuple):
    """Where a tensor lies in a file: its bytes from `begin` to `end`, counted after the header. `made_of` is the base
    tensor it is made from: another one where it is a tied alias."""

    name: str
    made_of: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header(placed: Sequence[Placed], said: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The head of a file: length and JSON, padded so that the data begin at a multiple of 8. `said`: what else it says
    of the file."""
    body: dict[str, object] = {"__metadata__": {"format": "pt", **said}}
    body.update({p.name: {"dtype": p.dtype, "shape": list(p.shape), "data_offsets": [p.begin, p.end]} for p in placed})
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, in as many writes as it takes. Safe from several threads."""
    data = data.cast("B")
    with stage("write", len(data)):
        while data:
            written = os.pwrite(fd, data, offset)
            data = data[written:]
            offset += written


def write_hashed(fd: int, pieces: Iterable[memoryview], offset: int) -> str:
    """Writes pieces one after the other from `offset` on; returns the BLAKE3 hash of all of them."""
    seen = blake3()
    for data in pieces:
        with stage("hash", data.nbytes):
            seen.update(data)
        write_at(fd, data, offset)
        offset += data.nbytes
    return seen.hexdigest()
