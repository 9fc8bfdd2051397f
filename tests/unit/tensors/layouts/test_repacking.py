"""Experts that are packed in the base and one by one in the fine-tune, and the reverse, are the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import continual
from continual.errors import Refuse
from continual.gates.lineage import LineageGate, trace
from continual.tensors import describe
from continual.tensors.checkpoints.checkpoint import open_checkpoint
from continual.tensors.checkpoints.place import Folder
from continual.tensors.layouts.repacking import BY_INPUT, TRIPLES, by_input, one_of
from continual.tensors.vectors.vectors import TaskVectors
from tests.helpers import models

EXPERTS = 3
HEAD = "model.layers.0.mlp.experts"
PACKED = {
    "model.embed_tokens.weight": (20, 8),
    f"{HEAD}.gate_up_proj": (EXPERTS, 12, 8),
    f"{HEAD}.down_proj": (EXPERTS, 8, 6),
}
QWEN = {"model_type": "qwen3_moe", "tie_word_embeddings": False}


def weights(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in PACKED.items()}


def apart(tensors: dict[str, torch.Tensor], triple: tuple[str, str, str] = TRIPLES[0]) -> dict[str, torch.Tensor]:
    """As transformers 4 writes them."""
    gate, up, down = triple
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for number in range(EXPERTS):
        fused = tensors[f"{HEAD}.gate_up_proj"][number]
        found[f"{HEAD}.{number}.{gate}.weight"], found[f"{HEAD}.{number}.{up}.weight"] = fused.chunk(2)
        found[f"{HEAD}.{number}.{down}.weight"] = tensors[f"{HEAD}.down_proj"][number]
    return found


def vectors(base: Path, tune: Path) -> tuple[dict[str, torch.Tensor], str, tuple[tuple[str, str], ...]]:
    """The task vectors, their digest, and what was repacked."""
    with open_checkpoint(Folder(base)) as ours, open_checkpoint(Folder(tune)) as theirs:
        model = describe(ours)
        lineage = trace(model, theirs, LineageGate())
        assert (lineage.unchanged, lineage.extra) == ((), ())
        reader = TaskVectors(model, theirs, lineage, run=17)  # runs that end within rows and across experts
        found = {name: reader.vector(name) for name in lineage.folded}
        digest = reader.digest({name: vector.digest for name, vector in found.items()})
        return {name: vector.tau for name, vector in found.items()}, digest, lineage.repackings


@pytest.mark.parametrize("triple", TRIPLES)
def test_experts_one_by_one_are_read_as_the_base_packs_them(triple: tuple[str, str, str], tmp_path: Path) -> None:
    base, tuned = weights(0), weights(1)
    models.write(tmp_path / "base", base, QWEN)
    models.write(tmp_path / "packed", tuned, QWEN)
    models.write(tmp_path / "apart", apart(tuned, triple), QWEN)
    found, digest, said = vectors(tmp_path / "base", tmp_path / "apart")
    for name in PACKED:
        assert torch.equal(found[name], tuned[name] - base[name]), name
    gate, up, down = triple
    assert said == (
        ("experts.down_proj", f"experts.*.{down}.weight"),
        ("experts.gate_up_proj", f"experts.*.{gate}.weight + experts.*.{up}.weight"),
    )
    _, same, nothing = vectors(tmp_path / "base", tmp_path / "packed")
    assert digest == same  # one model in two layouts is one model
    assert nothing == ()


@pytest.mark.parametrize("triple", TRIPLES)
def test_packed_experts_are_read_one_by_one(triple: tuple[str, str, str], tmp_path: Path) -> None:
    base, tuned = weights(0), weights(1)
    models.write(tmp_path / "base", apart(base, triple), QWEN)
    models.write(tmp_path / "tune", tuned, QWEN)
    found, _, said = vectors(tmp_path / "base", tmp_path / "tune")
    expected = apart(tuned, triple)
    assert found.keys() == expected.keys()
    for name, value in apart(base, triple).items():
        assert torch.equal(found[name], expected[name] - value), name
    assert ("experts.*.{2}.weight".format(*triple), "experts.down_proj") in said


@pytest.mark.parametrize("layout", ["packed", "apart"])
def test_a_fold_in_the_other_layout_is_the_same_merge(layout: str, tmp_path: Path) -> None:
    base = weights(0)
    tuned = {name: value + 0.05 * weights(1)[name] for name, value in base.items()}
    one, other = (base, apart(tuned)) if layout == "packed" else (apart(base), tuned)
    models.write(tmp_path / "base", one, QWEN)
    models.write(tmp_path / "tune", other, QWEN)
    continual.init(tmp_path / "base", tmp_path / "state", continual.Recipe("task-arithmetic", scale="1.0"))
    with continual.open(tmp_path / "state", write=True) as merge:
        assert merge.plan(tmp_path / "tune").renamings
        found = merge.fold(tmp_path / "tune")
        assert found.fate == "folded"
        assert found.report is not None
        assert found.report.numbers.renamings
        merge.export(tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in (tuned if layout == "packed" else apart(tuned)).items():
        assert torch.allclose(out[name], value, atol=1e-6), name


def test_an_expert_that_is_not_there_is_named(tmp_path: Path) -> None:
    models.write(tmp_path / "base", weights(0), QWEN)
    for number, part in ((1, "up_proj"), (2, "down_proj")):
        tuned = apart(weights(1))
        del tuned[f"{HEAD}.{number}.{part}.weight"]
        models.write(tmp_path / part, tuned, QWEN)
        with pytest.raises(Refuse, match=f"lacks {HEAD}.{number}.{part}.weight: the base packs 3 experts") as refused:
            vectors(tmp_path / "base", tmp_path / part)
        assert refused.value.reason == "missing"


def test_experts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    models.write(tmp_path / "base", weights(0), QWEN)
    name = f"{HEAD}.1.up_proj.weight"
    for case, value, reason in (
        ("dtype", apart(weights(1))[name].half(), "dtype"),
        ("shape", torch.zeros(5, 8), "shape"),
        ("more", None, "shape"),
        ("both", None, "prefix"),
    ):
        tuned = apart(weights(1))
        if value is not None:
            tuned[name] = value
        elif case == "more":
            tuned |= {n.replace(f"{HEAD}.2.", f"{HEAD}.3."): t.clone() for n, t in tuned.items()}
        else:
            tuned[f"{HEAD}.down_proj"] = weights(1)[f"{HEAD}.down_proj"]
        models.write(tmp_path / case, tuned, QWEN)
        with pytest.raises(Refuse) as refused:
            vectors(tmp_path / "base", tmp_path / case)
        assert refused.value.reason == reason, case


def test_packed_experts_of_another_number_are_refused(tmp_path: Path) -> None:
    models.write(tmp_path / "base", apart(weights(0)), QWEN)
    tuned = {name: value[:2] if value.dim() == 3 else value for name, value in weights(1).items()}
    models.write(tmp_path / "tune", tuned, QWEN)
    with pytest.raises(Refuse, match="the base has 3 experts one by one"):
        vectors(tmp_path / "base", tmp_path / "tune")


def test_a_family_that_packs_in_by_out_is_not_turned(tmp_path: Path) -> None:
    models.write(tmp_path / "base", weights(0), {"model_type": "llama4_text"})
    models.write(tmp_path / "tune", apart(weights(1)), {"model_type": "llama4_text"})
    with pytest.raises(Refuse, match="this family packs its experts as in × out"):
        vectors(tmp_path / "base", tmp_path / "tune")


def test_which_names_are_of_one_expert() -> None:
    assert one_of("a.experts.12.w1.weight") == ("a.experts", 12, "w1")
    for name in ("a.experts.012.w1.weight", "a.experts.w1.weight", "experts.1.w1.bias", "a.myexperts.1.w1.weight"):
        assert one_of(name) is None


def test_the_layouts_are_those_of_transformers() -> None:
    """Every family whose experts transformers packs by stacking and joining, with what gate, up and down are called."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    core = pytest.importorskip("transformers.core_model_loading")
    fused = []
    for family in mapping._build_checkpoint_conversion_mapping():
        for change in mapping.get_checkpoint_conversion_mapping(family) or ():
            steps = [type(step).__name__ for step in getattr(change, "operations", [])]
            if "MergeModulelist" not in steps:
                continue
            assert isinstance(change, core.WeightConverter)
            roles = tuple(source.removesuffix(".weight").rpartition(".")[2] for source in change.source_patterns)
            target = change.target_patterns[0].rpartition(".")[2]
            assert not by_input({"model_type": family}), family
            if target == "gate_up_proj":
                assert steps == ["MergeModulelist", "Concatenate"]
                assert (change.operations[0].dim, change.operations[1].dim) == (0, 1)
                assert roles in {triple[:2] for triple in TRIPLES}, (family, roles)
                fused.append(family)
            else:
                assert steps == ["MergeModulelist"]
                wanted = {"down_proj": {triple[2:] for triple in TRIPLES}, "up_proj": {("up_proj",)}}
                assert roles in wanted[target], (family, roles)
    assert {"mixtral", "qwen2_moe", "phimoe", "jamba", "lfm2_moe"} <= set(fused)
    assert not BY_INPUT & set(fused)
