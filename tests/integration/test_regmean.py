"""The inputs of layers on rows of tasks, read into a state of adapters once, and the merge that `regmean` reads by
them: real models of transformers, real rows, the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from continual import api, making
from continual.config import Settings
from continual.engine.views import ReadView
from continual.errors import Damaged, Misconfigured
from continual.publish.lora import LoraTarget
from continual.state import State
from continual.state.backup import Wish, backup
from continual.state.entries import InputsEntry, RepairEntry
from continual.state.repair import look, repair
from continual.state.strays import strays
from continual.state.task_inputs import SLOT, generation, in_force
from continual.state.verify import verify
from continual.tuning import TaskRows
from tests.helpers import adapters, batch
from tests.helpers.calibrated import Calibrated, made, read
from tests.helpers.command import machine, run

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """A classifier, rows of two tasks, and adapters a, b and c beside it."""
    found = made("classification", tmp_path_factory.mktemp("given"))
    for seed, name in enumerate("abc"):
        adapters.lora(found.base.parent / name, found.base, seed, modules=("query", "dense"))
    return found


def opened(place: Path, given: Calibrated, *names: str, rule: str = "tsv-m", **more: Any) -> api.Merge:
    """A state of adapters with these in it, open for writing."""
    if not (place / "state").exists():
        making.init(given.base, place / "state", making.Recipe(rule=rule, width=32))
    merge = api.Merge(Settings(state=place / "state", max_base_ratio=1e6, max_mean_ratio=1e6, **more), write=True)
    for name in names:
        outcome = merge.fold(given.base.parent / name)
        assert outcome.fate == "folded", outcome.message
    return merge


def rows(given: Calibrated, *models: str, rank: int = 64, **more: Any) -> TaskRows:
    """The rows of the first tasks, for models of these words."""
    words = tuple(tuple(one.split(",")) for one in models)
    return TaskRows("classification", words, given.wanted.rows[: len(words)], rank=rank, **more)


def heard(given: Calibrated, task: int) -> dict[str, torch.Tensor]:
    """C of every linear layer of the base on the rows of a task, one after the other, without hooks of ours."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(given.base).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.base)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, x, _y, n=name: seen.setdefault(n, []).append(x[0].detach()))
    with torch.no_grad():
        for row in read(Path(given.wanted.rows[task])):
            model(torch.tensor([tokenizer(row["text"])["input_ids"]]))
    found = {name: torch.cat([x.flatten(0, -2) for x in each]).double() for name, each in seen.items()}
    return {f"{name}.weight": x.mT @ x / len(x) for name, x in found.items()}


def test_what_is_kept_is_what_the_base_hears_and_the_merge_goes_by_it(tmp_path: Path, given: Calibrated) -> None:
    with opened(tmp_path, given, "a", "b", "c") as merge:
        before = merge.scale()
        found = merge.read_inputs(rows(given, "a,c", "b"))
        assert found.commit is not None
        assert [task[:2] for task in found.tasks] == [(("a", "c"), 24), (("b",), 24)]
        assert merge.scale() == before, "the rule in force stays"
        entry = found.commit.of_kind(InputsEntry)
        assert found.layers == entry.layers > 10
        kept = {
            one.words: generation(merge.state.path, merge.state.format, one) for one in in_force(merge.state.ledger)
        }
        reading = merge.reading(view=ReadView(rule="regmean", weights={"b": 2.0}))
        reading.settle(merge.executor, lambda *_: None)
        taus = {n: merge.reading(view=ReadView(rule="task-arithmetic", scale="1", only=(n,))) for n in "abc"}
        hears, moved = [heard(given, task) for task in (0, 1)], 0
        for spec in merge.state.format.tensors:
            if spec.name not in entry_layers(kept["b"]):
                continue
            for words, c in (("a,c", hears[0][spec.name]), ("b", hears[1][spec.name])):
                values = torch.from_numpy(kept[words].read(spec.name, SLOT)).double()
                near = 1e-5 * float(c.diagonal().mean())
                torch.testing.assert_close(values[-1], c.diagonal(), rtol=1e-4, atol=near)
                torch.testing.assert_close(values[:-1].mT @ values[:-1], c, rtol=1e-3, atol=10 * near)
            tau = [taus[n].unit(spec) for n in "abc"]
            mine = [hears[task][spec.name] for task in (0, 1, 0)]
            expected = batch.regmean(tau, mine, [1.0, 2.0, 1.0], 0.95).view(spec.shape)
            moved += bool(any(one.any() for one in tau))
            torch.testing.assert_close(reading.vector(spec).double(), expected, rtol=1e-3, atol=1e-4)
        assert moved > 4
        merge.export_lora(LoraTarget(tmp_path / "lora", rank=8), ReadView(rule="regmean"))
        assert merge.explain(ReadView(rule="regmean")).rule == "regmean"
        assert verify(merge.state) == []
        assert strays(merge.state.path, merge.state.format, merge.state.ledger) == []


def entry_layers(kept: Any) -> set[str]:
    """The layers that something was read of."""
    return {name for name in kept.form.slots if kept.has(name)}


def test_few_eigenvalues_come_near_all(tmp_path: Path, given: Calibrated) -> None:
    found = []
    with opened(tmp_path, given, "a", "b") as merge:
        for rank in (64, 12, 2):
            assert merge.read_inputs(rows(given, "a", "b", rank=rank)).rank == rank
            reading = merge.reading(view=ReadView(rule="regmean"))
            reading.settle(merge.executor, lambda *_: None)
            vectors = [reading.vector(s).flatten() for s in merge.state.format.tensors if s.kind == "matrix"]
            found.append(torch.cat(vectors))
    whole, *few = found
    near, far = (float((whole - one).norm() / whole.norm()) for one in few)
    assert 0 < near < 0.2 < far


def test_without_inputs_it_says_the_command_and_lets_no_model_in(tmp_path: Path, given: Calibrated) -> None:
    with opened(tmp_path, given, "a", "b") as merge:
        for refused in (
            lambda: merge.export(tmp_path / "out", view=ReadView(rule="regmean")),
            lambda: merge.rescale(rule="regmean"),
        ):
            with pytest.raises(Misconfigured, match=r"nobody has read those of a, b: 'continual tune --what inputs"):
                refused()
        merge.read_inputs(rows(given, "a"))
        with pytest.raises(Misconfigured, match="nobody has read those of b"):
            merge.rescale(rule="regmean")
        merge.export(tmp_path / "only-a", view=ReadView(rule="regmean", only=("a",)))
        merge.read_inputs(rows(given, "b"))
        assert merge.rescale(rule="regmean").rule == "regmean"
        outcome = merge.fold(given.base.parent / "c")
        assert (outcome.fate, outcome.reason) == ("refused", "inputs")
        assert "continual retry c" in outcome.message
        with opened(tmp_path / "other", given, "c"):
            pass
        with pytest.raises(Misconfigured, match="c: the merge is read by regmean"):
            merge.combine(tmp_path / "other" / "state")
        merge.read_inputs(rows(given, "[c-z]*"))  # whoever is called so, when it comes
        merge.retry("c")
        assert merge.fold(given.base.parent / "c").fate == "folded"
        merge.export(tmp_path / "all")
        seq = merge.head
        merge.rescale(rule="tsv-m")
        merge.state.rollback(2)
        merge.rescale(rule="regmean")
        assert merge.head > seq, "inputs do not go back with a merge"
    for more in ({"rule": "regmean"}, {"reading": "regmean"}):
        with opened(tmp_path / next(iter(more)), given, **more) as merge:
            assert merge.fold(given.base.parent / "a").reason == "inputs"


def test_a_merge_of_whole_tensors_is_told_what_can_be_read_so(tmp_path: Path, given: Calibrated) -> None:
    only = "only a state made with 'continual init --adapters'"
    with pytest.raises(Misconfigured, match=only):
        making.init(given.base, tmp_path / "whole", making.Recipe(rule="regmean"))
    making.init(given.base, tmp_path / "whole", making.Recipe(rule="mean"))
    with api.Merge(Settings(state=tmp_path / "whole"), write=True) as merge:
        with pytest.raises(Misconfigured, match=only):
            merge.rescale(rule="regmean")
        with pytest.raises(Misconfigured, match=only):
            merge.read_inputs(rows(given, "*"))


def test_words_that_name_nobody_or_one_model_twice_are_refused(tmp_path: Path, given: Calibrated) -> None:
    with opened(tmp_path, given, "a", "b") as merge:
        for words, said in (
            (("z",), "no model of the merge is called so; in it are a, b"),
            (("a", "?"), "a is of another task already"),
            (("",), "write names of models"),
        ):
            with pytest.raises(Misconfigured, match=said):
                merge.read_inputs(rows(given, *words))
        with pytest.raises(Misconfigured, match=r"2 of --rows, and 1 of --for"):
            TaskRows("classification", (("a",),), given.wanted.rows)
        with pytest.raises(Misconfigured, match="rank = 0"):
            rows(given, "a", rank=0)
        assert merge.head == 2
        assert not (merge.state.path / "inputs").exists() or not list((merge.state.path / "inputs").iterdir())


def test_weights_that_lie_in_by_out_meet_their_inputs_at_their_rows(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    found = made("causal-lm", tmp_path)
    random, weights = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for layer in (0, 1):
        head = f"base_model.model.transformer.h.{layer}.mlp.c_fc"  # 16 inputs, 64 outputs
        weights[f"{head}.lora_A.weight"] = torch.randn(2, 16, generator=random)
        weights[f"{head}.lora_B.weight"] = torch.randn(64, 2, generator=random)
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file(
            {k: v * (1 + (name == "b") * torch.rand_like(v)) for k, v in weights.items()},
            tmp_path / name / "adapter_model.safetensors",
        )
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["c_fc"], "fan_in_fan_out": True}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(said))
    with opened(tmp_path, found, "a", "b", gates={"copies": {"act": "off"}}) as merge:
        told = merge.read_inputs(TaskRows("causal-lm", (("a",), ("b",)), found.wanted.rows))
        assert told.commit is not None
        across = told.commit.of_kind(InputsEntry).across
        assert "transformer.h.0.mlp.c_fc.weight" in across
        one = merge.reading(view=ReadView(rule="regmean", only=("a",)))
        own = merge.reading(view=ReadView(rule="task-arithmetic", scale="1", only=("a",)))
        both = merge.reading(view=ReadView(rule="regmean"))
        mean = merge.reading(view=ReadView(rule="mean"))
        spec = next(s for s in merge.state.format.tensors if s.name.endswith("h.0.mlp.c_fc.weight"))
        assert spec.shape == (16, 64)
        torch.testing.assert_close(one.unit(spec), own.unit(spec), rtol=1e-4, atol=1e-5)
        x, m = both.unit(spec), mean.unit(spec)
        assert float((x - m).norm()) > 0.01 * float(m.norm())


def test_damage_is_named_and_a_repair_leaves_the_merge_as_it_was(tmp_path: Path, given: Calibrated) -> None:
    with opened(tmp_path, given, "a", "b") as merge:
        merge.read_inputs(rows(given, "a", "b"))
        first = {one.task.id for one in in_force(merge.state.ledger)}
        merge.read_inputs(rows(given, "a"))
        now = {one.words: one.task.id for one in in_force(merge.state.ledger)}
        there = {entry.name for entry in (merge.state.path / "inputs").iterdir()}
        assert there == set(now.values()), "what was read again goes"
        assert len(there & first) == 1
    state = tmp_path / "state"
    copy = backup(state, tmp_path / "backup", Wish(copy=True), lambda *_: None)
    assert copy.checked
    (chunk, *_) = sorted((state / "inputs" / now["a"] / SLOT).glob("*/c.*"))
    damaged = bytearray(chunk.read_bytes())
    damaged[10] ^= 1
    chunk.unlink()
    chunk.write_bytes(damaged)
    with State.open(state) as found:
        assert len(verify(found)) == 1
    with opened(tmp_path, given) as merge:
        reading = merge.reading(view=ReadView(rule="regmean"))
        with pytest.raises(Damaged, match="no fold depends on it: read the inputs again"):
            list(map(reading.unit, merge.state.format.tensors))
    plan = look(state, lambda *_: None)
    assert (plan.inputs, plan.undone, len(plan.lost)) == ((now["a"],), (), 1)
    commit = repair(state, plan, lambda *_: None)
    assert commit is not None
    assert commit.of_kind(RepairEntry).inputs == (now["a"],)
    assert look(state, lambda *_: None).findings == ()
    with opened(tmp_path, given) as merge:
        assert verify(merge.state) == []
        with pytest.raises(Misconfigured, match="nobody has read those of a:"):
            merge.reading(view=ReadView(rule="regmean"))
        merge.read_inputs(rows(given, "a"))
        merge.reading(view=ReadView(rule="regmean"))
    with State.open(tmp_path / "backup") as found:
        assert verify(found) == []
        assert {one.task.id for one in in_force(found.ledger)} == set(now.values())
    shutil.rmtree(state / "inputs" / in_force_of(state, "b"))
    assert [line for line in look(state, lambda *_: None).lost if "the inputs of b" in line]


def in_force_of(state: Path, words: str) -> str:
    with State.open(state) as found:
        return next(one.task.id for one in in_force(found.ledger) if one.words == words)


@pytest.mark.parametrize("step", ["fsync-dirs", "temp-commit", "head"])
def test_a_writer_that_dies_leaves_all_or_nothing(tmp_path: Path, given: Calibrated, step: str) -> None:
    class Died(BaseException):
        pass

    with opened(tmp_path, given, "a", "b"):
        pass
    seen: list[str] = []

    def dies(now: str) -> None:
        seen.append(now)
        if now == step and seen.count(step) == (1 if step in ("temp-commit", "link", "head") else 2):
            raise Died

    with (
        api.Merge(Settings(state=tmp_path / "state"), write=True, on_step=dies) as merge,
        pytest.raises(Died),
    ):
        merge.read_inputs(rows(given, "a", "b"))
    with opened(tmp_path, given) as merge:
        stands = step == "head"
        assert len(in_force(merge.state.ledger)) == 2 * stands
        assert verify(merge.state) == []
        assert strays(merge.state.path, merge.state.format, merge.state.ledger) == []
        if stands:
            merge.reading(view=ReadView(rule="regmean"))


def test_the_command(tmp_path: Path, given: Calibrated) -> None:
    with opened(tmp_path, given, "a", "b"):
        pass
    where = ("--state", tmp_path / "state", "--objective", "classification")
    files = [
        part for file, name in zip(given.wanted.rows, "ab", strict=True) for part in ("--rows", file, "--for", name)
    ]
    done = run("tune", "--what", "inputs", *files, *where, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "nothing recorded" in done.stdout
    body = machine("tune", "--what", "inputs", *files, *where, "--rank", 8)
    assert body["record"] == 3
    assert [task["rows"] for task in body["tasks"]] == [24, 24]
    assert body["rank"] == 8
    assert run("scale", "--rule", "regmean", "--state", tmp_path / "state").returncode == 0
    assert run("export", tmp_path / "out", "--state", tmp_path / "state").returncode == 0
    for wrong in (("--for", "a"), ("--rank", 3)):
        assert run("tune", "--what", "layers", *wrong, *where).returncode == 2
    assert run("tune", "--what", "inputs", *files, *where, "--rule", "regmean").returncode == 2
