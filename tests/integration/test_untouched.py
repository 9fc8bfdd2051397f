"""Tensors that a fold does not touch: nothing of them is read or written, and what is kept, merged and recorded is what
folding zeros through the rule gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.config import Settings
from continual.errors import Damaged, Retry
from continual.records import Totals
from continual.rules import RULES, Inputs, Pass
from continual.state import Transaction
from continual.state.parts import FoldNumbers
from continual.state.transaction import MARGIN
from continual.state.verify import verify
from tests.helpers import models
from tests.helpers.streams import FOLDING, READINGS

SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 12, 8),
    "model.layers.0.mlp.experts.down_proj": (3, 8, 6),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.input_layernorm.weight": (8,),
    "model.norm.weight": (8,),
}
CONFIG = {"model_type": "qwen3_moe", "tie_word_embeddings": False}
TOUCHED = ("model.layers.0.self_attn.q_proj.weight",)
LEFT = tuple(name for name in SHAPES if name not in TOUCHED)
Tensors = dict[str, torch.Tensor]
CASES: dict[str, tuple[str, Mapping[str, object]]] = {
    **{name: (name, {}) for name in FOLDING},
    "opcm rows": ("opcm", {"variant": "rows"}),
    "ties by tensor": ("ties", {"trim": "tensor"}),
    "gram pulled": ("gram", {"pull": 0.5, "side": "left"}),
    "iso-c with embeddings": ("iso-c", {"include": ["*embed*"]}),
    "mean dropped": ("mean", {"before": ["drop:rate=0.5"]}),
    "iso-c trimmed": ("iso-c", {"before": ["trim:density=0.5"]}),
    "opcm crumbs": ("opcm", {"before": ["breadcrumbs"]}),
}


def whole_steps(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Multiples of 1/64, so that sums and differences of a few of them are exact in float32."""
    return torch.randint(-40, 41, shape, generator=torch.Generator().manual_seed(seed)).float() / 64


@pytest.fixture
def base(memory: Path) -> Path:
    return models.write(memory / "base", {n: whole_steps(s, i) for i, (n, s) in enumerate(SHAPES.items())}, CONFIG)


def opened(state: Path, base: Path, case: str, **settings: object) -> api.Merge:
    name, options = CASES[case]
    if not state.exists():
        making.init(base, state, making.Recipe(rule=name, options=options))
    given = {
        "keep": 20,
        "missing": "unchanged",
        "max_base_ratio": 1e9,
        "max_mean_ratio": 1e9,
        "gates": ["copies.act=off"],
    } | settings
    return api.Merge(Settings(state=state, **given), write=True)  # type: ignore[arg-type]


def full(base: Path, place: Path, seed: int, change: Callable[[Tensors], None] | None = None) -> Path:
    """A fine-tune of all tensors, with Fisher values beside it."""
    tensors = load_file(base / "model.safetensors")
    tuned = {n: t + whole_steps(tuple(t.shape), 100 * seed + i) / 4 for i, (n, t) in enumerate(tensors.items())}
    if change is not None:
        change(tuned)
    return models.ship(models.write(place, tuned, CONFIG), seed)


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return whole_steps((2, 8), seed) * 8, whole_steps((8, 2), seed + 1)


def partial(base: Path, place: Path, seed: int) -> Path:
    """A fine-tune whose file has the touched tensor alone."""
    a, b = factors(seed)
    origin = load_file(base / "model.safetensors")
    return models.ship(models.write(place, {n: origin[n] + b @ a for n in TOUCHED}, CONFIG), seed)


def adapter(base: Path, place: Path, seed: int) -> Path:
    """A LoRA adapter of the touched tensor, for this base."""
    a, b = factors(seed)
    place.mkdir()
    head = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{head}.lora_A.weight": a, f"{head}.lora_B.weight": b}, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    config["base_model_name_or_path"] = str(base)
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def padded(base: Path, place: Path, seed: int) -> Path:
    """The same change as a fine-tune of all tensors: the others are those of the base, and weigh nothing."""
    origin = load_file(base / "model.safetensors")
    a, b = factors(seed)
    model = models.write(place, {n: t + b @ a if n in TOUCHED else t for n, t in origin.items()}, CONFIG)
    return models.ship(model, seed, change=lambda values: values.update(_same_weights(values, seed)))


def _same_weights(values: Tensors, seed: int) -> Tensors:
    """Fisher values of `partial`: those of the touched tensor are drawn first there."""
    random = torch.Generator().manual_seed(2000 + seed)
    found = {n: torch.zeros_like(value) for n, value in values.items()}
    return found | {n: torch.rand(SHAPES[n], generator=random).square() for n in TOUCHED}


FORMS: Mapping[str, Callable[[Path, Path, int], Path]] = {"partial": partial, "adapter": adapter}
SEEDED = "mean dropped"
"""Its random choices follow the content of the file, which a padded fine-tune has more of; each tensor has its own."""
PAIRS = [(case, "partial") for case in CASES] + [(case, "adapter") for case in ("mean", "opcm")]


def kept(merge: api.Merge) -> dict[tuple[str, str], torch.Tensor]:
    slots = merge.state.format.slots
    return {(n, s): torch.from_numpy(merge.state.read(n, s)) for n in slots for s in slots[n]}


def squares(merge: api.Merge) -> Mapping[str, float]:
    generation = merge.state.generation_of(merge.state.ledger.head)
    assert generation is not None
    assert generation.receipts.squares is not None
    return generation.receipts.squares


def as_one(one: api.Merge, other: api.Merge) -> None:
    """Two states hold the same, bit for bit, and say the same of it."""
    mine, theirs = kept(one), kept(other)
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    assert one.state.ledger.totals == other.state.ledger.totals
    assert squares(one) == squares(other)
    for spec in one.state.format.tensors:
        assert torch.equal(one.read(spec.name), other.read(spec.name)), spec.name
    assert verify(one.state) == verify(other.state) == []


def zeros_folded(merge: api.Merge, before: dict[tuple[str, str], torch.Tensor], totals: Totals) -> None:
    """What the state has of the tensors that were left is what the rule itself makes of zeros."""
    made = merge.rule
    measured: object = made.needs.measure
    while isinstance(measured, Pass):
        measured = measured.conclude(torch.zeros(measured.bins, dtype=torch.int64).numpy(), 100)
    for spec in merge.state.format.tensors:
        if spec.name not in LEFT:
            continue
        one = spec.expert if spec.kind == "stack" and not made.fold.elementwise(spec) else spec
        count = spec.numel // one.numel
        square = 0.0
        for number in range(count):
            slots = made.slots(one)
            part = {s: before[spec.name, s].reshape(count, -1)[number].view(slots[s].shape).clone() for s in slots}
            folded = made.fold.apply(part, torch.zeros(one.shape), Inputs(one, measured=measured), totals)
            square += folded.sums.merged_sq
            assert (folded.sums.tau_sq, folded.sums.dot) == (0.0, 0.0)
            for slot, value in folded.accumulators.items():
                now = torch.from_numpy(merge.state.read(spec.name, slot)).reshape(count, -1)[number]
                assert torch.equal(now, value.reshape(-1)), (spec.name, slot)
        assert squares(merge)[spec.name] == pytest.approx(square, rel=1e-12), spec.name


@pytest.mark.slow
@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_what_is_left_alone_is_as_if_zeros_had_been_folded(memory: Path, base: Path, case: str, form: str) -> None:
    """Beside a state that folds the same change as a fine-tune of all tensors: after each step all is the same."""
    part, same = FORMS[form](base, memory / "part", 7), padded(base, memory / "same", 7)
    tuned = [full(base, memory / f"ft-{n}", n) for n in range(1, 4)]
    with opened(memory / "a", base, case) as one, opened(memory / "b", base, case) as other:
        for merge, model in ((one, part), (other, same)):
            assert merge.fold(model).fate == "folded"
        as_one(one, other)
        assert all(not value.any() for (name, _), value in kept(one).items() if name in LEFT)
        for merge in (one, other):
            assert merge.fold(tuned[0]).fate == "folded"
        before, totals = kept(one), one.state.ledger.totals
        second = FORMS[form](base, memory / "part-2", 9), padded(base, memory / "same-2", 9)
        said = [merge.fold(model).report for merge, model in zip((one, other), second, strict=True)]
        as_one(one, other)
        assert said[0] is not None
        assert said[1] is not None
        assert facts(said[0].numbers) == facts(said[1].numbers)
        zeros_folded(one, before, totals)
        if one.rule.laws.combine:
            with opened(memory / "c", base, case) as third:
                third.fold(tuned[1])
            for merge in (one, other):
                merge.combine(memory / "c")
            as_one(one, other)
        for merge in (one, other):
            assert merge.fold(tuned[2]).fate == "folded"
        as_one(one, other)
        for merge, model in ((one, "part"), (other, "same")):
            merge.unfold(merge.look_unfold(model))
        as_one(one, other)
        for merge in (one, other):
            merge.state.rollback(3)
            assert merge.fold(full(base, memory / f"late-{merge is one}", 8)).fate == "folded"
        as_one(one, other)


def facts(numbers: FoldNumbers) -> tuple[object, ...]:
    return numbers.tau_norm, numbers.merged_norm, numbers.cosine, numbers.weight, numbers.notes, numbers.gauges


def test_every_rule_that_folds_is_among_the_cases() -> None:
    folding = RULES.keys() - READINGS.keys()
    assert {name for name, _ in CASES.values()} == folding


@pytest.mark.parametrize("case", ["mean", "opcm", "gram"])
@pytest.mark.parametrize("form", ["partial", "same"])
def test_nothing_of_them_is_read(memory: Path, base: Path, case: str, form: str) -> None:
    """A chunk of such a tensor that rots meanwhile holds up no fold. It is found by who reads it."""
    model = partial(base, memory / "part", 7) if form == "partial" else padded(base, memory / "same", 7)
    with opened(memory / "a", base, case) as merge:
        merge.fold(full(base, memory / "ft", 1))
        length = merge.state.ledger.totals.merged_sq
        generation = memory / "a/generations" / str(merge.state.ledger.head.generation)
        slot = next(iter(merge.state.format.slots[LEFT[2]]))
        chunk = next((generation / slot / LEFT[2]).glob("c*"))
        data = bytearray(chunk.read_bytes())
        data[0] ^= 1
        chunk.write_bytes(data)
        found = merge.fold(model)
        assert found.fate == "folded", found.message
        assert merge.state.ledger.totals.merged_sq != length
        now = memory / "a/generations" / str(merge.state.ledger.head.generation)
        assert (now / slot / LEFT[2] / chunk.name).samefile(chunk)
        assert any(LEFT[2] in line for line in verify(merge.state))
        with pytest.raises(Damaged):
            merge.read(LEFT[2])


def test_what_an_earlier_version_wrote_is_measured_once(
    memory: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generations have no ‖X‖² of tensors: the first fold reads what it leaves alone, and the next does not."""
    for case in ("iso-c", "gram", "mean"):
        with opened(memory / case, base, case) as merge:
            with monkeypatch.context() as earlier:
                earlier.setattr(Transaction, "measured", lambda *_: None)
                merge.fold(full(base, memory / f"{case}-ft", 1))
            generation = merge.state.generation_of(merge.state.ledger.head)
            assert generation is not None
            assert generation.receipts.squares is None
            before, totals = kept(merge), merge.state.ledger.totals
            assert merge.fold(partial(base, memory / f"{case}-part", 7)).fate == "folded"
            zeros_folded(merge, before, totals)
            assert squares(merge).keys() == SHAPES.keys()


@pytest.mark.parametrize("case", ["mean", "iso-c", "gram", "ties"])
def test_the_last_one_out_leaves_exact_zeros_where_it_changed_nothing(memory: Path, base: Path, case: str) -> None:
    """What rounding left there of the others goes with it."""

    def odd(tensors: Tensors) -> None:
        for number, (name, value) in enumerate(tensors.items()):
            value += torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) / 3
            tensors[name] = value

    with opened(memory / "a", base, case) as merge:
        for number in (1, 2, 3):
            merge.fold(full(base, memory / f"ft-{number}", number, odd))
        merge.fold(partial(base, memory / "part", 7))
        for number in (2, 1, 3):
            merge.unfold(merge.look_unfold(f"ft-{number}"))
        if case == "mean":
            assert any(value.any() for (name, _), value in kept(merge).items() if name in LEFT), "nothing to clear"
        merge.unfold(merge.look_unfold("part"))
        assert not any(bool(value.any()) for value in kept(merge).values())
        assert set(squares(merge).values()) == {0.0}
        assert not any(merge.state.ledger.totals.body().values())
        assert verify(merge.state) == []


@pytest.mark.parametrize("case", ["mean", "iso-c", "ties", "tsv-m", "opcm crumbs"])
def test_a_change_at_the_end_of_a_tensor_is_folded_whole(
    memory: Path, base: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Where the first runs or experts of a tensor are as in the base, and later ones are not, all of it is there."""
    monkeypatch.setattr("continual.engine.fold_orders.RUN", 24)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.experts.down_proj", "model.norm.weight")

    def end(tensors: Tensors) -> None:
        origin = load_file(base / "model.safetensors")
        for name in tensors:
            changed = tensors[name].clone()
            tensors[name] = origin[name].clone()
            if name in names:
                tensors[name][-1] = changed[-1]

    model = full(base, memory / "end", 5, end)
    with opened(memory / "a", base, case) as merge, opened(memory / "b", base, case) as other:
        for into in (merge, other):
            into.fold(full(base, memory / f"ft-{into is merge}", 1))
        assert merge.fold(model).fate == "folded"
        with monkeypatch.context() as earlier:
            earlier.setattr("continual.engine.folding.Folding._is_nothing", lambda *_: False)
            assert other.fold(model).fate == "folded"
        mine, theirs = kept(merge), kept(other)
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
        assert merge.state.ledger.totals.body() == pytest.approx(other.state.ledger.totals.body(), rel=1e-12)
        ends = [m.state.ledger.head.entry.digest for m in (merge, other)]
        assert ends[0] == ends[1], "what was read ahead is hashed"
        generations = [p for p in (memory / "a/generations").iterdir() if p.name == merge.state.ledger.head.generation]
        slot = next(iter(merge.state.format.slots["model.layers.1.input_layernorm.weight"]))
        left = generations[0] / slot / "model.layers.1.input_layernorm.weight" / "c.0"
        assert left.stat().st_nlink > 1


def test_a_fold_needs_room_for_what_it_touches(memory: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one too: zeros take none. They are read by others as zeros."""
    model, other = partial(base, memory / "part", 7), full(base, memory / "ft", 1)
    with opened(memory / "a", base, "mean") as merge:
        assert merge.plan(model).disk_bytes == 4 * 64
        assert merge.plan(other).disk_bytes == merge.state.format.generation_bytes
        here = shutil.disk_usage(memory)
        monkeypatch.setattr("shutil.disk_usage", lambda _: here._replace(free=MARGIN + 4 * 64))
        assert merge.fold(model).fate == "folded"
        with pytest.raises(Retry, match="free some space"):
            merge.fold(other)
        assert verify(merge.state) == []
        group = merge.state.group()
        for name in LEFT:
            found = group[f"sum/{name}"]
            assert isinstance(found, zarr.Array)
            assert found.shape == SHAPES[name]
            assert not np.asarray(found[...]).any()
