"""Rounds over adapters that wait, on states that keep adapters as they are: what is chosen is what a state of whole
tensors chooses of the same adapters, by the factors alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.engine.outcomes import Outcome
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.records import depths_of
from continual.selection import beside
from continual.selection.active import active_at
from continual.selection.in_memory import Score
from continual.selection.members import Member
from continual.state import Commit
from continual.state.verify import verify
from continual.tuning import Command
from tests.helpers import adapters, calibrated, packing, quadratic
from tests.helpers.folders import open_files
from tests.helpers.pools import fill, loaded, names, opened, waits

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


def state_of(tmp_path: Path, base: Path, width: int | None, rule: str) -> Path:
    state = tmp_path / ("dense" if width is None else "blocks")
    making.init(base, state, making.Recipe(rule=rule, width=width))
    return state


def candidates(base: Path) -> list[Path]:
    """Three that are good for a task each, and one of noise."""
    good = [quadratic.lora(base, k, f"good{k}", seed=k) for k in range(3)]
    return [quadratic.lora(base, None, "noise0", seed=50), *good]


def read(merge: api.Merge) -> dict[str, torch.Tensor]:
    reading = merge.reading()
    reading.settle(merge.executor, lambda *_: None)
    return {spec.name: reading.vector(spec) for spec in merge.state.format.tensors}


def same_table(ours: Any, theirs: Any) -> None:
    """Two rounds found the same of the same members, up to rounding."""
    assert [(row.name, row.fate, row.reason) for row in ours.rows] == [
        (row.name, row.fate, row.reason) for row in theirs.rows
    ]
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        for figure in ("score", "change", "error", "z", "weight"):
            found, expected = getattr(one, figure), getattr(other, figure)
            assert (found is None) == (expected is None), (one, figure)
            assert found is None or found == pytest.approx(expected, rel=1e-3, abs=1e-4), (one, figure)
    assert (ours.loss, ours.before) == pytest.approx((theirs.loss, theirs.before), rel=1e-4)


def test_the_relevant_ones_are_those_of_a_dense_state(tmp_path: Path, base: Path) -> None:
    paths = candidates(base)
    found: dict[int | None, list[Any]] = {}
    for width in (None, 64):
        with opened(state_of(tmp_path, base, width, "iso-c"), base, workers=1, rounds={"tolerance": 0.5}) as merge:
            fill(merge, *paths)
            looked = merge.look_round()
            assert looked.commit is None
            first = merge.round()
            assert sorted(names(merge)) == ["good0", "good1", "good2"]
            assert waits(merge) == ["noise0"]
            assert merge.state.ledger.open_round is None
            assert verify(merge.state) == []
            assert merge.why("noise0").rounds[-1].row.name == "noise0"
            told = [fold.entry.numbers.relevance for fold in merge.state.ledger.folds()]
            assert all(one is not None for one in told)
            found[width] = [looked, first, names(merge), waits(merge), read(merge)]
    dense, blocks = found[None], found[64]
    for one, other in zip(blocks[:2], dense[:2], strict=True):
        same_table(one, other)
    assert blocks[2:4] == dense[2:4]
    for name, value in dense[4].items():
        torch.testing.assert_close(blocks[4][name], value, rtol=0, atol=1e-5 * float(value.abs().max() + 1e-3))


def weighed(state: Path, base: Path, **rounds: Any) -> api.Merge:
    return opened(state, base, select=None, workers=1, rounds={"patience": 9, "tolerance": 0.5, **rounds}, keep=9)


def weights(merge: api.Merge) -> dict[str, tuple[float, ...]]:
    now = active_at(merge.state)
    return {now.members[key].name: each for key, each in now.weights.items()}


def is_the_sum(merge: api.Merge, base: Path, found: dict[str, torch.Tensor]) -> None:
    """What is read is Σ w_i τ_i, each layer with its own weights."""
    depths = depths_of(merge.state.format.tensors)
    taus = {name: adapters.task_vectors(base, base.parent / "pool" / name)[0] for name in weights(merge)}
    for spec in merge.state.format.tensors:
        parts = {n: each[depths.index(spec.depth) if len(each) > 1 else 0] for n, each in weights(merge).items()}
        nothing = torch.zeros(spec.shape)
        expected = sum((w * taus[name].get(spec.name, nothing) for name, w in parts.items()), nothing)
        torch.testing.assert_close(found[spec.name], expected, rtol=0, atol=1e-6, msg=spec.name)


def test_frank_wolfe_weighs_blocks_as_it_weighs_sums(tmp_path: Path, base: Path) -> None:
    """The first round chooses as that of a dense state. Another ρ changes weights alone: nothing is written but the
    record. Who leaves is taken out and waits. All of it is read back, at each record."""
    paths = candidates(base)
    with weighed(state_of(tmp_path, base, None, "frank-wolfe"), base) as merge:
        fill(merge, *paths)
        dense, expected = merge.round(), read(merge)
    state, seen = state_of(tmp_path, base, 64, "frank-wolfe"), {}
    for rounds, there, out in (
        ({}, ["good0", "good1", "good2"], ["noise0"]),
        ({"rho": 2.0}, ["good0", "good1", "good2"], ["noise0"]),
        ({"rho": 0.7, "sigmas": 4.3, "stays": 4.3}, ["good0", "good1"], ["noise0", "good2"]),
    ):
        with weighed(state, base, **rounds) as merge:
            if not merge.state.ledger.folds():
                fill(merge, *paths)
            before = merge.state.ledger.head.generation
            found = merge.round()
            if not seen:
                same_table(found, dense)
                for name, value in expected.items():
                    torch.testing.assert_close(merge.read(name), value, rtol=0, atol=1e-6)
            assert (names(merge), waits(merge)) == (there, out)
            seen[merge.head] = read(merge)
            is_the_sum(merge, base, seen[merge.head])
            assert merge.state.ledger.model is merge.state.ledger.head
            assert (merge.state.ledger.head.generation == before) == (len(seen) == 2)
            assert merge.state.ledger.totals.weight == pytest.approx(sum(sum(w) / 2 for w in weights(merge).values()))
            assert verify(merge.state) == []
    with weighed(state, base) as merge:
        for seq, value in seen.items():
            for name, tensor in value.items():
                torch.testing.assert_close(merge.read(name, at=seq), tensor, rtol=0, atol=0)
        merge.state.rollback(min(seen))
        shutil.rmtree(base.parent / "pool/good1")
        merge.unfold(merge.look_unfold("good1"))
        assert names(merge) == ["good0", "good2"]
        is_the_sum(merge, base, read(merge))
        with pytest.raises(Misconfigured, match="has the weights that rounds found: name another rule"):
            merge.tune_weights(Command((sys.executable, "{model}")))
        shares = {one.name: one.weight for one in merge.explain().models}
        assert shares == pytest.approx({name: sum(each) / 2 for name, each in weights(merge).items()})
        one = merge.reading(view=ReadView(rule="task-arithmetic", scale="1", weights={"good*": 1.0}, only=("good0",)))
        one.settle(merge.executor, lambda *_: None)
        tau = adapters.task_vectors(base, base.parent / "pool/good0")[0]
        spec = next(spec for spec in merge.state.format.tensors if spec.name in tau)
        torch.testing.assert_close(one.vector(spec), tau[spec.name], rtol=0, atol=1e-6)
        assert verify(merge.state) == []


def test_in_a_full_house_all_keep_a_weight_and_a_twin_gives_its_own(tmp_path: Path, base: Path) -> None:
    """Those that a round has no place for move together, and can be weighed again."""
    _, *good = candidates(base)
    asked = {"layers": False, "step": "soft", "active": 2}
    with weighed(state_of(tmp_path, base, 64, "frank-wolfe"), base, **asked, rho=0.6) as merge:
        fill(merge, *good[:2])
        merge.round()
        first = weights(merge)
        assert sorted(first) == ["good0", "good1"]
    lightest = min(first, key=lambda name: first[name])
    with weighed(tmp_path / "blocks", base, **asked) as merge:
        fill(merge, good[2])
        merge.round()
        second = weights(merge)
        assert sorted(second) == ["good0", "good1", "good2"]
        assert 0 < second[lightest][0] <= first[lightest][0]
        is_the_sum(merge, base, read(merge))
        shutil.copytree(base.parent / "pool" / lightest, base.parent / "pool/twin")
        fill(merge, base.parent / "pool/twin")
        found = {row.name: row for row in merge.round().rows}
        assert found["twin"].message == f"twin: duplicate of {lightest}: the same tensors"
        assert weights(merge)[lightest] > second[lightest]
        assert (sorted(weights(merge)), waits(merge)) == (sorted(second), [])
        is_the_sum(merge, base, read(merge))


def test_a_round_that_weighs_says_what_it_cut_to_make_room(tmp_path: Path, base: Path) -> None:
    _, *good = candidates(base)
    with weighed(state_of(tmp_path, base, 2, "frank-wolfe"), base) as merge:
        fill(merge, *good)
        found, whole = merge.round(), merge.fullness()
        assert whole is not None
        lost = {f.entry.candidate.name: whole.models[f.entry.numbers.block or 0] for f in merge.state.ledger.folds()}
        assert any(lost.values())
        assert found.cut == pytest.approx({name: share for name, share in lost.items() if share})


@pytest.mark.parametrize("alone", [True, False])
def test_who_has_no_room_in_the_width_is_refused_and_the_round_chooses_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """A whole matrix beside the factors has more directions than the state keeps. The round ends also where nobody else
    waits, and before it chooses again it closes the base."""
    opened_before: list[int] = []
    write = beside.write

    def counted(*given: Any) -> Commit:
        opened_before.append(len(open_files(base)))
        return write(*given)

    monkeypatch.setattr(beside, "write", counted)
    thick, good = quadratic.lora(base, 1, "thick", seed=3), quadratic.lora(base, 0, "good0")
    head, weights_of = "base_model.model.lm_head", load_file(thick / "adapter_model.safetensors")
    kept = {name: value for name, value in weights_of.items() if not name.startswith(head)}
    whole = load_file(base.parent / "targets/t1/model.safetensors")["lm_head.weight"]
    config = json.loads((thick / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    adapters.plain(thick, {**kept, f"{head}.weight": whole}, **config)
    making.init(base, tmp_path / "state", making.Recipe(rule="frank-wolfe", width=8))
    heard: list[Any] = []
    with weighed(tmp_path / "state", base) as merge:
        fill(merge, *([thick] if alone else [thick, good]))
        found = merge.round(told=heard.append)
        chosen = [row.name for row in found.rows if row.fate == "folded"]
        assert chosen == names(merge) == ([] if alone else ["good0"])
        assert opened_before == [2, 2], "for the gate, and for the round"
        (refused,) = (outcome for outcome in heard if isinstance(outcome, Outcome))
        assert (refused.name, refused.reason, merge.why("thick").reason) == ("thick", "cut", "cut")
        assert (waits(merge), merge.state.ledger.open_round) == ([], None)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_scores_and_trials_of_a_real_model(tmp_path: Path) -> None:
    """GPT-2, whose layers lie the other way round, and an adapter that PEFT wrote: the factors give what the whole task
    vector gives, in the score and in the model that is moved along it."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    given = calibrated.made("causal-lm", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.base)
    wanted = peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    peft.get_peft_model(model, wanted).save_pretrained(tmp_path / "lora")
    making.init(given.base, tmp_path / "state", making.Recipe(rule="mean", width=8))
    rows = {"objective": "causal-lm", "rows": given.wanted.rows, "heads": ()}
    with opened(tmp_path / "state", given.base, **rows) as merge, merge.weights() as weights:
        fill(merge, tmp_path / "lora")
        found = loaded(merge, merge.engine.reading_from(weights))
        (member,) = (Member(waiting.candidate) for waiting in merge.pool().values())
        before = {name: held[0].value.clone() for name, held in found.parameters.items()}
        found.backward()
        gradients = {name: held[0].gradient for name, held in found.parameters.items()}
        score = found.scores([member], lambda *_: None)[member.key]
        found.move(member, 0.5)
    taus = adapters.task_vectors(given.base, tmp_path / "lora")[0]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in taus} == {"c_attn", "c_fc"}
    products = [float((gradients[name].double() * tau.double()).sum()) for name, tau in taus.items()]
    assert isinstance(score, Score)
    assert score.total == pytest.approx(sum(products), rel=1e-4, abs=1e-5)
    assert score.tau_sq == pytest.approx(sum(float(tau.square().sum()) for tau in taus.values()), rel=1e-5)
    for name, value in before.items():
        moved = found.parameters[name][0].value
        torch.testing.assert_close(moved, value + 0.5 * taus.get(name, torch.zeros_like(value)), rtol=1e-5, atol=1e-6)


def test_the_base_has_to_be_readable(tmp_path: Path, base: Path) -> None:
    """A packed one is not; what it was packed from is. One that is gone is said before anything is read."""
    packed, state, good = packing.packed(base, tmp_path / "packed", "gptq"), tmp_path / "state", candidates(base)[1]
    making.init(packed, state, making.Recipe(rule="mean", width=64))
    with opened(state, base) as merge:
        fill(merge, good)
        for run in (merge.round, merge.look_round, lambda: merge.check([])):
            with pytest.raises(
                Misconfigured, match=r"is quantised \(GPTQ\).*model that it was quantised from: base = DIR"
            ):
                run()
        assert merge.state.ledger.open_round is None
    asked = {"objective": "tests.helpers.quadratic:make", "select": "relevance", "base": base}
    with api.open(state, write=True, **asked) as merge:
        assert merge.round().folds == 1
    whole = tmp_path / "whole"
    making.init(base, whole, making.Recipe(rule="mean", width=64))
    with opened(whole, base) as merge:
        fill(merge, good)
        (base / "model.safetensors").rename(tmp_path / "gone")
        with pytest.raises(Misconfigured, match=r"has no model.safetensors any more, and a round takes gradients"):
            merge.round()
