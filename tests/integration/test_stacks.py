"""Packed experts: a stack of E matrices is folded, unfolded, combined and read as the same E matrices are that stand in
tensors of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import continual
from tests.helpers import models, stores

pytestmark = pytest.mark.slow

EXPERTS, MODELS = 3, 3
PACKED = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.experts.gate_up_proj": (EXPERTS, 12, 8),
    "model.layers.0.mlp.experts.down_proj": (EXPERTS, 8, 6),
    "model.norm.weight": (8,),
}
CONFIG = {"model_type": "qwen3_moe", "tie_word_embeddings": False}
RULES: dict[str, dict[str, object]] = {
    "opcm": {},
    "opcm rows": {"variant": "rows"},
    "iso-c": {},
    "tsv-m": {},
    "gram": {"pull": 0.5},
    "mean": {},
    "task-arithmetic": {},
    "magmax": {},
    "ties": {"trim": "tensor"},
    "ties model": {},
    "mean breadcrumbs": {"before": ["breadcrumbs"]},
    "opcm trimmed": {"before": ["trim:density=0.5:over=tensor"]},
}


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each expert as a tensor of its own, under a name that no family has."""
    found = {}
    for name, value in tensors.items():
        if ".experts." in name:
            head, own = name.split("experts.")
            found |= {f"{head}experts.{number}.{own}.weight": one for number, one in enumerate(value)}
        else:
            found[name] = value
    return found


def together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `apart`."""
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for name in PACKED:
        if ".experts." in name:
            head, own = name.split("experts.")
            found[name] = torch.stack([tensors[f"{head}experts.{number}.{own}.weight"] for number in range(EXPERTS)])
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """A base and fine-tunes of it, packed and apart. The second fine-tune leaves one stack as it is in the base, the
    third one expert."""
    root = tmp_path_factory.mktemp("stacks")
    random = torch.Generator().manual_seed(1)
    made = {name: torch.randn(shape, generator=random) for name, shape in PACKED.items()}
    packed = [models.write(root / "packed-0", made, CONFIG)]
    for number in range(1, MODELS + 1):
        tuned = {n: t + 0.05 * torch.randn(t.shape, generator=random) for n, t in made.items()}
        if number == 2:
            tuned["model.layers.0.mlp.experts.down_proj"] = made["model.layers.0.mlp.experts.down_proj"]
        if number == 3:
            tuned["model.layers.0.mlp.experts.gate_up_proj"][1] = made["model.layers.0.mlp.experts.gate_up_proj"][1]
        packed.append(models.write(root / f"packed-{number}", tuned, CONFIG))
    singles = [
        models.write(root / f"apart-{number}", apart(load_file(path / "model.safetensors")), {"model_type": "other"})
        for number, path in enumerate(packed)
    ]
    return packed, singles


def merged(state: Path, base: Path, tunes: list[Path], rule: str, *, scale: str | None = None) -> continual.Merge:
    """An open merge of all of them."""
    name = rule.split()[0]
    continual.init(base, state, continual.Recipe(name, RULES[rule], scale=scale))
    merge = continual.open(state, write=True)
    for tune in tunes:
        assert merge.fold(tune).fate == "folded"
    return merge


def exported(merge: continual.Merge, to: Path) -> dict[str, torch.Tensor]:
    merge.export(to)
    return load_file(to / "model.safetensors")


@pytest.mark.parametrize("rule", RULES)
def test_a_stack_is_folded_as_its_experts_are(rule: str, pair: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    for scale in ("0.7", None) if rule in ("opcm", "gram") else ("0.7",):
        found = []
        for which, paths in zip(("packed", "apart"), pair, strict=True):
            with merged(tmp_path / f"{which}-{scale}", paths[0], paths[1:], rule, scale=scale) as merge:
                found.append(exported(merge, tmp_path / f"{which}-{scale}-out"))
        ours, theirs = found[0], together(found[1])
        for name in PACKED:
            if scale is not None:
                assert torch.equal(ours[name], theirs[name]), (name, scale)
            else:  # the lengths are sums over the tensors: of other tensors they can differ in the last bit
                assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7), (name, scale)


@pytest.mark.parametrize("rule", ["gram", "mean", "ties", "opcm"])
def test_a_stack_is_unfolded_and_combined(rule: str, pair: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    found = []
    for which, paths in zip(("packed", "apart"), pair, strict=True):
        with merged(tmp_path / which, paths[0], paths[1:], rule, scale="1.0") as merge:
            merge.unfold(merge.look_unfold(paths[1].name))
            if rule != "opcm":
                with merged(tmp_path / f"{which}-other", paths[0], paths[1:2], rule):
                    pass
                merge.combine(tmp_path / f"{which}-other")
            found.append(exported(merge, tmp_path / f"{which}-out"))
    ours, theirs = found[0], together(found[1])
    for name in PACKED:
        assert torch.equal(ours[name], theirs[name]), name


def test_kinds_are_counted(pair: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    packed, singles = pair
    rows = {kind: (tensors, numel) for kind, tensors, numel in continual.survey(packed[0]).kinds}
    assert rows["stack"] == (2, EXPERTS * (12 * 8 + 8 * 6))
    assert rows["matrix"] == (1, 64)
    with merged(tmp_path / "state", packed[0], [], "gram") as merge:
        plan = merge.plan(packed[1])
        assert (plan.stacks, plan.matrices, plan.plain) == (2, 1, 2)
        of_stacks = merge.engine.state.format
        # of each expert the lower triangle of a 6 × 6 Gram, folded into half the rows
        assert of_stacks.slots["model.layers.0.mlp.experts.down_proj"]["right"].shape == (EXPERTS, 3, 7)
    with merged(tmp_path / "apart", singles[0], [], "gram") as merge:
        assert merge.engine.state.format.generation_bytes == of_stacks.generation_bytes


def test_no_more_than_an_expert_of_a_stack_is_counted_as_memory(
    pair: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    needs = []
    for which, paths in zip(("packed", "apart"), pair, strict=True):
        with merged(tmp_path / which, paths[0], [], "opcm") as merge:
            needs.append(merge.plan(paths[1]).memory_bytes)
    assert needs[0] <= 1.01 * needs[1]


def test_a_state_that_was_made_before_there_were_stacks_folds_as_then(
    pair: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    """format.json of such a state calls the tensors plain, as one made with `plain` does, and knows no globs."""
    packed, _ = pair
    recipe = continual.Recipe("opcm", plain=("*.experts.*",), scale="1.0")
    continual.init(packed[0], tmp_path / "state", recipe)
    with stores.made_otherwise(tmp_path / "state") as body:
        body["base"]["plain"] = []
    with continual.open(tmp_path / "state", write=True) as merge:
        kinds = {spec.name: spec.kind for spec in merge.base.specs}
        assert kinds["model.layers.0.mlp.experts.down_proj"] == "plain"
        for tune in packed[1:3]:
            assert merge.fold(tune).fate == "folded"
        found = exported(merge, tmp_path / "out")
    tensors = [load_file(path / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"] for path in packed[:3]]
    expected = tensors[1] + tensors[2] - tensors[0]  # a plain tensor of opcm is the sum of the task vectors
    assert torch.allclose(found["model.layers.0.mlp.experts.gate_up_proj"], expected, atol=1e-6)
