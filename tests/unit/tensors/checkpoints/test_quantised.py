"""Quantised checkpoints are refused by the name of their form, whatever says that they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from continual.errors import Refuse
from continual.tensors import open_model
from tests.helpers import models, parts

Q = "model.layers.0.self_attn.q_proj"
FLOATS = {f"{Q}.weight": torch.zeros(4, 4), "model.norm.weight": torch.zeros(4)}


def written(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(models.CONFIG | (config or {})))
    return path


def refused(path: Path) -> str:
    with pytest.raises(Refuse) as refusal, open_model(path):
        pass
    assert refusal.value.reason == "quantised"
    assert "\n" not in str(refusal.value)
    assert "dequantise" in str(refusal.value) or "quantised from" in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "brand_new"}, "brand_new"),
        ({"group_size": 64, "bits": 4}, "MLX"),
    ],
)
def test_config_says_so(tmp_path: Path, body: dict[str, Any], form: str) -> None:
    said = refused(written(tmp_path / "m", FLOATS, {"quantization_config": body}))
    assert "quantization_config" in said
    assert f"({form})" in said
    inner = refused(written(tmp_path / "n", FLOATS, {"text_config": {"quantization_config": body}}))
    assert "text_config.quantization_config" in inner


@pytest.mark.parametrize(
    "body", [None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}]
)
def test_config_says_that_it_is_not(tmp_path: Path, body: dict[str, Any] | None) -> None:
    with open_model(written(tmp_path / "m", FLOATS, {"quantization_config": body})):
        pass


@pytest.mark.parametrize(
    ("tensors", "form"),
    [
        ({f"{Q}.qweight": torch.int32, f"{Q}.qzeros": torch.int32, f"{Q}.scales": torch.float16}, "GPTQ or AWQ"),
        ({f"{Q}.weight": torch.uint8, f"{Q}.weight.absmax": torch.uint8}, "bitsandbytes, 4 bits"),
        (
            {f"{Q}.weight": torch.uint8, f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.uint8},
            "bitsandbytes, 4 bits",
        ),
        ({f"{Q}.weight": torch.int8, f"{Q}.SCB": torch.float32}, "bitsandbytes, 8 bits"),
        ({f"{Q}.weight_packed": torch.int32, f"{Q}.weight_scale": torch.bfloat16}, "compressed-tensors"),
        ({"model.layers.0.mlp.experts.down_proj_blocks": torch.uint8}, "MXFP4"),
        ({f"{Q}.W_q": torch.uint8}, "HQQ"),
        ({f"{Q}._weight_qdata": torch.int8}, "TorchAO"),
        ({f"{Q}.weight": torch.uint8}, "U8 [4, 4], a packed weight"),
        ({f"{Q}.weight": torch.float8_e4m3fn, f"{Q}.weight_scale_inv": torch.float32}, "F8_E4M3 (FP8)"),
        ({f"{Q}.weight": torch.bfloat16, f"{Q}.weight_scale_inv": torch.float32}, "FP8"),
    ],
)
def test_tensors_say_so(tmp_path: Path, tensors: dict[str, torch.dtype], form: str) -> None:
    made = {name: torch.zeros(4, 4).to(dtype) for name, dtype in tensors.items()}
    said = refused(written(tmp_path / "m", made))
    assert form in said
    assert Q in said or "experts" in said


def test_whole_numbers_that_are_no_weights(tmp_path: Path) -> None:
    tensors = FLOATS | {
        "model.embeddings.position_ids": torch.arange(8).reshape(1, 8),
        "h.0.attn.bias": torch.zeros(1, 1, 4, 4, dtype=torch.uint8),
        "bn.num_batches_tracked": torch.tensor(3),
        "norm.weight": torch.zeros(4, dtype=torch.int8),
        "quantizer.codebook.weight": torch.zeros(4, 4),
    }
    with open_model(written(tmp_path / "m", tensors)):
        pass


@pytest.mark.parametrize("folder", ["unet", "text_encoder"])
def test_the_configuration_of_every_component_with_weights_counts(tmp_path: Path, folder: str) -> None:
    """diffusers quantises components one by one, each under its own configuration."""
    pipeline = parts.pipeline(tmp_path / "pipe")
    open_model(pipeline).close()
    file = pipeline / folder / "config.json"
    body = json.loads(file.read_text())
    file.write_text(json.dumps(body | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    assert refused(pipeline).startswith(f"{file}: quantization_config says")
