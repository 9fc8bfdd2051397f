"""The merge as a LoRA adapter: what PEFT makes of it, what our own reader makes of it, and the error that is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.errors import Halt, Misconfigured
from continual.executors.contract import silent
from continual.gates.lineage import LineageGate, trace
from continual.publish import lora
from continual.publish.folder import Target
from continual.tensors import Adapter, TaskVectors, open_model
from tests.helpers import models

IDS = torch.tensor([[1, 7, 3, 39, 0, 12]])
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# PEFT asks transformers for what that has deprecated
quiet = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
pytestmark = [pytest.mark.slow, quiet]
Chosen = Callable[[str, torch.Tensor], bool]


def is_matrix(_name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2


def llama(**more: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **more))


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    )


def merged(tmp_path: Path, base: Path, chosen: Chosen = is_matrix, rule: str = "mean", size: float = 0.05) -> api.Merge:
    """A merge of two fine-tunes of `base`, which differ from it in the tensors that are chosen."""
    making.init(base, tmp_path / "state", making.Recipe(rule=rule))
    merge = api.open(tmp_path / "state", write=True)
    origin = load_file(base / "model.safetensors")
    for seed in range(2):

        def only_chosen(tensors: dict[str, torch.Tensor]) -> None:
            tensors |= {name: t for name, t in origin.items() if not chosen(name, t)}

        assert (
            merge.fold(models.fine_tune(base, tmp_path / f"ft-{seed}", seed, size=size, change=only_chosen)).fate
            == "folded"
        )
    return merge


def export(merge: api.Merge, directory: Path, rank: int, dtype: str = "F32") -> lora.LoraReport:
    target = lora.LoraTarget(directory, rank, dtype)
    return lora.export(merge.base, merge.reading(), target, merge.executor, silent)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def peft_logits(base: Path, adapter: Path, architecture: Any) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(architecture.from_pretrained(base), adapter))


def agrees(tmp_path: Path, merge: api.Merge, report: lora.LoraReport, architecture: Any) -> None:
    """PEFT on the base gives the logits of the full export, which are not those of the base."""
    full = logits(architecture.from_pretrained(merge.export(Target(tmp_path / "full"))))
    assert not torch.allclose(full, logits(architecture.from_pretrained(tmp_path / "base")), atol=1e-3)
    torch.testing.assert_close(peft_logits(tmp_path / "base", report.directory, architecture), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["mean", "task-arithmetic"])
def test_peft_on_the_base_is_the_merged_model(tmp_path: Path, rule: str) -> None:
    llama().save_pretrained(tmp_path / "base")
    with merged(tmp_path, tmp_path / "base", rule=rule) as merge:
        report = export(merge, tmp_path / "adapter", 1000)
        assert (report.rank, report.adapted) == (16, 2 * 7 + 2)
        assert report.left_out == ()  # what an adapter cannot hold was not changed
        assert report.error < 1e-6
        assert report.nbytes == (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
        agrees(tmp_path, merge, report, transformers.LlamaForCausalLM)
        assert {p.name for p in report.directory.iterdir()} == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "continual.json",
        }


def test_the_error_is_that_of_the_trailing_singular_values(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    with merged(tmp_path, tmp_path / "base", chosen=lambda _name, _tensor: True) as merge:
        report = export(merge, tmp_path / "adapter", 2)
        trailing, norms = {}, {}
        for spec in merge.base.specs:
            tau = merge.read(spec.name).double().numpy()
            norms[spec.name] = float(np.square(tau).sum())
            sigma = np.linalg.svd(tau, compute_uv=False) if tau.ndim == 2 else np.concatenate([np.zeros(2), tau])
            trailing[spec.name] = float(np.square(sigma[2:]).sum())
        matrices = set(trailing) - set(report.left_out)
        assert report.error == pytest.approx((sum(trailing.values()) / sum(norms.values())) ** 0.5, abs=1e-6)
        assert report.error_adapted == pytest.approx(
            (sum(trailing[n] for n in matrices) / sum(norms[n] for n in matrices)) ** 0.5, abs=1e-6
        )
        assert report.error > report.error_adapted > 0.1
        worst = max(matrices, key=lambda n: trailing[n] / norms[n])
        assert report.worst == (worst, pytest.approx((trailing[worst] / norms[worst]) ** 0.5, abs=1e-6))
        told = json.loads((report.directory / "continual.json").read_text())["lora"]
        assert (told["rank"], told["error"], tuple(told["left_out"])) == (2, report.error, report.left_out)


def test_a_tied_table_is_left_out_and_counted(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    with merged(tmp_path, tmp_path / "base") as merge:
        report = export(merge, tmp_path / "adapter", 16)
        assert "model.embed_tokens.weight" in report.left_out
        squares = {s.name: float(merge.read(s.name).double().square().sum()) for s in merge.base.specs}
        expected = (squares["model.embed_tokens.weight"] / sum(squares.values())) ** 0.5
        assert report.error == pytest.approx(expected, abs=1e-6)
        assert report.error_adapted < 1e-6
        names = load_file(report.directory / "adapter_model.safetensors")
        assert not [name for name in names if "embed" in name or "lm_head" in name]
        peft_logits(tmp_path / "base", report.directory, transformers.LlamaForCausalLM)  # loads, and warns of nothing


@pytest.mark.parametrize("bare", [False, True], ids=["whole", "files of the inner model"])
def test_conv1d_weights_are_stored_transposed(tmp_path: Path, bare: bool) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    if bare:
        weights = load_file(tmp_path / "base/model.safetensors")
        weights = {name.removeprefix("transformer."): t for name, t in weights.items()}
        save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with merged(tmp_path, tmp_path / "base", chosen=lambda name, t: t.ndim == 2 and "wte" not in name) as merge:
        report = export(merge, tmp_path / "adapter", 16)
        config = json.loads((report.directory / "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] is True
        assert config["target_modules"][0] == "transformer.h.0.attn.c_attn"
        assert report.error < 1e-6
        agrees(tmp_path, merge, report, transformers.GPT2LMHeadModel)


@pytest.mark.parametrize(("make", "dtype"), [(llama, "F32"), (gpt2, "F32"), (llama, "bfloat16")])
def test_our_own_reader_finds_the_same_products(tmp_path: Path, make: Callable[[], Any], dtype: str) -> None:
    make().save_pretrained(tmp_path / "base")
    with merged(tmp_path, tmp_path / "base") as merge:
        report = export(merge, tmp_path / "adapter", 16, dtype=dtype)
        with open_model(report.directory) as model:
            assert isinstance(model, Adapter)
            lineage = trace(merge.base, model, LineageGate())
            assert len(lineage.folded) == report.adapted
            vectors = TaskVectors(merge.base, model, lineage)
            for name in lineage.folded:
                tau = merge.read(name)
                error = float((vectors.vector(name).tau - tau).norm() / tau.norm())
                assert error < (1e-6 if dtype == "F32" else 6e-3), name
                assert error <= report.worst[1] + 2e-7
        refused = merge.fold(report.directory)
        assert (refused.fate, refused.reason) == ("refused", "own-release")


def test_what_no_plain_adapter_holds_is_left_out(tmp_path: Path) -> None:
    """nn.MultiheadAttention reads its weights past a wrapper; transformers 5 has no nn.Linear for experts and their
    router, nor the name embed_out."""
    shapes = {
        "vision.attn.in_proj_weight": (24, 8),
        "vision.attn.out_proj.weight": (8, 8),
        "vision.conv1.weight": (8, 3, 4, 4),
        "decoder.embed_positions.weight": (12, 8),
        "embed_out.weight": (12, 8),
        "layers.0.mlp.experts.0.up_proj.weight": (12, 8),
        "layers.0.mlp.gate.weight": (4, 8),
        "layers.0.mlp.stacked": (2, 8, 8),
    }
    kept = {
        "text.embeddings.position_embeddings.weight": (12, 8),
        "layers.0.mlp.shared_expert.up_proj.weight": (12, 8),
        "layers.0.self_attn.out_proj.weight": (8, 4),
        "classifier.weight": (3, 8),
    }
    base = models.base(tmp_path / "base", shapes=shapes | kept)
    with merged(tmp_path, base, chosen=lambda _name, _tensor: True) as merge:
        report = export(merge, tmp_path / "adapter", 5)
        assert set(report.left_out) == set(shapes)
        weights = load_file(report.directory / "adapter_model.safetensors")
        head = "base_model.model."
        assert weights[f"{head}classifier.lora_B.weight"].shape == (3, 5)
        assert not weights[f"{head}classifier.lora_B.weight"][:, 3:].any(), "zeros beyond the tensor's own rank"
        assert weights[f"{head}text.embeddings.position_embeddings.lora_embedding_A"].shape == (5, 12)
        assert weights[f"{head}text.embeddings.position_embeddings.lora_embedding_B"].shape == (8, 5)


def test_bits_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    with merged(tmp_path, base) as merge:
        for workers in (1, 4):
            merge.settings.__dict__["workers"] = workers
            export(merge, tmp_path / f"adapter-{workers}", 3)
    one, four = ((tmp_path / f"adapter-{n}/adapter_model.safetensors").read_bytes() for n in (1, 4))
    assert one == four


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "empty")
    with api.open(tmp_path / "empty") as merge, pytest.raises(Misconfigured, match="nothing is folded"):
        export(merge, tmp_path / "out", 4)
    with merged(tmp_path, base) as merge:
        with pytest.raises(Misconfigured, match="rank = 0"):
            export(merge, tmp_path / "out", 0)
        with pytest.raises(Misconfigured, match="exists"):
            export(merge, base, 4)
        with pytest.raises(Misconfigured, match="no such directory"):
            export(merge, tmp_path / "nowhere/out", 4)
        merge.rescale("1e12")
        with pytest.raises(Halt, match=r"weight: its factors have values that F16"):
            export(merge, tmp_path / "out", 4, dtype="float16")
        assert not (tmp_path / "out").exists()
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
