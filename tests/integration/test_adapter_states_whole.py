"""Adapters that are no products of thin factors in a state of adapters: what takes the weights of the base, and what
has more directions than the state keeps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.config import Settings
from continual.engine.block_reading import StoredLayers
from continual.engine.views import ReadView
from continual.executors.contract import silent
from continual.selection.members import Kept, Member, opened
from continual.tensors import Folder, candidate_of, open_model
from tests.helpers import adapters, models
from tests.helpers.folders import open_files
from tests.helpers.kinds_of_adapters import seed_of, tensors_of

ALONE = ReadView(rule="task-arithmetic", scale="1")
SHAPES = {"a.weight": (4, 6), "a.bias": (4,), "norm.weight": (6,), "embed_tokens.weight": (30, 6)}
KINDS = ("LOHA", "OFT", "SHIRA", "TRAINABLE_TOKENS")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base", shapes=SHAPES)


def of_kind(directory: Path, kind: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    weights = tensors_of(kind)
    if kind == "SHIRA":
        weights["base_model.model.a.shira_indices"] = torch.tensor(
            [[0, 1, 2, 3, 3], [5, 4, 0, 1, 2]], dtype=torch.int32
        )
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(seed_of(kind)))
    return directory


def mixed(directory: Path) -> Path:
    """Factors, a bias, a norm, and rows of a table."""
    torch.manual_seed(3)
    head = "base_model.model"
    weights = {
        f"{head}.a.lora_A.weight": torch.randn(2, 6),
        f"{head}.a.lora_B.weight": torch.randn(4, 2),
        f"{head}.a.bias": torch.randn(4),
        f"{head}.norm.modules_to_save.weight": torch.randn(6),
        f"{head}.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(3, 6),
    }
    said = {"bias": "lora_only", "modules_to_save": ["norm"], "trainable_token_indices": {"embed_tokens": [7, 2, 8]}}
    return adapters.plain(directory, weights, **said)


def dora(directory: Path, base: Path) -> Path:
    torch.manual_seed(4)
    made = adapters.plain(directory, use_dora=True)
    lengths = load_file(base / "model.safetensors")["a.weight"].norm(dim=1) * 1.1
    weights = load_file(made / "adapter_model.safetensors") | {"base_model.model.a.lora_magnitude_vector": lengths}
    save_file(weights, made / "adapter_model.safetensors")
    return made


def merge_of(state: Path, made_of: Path | None, width: int = 16, **settings: object) -> api.Merge:
    if not state.exists():
        assert made_of is not None
        making.init(made_of, state, making.Recipe(rule="mean", width=width))
    return api.Merge(Settings.model_validate({"state": state, "max_mean_ratio": 1e6, **settings}), write=True)


def exported(merge: api.Merge, directory: Path, **view: object) -> dict[str, torch.Tensor]:
    merge.export(directory, view=ALONE.changed(ReadView(**view)))  # type: ignore[arg-type]
    return load_file(directory / "model.safetensors")


def same_as_merged(found: dict[str, torch.Tensor], base: Path, model: Path) -> None:
    before, taus = load_file(base / "model.safetensors"), adapters.task_vectors(base, model)[0]
    assert taus
    for name, value in found.items():
        expected = before[name] + taus.get(name, torch.zeros_like(value))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=2e-6, msg=name)


@pytest.mark.slow
def test_a_kind_of_adapter_comes_out_as_it_went_in(tmp_path: Path, base: Path) -> None:
    """Several kinds beside each other: what is exported is what PEFT would merge
    (tests/unit/tensors/adapters/test_adapter_kinds_as_peft.py has the same with what PEFT saves). Taken out, it leaves
    what it
    found."""
    made = {kind: of_kind(tmp_path / kind.lower(), kind, number) for number, kind in enumerate(KINDS)}
    made |= {"LORA": mixed(tmp_path / "lora"), "DORA": dora(tmp_path / "dora", base)}
    with merge_of(tmp_path / "state", base, width=64) as merge:
        for kind, model in made.items():
            planned = merge.plan(model)
            outcome = merge.fold(model)
            assert outcome.fate == "folded", outcome.message
            assert outcome.report is not None
            assert (planned.ok, planned.folded) == (True, len(outcome.report.lineage.folded)), kind
            assert not outcome.report.numbers.cut
            assert planned.read_bytes == outcome.report.bytes_read, kind
        for kind, model in made.items():
            reading, taus = (
                merge.reading(view=replace(ALONE, only=(kind.lower(),))),
                adapters.task_vectors(base, model)[0],
            )
            reading.settle(merge.executor, silent)
            for spec in merge.base.specs:
                expected = taus.get(spec.name, torch.zeros(spec.shape))
                torch.testing.assert_close(reading.vector(spec), expected, rtol=1e-6, atol=2e-6, msg=kind)
        same_as_merged(exported(merge, tmp_path / "out", only=("lora",)), base, made["LORA"])
        assert {one.name for one in merge.explain(ALONE).models} == {kind.lower() for kind in made}
        before = exported(merge, tmp_path / "before", without=("dora",))
        merge.unfold(merge.look_unfold("dora"))
        after = exported(merge, tmp_path / "after")
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert api.verify(tmp_path / "state").findings == ()


def test_vectors_and_trained_rows_take_a_column_each(tmp_path: Path, base: Path) -> None:
    with merge_of(tmp_path / "state", base) as merge:
        outcome = merge.fold(mixed(tmp_path / "lora"))
        assert outcome.report is not None
        table = 3 * 6 * 4
        read = {name: value.nbytes for name, value in load_file(tmp_path / "lora/adapter_model.safetensors").items()}
        assert (
            outcome.report.bytes_read == sum(read.values()) + 4 * 4 + 6 * 4 + table
        )  # three rows of the base, no table
        reading = merge.reading(view=ALONE)
        columns = {spec.name: reading.columns(spec) for spec in merge.base.specs}  # type: ignore[attr-defined]
    assert columns == {"a.weight": 2, "a.bias": 1, "norm.weight": 1, "embed_tokens.weight": 3}


def test_a_base_whose_weights_are_gone(tmp_path: Path, base: Path) -> None:
    """What takes them is refused, and looked at again when they are back; the rest of an adapter is folded on request,
    and what takes none of them is folded."""
    model, other = mixed(tmp_path / "lora"), of_kind(tmp_path / "loha", "LOHA")
    with merge_of(tmp_path / "state", base) as merge:
        shutil.move(base, tmp_path / "elsewhere")
        outcome = merge.fold(model)
        assert (outcome.fate, outcome.reason) == ("refused", "form")
        assert "depends on the weights of the base" in outcome.message
        assert "is gone: put it back, or say where it is now with base = DIR" in outcome.message
        assert merge.plan(model).reason == "known"
        found = merge.fold(other)
        assert found.fate == "folded", found.message
    with merge_of(tmp_path / "state", None, gates={"form": {"whole": "leave-out"}}) as merge:
        outcome = merge.fold(model)
        assert outcome.line().endswith(
            "left out, as this state has no place for it: a.bias, embed_tokens.weight, norm.weight"
        )
        merge.unfold(merge.look_unfold("lora"))
        merge.retry("lora")
    with merge_of(tmp_path / "state", None, base=tmp_path / "elsewhere") as merge:
        assert merge.fold(model).fate == "folded"
        found = exported(merge, tmp_path / "out", only=("lora",))
    same_as_merged(found, tmp_path / "elsewhere", model)


def test_another_model_in_place_of_the_base(tmp_path: Path, base: Path) -> None:
    models.base(tmp_path / "other", shapes=SHAPES | {"norm.weight": (7,)})
    with merge_of(tmp_path / "state", base, base=tmp_path / "other") as merge:
        outcome = merge.fold(dora(tmp_path / "dora", base))
        assert not open_files(tmp_path / "other")
    assert (outcome.fate, outcome.reason) == ("refused", "form")
    assert "is not the one this state was made from" in outcome.message


def test_a_base_that_changes_under_an_open_state(tmp_path: Path, base: Path) -> None:
    """The weights that are there now are read, as an export reads them; the files of before do not stay open."""
    with merge_of(tmp_path / "state", base) as merge:
        merge.fold(mixed(tmp_path / "lora"))
        weights = load_file(base / "model.safetensors")
        save_file({name: value + 1.0 for name, value in weights.items()}, base / "model.safetensors")
        model = dora(tmp_path / "dora", base)
        assert merge.fold(model).fate == "folded"
        found = exported(merge, tmp_path / "out", only=("dora",))
        assert len(open_files(base)) == 1
    same_as_merged(found, base, model)


def wide(directory: Path, base: Path, noise: float) -> Path:
    """A whole matrix of one large direction and many small ones."""
    torch.manual_seed(5)
    before = load_file(base / "model.safetensors")["a.weight"]
    tau = torch.outer(torch.randn(4), torch.randn(6)) + noise * torch.randn(4, 6)
    directory.mkdir()
    save_file({"base_model.model.a.weight": before + tau}, directory / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "target_modules": ["b"], "modules_to_save": ["a"]}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


def test_what_the_width_has_no_room_for_is_refused_or_said(tmp_path: Path, base: Path) -> None:
    little, much = wide(tmp_path / "little", base, 0.01), wide(tmp_path / "much", base, 0.5)
    with merge_of(tmp_path / "state", base, width=1) as merge:
        outcome = merge.fold(little)
        assert outcome.report is not None
        assert 0.0 < (outcome.report.numbers.cut or 0.0) < 0.01
        outcome = merge.fold(much)
        assert (outcome.fate, outcome.reason) == ("refused", "cut")
        assert merge.state.ledger.head.entry.settings == {"gates.cut.most": 0.01}  # type: ignore[union-attr]
    with merge_of(tmp_path / "state", None, gates={"cut": {"most": 1.0}}) as merge:
        outcome = merge.fold(much)
        assert outcome.fate == "folded"
        assert "of its square cut off" in outcome.line()
        assert outcome.report is not None
        expected = adapters.task_vectors(base, much)[0]["a.weight"]
        sigma = torch.linalg.svdvals(expected.double()).square()
        assert outcome.report.numbers.tau_norm == pytest.approx(float(expected.norm()), rel=1e-5)
        # one column for two models: the larger first triplet stays
        assert outcome.report.numbers.cut == pytest.approx(1 - float(sigma[0] / sigma.sum()), rel=1e-3)


PACKED = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 12, 8),
    "model.layers.0.mlp.experts.down_proj": (3, 8, 6),
}
HEAD = "base_model.model.model.layers.0.mlp.experts"


def of_stacks(directory: Path, seed: int, rank: int = 2) -> Path:
    """LoRA on the parameters of packed experts, as PEFT lays it out."""
    random = torch.Generator().manual_seed(seed)
    sides = {f"{HEAD}.base_layer": (8, 12), HEAD: (6, 8)}
    weights = {}
    for name, (inner, outer) in sides.items():
        weights[f"{name}.lora_A.weight"] = torch.randn(3 * rank, inner, generator=random) * 0.3
        weights[f"{name}.lora_B.weight"] = torch.randn(outer, 3 * rank, generator=random) * 0.3
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    return adapters.plain(directory, weights, target_parameters=targets, target_modules=[], r=rank)


def of_experts(directory: Path, seed: int) -> Path:
    """LoRA on two single experts of three, which the base has packed."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for number, role, inner, outer in ((0, "up_proj", 8, 6), (0, "gate_proj", 8, 6), (2, "down_proj", 6, 8)):
        weights[f"{HEAD}.{number}.{role}.lora_A.weight"] = torch.randn(2, inner, generator=random) * 0.3
        weights[f"{HEAD}.{number}.{role}.lora_B.weight"] = torch.randn(outer, 2, generator=random) * 0.3
    return adapters.plain(directory, weights, target_modules=["up_proj", "gate_proj", "down_proj"])


def of_saved_stacks(directory: Path, base: Path) -> Path:
    """A whole stack, of which two experts differ from the base."""
    value = load_file(base / "model.safetensors")["model.layers.0.mlp.experts.down_proj"]
    value[1:] += torch.outer(torch.arange(8.0), torch.ones(6))
    return adapters.plain(directory, {f"{HEAD}.down_proj": value}, modules_to_save=["experts"])


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made = {name: torch.randn(shape) * 0.1 for name, shape in PACKED.items()}
    return models.write(tmp_path / "packed", made, {"model_type": "qwen3_moe", "tie_word_embeddings": False})


def read(merge: api.Merge, view: ReadView) -> dict[str, torch.Tensor]:
    reading = merge.reading(view=view)
    reading.settle(merge.executor, silent)
    return {spec.name: reading.vector(spec) for spec in merge.base.specs}


@pytest.mark.slow
def test_packed_experts_are_kept_one_by_one(tmp_path: Path, packed: Path) -> None:
    """What is read is what a state of whole tensors has; each comes out as it went in, and leaves what it found."""
    made = [of_stacks(tmp_path / "one", 1), of_experts(tmp_path / "two", 2), of_stacks(tmp_path / "three", 3, rank=1)]
    made.append(of_saved_stacks(tmp_path / "four", packed))
    with merge_of(tmp_path / "state", packed, width=16) as merge:
        for model in made:
            planned = merge.plan(model)
            outcome = merge.fold(model)
            assert outcome.report is not None, outcome.message
            assert (planned.stacks in (1, 2), outcome.report.numbers.cut) == (True, 0.0)
            assert planned.read_bytes == outcome.report.bytes_read
        for model in made:
            taus = adapters.task_vectors(packed, model)[0]
            for name, value in read(merge, replace(ALONE, only=(model.name,))).items():
                torch.testing.assert_close(value, taus.get(name, torch.zeros_like(value)), rtol=1e-5, atol=1e-6)
        making.init(packed, tmp_path / "dense", making.Recipe(rule="iso-c"))
        with merge_of(tmp_path / "dense", None, max_base_ratio=100.0) as dense:
            for model in made:
                assert dense.fold(model).fate == "folded"
            expected = read(dense, ReadView())
        found = read(merge, ReadView(rule="iso-c"))
        length = max(float(value.norm()) for value in expected.values())
        assert all(float((found[name] - value).norm()) < 2e-5 * length for name, value in expected.items())
        shares = merge.explain(ALONE)
        assert [layer.name for layer in shares.layers] == ["model.layers.0"]
        same_as_merged(exported(merge, tmp_path / "out", only=("two",)), packed, made[1])
        before = exported(merge, tmp_path / "before", without=("one",))
        merge.unfold(merge.look_unfold("one"))
        after = exported(merge, tmp_path / "after")
        assert all(torch.equal(before[name], value) for name, value in after.items())
    with merge_of(tmp_path / "other", packed, width=16) as merge:
        merge.fold(made[0])
        merge.combine(tmp_path / "state")
        again = exported(merge, tmp_path / "again", without=("one",))
        assert all(torch.equal(before[name], value) for name, value in again.items())
    assert api.verify(tmp_path / "other").findings == ()


def test_experts_are_cut_one_by_one(tmp_path: Path, packed: Path) -> None:
    with merge_of(tmp_path / "state", packed, width=2) as merge:
        for number in range(2):
            outcome = merge.fold(of_stacks(tmp_path / f"lora-{number}", number))
            assert outcome.report is not None
        assert 0.0 < (outcome.report.numbers.cut or 0.0) < 1.0
        assert merge.plan(of_stacks(tmp_path / "more", 9)).message.endswith(
            "; in 6 of 6 layers adapters are cut to the width of 2"
        )
        found = read(merge, replace(ALONE, only=("lora-1",)))
    taus = adapters.task_vectors(packed, tmp_path / "lora-1")[0]
    for name, value in taus.items():
        u, sigma, v = torch.linalg.svd(value, full_matrices=False)
        expected = u[..., :1] * sigma[:, None, :1] @ v[:, :1]
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


def test_a_round_takes_what_is_kept_of_a_stack_expert_by_expert(tmp_path: Path, packed: Path) -> None:
    model = of_experts(tmp_path / "lora", 2)
    taus = adapters.task_vectors(packed, model)[0]
    with merge_of(tmp_path / "state", packed) as merge:
        new = Member(candidate_of(open_model(model)), at=Folder(model))
        assert merge.fold(model).fate == "folded"
        kept = Member(new.candidate, kept=Kept(StoredLayers(merge.state, merge.state.ledger.head), 1))
        for member in (new, kept):
            with opened(merge.engine, member) as found:
                assert set(found.changed) == set(taus)
                for name, tau in taus.items():
                    target, gradient = torch.ones(tau.shape), torch.arange(float(tau.numel()))
                    found.add(name, target, 0.5)
                    torch.testing.assert_close(target, 1.0 + 0.5 * tau)
                    expected = float(gradient @ tau.flatten()), float(tau.square().sum())
                    assert found.inners(name, gradient, square=True) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("whole", ["fold", "leave-out"])
def test_a_copy_of_a_weight_that_was_saved_beside_its_factors(tmp_path: Path, base: Path, whole: str) -> None:
    """PEFT saves one of every embedding and head that it adapts; without the base's weights the factors are folded."""
    plain = adapters.plain(tmp_path / "plain")
    model = shutil.copytree(plain, tmp_path / "model")
    weights = load_file(base / "model.safetensors")
    copy = {"base_model.model.a.base_layer.weight": weights["a.weight"]}
    save_file(load_file(model / "adapter_model.safetensors") | copy, model / "adapter_model.safetensors")
    with merge_of(tmp_path / "state", base, gates={"form": {"whole": whole}}) as merge:
        if whole == "leave-out":
            (base / "model.safetensors").unlink()
        outcome = merge.fold(model)
        assert outcome.fate == "folded", outcome.message
        assert ("a.base_layer.weight" in outcome.line()) == (whole == "leave-out")
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        same_as_merged(exported(merge, tmp_path / "out"), base, plain)
