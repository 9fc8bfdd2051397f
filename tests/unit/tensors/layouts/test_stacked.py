"""LoRA on packed experts, written by hand: which parameter and which axis is meant, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from continual.gates.lineage import LineageGate, trace
from continual.tensors import Adapter, LayerVectors, TaskVectors, open_model
from continual.tensors.vectors.vectors import Content
from tests.helpers import models
from tests.helpers.adapters import Tensors, based, plain, refused, task_vectors

EXPERTS, HIDDEN, INNER, RANK = 3, 8, 6, 2
HEAD = "model.layers.0.mlp.experts"
QWEN = {"model_type": "qwen3_moe", "tie_word_embeddings": False}
OSS = {"model_type": "gpt_oss", "tie_word_embeddings": False}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def base(path: Path, config: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> Path:
    stacks = shapes or {"gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN), "down_proj": (EXPERTS, HIDDEN, INNER)}
    tensors = {f"{HEAD}.{name}": torch.randn(shape) for name, shape in stacks.items()}
    return models.write(path, {"model.embed_tokens.weight": torch.randn(20, HIDDEN)} | tensors, config or QWEN)


def factors(module: str, inner: int, outer: int, rank: int = RANK, experts: int = EXPERTS) -> Tensors:
    """A and B as every version of PEFT lays them out."""
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_A.weight": torch.randn(experts * rank, inner),
        f"{name}.lora_B.weight": torch.randn(outer, rank * experts),
    }


def product(tensors: Tensors, module: str, scale: float, *, by_input: bool = False, rank: int = RANK) -> torch.Tensor:
    """What PEFT adds, as its own sum over the indices says it."""
    a, b = (tensors[f"base_model.model.{module}.lora_{one}.weight"] for one in "AB")
    a = a.reshape(-1, rank, a.shape[1])
    b = b.reshape(b.shape[0], rank, -1)
    return torch.einsum("ore,eri->eio" if by_input else "ore,eri->eoi", b, a) * scale


def both(inner: int, outer: int, *others: int) -> Tensors:
    """Of two parameters: the first is wrapped by the second."""
    return factors(f"{HEAD}.base_layer", inner, outer) | factors(HEAD, *others)


@pytest.mark.parametrize("by_input", [False, True])
def test_shapes_say_which_parameter_and_which_axis(by_input: bool, tmp_path: Path) -> None:
    """As PEFT 0.19.1 and later write it, and as 0.18 did."""
    sides = ((2 * INNER, HIDDEN), (HIDDEN, INNER)) if by_input else ((HIDDEN, 2 * INNER), (INNER, HIDDEN))
    tensors = both(*sides[0], *sides[1])
    adapter = plain(tmp_path / "x", tensors, target_parameters=TARGETS, target_modules=[])
    found, lineage, _ = task_vectors(base(tmp_path / "base"), adapter)
    assert lineage.folded == (f"{HEAD}.down_proj", f"{HEAD}.gate_up_proj")
    assert lineage.repackings == ()
    gate = product(tensors, f"{HEAD}.base_layer", 2.0, by_input=by_input)
    down = product(tensors, HEAD, 2.0, by_input=by_input)
    torch.testing.assert_close(found[f"{HEAD}.gate_up_proj"], gate)
    torch.testing.assert_close(found[f"{HEAD}.down_proj"], down)


def test_a_stack_is_made_one_expert_at_a_time_and_in_runs_alike(tmp_path: Path) -> None:
    tensors = both(HIDDEN, 2 * INNER, INNER, HIDDEN)
    adapter = plain(tmp_path / "x", tensors, target_parameters=TARGETS)
    origin = based(base(tmp_path / "base"))
    with origin.checkpoint, open_model(adapter) as model:
        lineage = trace(origin, model, LineageGate())
        reader = TaskVectors(origin, model, lineage, run=7)
        for spec in (spec for spec in origin.specs if spec.kind == "stack"):
            whole, content = reader.vector(spec.name), Content()
            assert torch.equal(torch.stack(list(reader.experts(spec, content))), whole.tau)
            assert (content.digest(), content.nbytes) == (whole.digest, whole.nbytes_read)
            runs = [(start, values.clone()) for start, _, values in reader.runs(spec.name, None, share=0.5)]
            assert all(torch.equal(values, whole.tau.view(-1)[at : at + len(values)]) for at, values in runs)
            # the whole stack is not in memory for one of its experts
            stack = 4 * spec.numel
            assert reader.nbytes(spec.name) - reader.nbytes(spec.name, whole=False) == stack - stack // EXPERTS
        model.check_unchanged()


def thin(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors of each expert, as a state that keeps adapters takes them."""
    origin = based(path / "base")
    with origin.checkpoint, open_model(path / "packed") as model:
        assert isinstance(model, Adapter)
        lineage = trace(origin, model, LineageGate())
        reader = LayerVectors(origin, model, lineage)
        return {s.name: found[:2] for s in origin.specs if s.name in lineage.folded for found in reader.read(s)}


@pytest.mark.parametrize("by_input", [False, True])
def test_experts_one_by_one_get_their_own_factors(by_input: bool, tmp_path: Path) -> None:
    """The digest is that of an adapter of each expert by itself: the same model twice is a duplicate."""
    sides = ((2 * INNER, HIDDEN), (HIDDEN, INNER)) if by_input else ((HIDDEN, 2 * INNER), (INNER, HIDDEN))
    tensors = both(*sides[0], *sides[1])
    packed = plain(tmp_path / "packed", tensors, target_parameters=TARGETS)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    origin = {f"{HEAD}.{n}.{role}.weight": torch.randn(s) for n in range(EXPERTS) for role, s in shapes.items()}
    models.write(tmp_path / "base", origin, QWEN)
    found, lineage, digest = task_vectors(tmp_path / "base", packed)
    assert set(found) == set(origin)
    assert lineage.repackings[0] == ("experts.*.down_proj.weight", "experts.down_proj")
    gate = product(tensors, f"{HEAD}.base_layer", 2.0, by_input=by_input)
    down = product(tensors, HEAD, 2.0, by_input=by_input)
    single: Tensors = {}
    for number in range(EXPERTS):
        for role, expected in (
            ("gate_proj", gate[number, :INNER]),
            ("up_proj", gate[number, INNER:]),
            ("down_proj", down[number]),
        ):
            torch.testing.assert_close(found[f"{HEAD}.{number}.{role}.weight"], expected)
            pair = "A", "B"
            module = HEAD if role == "down_proj" else f"{HEAD}.base_layer"
            a, b = (tensors[f"base_model.model.{module}.lora_{one}.weight"] for one in pair)
            a, b = a.view(EXPERTS, RANK, -1)[number], b.view(-1, RANK, EXPERTS)[:, :, number]
            a, b = (b.T, a.T) if by_input else (a, b)
            rows = slice(INNER, None) if role == "up_proj" else slice(None, INNER if role == "gate_proj" else None)
            single[f"base_model.model.{HEAD}.{number}.{role}.lora_A.weight"] = a.clone(
                memory_format=torch.contiguous_format
            )
            single[f"base_model.model.{HEAD}.{number}.{role}.lora_B.weight"] = b[rows].clone(
                memory_format=torch.contiguous_format
            )
    assert all(
        torch.allclose(left @ right.mT, found[name].double(), atol=1e-5)
        for name, (left, right) in thin(tmp_path).items()
    )
    again, _, same = task_vectors(tmp_path / "base", plain(tmp_path / "single", single))
    assert all(torch.equal(again[name], found[name]) for name in found)
    assert same == digest


def test_a_square_stack_goes_with_the_others(tmp_path: Path) -> None:
    """gpt-oss has hidden states as wide as its experts: the fused stack says how the factors lie."""
    origin = base(tmp_path / "base", OSS, gate_up_proj=(EXPERTS, 8, 16), down_proj=(EXPERTS, 8, 8))
    tensors = both(8, 16, 8, 8)
    found, _, _ = task_vectors(origin, plain(tmp_path / "x", tensors, target_parameters=TARGETS))
    torch.testing.assert_close(found[f"{HEAD}.down_proj"], product(tensors, HEAD, 2.0, by_input=True))


@pytest.mark.parametrize(
    ("config", "version", "by_input"),
    [
        (QWEN, "0.18.1", True),
        (QWEN, "0.19.0", True),
        (QWEN, "0.19.1", False),
        (QWEN, "0.21.0.dev0@abc", False),
        (OSS, "0.18.0", True),
        (OSS, "0.19.0", None),
        (OSS, "0.21.0", None),
        (QWEN, None, None),
        (QWEN, "new", None),
        ({"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}, "0.21.0", None),
    ],
)
def test_a_square_stack_alone_is_read_by_the_version(
    config: dict[str, Any], version: str | None, by_input: bool | None, tmp_path: Path
) -> None:
    origin = base(tmp_path / "base", config | {"tie_word_embeddings": False}, down_proj=(EXPERTS, 8, 8))
    tensors = factors(HEAD, 8, 8)
    adapter = plain(tmp_path / "x", tensors, target_parameters=["down_proj"], peft_version=version)
    if by_input is None:
        refusal = refused(origin, adapter)
        assert refusal.reason == "adapter-kind"
        assert "in more than one way, and peft_version" in str(refusal)
        return
    found, _, _ = task_vectors(origin, adapter)
    torch.testing.assert_close(found[f"{HEAD}.down_proj"], product(tensors, HEAD, 2.0, by_input=by_input))


def test_two_parameters_of_one_shape_are_not_told_apart(tmp_path: Path) -> None:
    origin = base(tmp_path / "base", up_proj=(EXPERTS, 8, 8), down_proj=(EXPERTS, 8, 8))
    adapter = plain(tmp_path / "x", both(8, 8, 8, 8), target_parameters=["up_proj", "down_proj"], peft_version="0.21.0")
    refusal = refused(origin, adapter)
    assert refusal.reason == "adapter-kind"
    assert "down_proj [3, 8, 8], up_proj [3, 8, 8] in more than one way" in str(refusal)


def test_ranks_and_alphas_are_those_of_the_parameter(tmp_path: Path) -> None:
    tensors = factors(f"{HEAD}.base_layer", HIDDEN, 2 * INNER, rank=4) | factors(HEAD, INNER, HIDDEN)
    adapter = plain(
        tmp_path / "x",
        tensors,
        target_parameters=["gate_up_proj", "down_proj", "gate.weight"],
        rank_pattern={r".*\.gate_up_proj": 4, "mlp.experts": 7},
        alpha_pattern={r".*\.gate_up_proj": 2},
    )
    found, _, _ = task_vectors(base(tmp_path / "base"), adapter)
    gate = product(tensors, f"{HEAD}.base_layer", 0.5, rank=4)
    torch.testing.assert_close(found[f"{HEAD}.gate_up_proj"], gate)
    torch.testing.assert_close(found[f"{HEAD}.down_proj"], product(tensors, HEAD, 2.0))


@pytest.mark.parametrize(
    ("tensors", "reason", "said"),
    [
        (factors(HEAD, HIDDEN, 2 * INNER, rank=3), "shape", "fit none of its parameters down_proj [3, 8, 6] (rank 2)"),
        (factors(HEAD, HIDDEN, 2 * INNER, experts=4), "shape", "[8, 8] × [12, 8], fit none of its parameters"),
        (factors(HEAD, HIDDEN, 2 * INNER + 2), "shape", "[6, 8] × [14, 6], fit none of its parameters"),
        (both(HIDDEN, 2 * INNER, HIDDEN, 2 * INNER), "shape", "and [6, 8] × [12, 6], fit none of its parameters"),
        (factors("model.layers.7.mlp.experts.base_layer", 8, 12), "adapter-target", "layers.7.mlp.experts"),
        (factors("model.layers.0.other.experts", 8, 8), "adapter-target", "layers.0.other.experts"),
    ],
)
def test_factors_that_fit_no_parameter(tensors: Tensors, reason: str, said: str, tmp_path: Path) -> None:
    refusal = refused(base(tmp_path / "base"), plain(tmp_path / "x", tensors, target_parameters=TARGETS))
    assert refusal.reason == reason
    assert said in str(refusal)


@pytest.mark.parametrize(
    ("config", "number", "said"),
    [
        (QWEN, EXPERTS, "gate_up_proj of the base has 3 experts"),
        (OSS, 0, "packs its experts into model.layers.0.mlp.experts.gate_up_proj as in × out"),
    ],
)
def test_single_experts_that_a_stack_has_no_place_for(
    config: dict[str, Any], number: int, said: str, tmp_path: Path
) -> None:
    module = f"base_model.model.{HEAD}.{number}.up_proj"
    tensors = {f"{module}.lora_A.weight": torch.randn(2, HIDDEN), f"{module}.lora_B.weight": torch.randn(INNER, 2)}
    refusal = refused(base(tmp_path / "base", config), plain(tmp_path / "x", tensors))
    assert refusal.reason == "adapter-target"
    assert said in str(refusal)


def test_one_expert_alone_changes_its_rows_alone(tmp_path: Path) -> None:
    module = f"base_model.model.{HEAD}.1.up_proj"
    tensors = {f"{module}.lora_A.weight": torch.randn(2, HIDDEN), f"{module}.lora_B.weight": torch.randn(INNER, 2)}
    found, lineage, _ = task_vectors(base(tmp_path / "base"), plain(tmp_path / "x", tensors))
    assert lineage.folded == (f"{HEAD}.gate_up_proj",)
    expected = torch.zeros(EXPERTS, 2 * INNER, HIDDEN)
    expected[1, INNER:] = 2.0 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    torch.testing.assert_close(found[f"{HEAD}.gate_up_proj"], expected)
    odd = {f"{module}.lora_A.weight": torch.randn(2, HIDDEN), f"{module}.lora_B.weight": torch.randn(INNER + 1, 2)}
    refusal = refused(tmp_path / "base", plain(tmp_path / "odd", odd))
    assert refusal.reason == "shape"
    assert "expert 1 of model.layers.0.mlp.experts.gate_up_proj" in str(refusal)
