"""How a candidate's tensors map to the base's, and every way in which it can be no fine-tune of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from continual.errors import Refuse
from continual.gates.contract import Headers
from continual.gates.lineage import LineageGate, trace
from continual.records import Lineage
from continual.tensors import BaseModel, Checkpoint, TaskVectors, describe, open_model
from continual.tensors.matched.matching import find_prefix
from tests.helpers import models
from tests.unit.gates import cases
from tests.unit.gates.cases import Case, fine_tune, headers

Tensors = dict[str, torch.Tensor]
TENSORS: Tensors = {
    "model.embed_tokens.weight": torch.randn(10, 4),
    "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4),
    "model.layers.1.mlp.up_proj.weight": torch.randn(6, 4),
    "model.norm.weight": torch.randn(4),
    "model.rotary.inv_ids": torch.arange(3),
}
UP = "model.layers.0.mlp.up_proj.weight"


def save(path: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    return cases.save(path, tensors, config if config is not None else {"model_type": "gemma"})


@pytest.fixture
def base(tmp_path: Path) -> Iterator[BaseModel]:
    with cases.described(save(tmp_path / "base", TENSORS)) as found:
        yield found


def traced(base: BaseModel, tmp_path: Path, tensors: Tensors, **policy: Any) -> Lineage:
    with open_model(save(tmp_path / "ft", tensors)) as model:
        lineage = trace(base, model, LineageGate(**policy))
        vectors = TaskVectors(base, model, lineage)
        for name in lineage.folded:
            assert vectors.vector(name).tau.shape == base.checkpoint.tensors[name].shape
        return lineage


def refused(base: BaseModel, tmp_path: Path, tensors: Tensors, **policy: Any) -> Refuse:
    with open_model(save(tmp_path / "ft", tensors)) as model, pytest.raises(Refuse) as refusal:
        trace(base, model, LineageGate(**policy))
    assert "ft" in str(refusal.value)
    return refusal.value


FOLDED = tuple(sorted(name for name, t in TENSORS.items() if t.is_floating_point()))


def test_same_names(base: BaseModel, tmp_path: Path) -> None:
    assert traced(base, tmp_path, TENSORS) == Lineage(FOLDED)


def test_carried_tensors_may_be_missing_or_other(base: BaseModel, tmp_path: Path) -> None:
    assert traced(base, tmp_path, {n: t for n, t in TENSORS.items() if n in FOLDED}) == Lineage(FOLDED)
    (tmp_path / "ft").rename(tmp_path / "other")
    assert traced(base, tmp_path, TENSORS | {"model.rotary.inv_ids": torch.zeros(99)}) == Lineage(FOLDED)


def test_a_head_stays_out_and_is_listed(base: BaseModel, tmp_path: Path) -> None:
    lineage = traced(base, tmp_path, TENSORS | {"score.weight": torch.zeros(2, 4), "classifier.bias": torch.zeros(2)})
    assert lineage.extra == ("classifier.bias", "score.weight")


@pytest.mark.parametrize(("prefix", "strip"), [(("", "wrapped."), ""), (("model.", ""), "model.")])
def test_one_prefix_may_be_added_or_removed(
    base: BaseModel, tmp_path: Path, prefix: tuple[str, str], strip: str
) -> None:
    tensors = {prefix[1] + name.removeprefix(strip): t for name, t in TENSORS.items()}
    lineage = traced(base, tmp_path, tensors | {"score.weight": torch.zeros(2, 4)})
    assert (lineage.folded, lineage.prefix, lineage.extra) == (FOLDED, prefix, ("score.weight",))


def test_two_towers_are_ambiguous(base: BaseModel, tmp_path: Path) -> None:
    refusal = refused(base, tmp_path, {tower + name: t for tower in ("query.", "doc.") for name, t in TENSORS.items()})
    assert refusal.reason == "prefix"
    assert "query." in str(refusal)
    assert "doc." in str(refusal)


def test_prefix_of_a_bare_model_and_its_language_model() -> None:
    bare = [f"layers.{i}.w" for i in range(50)]
    assert find_prefix(bare, [f"model.{n}" for n in bare] + ["lm_head.weight"], "x") == ("", "model.")
    assert find_prefix([f"model.{n}" for n in bare] + ["lm_head.weight"], [*bare, "lm_head.weight"], "x") == (
        "model.",
        "",
    )
    assert find_prefix(bare, bare[:-1], "x") == ("", "")
    assert find_prefix(bare, ["other"], "x") == ("", "")
    assert find_prefix(bare, [*bare, *(f"second.{n}" for n in bare)], "x") == ("", "")
    assert find_prefix(bare, ["adapter.layers.3.w"], "x") == ("", "adapter.")


def test_missing_tensors(base: BaseModel, tmp_path: Path) -> None:
    fewer = {n: t for n, t in TENSORS.items() if n != UP}
    refusal = refused(base, tmp_path, fewer)
    assert refusal.reason == "missing"
    assert UP in str(refusal)
    assert "missing = unchanged" in str(refusal)
    (tmp_path / "ft").rename(tmp_path / "first")
    lineage = traced(base, tmp_path, fewer, missing="unchanged")
    assert lineage.unchanged == (UP,)
    assert lineage.folded == tuple(n for n in FOLDED if n != UP)


def test_nothing_in_common_is_refused_whatever_the_policy(base: BaseModel, tmp_path: Path) -> None:
    refusal = refused(base, tmp_path, {"x": torch.zeros(1)}, missing="unchanged")
    assert (refusal.reason, "not a fine-tune of this base" in str(refusal)) == ("missing", True)


def test_what_the_index_does_not_name_stays_out_and_is_listed(base: BaseModel, tmp_path: Path) -> None:
    path = save(tmp_path / "ft", TENSORS | {"more.weight": torch.zeros(3)})
    (path / "model.safetensors").rename(path / "x.safetensors")
    index = {"weight_map": dict.fromkeys(TENSORS, "x.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_model(path) as model:
        lineage = trace(base, model, LineageGate())
    assert (lineage.folded, lineage.extra) == (FOLDED, ("more.weight",))


def test_other_shapes_are_named(base: BaseModel, tmp_path: Path) -> None:
    refusal = refused(base, tmp_path, TENSORS | {UP: torch.zeros(7, 4)}, vocab="common-rows")
    assert refusal.reason == "shape"
    for word in (UP, "[7, 4]", "[6, 4]"):
        assert word in str(refusal)


def test_double_weights(base: BaseModel, tmp_path: Path) -> None:
    refusal = refused(base, tmp_path, TENSORS | {UP: torch.zeros(6, 4, dtype=torch.float64)})
    assert (refusal.reason, UP in str(refusal)) == ("dtype", True)


@pytest.mark.parametrize("rows", [7, 13])
def test_vocabulary_rows(base: BaseModel, tmp_path: Path, rows: int) -> None:
    name = "model.embed_tokens.weight"
    tensors = TENSORS | {name: torch.randn(rows, 4)}
    refusal = refused(base, tmp_path, tensors)
    assert refusal.reason == "vocab"
    for word in (name, f"[{rows}, 4]", "[10, 4]", "common-rows"):
        assert word in str(refusal)
    with open_model(tmp_path / "ft") as model:
        lineage = trace(base, model, LineageGate(vocab="common-rows"))
        assert lineage.rows == {name: min(rows, 10)}
        tau = TaskVectors(base, model, lineage).vector(name).tau
    common = min(rows, 10)
    assert torch.equal(tau[:common], tensors[name][:common] - TENSORS[name][:common])
    assert not tau[common:].any()


def test_narrower_dtypes_are_recorded(base: BaseModel, tmp_path: Path) -> None:
    lineage = traced(base, tmp_path, {n: t.bfloat16() if t.is_floating_point() else t for n, t in TENSORS.items()})
    assert lineage.narrowed == dict.fromkeys(FOLDED, "BF16")


@pytest.mark.parametrize(
    ("ours", "theirs", "narrowed"),
    [("bfloat16", "float32", None), ("bfloat16", "float16", "F16"), ("float16", "bfloat16", "BF16")],
)
def test_neither_half_holds_the_other(tmp_path: Path, ours: str, theirs: str, narrowed: str | None) -> None:
    weight = torch.randn(6, 4)
    with open_model(save(tmp_path / "base", {"a.weight": weight.to(getattr(torch, ours))})) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        lineage = traced(describe(checkpoint), tmp_path, {"a.weight": weight.to(getattr(torch, theirs))})
    assert lineage.narrowed.get("a.weight") == narrowed


TABLE = TENSORS["model.embed_tokens.weight"]


def test_a_tied_alias_may_be_there_or_not(base: BaseModel, tmp_path: Path) -> None:
    lineage = traced(base, tmp_path, TENSORS | {"lm_head.weight": TABLE})
    assert (lineage.folded, lineage.extra) == (FOLDED, ())
    (tmp_path / "ft").rename(tmp_path / "first")
    only_head = {n: t for n, t in TENSORS.items() if n != "model.embed_tokens.weight"} | {"lm_head.weight": TABLE + 1}
    assert traced(base, tmp_path, only_head).folded == FOLDED
    with open_model(tmp_path / "ft") as model:
        tau = TaskVectors(base, model, trace(base, model, LineageGate())).vector("model.embed_tokens.weight").tau
    assert torch.equal(tau, (TABLE + 1) - TABLE)


def test_tied_names_that_differ_are_refused(base: BaseModel, tmp_path: Path) -> None:
    assert refused(base, tmp_path, TENSORS | {"lm_head.weight": TABLE.bfloat16()}).reason == "tied"
    (tmp_path / "ft").rename(tmp_path / "first")
    other = TABLE.clone()
    other[-1, -1] += 1
    with open_model(save(tmp_path / "ft", TENSORS | {"lm_head.weight": other})) as model:
        vectors = TaskVectors(base, model, trace(base, model, LineageGate()))
        with pytest.raises(Refuse, match=r"embed_tokens.*lm_head") as refusal:
            vectors.vector("model.embed_tokens.weight")
    assert refusal.value.reason == "tied"


def test_an_untied_head_is_extra(tmp_path: Path) -> None:
    config = {"model_type": "gemma", "tie_word_embeddings": False}
    with open_model(save(tmp_path / "base", TENSORS, config)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        assert traced(describe(checkpoint), tmp_path, TENSORS | {"lm_head.weight": TABLE}).extra == ("lm_head.weight",)


def _case(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], Case]:
    return lambda place: Case(LineageGate(), fine_tune(place, change))


def _two_towers(tensors: Tensors) -> None:
    both = {tower + name: t.clone() for tower in ("query.", "doc.") for name, t in tensors.items()}
    tensors.clear()
    tensors |= both


def _another_adapter(place: Path) -> Case:
    base, adapter = models.base(place / "base"), place / "adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.9.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.zeros(2, 16), f"{module}.lora_B.weight": torch.zeros(16, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return Case(LineageGate(), headers(base, adapter))


def adapter_of(place: Path, named: object) -> Headers:
    """An adapter of the small base that names a base."""
    base, adapter = models.base(place / "base"), place / "adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.zeros(2, 16), f"{module}.lora_B.weight": torch.zeros(16, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": named}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return headers(base, adapter)


def _of_another_base(place: Path) -> Case:
    return Case(LineageGate(), adapter_of(place, "mistralai/Mistral-7B-v0.3")._replace(repo="meta-llama/Llama-3.1-8B"))


BASES = {
    "meta-llama/Llama-3.1-8B": [
        *("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "unsloth/Llama-3.1-8B-unsloth-bnb-4bit", "x/Llama-3.1-8B-FP8-dynamic"),
        *("hugging-quants/Meta-Llama-3.1-8B-AWQ-INT4", "TheBloke/Llama-3.1-8B-GPTQ", "y/Llama-3.1-8B-Q4_K_M-GGUF"),
        *("RedHatAI/Meta-Llama-3.1-8B-quantized.w4a16", "z/Meta-Llama-3.1-8B-GPTQ-Int4", "a/Llama-3.1-8B-4bit"),
        *(
            "/models/whatever",
            "./out/sft",
            "../base",
            "base",
            "",
            None,
            3,
            "/x/models--meta-llama--Llama-3.1-8B/snapshots/f",
        ),
    ],
    "mistralai/Mistral-7B-v0.1": ["unsloth/mistral-7b-bnb-4bit", "unsloth/mistral-7b"],
    "Qwen/Qwen2.5-0.5B-Instruct": ["unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit", "Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int8"],
    "openai/gpt-oss-20b": ["unsloth/gpt-oss-20b-BF16", "unsloth/gpt-oss-20b-unsloth-bnb-4bit"],
    "Qwen/Qwen3-8B": [
        *("x/Qwen3-8B-FP8-Static", "x/Qwen3-8B-GPTQ-4bit-32g-actorder_True", "x/Qwen3-8B-AutoRound-int4-asym"),
        *("mlx-community/Qwen3-8B-4bit-DWQ", "x/Qwen3-8B-AQLM-2Bit-1x16", "x/Qwen3-8B-torchao-int4wo-gs128"),
        *("nvidia/Qwen3-8B-NVFP4A16", "x/Qwen3-8B-AWQ", "x/Qwen3-8B-HQQ-4bit", "Qwen/Qwen3-8B-FP8"),
    ],
}
OTHERS = [
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    ("Qwen/Qwen2.5-0.5B", "unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit"),
    ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"),
    ("meta-llama/Llama-3.1-8B", "/cache/models--org--other/snapshots/f"),
    ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
]


@pytest.mark.parametrize(("ours", "theirs"), [(ours, one) for ours, many in BASES.items() for one in many])
def test_another_name_of_the_same_base(tmp_path: Path, ours: str, theirs: object) -> None:
    assert LineageGate().judge(adapter_of(tmp_path, theirs)._replace(repo=ours)).lineage


@pytest.mark.parametrize(("ours", "theirs"), OTHERS)
def test_the_name_of_another_base(tmp_path: Path, ours: str, theirs: str) -> None:
    seen = adapter_of(tmp_path, theirs)
    with pytest.raises(Refuse) as refusal:
        LineageGate().judge(seen._replace(repo=ours))
    assert refusal.value.reason == "lineage"
    for word in ("adapter_config.json", "base_model_name_or_path", ours, "lineage = shapes"):
        assert word in str(refusal.value)
    assert LineageGate(lineage="shapes").judge(seen._replace(repo=ours)).lineage
    assert LineageGate().judge(seen).lineage, "a base that came from no repo has no name to compare"


def _tied(place: Path) -> Case:
    config = models.CONFIG | {"tie_word_embeddings": True}
    tensors = {name: torch.randn(shape) for name, shape in models.SHAPES.items() if name != "lm_head.weight"}
    table = tensors["model.embed_tokens.weight"]
    base = models.write(place / "base", tensors, config)
    alice = models.write(place / "alice", tensors | {"lm_head.weight": table.bfloat16()}, config)
    return Case(LineageGate(), headers(base, alice))


def _a_head(tensors: Tensors) -> None:
    tensors["score.weight"] = torch.zeros(2, 16)


def _index_without_a_tensor(place: Path) -> Case:
    base = models.base(place / "base")
    alice = models.fine_tune(base, place / "alice", 1)
    (alice / "model.safetensors").rename(alice / "model-00001-of-00001.safetensors")
    listed = {name: "model-00001-of-00001.safetensors" for name in models.SHAPES if name != "model.norm.weight"}
    (alice / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return Case(LineageGate(), headers(base, alice))


REFUSED = {
    "index": _index_without_a_tensor,
    "lineage": _of_another_base,
    "prefix": _case(_two_towers),
    "missing": _case(lambda t: t.pop("model.norm.weight")),
    "adapter-kind": _case(lambda t: t.update({"model.norm.lora_A.weight": torch.zeros(2, 4)})),
    "adapter-target": _another_adapter,
    "dtype": _case(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)})),
    "shape": _case(lambda t: t.update({"model.norm.weight": torch.zeros(17)})),
    "vocab": _case(lambda t: t.update({"model.embed_tokens.weight": torch.zeros(41, 16)})),
    "tied": _tied,
    "extra": lambda place: Case(LineageGate(extra="refuse"), fine_tune(place, _a_head)),
}


def test_a_message_names_the_tensors_that_are_lacking(base: BaseModel, tmp_path: Path) -> None:
    two = {name: tensor for name, tensor in TENSORS.items() if "layers" not in name}
    assert "lacks model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight of the base" in str(
        refused(base, tmp_path, two)
    )
