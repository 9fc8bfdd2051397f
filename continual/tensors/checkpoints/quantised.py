"""Whether a checkpoint is quantised: by its config.json, by the dtypes and by the names of its tensors.

Packed numbers are no weights that could be subtracted, so a quantised base or fine-tune is refused by the name of its
form, with what to do. A checkpoint that says nothing of it and holds floats is not quantised, whoever made it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from continual.errors import Refuse
from continual.outside import shown
from continual.tensors.checkpoints.header import TensorInfo

_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes, 4 bits",
    "bitsandbytes_8bit": "bitsandbytes, 8 bits",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
    "hqq": "HQQ",
    "gguf": "GGUF",
    "torchao": "TorchAO",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "modelopt": "ModelOpt",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
}
"""`quant_method`s of config.json, as people write them; others stand as they are."""
_KEYS = ("quantization_config", "compression_config", "quantization")
_INNER = ("text_config", "llm_config", "language_config", "thinker_config", "vision_config")
_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(?:weight\.)?(?:absmax|nested_absmax|quant_map|quant_state\..+)$"), "bitsandbytes, 4 bits"),
    (re.compile(r"\.(?:SCB|weight_format)$"), "bitsandbytes, 8 bits"),
    (re.compile(r"\.(?:qweight|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.(?:weight_packed|weight_shape|weight_zero_point|weight_g_idx)$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_inv$"), "FP8"),
    (re.compile(r"_proj_(?:blocks|scales)$"), "MXFP4"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.weight\._(?:data|scale|shift|zeropoint)$"), "Quanto"),
    (re.compile(r"\.codebooks$"), "AQLM"),
    (re.compile(r"\._weight_qdata$"), "TorchAO"),
)
"""Names that only packed tensors and what belongs to them bear."""
_PACKED = re.compile(r"(?:^|[._])weight$")
_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32")


def check_config(file: Path | str, config: Mapping[str, object]) -> None:
    """Raises Refuse (`quantised`) where the configuration in a `file` says that the model is quantised."""
    bodies = [("", config), *((f"{key}.", body) for key in _INNER if isinstance(body := config.get(key), dict))]
    for path, body in bodies:
        for key in _KEYS:
            if form := _form(body.get(key)):
                raise Refuse(
                    "quantised",
                    f"{file}: {path}{key} says that this model is quantised ({form}): "
                    f"{_ADVICE}; if its tensors are plain floats after all, take {path}{key} out",
                )


def form_of(config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> str | None:
    """How a model is quantised, by its configuration or by its tensors; None where it is not."""
    bodies = (config, *(body for key in _INNER if isinstance(body := config.get(key), dict)))
    said = next((form for body in bodies for key in _KEYS if (form := _form(body.get(key)))), None)
    told = next((form for name in tensors for pattern, form in _NAMES if pattern.search(name)), None)
    if said or told:
        return said or told
    if any(info.dtype.startswith("F8_") for info in tensors.values()):
        return "FP8"
    packed = any(len(i.shape) >= 2 and i.dtype in _WHOLE and _PACKED.search(n) for n, i in tensors.items())
    return "of a kind that it does not name" if packed else None


def check_tensors(where: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises Refuse (`quantised`) where names or dtypes are those of packed tensors."""
    for name in tensors:
        for pattern, form in _NAMES:
            if pattern.search(name):
                raise _refusal(where, f"tensor {name} is of a quantised model ({form})")
    for name, info in tensors.items():
        if len(info.shape) >= 2 and info.dtype in _WHOLE and _PACKED.search(name):
            raise _refusal(where, f"tensor {name} is {info.dtype} {list(info.shape)}, a packed weight")


_ADVICE = (
    "packed numbers cannot be subtracted or merged; use the model that it was quantised from, in F32, F16 or BF16, or "
    "dequantise it (in transformers: model.dequantize(), then save_pretrained)"
)


def _refusal(where: str, what: str) -> Refuse:
    return Refuse("quantised", f"{where}: {what}: {_ADVICE}")


def _form(body: object) -> str | None:
    """How a quantisation that config.json speaks of is called; None where it speaks of none."""
    if not isinstance(body, dict) or not body:
        return None
    method = body.get("quant_method")
    bits = [bool(body[key]) for key in ("load_in_4bit", "load_in_8bit") if key in body]
    if bits and not any(bits) and method in (None, "bitsandbytes"):
        return None
    if isinstance(method, str):
        return _METHODS.get(method.lower(), shown(method))
    if bits:
        return "bitsandbytes"
    return "MLX" if {"group_size", "bits"} <= body.keys() else "of a kind that it does not name"
