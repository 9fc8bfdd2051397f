"""The weights of the models of a state of adapters, found on calibration rows with real, tiny transformers models."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from continual import api, linalg, making
from continual.config import Settings
from continual.engine.block_reading import BlockReading
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.executors.contract import silent
from continual.objectives import builtin
from continual.objectives.parameters import Parameters, find_parameters
from continual.records import ObjectiveRecord
from continual.rules import ReadOptions
from continual.state.entries import TuneEntry
from continual.state.parts import RowsEvaluation
from continual.tuning import Learning, Rows, Weighing, scoring, slopes
from tests.helpers import adapters
from tests.helpers.command import machine, run
from tests.helpers.tiny import CPU, MODELS, SMALL, WORDS, transformers, write_tokenizer

pytestmark = pytest.mark.slow

NAMES = "abcd"


class Place(NamedTuple):
    """A state of four adapters of the base beside it, and what they are weighed by."""

    state: Path
    base: Path
    ask: Rows

    def open(self) -> api.Merge:
        return api.Merge(Settings(state=self.state, base=str(self.base), max_base_ratio=100.0), write=True)


def placed(directory: Path, kind: str, rule: str = "task-arithmetic", scale: str = "1") -> Place:
    torch.manual_seed(0)
    objective = "causal-lm" if kind == "experts" else kind
    stack = "model.layers.0.mlp.experts.down_proj"  # experts × in × out
    if kind == "experts":
        sizes = SMALL | {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
        config = transformers.GptOssConfig(**sizes, num_local_experts=3, num_experts_per_tok=2)
        model, modules = transformers.GptOssForCausalLM(config), ("q_proj",)
    elif objective == "causal-lm":
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=32)
        model, modules = transformers.LlamaForCausalLM(config), ("q_proj", "v_proj", "down_proj")
    else:
        model, modules = MODELS[objective]().float(), ("query", "value")
    model.save_pretrained(directory / "base")
    write_tokenizer(directory / "base")
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS[2:], k=draw.randint(2, 9))), "label": "pos"} for _ in range(12)]
    for row in rows[::3]:
        row["label"] = "neg"
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    heads = directory / "heads.json" if objective == "heads" else None
    if heads:
        heads.write_text(json.dumps({"neg": ["bad", "very bad film"], "pos": ["good", "a good book"]}))
    making.init(directory / "base", directory / "state", making.Recipe(rule=rule, scale=scale, width=16))
    found = Place(directory / "state", directory / "base", Rows(objective, directory / "rows.jsonl", heads, 5))
    with found.open() as merge:
        for seed, name in enumerate(NAMES):
            made = adapters.lora(directory / name, found.base, seed, rank=2 + seed % 2, modules=modules, lora_alpha=60)
            if kind == "experts" and seed > 1:
                value = load_file(found.base / "model.safetensors")[stack].clone()
                value[seed - 1] += torch.outer(torch.randn(value.shape[1]), torch.randn(value.shape[2]))
                adapters.plain(made, {f"base_model.model.{stack}": value}, modules_to_save=["experts"])
            assert merge.fold(made).fate == "folded"
    return found


@pytest.mark.parametrize(
    ("kind", "rule", "scale", "lines"),
    [
        ("causal-lm", "task-arithmetic", "0.8", "0.5:1"),
        ("causal-lm", "task-arithmetic", "norm:0.7", None),
        ("classification", "mean", "3", None),
        ("heads", "mean", "norm:0.6", None),
        ("experts", "task-arithmetic", "0.5", None),
    ],
)
def test_slopes_are_those_of_the_loss(tmp_path: Path, kind: str, rule: str, scale: str, lines: str | None) -> None:
    place = placed(tmp_path, kind, rule, scale)
    view = ReadView(lines=lines, weights={"a": 0.5, "c": 2.0})
    worth = builtin.load(place.ask, place.base, CPU)
    with place.open() as merge, merge.weights() as base:
        held = find_parameters(worth.model, base.specs, base.aliases)
        reading = merge.reading(view=view)
        assert isinstance(reading, BlockReading)
        numbers = list(reading.chosen)

        def loss(group: list[int], step: float) -> float:
            moved = ReadView(
                lines=lines,
                weights={
                    name: reading.chosen[number] * (2.0 ** (step / 50) if number in group else 1.0)
                    for name, number in zip(NAMES, numbers, strict=True)
                },
            )
            there = merge.reading(view=moved)
            there.settle(merge.executor, silent)
            scoring.fill(held, base, there, merge.executor)
            return worth.backward()

        groups = [[numbers[0]], [numbers[1], numbers[2]], [numbers[3]]]
        wanted = [(loss(group, 1.0) - loss(group, -1.0)) / (2 * 0.6931471805599453 / 50) for group in groups]
        assert loss([], 0.0) > 0
        found = slopes.Slopes(reading, groups, merge.executor).at(reading.chosen, held)
    assert found == pytest.approx(wanted, rel=2e-2, abs=5e-6)
    assert max(map(abs, wanted)) > 1e-4


def test_the_weights_are_found_by_slopes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = placed(tmp_path, "causal-lm")
    with place.open() as merge:
        told, tried, sloped = list[float](), list[list[float]](), list[list[float]]()
        along = slopes.Slopes.at

        def at(self: slopes.Slopes, weights: Mapping[int, float], held: Parameters) -> tuple[float, ...]:
            sloped.append(sorted(weights.values()))
            return along(self, weights, held)

        def hear(options: ReadOptions, score: float) -> None:
            told.append(score)
            tried.append(sorted(weight for _, weight in options.weights))

        monkeypatch.setattr(slopes.Slopes, "at", at)
        found = merge.tune_weights(place.ask, Weighing(9), told=hear)
        assert sloped == [pytest.approx(weights, rel=1e-5) for weights in tried]
        assert len(found.entry.trials) == len(told) <= 9
        assert found.score == max(told) > found.before == told[0]
        assert isinstance(found.entry.evaluation, RowsEvaluation)
        assert found.entry.evaluation.objective == "causal-lm"
        assert merge.scale() == found.read
        named = {fold.entry.candidate.key: fold.entry.candidate.name for fold in merge.state.ledger.folds()}
        weights = {named[key]: weight for key, weight in found.read.weights}
        assert {one.name: one.weight for one in merge.explain().models} == pytest.approx(weights)
        worth = builtin.load(place.ask, merge.export(tmp_path / "tuned"), CPU)
        assert worth.score() == pytest.approx(found.score, rel=1e-4), "what is exported is what was evaluated"
        head = merge.state.ledger.head.seq
        merge.rescale("auto")
        merge.rescale("1")
        monkeypatch.setattr(slopes, "is_sum", lambda _: False)
        plain = merge.tune_weights(place.ask, Weighing(9, dry_run=True))
        assert (plain.before, plain.commit) == (pytest.approx(found.before), None)
        assert plain.score < found.score, "one weight after the other is slower"
        kept = merge.state.ledger.get(head).entry
        assert isinstance(kept, TuneEntry)
        assert kept.trials == found.entry.trials


def test_groups_on_rows_and_what_is_no_sum(tmp_path: Path) -> None:
    place = placed(tmp_path, "causal-lm")
    argv = ["--rows", place.ask.file, "--objective", "causal-lm", "--batch", 5, "--state", place.state, "--dry-run"]
    body = machine("tune", "--what", "weights", "--group", "a,b", "--group", "c", "--candidates", 4, *argv)
    with place.open() as merge:
        keys = [fold.entry.candidate.key for fold in merge.state.ledger.folds()]
    weights = [body["read"]["weights"][key] for key in keys]
    assert weights[0] == weights[1] != 1.0
    assert weights[3] == 1.0
    assert len(body["trials"]) <= 4
    few = run("tune", "--what", "weights", "--rule", "iso-c", "--candidates", 8, *argv)
    assert few.returncode == 2
    assert "4 weights take at least 9" in few.stderr
    with place.open() as merge:
        assert merge.scale().weights == ()
        found = merge.tune_weights(place.ask, Weighing(3, (("a", "b", "c", "d"),), rule="iso-c"))
        assert len({weight for _, weight in found.read.weights}) == 1


def test_coefficients_of_layers_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = placed(tmp_path, "experts", "tsv-m", "0.3")
    dots, asked = linalg.dot, set[int]()
    monkeypatch.setattr(linalg, "dot", lambda one, other: asked.add(one.numel()) or dots(one, other))
    files = {"rows": (place.ask.file,), "calibration": {"batch": 4, "held": 0.25}}
    with place.open() as merge:
        found = merge.tune_layers(Learning("causal-lm", **files, candidates=6))
        assert found.score > found.before
        layers = dict(found.read.layers)
        sizes = {spec.numel for spec in merge.state.format.tensors if spec.layers and merge.reading().columns(spec)}
        assert asked == sizes, "a tensor that no adapter changes has no gradient"
        stack = "model.layers.0.mlp.experts.down_proj"
        assert layers[stack] != 1.0
        each = merge.tune_layers(Learning("causal-lm", **files, candidates=6, models=True, dry_run=True))
        assert each.before == pytest.approx(found.score, rel=1e-4)
        assert each.score > each.before
        owners = [key for key, _ in each.read.terms.models if each.read.terms.of(key)[stack] != 1.0]
        assert len(owners) > 1, "all experts of a layer have one in common, and each model its own"
        base, after = (
            load_file(where / "model.safetensors") for where in (place.base, merge.export(tmp_path / "after"))
        )
        merge.rescale("auto")
        merge.rescale("0.3")
        plain = load_file(merge.export(tmp_path / "plain") / "model.safetensors")
    for name, value in base.items():
        wanted = layers.get(name, 1.0) * (plain[name].float() - value.float())
        assert torch.allclose(after[name].float() - value.float(), wanted, rtol=1e-3, atol=1e-6), name


def test_models_of_the_state_and_directories_teach(tmp_path: Path) -> None:
    place = placed(tmp_path, "causal-lm", "tsv-m")
    files = {"rows": (place.ask.file, place.ask.file), "calibration": {"batch": 5}}
    with place.open() as merge:
        alone = merge.export(tmp_path / "alone", view=ReadView(rule="task-arithmetic", scale="1", only=("b",)))
        found = merge.tune_layers(Learning("causal-lm", **files, candidates=6, teachers=("a", "b")))
        assert found.score > found.before
        told = found.entry.evaluation
        assert isinstance(told, ObjectiveRecord)
        assert [teacher.name for teacher in told.teachers or ()] == ["a", "b"]
        merge.rescale("auto")
        merge.rescale("1")
        outside = merge.tune_layers(Learning("causal-lm", **files, candidates=3, teachers=("a", str(alone))))
        assert outside.before == pytest.approx(found.before, rel=1e-2), "exported, and rounded with that"
        assert merge.state.ledger.head.seq == outside.commit.seq if outside.commit else True
        for named, message in ((("a",), "one for each file"), (("a", "*"), "4 models are called so")):
            with pytest.raises(Misconfigured, match=message):
                merge.tune_layers(Learning("causal-lm", **files, teachers=named))
    argv = ["--rows", place.ask.file, "--objective", "causal-lm", "--state", place.state, "--teacher", "a"]
    body = machine("tune", "--what", "layers", "--candidates", 3, *argv, "--dry-run")
    assert [one["name"] for one in body["evaluation"]["teachers"]] == ["a"]
    done = run("tune", *argv)
    assert done.returncode == 2
    assert "--teacher is for --what layers" in done.stderr


def test_entropy_needs_no_labels_and_is_warned_of(tmp_path: Path) -> None:
    place = placed(tmp_path, "heads", "mean")
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"text": f"{word} film"}) + "\n" for word in WORDS[2:]))
    argv = ["--rows", bare, "--objective", "heads", "--heads", place.ask.heads, "--state", place.state]
    argv += ["--what", "layers", "--candidates", 3, "--calibration", "unsupervised=true", "--dry-run"]
    done = run("tune", *argv)
    assert done.returncode == 0, done.stderr
    assert "entropy says how sure the model is, not whether it is right" in done.stderr
    body = machine("tune", *argv)
    assert body["evaluation"]["unsupervised"] is True
    assert body["score"] >= body["before"]["score"]
