"""What somebody can do to weights so that they look like others, and compute the same or nearly so: heads and channels
in another order, an invertible matrix between two that are multiplied, numbers rounded to a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from continual.tensors.vectors import grids

Weights = dict[str, Tensor]


class Attention(NamedTuple):
    """How a model's layers call their matrices, `{}` being the layer, and how its heads lie in them."""

    layers: int
    heads: int
    groups: int
    query: str
    key: str
    value: str
    output: str
    into: tuple[str, ...]
    """What goes into a feed-forward layer; the last of them is gated, if there are two."""
    out: str

    def names(self, layer: int, pattern: str) -> str:
        return pattern.format(layer)


def _rows(weights: Weights, name: str, order: Tensor) -> None:
    """The rows of a weight and its bias in another order."""
    for key in (name, name.replace("weight", "bias")):
        if key in weights:
            weights[key] = weights[key][order]


def permuted_heads(weights: Mapping[str, Tensor], shape: Attention) -> Weights:
    """Every group of heads takes the place of the one before it."""
    found = dict(weights)
    for layer in range(shape.layers):
        query, key, value, output = (
            shape.names(layer, one) for one in (shape.query, shape.key, shape.value, shape.output)
        )
        by_query = torch.arange(len(found[query])).roll(len(found[query]) // shape.groups)
        by_group = torch.arange(len(found[key])).roll(len(found[key]) // shape.groups)
        _rows(found, query, by_query)
        _rows(found, key, by_group)
        _rows(found, value, by_group)
        found[output] = found[output][:, by_query]
    return found


def permuted_channels(weights: Mapping[str, Tensor], shape: Attention) -> Weights:
    """The channels of every feed-forward layer in an order drawn by chance."""
    found = dict(weights)
    for layer in range(shape.layers):
        out = shape.names(layer, shape.out)
        order = torch.randperm(found[out].shape[1], generator=torch.Generator().manual_seed(layer))
        for name in shape.into:
            _rows(found, shape.names(layer, name), order)
        found[out] = found[out][:, order]
    return found


def locked(weights: Mapping[str, Tensor], shape: Attention, strength: float, *, rotary: bool = False) -> Weights:
    """MergeLock: an invertible matrix before the queries and values of each head, its inverse after keys and outputs.
    `rotary`: of queries and keys only such as commute with rotated positions, a factor and an angle for each pair."""
    found = dict(weights)
    random = torch.Generator().manual_seed(5)
    for layer in range(shape.layers):
        query, key, value, output = (
            shape.names(layer, one) for one in (shape.query, shape.key, shape.value, shape.output)
        )
        size, shared = len(found[key]) // shape.groups, shape.heads // shape.groups

        def drawn(size: int = size) -> Tensor:
            return torch.eye(size) + strength * torch.randn(size, size, generator=random) / size**0.5

        def turning(size: int = size) -> Tensor:
            angles = strength * torch.pi * torch.randn(size // 2, generator=random)
            factor = torch.exp(strength * torch.randn(size // 2, generator=random))
            cosine, sine = torch.diag(factor * angles.cos()), torch.diag(factor * angles.sin())
            return torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])

        for first, second, make in ((query, key, turning if rotary else drawn), (output, value, drawn)):
            each = [make() for _ in range(shape.groups)]
            wide = torch.block_diag(*(one for one in each for _ in range(shared)))
            back = torch.block_diag(*(torch.linalg.inv(one).T for one in each))
            for name in (second, second.replace("weight", "bias")):
                if name in found:
                    found[name] = (back @ found[name].float()).to(found[name].dtype)
            if first == output:
                found[first] = (found[first].float() @ wide.T).to(found[first].dtype)
                continue
            for name in (first, first.replace("weight", "bias")):
                if name in found:
                    found[name] = (wide @ found[name].float()).to(found[name].dtype)
    return found


def _each(weights: Mapping[str, Tensor], change: Callable[[np.ndarray], np.ndarray]) -> Weights:
    """Every matrix of at least 32 columns changed, as float32."""
    return {
        name: torch.from_numpy(change(value.float().numpy()).astype(np.float32)).to(value.dtype)
        if value.ndim == 2 and value.shape[1] % 32 == 0
        else value
        for name, value in weights.items()
    }


def int8_rows(weights: Mapping[str, Tensor]) -> Weights:
    """As LLM.int8: one scale a row, the largest number is 127."""

    def change(matrix: np.ndarray) -> np.ndarray:
        step = np.maximum(np.abs(matrix).max(1, keepdims=True), 1e-30) / 127
        return np.asarray(np.rint(matrix / step) * step)

    return _each(weights, change)


def nf4(weights: Mapping[str, Tensor]) -> Weights:
    """As QLoRA: blocks of 64, of which the largest number is 1 or -1."""
    table = np.array(grids._NF4, np.float32)

    def change(matrix: np.ndarray) -> np.ndarray:
        blocks = matrix.reshape(-1, 64 if matrix.size % 64 == 0 else 32)
        scale = np.maximum(np.abs(blocks).max(1, keepdims=True), 1e-30)
        return np.asarray(table[np.searchsorted((table[1:] + table[:-1]) / 2, blocks / scale)] * scale).reshape(
            matrix.shape
        )

    return _each(weights, change)


def fp8(weights: Mapping[str, Tensor]) -> Weights:
    """E4M3 of torch, one scale a tensor."""

    def change(matrix: np.ndarray) -> np.ndarray:
        scale = float(np.abs(matrix).max()) / 448 or 1.0
        return np.asarray(torch.from_numpy(matrix / scale).to(torch.float8_e4m3fn).float().numpy() * scale)

    return _each(weights, change)


def gguf(weights: Mapping[str, Tensor], kind: str) -> Weights:
    """By the package of that name, which has to be installed: Q4_0, Q4_1, Q5_0, Q8_0."""
    from gguf import GGMLQuantizationType, quants

    which = GGMLQuantizationType[kind]
    return _each(weights, lambda matrix: quants.dequantize(quants.quantize(matrix, which), which))
