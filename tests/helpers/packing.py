"""Quantised copies of a model, with the names, dtypes and shapes that the libraries write. The numbers in them are
random, but for what says a shape: nobody reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers import models

Tensors = dict[str, torch.Tensor]
GROUP = 8


def _numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(0, 100, shape).to(dtype)


def gptq(stem: str, out: int, inputs: int, *, order: bool = True) -> Tensors:
    """GPTQ of 4 bits."""
    found = {
        f"{stem}.qweight": _numbers(torch.int32, inputs // 8, out),
        f"{stem}.qzeros": _numbers(torch.int32, inputs // GROUP, out // 8),
        f"{stem}.scales": _numbers(torch.float16, inputs // GROUP, out),
        f"{stem}.bias": torch.zeros(out, dtype=torch.float16),
    }
    return {**found, f"{stem}.g_idx": _numbers(torch.int32, inputs)} if order else found


def awq(stem: str, out: int, inputs: int) -> Tensors:
    """AWQ of 4 bits."""
    return {
        f"{stem}.qweight": _numbers(torch.int32, inputs, out // 8),
        f"{stem}.qzeros": _numbers(torch.int32, inputs // GROUP, out // 8),
        f"{stem}.scales": _numbers(torch.float16, inputs // GROUP, out),
    }


def nf4(stem: str, out: int, inputs: int, *, said: object = None) -> Tensors:
    """bitsandbytes of 4 bits, doubly quantised."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": said or [out, inputs]}
    return {
        f"{stem}.weight": _numbers(torch.uint8, out * inputs // 2, 1),
        f"{stem}.weight.absmax": _numbers(torch.uint8, out * inputs // 64 + 1),
        f"{stem}.weight.nested_absmax": _numbers(torch.float32, 1),
        f"{stem}.weight.nested_quant_map": _numbers(torch.float32, 256),
        f"{stem}.weight.quant_map": _numbers(torch.float32, 16),
        f"{stem}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def int8(stem: str, out: int, inputs: int) -> Tensors:
    """bitsandbytes of 8 bits."""
    return {
        f"{stem}.weight": _numbers(torch.int8, out, inputs),
        f"{stem}.SCB": _numbers(torch.float32, out),
        f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def fp8(stem: str, out: int, inputs: int) -> Tensors:
    """FP8 in blocks, as DeepSeek-V3 has it, with the scales of a cache."""
    return {
        f"{stem}.weight": torch.randn(out, inputs).to(torch.float8_e4m3fn),
        f"{stem}.weight_scale_inv": torch.rand(1, 1),
        f"{stem}.k_scale": torch.rand(1),
    }


def fp8_static(stem: str, out: int, inputs: int) -> Tensors:
    """FP8 with one scale for the weights and one for the inputs."""
    return {
        f"{stem}.weight": torch.randn(out, inputs).to(torch.float8_e4m3fn),
        f"{stem}.weight_scale": torch.rand(out, 1),
        f"{stem}.input_scale": torch.rand(1),
    }


def compressed(stem: str, out: int, inputs: int) -> Tensors:
    """compressed-tensors of 4 bits."""
    return {
        f"{stem}.weight_packed": _numbers(torch.int32, out, inputs // 8),
        f"{stem}.weight_scale": _numbers(torch.bfloat16, out, inputs // GROUP),
        f"{stem}.weight_shape": torch.tensor([out, inputs]),
    }


def nvfp4(stem: str, out: int, inputs: int) -> Tensors:
    """NVFP4 as compressed-tensors writes it."""
    return {
        f"{stem}.weight_packed": _numbers(torch.uint8, out, inputs // 2),
        f"{stem}.weight_scale": torch.rand(out, inputs // 16).to(torch.float8_e4m3fn),
        f"{stem}.weight_global_scale": torch.rand(1),
        f"{stem}.input_global_scale": torch.rand(1),
    }


def modelopt(stem: str, out: int, inputs: int) -> Tensors:
    """NVFP4 as ModelOpt writes it."""
    return {
        f"{stem}.weight": _numbers(torch.uint8, out, inputs // 2),
        f"{stem}.weight_scale": torch.rand(out, inputs // 16).to(torch.float8_e4m3fn),
        f"{stem}.weight_scale_2": torch.rand(1),
        f"{stem}.input_scale": torch.rand(1),
    }


def w8a8(stem: str, out: int, inputs: int) -> Tensors:
    """compressed-tensors of 8 bits."""
    return {f"{stem}.weight": _numbers(torch.int8, out, inputs), f"{stem}.weight_scale": torch.rand(out, 1)}


def hqq(stem: str, out: int, inputs: int) -> Tensors:
    """HQQ of 4 bits, as its state_dict is made for safetensors."""
    return {
        f"{stem}.W_q": _numbers(torch.uint8, GROUP // 2, out * inputs // GROUP),
        f"{stem}.scale": _numbers(torch.float16, out * inputs // GROUP, 1),
        f"{stem}.zero": _numbers(torch.float16, out * inputs // GROUP, 1),
        f"{stem}.shape": torch.tensor([out, inputs]),
        f"{stem}.nbits": torch.tensor(4),
        f"{stem}.group_size": torch.tensor(GROUP),
        f"{stem}.packing": _numbers(torch.uint8, 7),
    }


def torchao(stem: str, out: int, inputs: int) -> Tensors:
    """TorchAO of 8 bits."""
    return {
        f"{stem}._weight_qdata": _numbers(torch.int8, out, inputs),
        f"{stem}._weight_scale": torch.rand(out, 1),
        f"{stem}._weight_zero_point": _numbers(torch.int8, out, 1),
    }


def quanto(stem: str, out: int, inputs: int) -> Tensors:
    """Quanto of 8 bits."""
    return {
        f"{stem}.weight._data": _numbers(torch.int8, out, inputs),
        f"{stem}.weight._scale": torch.rand(out, 1),
        f"{stem}.input_scale": torch.rand(1),
        f"{stem}.output_scale": torch.rand(1),
    }


def eetq(stem: str, out: int, inputs: int) -> Tensors:
    """EETQ, which keeps inputs × outputs."""
    return {
        f"{stem}.weight": _numbers(torch.int8, inputs, out),
        f"{stem}.weight_scales": torch.rand(out).half(),
    }


def aqlm(stem: str, out: int, inputs: int) -> Tensors:
    """AQLM, one codebook of vectors of 8."""
    return {
        f"{stem}.codes": _numbers(torch.int8, out, inputs // 8, 1),
        f"{stem}.codebooks": torch.rand(1, 256, 1, 8).half(),
        f"{stem}.scales": torch.rand(out, 1, 1, 1).half(),
    }


def mlx(stem: str, out: int, inputs: int) -> Tensors:
    """MLX of 4 bits."""
    return {
        f"{stem}.weight": _numbers(torch.uint32, out, inputs // 8),
        f"{stem}.scales": torch.rand(out, inputs // GROUP).half(),
        f"{stem}.biases": torch.rand(out, inputs // GROUP).half(),
    }


def bitnet(stem: str, out: int, inputs: int) -> Tensors:
    """BitNet of 1.58 bits, four values a byte."""
    return {f"{stem}.weight": _numbers(torch.uint8, out // 4, inputs), f"{stem}.weight_scale": torch.rand(1)}


Packer = Callable[[str, int, int], Tensors]
FORMS: Mapping[str, tuple[Packer, dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8_static": (fp8_static, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "compressed": (compressed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "nvfp4": (nvfp4, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    "modelopt": (modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "w8a8": (w8a8, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "hqq": (hqq, {"quant_method": "hqq"}),
    "torchao": (torchao, {"quant_method": "torchao"}),
    "quanto": (quanto, {"quant_method": "quanto", "weights": "int8"}),
    "eetq": (eetq, {"quant_method": "eetq"}),
    "aqlm": (aqlm, {"quant_method": "aqlm"}),
    "mlx": (mlx, {"bits": 4, "group_size": GROUP}),
    "bitnet": (bitnet, {"quant_method": "bitnet"}),
}
"""How a linear layer is packed, and the quantization_config of such a model, by the name of the form."""


def packed(base: Path, directory: Path, form: str, **config: Any) -> Path:
    """A quantised copy of a model: its linear layers in a form, its tables and norms as they are."""
    pack, said = FORMS[form]
    tensors: Tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors |= pack(name.removesuffix(".weight"), *tensor.shape)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    body = json.loads((base / "config.json").read_text())
    return models.write(directory, tensors, {**body, "torch_dtype": "bfloat16", "quantization_config": said, **config})
