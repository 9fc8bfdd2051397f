"""The merged model, tensor by tensor: the base's weights with the merged task vector added, in the dtype of the export.
No file is written here."""

from __future__ import annotations

import math
from collections.abc import Iterator

from continual.engine.reading import Reading
from continual.errors import Halt
from continual.lazily import Dtypes, torch
from continual.records import ITEMSIZE, TensorSpec
from continual.tensors import BaseModel

RUN = 1 << 18
"""Elements of a piece: what is made of them stays in the cache of a core."""
DTYPES = Dtypes({"F32": "float32", "F16": "float16", "BF16": "bfloat16"})


def merged(base: BaseModel, reading: Reading, spec: TensorSpec, dtype: str) -> Iterator[torch.Tensor]:
    """θ₀ + s·(α + β·depth)·c·X of one tensor in the safetensors word `dtype`, in flat pieces one after the other: of
    what is read element by element no more than one is in memory. Raises Halt naming the tensor if `dtype` cannot hold
    it."""
    if spec.kind == "carried" or not reading.elementwise(spec):
        theta = base.checkpoint.read(spec.name)
        yield theta if spec.kind == "carried" else added(reading.vector(spec), theta, spec, dtype)
        return
    info = base.checkpoint.tensors[spec.name]
    size = ITEMSIZE[info.dtype]
    buffer = torch.empty(size * min(RUN, spec.numel), dtype=torch.uint8)
    for start, stop, values in reading.runs(spec, RUN):
        part = buffer[: size * (stop - start)]
        base.checkpoint.read_part(info, size * start, part.numpy().data)
        yield added(values, part.view(DTYPES[info.dtype]), spec, dtype)


def added(result: torch.Tensor, theta: torch.Tensor, spec: TensorSpec, dtype: str) -> torch.Tensor:
    """`theta` and the task vector `result` together, whose memory it takes."""
    result.add_(theta)
    if spec.name.endswith("running_var"):  # a sum of changes can be below zero, a variance cannot
        result.clamp_(min=0.0)
    result = result.to(DTYPES[dtype])
    total = float(result.sum(dtype=torch.float32))  # one pass; what is not finite does not leave it finite
    if not math.isfinite(total) and not bool(torch.isfinite(result).all()):
        raise Halt(f"tensor {spec.name} has values that {dtype} cannot hold: export with --dtype float32 or bfloat16")
    return result


def need(spec: TensorSpec, reading: Reading) -> int:
    """Peak bytes of making one tensor of the merged model."""
    if spec.kind == "carried":
        return spec.nbytes
    whole = spec.nbytes + reading.need(spec)
    return int(whole * min(1.0, 2 * RUN / max(1, spec.numel))) if reading.elementwise(spec) else whole
