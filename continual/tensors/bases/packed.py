"""A quantised base as the model that it was quantised from: the names and the shapes of its weights, by its headers.

A state that keeps adapters reads no weight of its base, so packed numbers are as good as any, as long as it is known
which weight each of them is and how large that is. What only unpacks numbers (scales, zeros, codebooks) is left out.
What the headers do not say is read from tensors of a few bytes; what nothing says is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from continual.errors import Refuse
from continual.lazily import torch
from continual.records import ITEMSIZE
from continual.tensors.checkpoints import header, quantised
from continual.tensors.checkpoints.buffers import is_buffer
from continual.tensors.checkpoints.checkpoint import TORCH, Checkpoint
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.names.conv1d import CONV1D

Shape = tuple[int, ...]

_HELPER = re.compile(
    r"(?P<layer>.+?)(?:\.weight)?[._](?:(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.[^.]+|SCB|CB"
    r"|weight_format|qzeros|scales?|g_idx|perm|zeros?|zero_point|biases|bias_scale"
    r"|weight_(?:shape|scale|scale_inv|scale_2|scales|zero_point|g_idx|global_scale)|scale_(?:inv|weight|input)"
    r"|(?:input|output|activation)_(?:scale|zero_point|global_scale|amax)|codebooks|shape|nbits|group_size|axis|packing"
    r"|unpack_view_dtype|view_as_float|quant_(?:scale|zero)|compute_dtype|meta|encoded_state_dict|stores_quant_config"
    r"|channel_wise|optimize|round_zero|offload_meta|_(?:scale|shift|zeropoint)"
    r"|_weight_(?:scale|zero_point|act_quant_scale|per_tensor_scale))$"
)
"""What stands beside the packed numbers of a layer, and is no weight."""
_CACHE = re.compile(r"\.(?:[qkv]|prob|attn)_(?:scale|zero_point)$|(?:^|\.)scaled_fp8$")
"""Scales of the cache of keys and values, and the mark that ComfyUI leaves."""
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "half": "F16", "float": "F32"}
_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_LARGEST_BLOB = 1 << 16
_FP4 = 16
"""Values of one scale of NVFP4."""
_MX = 32
"""Values of one scale of MXFP4."""


class Packed(NamedTuple):
    """A packed weight: its name and shape in the model that it was quantised from, the tensor that holds its numbers,
    and the first part of the names of what stands beside it. `linear`: a layer of inputs and outputs, which the class
    of some families keeps the other way round."""

    name: str
    shape: Shape
    info: TensorInfo
    stem: str
    linear: bool = True


def unpacked(checkpoint: Checkpoint) -> tuple[Checkpoint, str | None]:
    """The same open files with the names and shapes that the weights have unpacked, and how the form is called; a
    checkpoint that is not quantised as it is, and None.

    Raises Refuse (`quantised`) for a tensor of which nothing says what weight it is, Retry where the few bytes that say
    it cannot be read now.
    """
    form = quantised.form_of(checkpoint.config, checkpoint.tensors)
    if form is None:
        return checkpoint, None
    return checkpoint.with_tensors(_Reader(checkpoint).tensors()), form


class _Reader:
    """Reads what the packed weights of one checkpoint are."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._raw = checkpoint.tensors
        self._body = _quantisation(checkpoint.config)
        self._read: dict[tuple[str, Shape], Shape] = {}
        self._dtype = _dtype_of(checkpoint.config)
        self._swapped = CONV1D.get(str(checkpoint.config.get("model_type")), frozenset())

    def tensors(self) -> dict[str, TensorInfo]:
        """All weights, by name. Raises as `unpacked`."""
        layers: list[Packed] = []
        for name, info in self._raw.items():
            if (layer := self._layer(name, info)) is not None:
                layers.append(layer)
        packed, stems = {layer.info.name for layer in layers}, {layer.stem for layer in layers}
        found: dict[str, TensorInfo] = {}
        for layer in layers:
            if layer.name in found:
                raise self._refuse(layer.info, f"is {layer.name}, and so is another one")
            shape = layer.shape
            if layer.linear and layer.name.removesuffix(".weight").rpartition(".")[2] in self._swapped:
                shape = shape[::-1]
            found[layer.name] = layer.info._replace(name=layer.name, dtype=self._dtype, shape=shape)
        for name, info in self._raw.items():
            if name in packed or _CACHE.search(name) or self._is_helper(name, stems):
                continue
            if name in found:
                raise self._refuse(info, "is there packed as well")
            if info.dtype not in ITEMSIZE or (
                len(info.shape) >= 2 and info.dtype in _WHOLE and not is_buffer(name, info.shape)
            ):
                raise self._refuse(info, "is of a form that is not known")
            found[name] = info
        return found

    def _is_helper(self, name: str, stems: set[str]) -> bool:
        match = _HELPER.fullmatch(name)
        return match is not None and (match["layer"] in stems or f"{match['layer']}.weight" in stems)

    def _layer(self, name: str, info: TensorInfo) -> Packed | None:
        """The packed weight that a tensor holds, None where it holds none."""
        for suffix, of in _BY_NAME:
            stem = name.removesuffix(suffix)
            if stem == name:
                continue
            shape = of(self, stem, info)
            if shape is not None:
                weight = stem if suffix == "._data" else f"{stem}.weight"
                return Packed(weight, shape, info, weight.removesuffix(".weight"))
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in self._raw:
            stem = name.removesuffix("_blocks")
            return Packed(stem, self._blocks(info), info, stem, linear=False)
        if name.endswith(".weight"):
            stem = name.removesuffix(".weight")
            if (shape := self._weight(stem, info)) is not None:
                return Packed(name, shape, info, stem)
        narrow = info.dtype not in ITEMSIZE and not info.dtype.startswith(("F4", "F6", "F8_E8M0"))
        if narrow and not _HELPER.fullmatch(name) and not _CACHE.search(name):
            return Packed(name, info.shape, info, name.removesuffix(".weight"), linear=False)
        return None

    def _weight(self, stem: str, info: TensorInfo) -> Shape | None:
        """The shape of a weight that is packed under its own name."""
        state = next((n for kind in ("nf4", "fp4") if (n := _state_of(stem, kind)) in self._raw), None)
        if state is not None:
            shape = self._said(info, self._raw[state], self._blob)
            if 2 * info.nbytes != math.prod(shape) + math.prod(shape) % 2:
                raise self._refuse(info, f"cannot hold the {list(shape)} that {state} says")
            return shape
        if len(info.shape) not in (2, 3) or info.dtype in ("F32", "F16", "BF16"):
            return None
        scales = self._raw.get(f"{stem}.weight_scale")
        if info.dtype == "I8":
            if f"{stem}.weight_scales" in self._raw and f"{stem}.SCB" not in self._raw:
                return info.shape[::-1]  # EETQ keeps inputs × outputs
            return info.shape if scales is not None or f"{stem}.SCB" in self._raw else None
        if info.dtype == "U8" and str(self._body.get("quant_method")).lower() == "bitnet":
            return (4 * info.shape[0], *info.shape[1:])
        if info.dtype == "U8" and scales is not None:
            return self._two_in_one(info, scales)
        beside = self._raw.get(f"{stem}.scales")
        if info.dtype == "U32" and beside is not None:
            return self._of_mlx(info, beside)
        return None

    def _two_in_one(self, info: TensorInfo, scales: TensorInfo) -> Shape | None:
        """NVFP4 and MXFP4, two values a byte."""
        shape = (*info.shape[:-1], 2 * info.shape[-1])
        per = _FP4 if scales.dtype.startswith("F8_E4") else _MX
        return shape if scales.shape == (*shape[:-1], -(-shape[-1] // per)) else None

    def _of_mlx(self, info: TensorInfo, scales: TensorInfo) -> Shape | None:
        group = self._body.get("group_size")
        bits = 0 if not isinstance(group, int) else 32 * info.shape[-1] // max(1, scales.shape[-1] * group)
        return (*info.shape[:-1], scales.shape[-1] * group) if isinstance(group, int) and 2 <= bits <= 8 else None

    def _qweight(self, stem: str, info: TensorInfo) -> Shape:
        """GPTQ packs the inputs, AWQ the outputs: the scales tell the two apart."""
        scales = self._raw.get(f"{stem}.scales")
        if len(info.shape) != 2 or scales is None or len(scales.shape) != 2 or info.dtype != "I32":
            raise self._refuse(info, "has no scales of a known layout beside it")
        groups, outputs = scales.shape
        order = self._raw.get(f"{stem}.g_idx")
        if info.shape[1] == outputs:  # GPTQ
            if order is not None and len(order.shape) == 1 and order.shape[0]:
                inputs = order.shape[0]
            elif (bits := self._bits()) is not None:
                inputs = 32 * info.shape[0] // bits
            elif isinstance(group := self._body.get("group_size"), int) and group > 0:
                inputs = groups * group
            else:
                raise self._refuse(info, "is of as many bits as nothing says: quantization_config has no bits")
            if not inputs <= 32 * info.shape[0] <= 8 * inputs:
                raise self._refuse(info, f"is no weight of {inputs} inputs")
            return outputs, inputs
        if not outputs or 32 * info.shape[1] not in (4 * outputs, 8 * outputs) or not groups or info.shape[0] % groups:
            raise self._refuse(info, f"and its scales {list(scales.shape)} are in a layout that is not known")
        return outputs, info.shape[0]

    def _weight_packed(self, stem: str, info: TensorInfo) -> Shape:
        """compressed-tensors."""
        said, scales = self._raw.get(f"{stem}.weight_shape"), self._raw.get(f"{stem}.weight_scale")
        if said is not None:
            return self._said(info, said, self._numbers)
        two = info.dtype == "U8" and scales is not None and len(info.shape) >= 2
        if two and scales is not None and (shape := self._two_in_one(info, scales)) is not None:
            return shape
        raise self._refuse(info, "has no weight_shape beside it")

    def _w_q(self, stem: str, info: TensorInfo) -> Shape:
        """HQQ, which writes the shape beside it."""
        said = self._raw.get(f"{stem}.shape")
        if said is None:
            raise self._refuse(info, "has no shape beside it")
        return self._said(info, said, self._numbers)

    def _same(self, _stem: str, info: TensorInfo) -> Shape:
        """Quanto and TorchAO, where a value is a byte."""
        if info.dtype != "I8" and not info.dtype.startswith("F8_E"):
            raise self._refuse(info, "is packed in a layout that is not known")
        return info.shape

    def _codes(self, stem: str, info: TensorInfo) -> Shape | None:
        """AQLM."""
        books = self._raw.get(f"{stem}.codebooks")
        if books is None:
            return None
        if len(info.shape) != 3 or len(books.shape) != 4:
            raise self._refuse(info, f"and its codebooks {list(books.shape)} are in a layout that is not known")
        return info.shape[0] * books.shape[2], info.shape[1] * books.shape[3]

    def _blocks(self, info: TensorInfo) -> Shape:
        """MXFP4 as gpt-oss has it: experts × outputs × groups × 16 bytes; the model has experts × inputs × outputs."""
        if len(info.shape) != 4 or info.shape[3] != _MX // 2 or info.dtype != "U8":
            raise self._refuse(info, "are no blocks of MXFP4")
        experts, outputs, groups, _ = info.shape
        return experts, groups * _MX, outputs

    def _bits(self) -> int | None:
        bits = self._body.get("bits")
        return bits if isinstance(bits, int) and 2 <= bits <= 8 and not self._body.get("dynamic") else None

    def _said(self, info: TensorInfo, said: TensorInfo, read: Callable[[TensorInfo], Shape]) -> Shape:
        """The shape that another tensor says: read once for all layers of one name and one packed shape."""
        key = re.sub(r"\d+", "*", info.name), (*info.shape, info.nbytes)
        if key not in self._read:
            shape = read(said)
            if not 1 <= len(shape) <= 4 or not info.nbytes <= 2 * math.prod(shape) <= 16 * info.nbytes:
                raise self._refuse(info, f"cannot hold the {list(shape)} that {said.name} says")
            self._read[key] = shape
        return self._read[key]

    def _bytes(self, info: TensorInfo) -> bytearray:
        if info.nbytes > _LARGEST_BLOB:
            raise self._refuse(info, "is too large to say a shape")
        found = bytearray(info.nbytes)
        self._checkpoint.read_part(info, 0, memoryview(found))
        return found

    def _blob(self, info: TensorInfo) -> Shape:
        body = header.json_object(bytes(self._bytes(info)), f"{self._checkpoint.place}: {info.name}", "quantised")
        return self._sizes(info, body.get("shape"))

    def _numbers(self, info: TensorInfo) -> Shape:
        if info.dtype not in ("I64", "I32"):
            raise self._refuse(info, "is no list of sizes")
        return self._sizes(info, torch.frombuffer(self._bytes(info), dtype=TORCH[info.dtype]).tolist())

    def _sizes(self, info: TensorInfo, found: object) -> Shape:
        if not isinstance(found, list) or not all(type(n) is int and 0 < n < 1 << 31 for n in found):
            raise self._refuse(info, "is no list of sizes")
        return tuple(found)

    def _refuse(self, info: TensorInfo, what: str) -> Refuse:
        return Refuse(
            "quantised",
            f"{self._checkpoint.place}: tensor {info.name} {info.dtype} {list(info.shape)} {what}; make the state of "
            "the model that it was quantised from (adapters over a quantised copy fold into it as well)",
        )


_BY_NAME: tuple[tuple[str, Callable[[_Reader, str, TensorInfo], Shape | None]], ...] = (
    (".qweight", _Reader._qweight),
    (".weight_packed", _Reader._weight_packed),
    (".W_q", _Reader._w_q),
    ("._weight_qdata", _Reader._same),
    ("._data", _Reader._same),
    (".codes", _Reader._codes),
)


def _state_of(stem: str, kind: str) -> str:
    return f"{stem}.weight.quant_state.bitsandbytes__{kind}"


def _quantisation(config: Mapping[str, object]) -> Mapping[str, object]:
    bodies = (config.get(key) for key in ("quantization_config", "compression_config", "quantization"))
    return next((body for body in bodies if isinstance(body, dict) and body), {})


def _dtype_of(config: Mapping[str, object]) -> str:
    """The safetensors word of the dtype that a model has when it is unpacked."""
    for body in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            word = str(body.get(key)).removeprefix("torch.") if isinstance(body, dict) else ""
            if word in _DTYPES:
                return _DTYPES[word]
    return "BF16"
