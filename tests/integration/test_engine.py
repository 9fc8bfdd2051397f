"""The engine on real files: what a fold does to the state, and every way a candidate or its environment can be bad."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.errors import Abandoned, Damaged, Misconfigured
from continual.publish.folder import Target
from continual.rules import Inputs
from continual.rules.trimming import Sampled, Threshold
from continual.state.verify import verify
from tests.helpers import models
from tests.helpers.streams import FOLDING

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


def opened(tmp_path: Path, origin: Path, rule: str = "opcm", **settings: object) -> api.Merge:
    state = tmp_path / "state"
    if not state.exists():
        making.init(origin, state, making.Recipe(rule=rule, scale="paper"))
    return api.Merge(Settings(state=state, **settings), write=True)  # type: ignore[arg-type]


@pytest.fixture
def merge(tmp_path: Path, base: Path) -> Iterator[api.Merge]:
    with opened(tmp_path, base) as found:
        yield found


def snapshot(merge: api.Merge) -> tuple[str | None, dict[tuple[str, str], bytes]]:
    slots = merge.state.format.slots
    return merge.state.ledger.head.generation, {
        (n, s): merge.state.read(n, s).tobytes() for n in slots for s in slots[n]
    }


def test_mean_is_the_mean(tmp_path: Path, base: Path) -> None:
    fine_tunes = [models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(3)]
    with opened(tmp_path, base, "mean") as merge:
        for model in fine_tunes:
            outcome = merge.fold(model)
            assert outcome.fate == "folded", outcome.message
        origin = load_file(base / "model.safetensors")[NAME]
        expected = sum(load_file(m / "model.safetensors")[NAME].double() - origin.double() for m in fine_tunes) / 3
        torch.testing.assert_close(merge.read(NAME).double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rule", ["mean", "opcm"])
def test_what_a_fold_says(tmp_path: Path, base: Path, rule: str) -> None:
    """Its line, its times by stage, its cosine with the merge before, and the stages of its progress."""
    stages: list[str] = []
    first, second = (models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(2))
    with opened(tmp_path, base, rule) as merge:
        alone = merge.fold(first, progress=lambda stage, _done, _total: stages.append(stage))
        assert alone.report is not None
        assert alone.report.numbers.cosine is None
        assert "cosine" not in alone.line()
        assert set(alone.report.seconds) == {"read", "rule", "write", "commit", "total"}
        assert list(dict.fromkeys(stages)) == ["fold", "commit"]
        again = merge.fold(second)
        assert again.report is not None
        one, two = (
            torch.cat([(load_file(m / "model.safetensors")[n] - v).flatten() for n, v in origin.items()])
            for origin in [load_file(base / "model.safetensors")]
            for m in (first, second)
        )
        cosine = float(torch.nn.functional.cosine_similarity(one, two, dim=0))
        assert again.report.numbers.cosine == pytest.approx(cosine, abs=1e-5)
        assert cosine != 0.0
        assert f"cosine {again.report.numbers.cosine:+.3f}, " in again.line()
        assert "left out" not in again.line()
        brings = models.fine_tune(base, tmp_path / "ft-3", 3, change=lambda t: t.update({"v_head": torch.ones(2)}))
        assert merge.fold(brings).line().endswith(" s; left out, as this state has no place for it: v_head")
        twin = models.write(tmp_path / "twin", load_file(second / "model.safetensors"))
        found = merge.fold(twin)
        assert found.message == "twin: duplicate of record 2 (ft-1): the same tensors, already in the state"
        refused = merge.fold(models.write(tmp_path / "same", load_file(base / "model.safetensors")))
        assert merge.state.ledger.head.entry.message == refused.message
        assert refused.message.startswith("same: the task vector is zero everywhere")


def test_passes_before_a_fold_are_counted(tmp_path: Path, base: Path) -> None:
    stages: list[str] = []
    with opened(tmp_path, base, "ties") as merge:
        merge.fold(
            models.fine_tune(base, tmp_path / "ft", 1), progress=lambda stage, _done, _total: stages.append(stage)
        )
    passes = [stage for stage in dict.fromkeys(stages) if stage.startswith("measure")]
    assert passes == [f"measure {number}" for number in range(1, len(passes) + 1)]
    assert passes


def test_known_model_is_a_no_op_and_a_copy_is_a_duplicate(tmp_path: Path, base: Path, merge: api.Merge) -> None:
    alice = models.fine_tune(base, tmp_path / "alice", 1)
    copy = models.fine_tune(base, tmp_path / "copy", 1)
    first = merge.fold(alice)
    before = snapshot(merge)
    again = merge.fold(alice)
    assert (again.fate, again.commit.seq, again.refused) == ("known", first.commit.seq, False)
    twin = merge.fold(copy)
    assert (twin.fate, twin.refused) == ("duplicate", False)
    assert f"duplicate of record {first.commit.seq}" in twin.message
    assert merge.fold(copy).fate == "known"
    assert snapshot(merge) == before


def test_update_in_place_follows_the_setting(tmp_path: Path, base: Path) -> None:
    alice = models.fine_tune(base, tmp_path / "alice", 1)
    with opened(tmp_path, base) as merge:
        merge.fold(alice)
    (alice / "model.safetensors").unlink()
    (alice / "config.json").unlink()
    alice.rmdir()
    models.fine_tune(base, alice, 2)
    with opened(tmp_path, base) as merge:
        assert merge.fold(alice).reason == "update"
        merge.retry("alice")
    with opened(tmp_path, base, updates="add") as merge:
        assert merge.fold(alice).fate == "folded"


def _nan(t: dict[str, torch.Tensor]) -> None:
    t[NAME][3, 4] = math.nan


def _inf(t: dict[str, torch.Tensor]) -> None:
    t["model.norm.weight"][0] = math.inf


def _other(t: dict[str, torch.Tensor]) -> None:
    for name in t:
        t[name] = torch.randn(t[name].shape, generator=torch.Generator().manual_seed(5)) * 0.1


def _shape(t: dict[str, torch.Tensor]) -> None:
    t[NAME] = t[NAME][:-1].clone()


def _missing(t: dict[str, torch.Tensor]) -> None:
    del t[NAME]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_nan, (NAME, "NaN")),
        (_inf, ("model.norm.weight", "infinite")),
        (_other, ("max_base_ratio", "another base")),
        (_shape, (NAME, "47", "48")),
        (_missing, (NAME,)),
    ],
)
def test_bad_candidate_is_refused_and_the_state_is_as_before(
    tmp_path: Path,
    base: Path,
    merge: api.Merge,
    change: Callable[[dict[str, torch.Tensor]], None],
    words: tuple[str, ...],
) -> None:
    merge.fold(models.fine_tune(base, tmp_path / "good", 1))
    before = snapshot(merge)
    outcome = merge.fold(models.fine_tune(base, tmp_path / "bad", 2, change=change))
    assert outcome.refused
    for word in ("bad", *words):
        assert word in outcome.message
    assert "\n" not in outcome.message
    assert snapshot(merge) == before
    assert len(list((tmp_path / "state" / "generations").iterdir())) == 1, "the dropped generation is still there"
    assert verify(merge.state) == []
    assert merge.fold(tmp_path / "bad").fate == "known"
    assert merge.fold(models.fine_tune(base, tmp_path / "next", 3)).fate == "folded"


def test_the_base_itself_is_refused_as_zero(tmp_path: Path, base: Path, merge: api.Merge) -> None:
    assert merge.fold(models.fine_tune(base, tmp_path / "same", 0, size=0.0)).reason == "zero"


def test_own_export_is_refused(tmp_path: Path, base: Path, merge: api.Merge) -> None:
    merge.fold(models.fine_tune(base, tmp_path / "alice", 1))
    merge.export(Target(tmp_path / "merged"))
    outcome = merge.fold(tmp_path / "merged")
    assert outcome.reason == "own-release"


def test_bits_do_not_depend_on_the_workers(tmp_path: Path, base: Path) -> None:
    fine_tunes = [models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(3)]
    seen = []
    for workers in (1, 4):
        state = tmp_path / f"state-{workers}"
        making.init(base, state)
        with api.open(state, write=True, workers=workers) as merge:
            for model in fine_tunes:
                merge.fold(model)
            seen.append((snapshot(merge)[1], merge.state.ledger.totals))
    assert seen[0] == seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDING)
def test_every_rule_folds_survives_reopening_and_exports(tmp_path: Path, base: Path, name: str) -> None:
    """Three folds, the state reopened before each, with one worker and with three: the same bits; a clean state of
    constant size; a sane export."""
    fine_tunes = [models.ship(models.fine_tune(base, tmp_path / f"ft-{i}", i), i) for i in range(3)]
    found = []
    for workers in (1, 3):
        state, sizes = tmp_path / f"state-{workers}", set()
        making.init(base, state, making.Recipe(rule=name))
        for model in fine_tunes:
            with api.Merge(Settings(state=state, workers=workers), write=True) as merge:
                assert merge.fold(model).fate == "folded"
                sizes.add(merge.state.generation_bytes())
        with api.Merge(Settings(state=state)) as merge:
            assert verify(merge.state) == []
            found.append((snapshot(merge)[1], merge.state.ledger.totals))
            exported = load_file(merge.export(Target(tmp_path / f"out-{workers}")) / "model.safetensors")
        assert len(sizes) == 1
    assert found[0] == found[1]
    origin = load_file(base / "model.safetensors")
    assert exported.keys() == origin.keys()
    for tensor, value in exported.items():
        assert torch.isfinite(value).all()
        moved = float((value - origin[tensor]).norm() / origin[tensor].norm())
        assert 0.0 < moved < 1.0, (tensor, moved)


def test_untouched_tensors_are_hard_links_and_state_size_is_constant(
    tmp_path: Path, base: Path, merge: api.Merge
) -> None:
    origin = load_file(base / "model.safetensors")

    def only_one(t: dict[str, torch.Tensor]) -> None:
        for name in t:
            if name != NAME:
                t[name] = origin[name].clone()

    merge.fold(models.fine_tune(base, tmp_path / "first", 1))
    size = merge.state.generation_bytes()
    merge.fold(models.fine_tune(base, tmp_path / "second", 2, change=only_one))
    assert merge.state.generation_bytes() == size
    chunks = [
        p
        for p in (tmp_path / "state/generations" / str(merge.state.ledger.head.generation)).rglob("*")
        if p.name[:2] in ("c", "c.")
    ]
    shared = [p for p in chunks if p.stat().st_nlink > 1]
    assert 0 < len(shared) < len(chunks)


def test_stop_abandons_the_fold_and_settles_nothing(tmp_path: Path, base: Path, merge: api.Merge) -> None:
    alice = models.fine_tune(base, tmp_path / "alice", 1)
    before = merge.state.ledger.head.seq
    merge.engine.resources.stop.set()
    with pytest.raises(Abandoned):
        merge.fold(alice)
    merge.engine.resources.stop.clear()
    assert merge.state.ledger.head.seq == before
    assert merge.fold(alice).fate == "folded"


def test_another_base_in_its_place_is_noticed(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path, base):
        pass
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with opened(tmp_path, base) as merge, pytest.raises(Damaged, match=r"tensor .* differs"):
        _ = merge.base


def test_a_moved_base_is_found_again(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path, base):
        pass
    alice = models.fine_tune(base, tmp_path / "alice", 1)
    base.rename(tmp_path / "elsewhere")
    with opened(tmp_path, base) as merge, pytest.raises(Misconfigured, match="--base"):
        _ = merge.base
    os.utime(tmp_path / "elsewhere/model.safetensors")
    with opened(tmp_path, base, base=tmp_path / "elsewhere") as merge:
        assert merge.fold(alice).fate == "folded"


def test_rollback_then_retry_folds_again(tmp_path: Path, base: Path, merge: api.Merge) -> None:
    first = merge.fold(models.fine_tune(base, tmp_path / "alice", 1))
    before = snapshot(merge)
    bob = models.fine_tune(base, tmp_path / "bob", 2)
    merge.fold(bob)
    after = snapshot(merge)[1]
    merge.state.rollback(first.commit.seq)
    assert snapshot(merge) == before
    assert merge.fold(bob).refused
    merge.retry("bob")
    assert merge.fold(bob).fate == "folded"
    assert snapshot(merge)[1] == after


def test_generations_expire_beyond_those_kept_and_tags_hold_one(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path, base, keep=2) as merge:
        first = merge.fold(models.fine_tune(base, tmp_path / "ft-0", 0))
        merge.state.tag("gold", first.commit.seq)
        for i in range(1, 5):
            merge.fold(models.fine_tune(base, tmp_path / f"ft-{i}", i))
        kept = {p.name for p in (tmp_path / "state/generations").iterdir()}
        assert len(kept) == 3
        assert first.commit.generation in kept
        assert verify(merge.state) == []
        old = merge.state.read(NAME, next(iter(merge.state.format.slots[NAME])), at=first.commit.seq)
        assert np.isfinite(old).all()


def test_plan_reads_headers_and_says_why(tmp_path: Path, base: Path, merge: api.Merge) -> None:
    good = merge.plan(models.fine_tune(base, tmp_path / "good", 1))
    assert good.ok
    assert (good.matrices, good.plain, good.message) == (6, 5, "fits this base")
    assert good.disk_bytes == sum(4 * torch.Size(s).numel() for s in models.SHAPES.values())
    bad = merge.plan(models.fine_tune(base, tmp_path / "bad", 2, change=_shape))
    assert (bad.ok, NAME in bad.message) == (False, True)
    assert merge.state.ledger.head.seq == 0, "a plan must leave no record"


def test_random_choices_are_the_same_in_every_version(tmp_path: Path) -> None:
    """They depend on the tensor's content and name alone: a state that was folded years ago can be folded again."""
    base = models.write(tmp_path / "base", {"w": torch.ones(8, 8), "b": torch.ones(8)})
    tuned = models.write(tmp_path / "ft", {"w": torch.full((8, 8), 2.0), "b": torch.full((8,), 2.0)})
    recipe = making.Recipe(rule="task-arithmetic", options={"before": ["drop:rate=0.5"]})
    making.init(base, tmp_path / "state", recipe)
    with api.Merge(Settings(state=tmp_path / "state", max_base_ratio=1e9), write=True) as merge:
        assert merge.fold(tuned).fate == "folded"
        kept = merge.read("w").reshape(-1) != 0
    assert "".join("x" if one else "." for one in kept) == (
        "...xx..xxx....xx.xx..x.xx....xxx.x..xxxxxx...x.x...x......x..x.."
    )


def test_a_sample_counts_for_all_elements_that_it_stands_for(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With runs that are shorter than a tensor, the last one shorter still."""
    monkeypatch.setattr("continual.engine.fold_orders.RUN", 100)
    counted: Counter[str] = Counter()

    def tally(_self: Sampled, tau: torch.Tensor, inputs: Inputs, _counts: object, times: int) -> None:
        counted[inputs.spec.name] += times * tau.numel()

    making.init(base, tmp_path / "state", making.Recipe(rule="ties", options={"density": 0.2}))
    with opened(tmp_path, base) as merge:
        monkeypatch.setattr(Sampled, "tally", tally)
        monkeypatch.setattr(Sampled, "conclude", lambda _self, _counts, _numel: Threshold(0.0))
        assert merge.fold(models.fine_tune(base, tmp_path / "ft", 1)).fate == "folded"
    for name, shape in models.SHAPES.items():
        assert counted[name] == pytest.approx(torch.Size(shape).numel(), rel=0.1), name
