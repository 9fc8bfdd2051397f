"""What a quantised base is, by its headers: every linear layer under its own name, with its own shape."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual import making
from continual.engine.base import open_headers
from continual.errors import Refuse
from continual.tensors import open_model
from tests.helpers import models, packing
from tests.helpers.packing import FORMS

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    opened, form = open_headers(directory)
    with opened:
        assert form is not None
        return {name: info.shape for name, info in opened.tensors.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_is_there_under_its_name(tmp_path: Path, base: Path, form: str) -> None:
    directory = packing.packed(base, tmp_path / "packed", form)
    found = shapes(directory)
    more = {name: shape for name, shape in found.items() if name.endswith(".bias")}
    assert len(more) == (6 if form == "gptq" else 0)
    assert {name: shape for name, shape in found.items() if name not in more} == models.SHAPES
    opened, _ = open_headers(directory)
    with opened:
        assert {opened.tensors[name].dtype for name in models.SHAPES} == {"BF16"}
    with pytest.raises(Refuse) as refusal:  # whoever reads weights refuses it as before
        open_model(directory).close()
    assert refusal.value.reason == "quantised"


def test_a_model_that_is_not_quantised_is_as_it_is(base: Path) -> None:
    opened, form = open_headers(base)
    with opened:
        assert form is None
        assert {name: info.dtype for name, info in opened.tensors.items()} == dict.fromkeys(models.SHAPES, "F32")


def written(directory: Path, tensors: Tensors, quantisation: Mapping[str, object], **config: object) -> Path:
    return models.write(directory, tensors, {**models.CONFIG, "quantization_config": dict(quantisation), **config})


@pytest.mark.parametrize(("bits", "rows"), [(2, 4), (3, 6), (4, 8), (8, 16)])
@pytest.mark.parametrize("order", [True, False])
def test_gptq_of_any_bits(tmp_path: Path, bits: int, rows: int, order: bool) -> None:
    """64 inputs, 24 outputs; older files have no order of the inputs."""
    tensors = {
        "a.qweight": torch.zeros(rows, 24, dtype=torch.int32),
        "a.scales": torch.zeros(2, 24).half(),
        "a.qzeros": torch.zeros(2, 3, dtype=torch.int32),
    }
    if order:
        tensors["a.g_idx"] = torch.zeros(64, dtype=torch.int32)
    found = shapes(written(tmp_path / "m", tensors, {"quant_method": "gptq", "bits": bits, "group_size": 32}))
    assert found == {"a.weight": (24, 64)}


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """The model has experts × inputs × outputs; the blocks are experts × outputs × groups × 16 bytes."""
    stem = "model.layers.0.mlp.experts"
    tensors = {
        f"{stem}.gate_up_proj_blocks": torch.zeros(3, 10, 2, 16, dtype=torch.uint8),
        f"{stem}.gate_up_proj_scales": torch.zeros(3, 10, 2, dtype=torch.uint8),
        f"{stem}.gate_up_proj_bias": torch.zeros(3, 10).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 64).bfloat16(),
    }
    directory = written(tmp_path / "m", tensors, {"quant_method": "mxfp4"})
    sides = (8 + 64) + (3 + 10) + 3 * (64 + 10)  # a matrix, the biases, and three experts, each a layer of its own
    assert making.survey(directory, making.Recipe(width=4)).state_bytes == 4 * 4 * sides + 5 * 4 * 4 * 8
    assert shapes(directory) == {
        f"{stem}.gate_up_proj": (3, 64, 10),
        f"{stem}.gate_up_proj_bias": (3, 10),
        "model.layers.0.self_attn.q_proj.weight": (8, 64),
    }


def test_layers_that_a_class_keeps_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2 has inputs × outputs; quantised layers are of outputs × inputs. A weight that was only cast stays."""
    tensors = packing.nf4("transformer.h.0.attn.c_attn", 24, 8) | packing.int8("lm_head", 16, 8)
    tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(8, 32).to(torch.float8_e4m3fn)
    found = shapes(written(tmp_path / "m", tensors, {"quant_method": "bitsandbytes"}, model_type="gpt2"))
    assert found == {
        "transformer.h.0.attn.c_attn.weight": (8, 24),
        "transformer.h.0.mlp.c_fc.weight": (8, 32),
        "lm_head.weight": (16, 8),
    }


def test_packed_numbers_kept_as_another_dtype(tmp_path: Path) -> None:
    """bitsandbytes of 4 bits, stored as bfloat16 for FSDP: a quarter as many numbers."""
    tensors = packing.nf4("a", 16, 32)
    tensors["a.weight"] = torch.zeros(16 * 32 // 4, 1).bfloat16()
    assert shapes(written(tmp_path / "m", tensors, {"quant_method": "bitsandbytes"})) == {"a.weight": (16, 32)}


def test_fp8_stacks_and_what_comfyui_writes(tmp_path: Path) -> None:
    narrow = torch.zeros(2, 8, 4).to(torch.float8_e4m3fn)
    tensors = {
        "experts.gate_up_proj": narrow,
        "experts.gate_up_proj_scale": torch.zeros(2, 1, 4),
        "blocks.0.attn.qkv.weight": torch.zeros(12, 4).to(torch.float8_e5m2),
        "blocks.0.attn.qkv.scale_weight": torch.zeros(1),
        "blocks.0.attn.qkv.bias": torch.zeros(12).half(),
        "blocks.0.gate.scale": torch.zeros(4),
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
    }
    directory = models.write(tmp_path / "m", tensors, {})
    assert shapes(directory) == {
        "experts.gate_up_proj": (2, 8, 4),
        "blocks.0.attn.qkv.weight": (12, 4),
        "blocks.0.attn.qkv.bias": (12,),
        "blocks.0.gate.scale": (4,),  # of a layer that is not packed
    }


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("tensors", "quantisation", "said"),
    [
        ({"a.B": torch.zeros(4, 8, dtype=torch.int32)}, GPTQ, r"a\.B I32 \[4, 8\] is of a form that is not known"),
        ({"a.qweight": torch.zeros(4, 8, dtype=torch.int32)}, GPTQ, r"a\.qweight .* has no scales"),
        (packing.gptq("a", 16, 32, order=False), {"quant_method": "gptq"}, "of as many bits as nothing says"),
        (packing.gptq("a", 16, 32, order=False), {"quant_method": "gptq", "bits": 4.5}, "as nothing says"),
        ({**packing.awq("a", 16, 32), "a.scales": torch.zeros(4, 12)}, GPTQ, "in a layout that is not known"),
        (packing.nf4("a", 16, 32, said=[16, 64]), {}, r"cannot hold the \[16, 64\]"),
        (packing.nf4("a", 16, 32, said=["x"]), {}, "is no list of sizes"),
        ({"a.weight": torch.zeros(4, 8, dtype=torch.int8)}, {"quant_method": "x"}, "is of a form that is not known"),
        ({"a.W_q": torch.zeros(4, 8, dtype=torch.uint8)}, {"quant_method": "hqq"}, "has no shape beside it"),
        ({"a._weight_qdata": torch.zeros(4, 8, dtype=torch.int32)}, {}, "is packed in a layout"),
        (packing.fp8("a", 4, 8) | {"a.qweight": torch.zeros(1, 4, dtype=torch.int32)}, {}, "no scales"),
        (packing.gptq("a", 16, 32) | packing.int8("a", 16, 32), GPTQ, r"is a\.weight, and so is another one"),
        (packing.gptq("a", 16, 32) | {"a.weight": torch.zeros(16, 32)}, GPTQ, "is there packed as well"),
    ],
)
def test_what_nothing_says_is_refused(
    tmp_path: Path, tensors: Tensors, quantisation: Mapping[str, object], said: str
) -> None:
    directory = written(tmp_path / "m", tensors, quantisation)
    with pytest.raises(Refuse) as refusal:
        open_headers(directory)
    assert refusal.value.reason == "quantised"
    message = str(refusal.value)
    assert re.search(said, message), message
    assert message.endswith("(adapters over a quantised copy fold into it as well)")


def test_nothing_large_is_read(tmp_path: Path, base: Path) -> None:
    """Only what says a shape, once for all layers of one name."""
    directory = packing.packed(base, tmp_path / "packed", "nf4")
    file = directory / "model.safetensors"
    kept = {name for name in load_file(file) if "layers.0" in name and "quant_state" in name}
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    data = bytearray(file.read_bytes())
    for name, entry in header.items():
        if name not in kept and name != "__metadata__":
            begin, end = (8 + size + at for at in entry["data_offsets"])
            data[begin:end] = bytes(end - begin)
    file.write_bytes(data)
    assert shapes(directory) == models.SHAPES
