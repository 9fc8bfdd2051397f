"""What is no safetensors checkpoint is recognised, and said in one line with what to do."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from continual.errors import Refuse
from continual.tensors import open_model
from continual.tensors.checkpoints.foreign import by_bytes, is_factor

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


def zipped() -> bytes:
    into = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, into)
    return into.getvalue()


def refused(path: Path) -> Refuse:
    with pytest.raises(Refuse) as refusal, open_model(path):
        pass
    assert path.name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    return refusal.value


BYTES = [
    (LFS, "foreign", "Git LFS pointer", "git lfs pull"),
    (b"GGUF\x03\0\0\0" + bytes(100), "foreign", "GGUF", "made from"),
    (b"<!DOCTYPE html>\n<html><head>" + b" " * 100, "foreign", "HTML page", "download"),
    (b"\n  <html lang=en>" + b" " * 100, "foreign", "HTML page", "download"),
    (b'{"error": "Repository not found, or you are not logged in"}', "foreign", "JSON text", "download"),
    (b"Entry not found: the file is not there", "foreign", "a text", "download"),
    (bytes(4096), "foreign", "zeros", "download"),
    (zipped(), "pickle", "torch.save", "convert it"),
    (pickle.dumps({"a": list(range(50))}), "pickle", "pickle", "convert it"),
    (b"\x89HDF\r\n\x1a\n" + bytes(100), "foreign", "HDF5", "convert it"),
    (b"/annex/objects/SHA256E-s1--9f.safetensors", "foreign", "git-annex", "git annex get"),
]


@pytest.mark.parametrize(("data", "reason", "what", "do"), BYTES)
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_file_that_is_something_else(tmp_path: Path, name: str, data: bytes, reason: str, what: str, do: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_bytes(data)
    if name.startswith("adapter"):
        (tmp_path / "m" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    refusal = refused(tmp_path / "m")
    assert refusal.reason == reason
    for words in (name, what, do):
        assert words in str(refusal)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_small_file_that_is_a_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    if "index" not in name:
        save_file({"a": torch.zeros(2)}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / name).write_bytes(LFS)
    refusal = refused(tmp_path / "m")
    assert (refusal.reason, name in str(refusal), "git lfs pull" in str(refusal)) == ("foreign", True, True)


def test_no_safetensors_file_begins_like_something_else() -> None:
    """Whatever the length of its header: a first byte can be that of a letter, a brace or a mark of a zip."""
    for count in range(300):
        data = save({"a": torch.zeros(1)}, metadata={"k": "v" * count})
        assert by_bytes(data[:64]) is None, data[:16]


NAMES = [
    (["model-q4_k_m.gguf", "config.json"], "foreign", "GGUF"),
    (["global_step500", "latest", "zero_to_fp32.py"], "sharded-state", "DeepSpeed"),
    (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "sharded-state", "zero_to_fp32.py"),
    (["pytorch_model_fsdp.bin"], "sharded-state", "merge-weights"),
    (["__0_0.distcp", "__1_0.distcp", ".metadata"], "sharded-state", "FSDP"),
    (["model.onnx"], "foreign", "ONNX"),
    (["weights.npz", "config.json"], "foreign", "MLX"),
    (["tf_model.h5", "config.json"], "foreign", "TensorFlow"),
    (["flax_model.msgpack", "config.json"], "foreign", "Flax"),
    (["openvino_model.xml", "openvino_model.bin"], "foreign", "OpenVINO"),
    (["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], "foreign", "TensorFlow"),
    (["pytorch_model.bin", "config.json"], "pickle", "convert them to safetensors"),
    (["model.tar.gz"], "foreign", "unpack"),
    (["llama.nemo"], "sharded-state", "NeMo"),
]


@pytest.mark.parametrize(("names", "reason", "words"), NAMES)
def test_a_directory_that_holds_something_else(tmp_path: Path, names: list[str], reason: str, words: str) -> None:
    (tmp_path / "m").mkdir()
    for name in names:
        (tmp_path / "m" / name).write_bytes(b"{}")
    refusal = refused(tmp_path / "m")
    assert (refusal.reason, words in str(refusal)) == (reason, True), str(refusal)
    assert any(name in str(refusal) for name in names)


def test_names_that_are_no_factors() -> None:
    for name in ("model.layers.0.self_attn.kv_a_proj.weight", "lora.weight", "colora_A.weight", "flora_down.weight"):
        assert not is_factor(name), name
    with_own = {f"layers.{i}.weight": torch.zeros(1) for i in range(5)} | {
        "layers.0.lora_A.speech.weight": torch.zeros(1)
    }
    assert sum(map(is_factor, with_own)) == 1


def test_a_model_may_have_factors_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    names = [f"layers.{i}.weight" for i in range(5)] + ["layers.0.lora_A.speech.weight"]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "phi4_multimodal"}))
    with open_model(tmp_path / "m"):
        pass
