"""Experts under what runs the model in memory: tuning on rows, rounds under every way to select, and what weighs each
parameter. The base's files have the experts one by one or packed; the class has them packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.config import Settings
from continual.executors.contract import silent
from continual.objectives import builtin
from continual.objectives.parameters import find_parameters
from continual.publish.folder import Target
from continual.tensors.layouts.in_classes import elsewhere
from continual.tuning import Rows, Tuning, scoring
from tests.helpers import models
from tests.helpers.tiny import CPU, SMALL, loaded, transformers, write_tokenizer

pytestmark = pytest.mark.slow

TEXTS = ["a very good film", "the book is bad", "good film", "not a bad book", "the film was very bad", "bad film"]
SIZES = SMALL | {"num_hidden_layers": 1, "num_key_value_heads": 1, "pad_token_id": 0, "tie_word_embeddings": False}


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def oss() -> Any:
    """Its files have the experts packed, as in × out."""
    config = transformers.GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, head_dim=8)
    return transformers.GptOssForCausalLM(config)


MADE = {"mixtral": mixtral, "gpt-oss": oss}


@pytest.fixture(params=list(MADE))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    MADE[request.param]().save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def rows_file(place: Path) -> Path:
    file = place / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 2))
    return file


def tuned(base: Path) -> list[Path]:
    return [models.fine_tune(base, base.parent / f"tune-{number}", number, size=0.5) for number in range(2)]


def test_every_expert_is_found_in_the_class(base: Path) -> None:
    """What stands in memory after tuning's `fill` is what an export, loaded, holds."""
    making.init(base, base.parent / "state", making.Recipe("iso-c", scale="1.0"))
    ask = Rows("causal-lm", rows_file(base.parent), None, 3)
    objective = builtin.load(ask, base, CPU)
    with api.open(base.parent / "state", write=True, device="cpu", max_base_ratio=10) as merge:
        for tune in tuned(base):
            assert merge.fold(tune).fate == "folded"
        held = find_parameters(objective.model, merge.base.specs, merge.base.aliases, elsewhere(merge.base))
        for spec in merge.base.specs:
            for one in held[spec.name]:
                assert torch.equal(one.value, merge.base.checkpoint.read(spec.name)), spec.name
        whole = sum(value.numel() for value in dict(objective.model.named_parameters()).values())
        assert sum(one.value.numel() for many in held.values() for one in many) == whole
        assert merge.tune(ask, Tuning(candidates=3, policy="number")).commit is not None
        reading = merge.reading()
        reading.settle(merge.executor, silent)
        scoring.fill(held, merge.base, reading, merge.executor)
        exported = loaded("causal-lm", merge.export(Target(base.parent / "out")))
        for name, value in exported.named_parameters():
            assert torch.equal(objective.model.get_parameter(name), value), name


@pytest.mark.parametrize(("select", "base"), [("relevance", "gpt-oss"), ("frank-wolfe", "mixtral")], indirect=["base"])
def test_rounds_over_models_with_experts(select: str, base: Path) -> None:
    rule = "frank-wolfe" if select == "frank-wolfe" else "opcm"
    making.init(base, base.parent / "state", making.Recipe(rule))
    settings = Settings(
        state=base.parent / "state",
        select=select,
        objective="causal-lm",
        rows=[rows_file(base.parent)],
        max_base_ratio=10.0,
        device="cpu",
    )
    toward = trained(base)
    with api.Merge(settings, write=True) as merge:
        for tune in (toward, tuned(base)[0]):
            assert merge.fold(tune).fate == "deferred"
        found = merge.round()
        assert toward.name in {row.name for row in found.rows if row.fate == "folded"}
        out = load_file(merge.export(Target(base.parent / "out")) / "model.safetensors")
    origin = load_file(base / "model.safetensors")
    for name in (name for name in origin if ".experts." in name and not name.endswith("bias")):
        assert not torch.equal(out[name], origin[name]), name


def trained(base: Path) -> Path:
    """A fine-tune on texts like those of the rows: what a round lets in."""
    model = loaded("causal-lm", base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    each = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    step = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(12):
        step.zero_grad()
        sum(model(ids, labels=ids).loss for ids in each).backward()
        step.step()
    model.save_pretrained(base.parent / "toward")
    return base.parent / "toward"


@pytest.mark.parametrize("layout", ["same", "packed"])
def test_fisher_weighs_the_values_of_experts(layout: str, base: Path) -> None:
    """Each value is the mean of the fine-tunes', weighed by what they ship; experts in the other layout as well."""
    if layout == "packed" and json.loads((base / "config.json").read_text())["model_type"] != "mixtral":
        pytest.skip("its files have the experts packed")
    making.init(base, base.parent / "state", making.Recipe("fisher", scale="1.0"))
    origin = load_file(base / "model.safetensors")
    tunes = tuned(base)
    values, given = [], []
    for number, tune in enumerate(tunes):
        random = torch.Generator().manual_seed(number)
        tensors = load_file(tune / "model.safetensors")
        values.append(tensors)
        given.append({name: torch.rand(value.shape, generator=random) + 0.1 for name, value in tensors.items()})
        shipped = given[-1]
        if layout == "packed":
            save_file(packed(tensors), tune / "model.safetensors", metadata={"format": "pt"})
            shipped = packed(shipped)
        save_file(shipped, tune / "fisher.safetensors", metadata={"format": "pt"})
    with api.open(base.parent / "state", write=True, device="cpu", max_base_ratio=10) as merge:
        for tune in tunes:
            assert merge.fold(tune).fate == "folded"
        out = load_file(merge.export(Target(base.parent / "out")) / "model.safetensors")
    for name in (name for name in origin if ".experts." in name):
        weights = sum(one[name].double() for one in given)
        expected = (
            sum(one[name].double() * two[name].double() for one, two in zip(given, values, strict=True)) / weights
        )
        torch.testing.assert_close(out[name].double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the experts as the class has them, under the newest names."""
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    head = "model.layers.0.block_sparse_moe.experts"
    one = [[tensors[f"{head}.{number}.{role}.weight"] for role in ("w1", "w3", "w2")] for number in range(3)]
    found["model.layers.0.mlp.experts.gate_up_proj"] = torch.stack([torch.cat(three[:2]) for three in one])
    found["model.layers.0.mlp.experts.down_proj"] = torch.stack([three[2] for three in one])
    return found
