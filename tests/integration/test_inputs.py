"""What a fold takes besides the weights: their weight, values shipped beside them, transforms before it; and how the
merge is read, on real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.config import Settings
from continual.errors import Misconfigured
from continual.publish.folder import Target
from tests.helpers import models

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


def opened(tmp_path: Path, base: Path, asked: making.Recipe, **settings: object) -> api.Merge:
    if not (tmp_path / "state").exists():
        making.init(base, tmp_path / "state", asked)
    return api.Merge(Settings(state=tmp_path / "state", **settings), write=True)  # type: ignore[arg-type]


def tau(base: Path, model: Path) -> torch.Tensor:
    return load_file(model / "model.safetensors")[NAME] - load_file(base / "model.safetensors")[NAME]


def test_weights_come_from_settings_files_and_headers(tmp_path: Path, base: Path) -> None:
    a, b, c, d = (
        models.fine_tune(base, tmp_path / name, i) for i, name in enumerate(("alice", "bob", "carol", "dave"))
    )
    (b / "eval_results.json").write_text(json.dumps({"eval": {"accuracy": 0.5}}))
    save_file(load_file(c / "model.safetensors"), c / "model.safetensors", metadata={"score": "4"})
    mean = making.Recipe(rule="mean")
    for model, settings, weight in (
        (a, {"weights": {"ali*": 3.0}}, 3.0),
        (b, {"weight": "eval_results.json:eval.accuracy"}, 0.5),
        (c, {"weight": "metadata:score"}, 4.0),
        (d, {"weight": "2"}, 2.0),
    ):
        with opened(tmp_path, base, mean, **settings) as merge:
            outcome = merge.fold(model)
            assert outcome.report is not None, outcome.message
            assert outcome.report.numbers.weight == weight
    with opened(tmp_path, base, mean) as merge:
        expected = (3 * tau(base, a) + 0.5 * tau(base, b) + 4 * tau(base, c) + 2 * tau(base, d)) / 9.5
        torch.testing.assert_close(merge.read(NAME), expected, rtol=1e-4, atol=1e-8)
        merge.unfold(merge.look_unfold("carol"))
        torch.testing.assert_close(
            merge.read(NAME), (3 * tau(base, a) + 0.5 * tau(base, b) + 2 * tau(base, d)) / 5.5, rtol=1e-4, atol=1e-8
        )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (None, "is not there"),
        ('{"score": -1}', "score is -1"),
        ('{"score": "high"}', "score is high"),
        ('{"other": 1}', "score is None"),
        ("[1]", "JSON"),
    ],
)
def test_a_weight_that_is_missing_or_wrong_refuses_the_model(
    tmp_path: Path, base: Path, body: str | None, words: str
) -> None:
    model = models.fine_tune(base, tmp_path / "alice", 1)
    if body is not None:
        (model / "metrics.json").write_text(body)
    with opened(tmp_path, base, making.Recipe(rule="mean"), weight="metrics.json:score") as merge:
        outcome = merge.fold(model)
        assert (outcome.refused, outcome.reason) == (True, "weight"), outcome.message
        assert words in outcome.message
        assert "metrics.json" in outcome.message


def test_a_plan_asks_for_the_weight_and_the_pool_does_not(tmp_path: Path, base: Path) -> None:
    """A model that waits can still get the file with its weight; it is asked for it when a round folds it."""
    model = models.fine_tune(base, tmp_path / "alice", 1)
    recipe = making.Recipe(rule="mean")
    with opened(tmp_path, base, recipe, weight="metrics.json:score") as merge:
        plan = merge.plan(model)
        assert (plan.ok, plan.reason) == (False, "weight")
    with opened(tmp_path, base, recipe, weight="metrics.json:score", select="relevance") as merge:
        assert merge.fold(model).fate == "deferred"


@pytest.mark.parametrize(
    ("rule", "settings", "words"),
    [
        ("opcm", {"weight": "2"}, "opcm folds every model with weight 1"),
        ("mean", {"weight": "-1"}, "above 0"),
        ("mean", {"weight": "accuracy"}, "FILE.json:KEY"),
        ("mean", {"weight": "../x.json:a"}, "FILE.json:KEY"),
        ("mean", {"weights": {"x": 0.0}}, "weights: x"),
        ("mean", {"rule": "ties"}, "was made with mean"),
        ("ties", {"options": {"density": 0.5}}, "density = 0.5"),
        ("mean", {"before": ("drop",)}, "before = .*drop.* was made with None"),
    ],
)
def test_settings_that_do_not_fit_the_state_are_refused(
    tmp_path: Path, base: Path, rule: str, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(Misconfigured, match=words):
        opened(tmp_path, base, making.Recipe(rule=rule), **settings).plan(base)


def test_fisher_weighs_each_parameter_by_what_is_shipped(tmp_path: Path, base: Path) -> None:
    tuned = [models.ship(models.fine_tune(base, tmp_path / f"ft-{i}", i), i) for i in range(3)]
    with opened(tmp_path, base, making.Recipe(rule="fisher", options={"power": 0.5})) as merge:
        for model in tuned:
            plan = merge.plan(model)
            assert plan.ok
            values = 4 * sum(torch.Size(shape).numel() for shape in models.SHAPES.values())
            assert plan.read_bytes == 3 * values, "the base, the fine-tune and what is shipped, once each"
            assert merge.fold(model).fate == "folded"
        weights = [load_file(model / "fisher.safetensors")[NAME].double().sqrt() for model in tuned]
        total = sum(w * tau(base, model).double() for w, model in zip(weights, tuned, strict=True))
        torch.testing.assert_close(merge.read(NAME).double(), total / sum(weights), rtol=1e-5, atol=1e-8)


def _negative(values: dict[str, torch.Tensor]) -> None:
    values[NAME][0, 0] = -1.0


def _infinite(values: dict[str, torch.Tensor]) -> None:
    values[NAME][3, 1] = torch.inf


def _lacking(values: dict[str, torch.Tensor]) -> None:
    del values[NAME]


def _shaped(values: dict[str, torch.Tensor]) -> None:
    values[NAME] = values[NAME].T.contiguous()


@pytest.mark.parametrize("change", [_negative, _infinite, _lacking, _shaped, None])
def test_bad_values_beside_the_weights_refuse_the_model(
    tmp_path: Path, base: Path, change: Callable[[dict[str, torch.Tensor]], None] | None
) -> None:
    model = models.fine_tune(base, tmp_path / "alice", 1)
    if change is not None:
        models.ship(model, 1, change=change)
    with opened(tmp_path, base, making.Recipe(rule="fisher")) as merge:
        outcome = merge.fold(model)
        assert (outcome.refused, outcome.reason) == (True, "moments"), outcome.message
        assert "fisher.safetensors" in outcome.message
        assert change is None or NAME in outcome.message
        if change is None:
            models.ship(model, 1)
            merge.retry("alice")
            assert merge.fold(model).fate == "folded"


def test_a_dropped_model_is_the_same_wherever_it_lies_and_can_be_taken_out(tmp_path: Path, base: Path) -> None:
    asked = making.Recipe(rule="task-arithmetic", options={"before": ["drop:rate=0.75"]}, scale="1")
    a, b = (models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(2))
    with opened(tmp_path, base, asked) as merge:
        merge.fold(a)
        first = merge.read(NAME)
        kept = first != 0
        assert 0.15 < float(kept.float().mean()) < 0.35
        torch.testing.assert_close(first[kept], 4 * tau(base, a)[kept], rtol=1e-5, atol=1e-9)
        merge.fold(b)
        merge.unfold(merge.look_unfold("ft-1"))
        torch.testing.assert_close(merge.read(NAME), first, rtol=1e-5, atol=1e-8)
    (tmp_path / "there").mkdir()
    with opened(tmp_path / "there", base, asked, workers=1) as merge:
        merge.fold(a.rename(tmp_path / "there/copy"))
        assert torch.equal(merge.read(NAME), first)
    with opened(tmp_path, base, asked, before=("drop:rate=0.75",)) as merge:
        assert merge.rule.options["before"] == [{"name": "drop", "rate": 0.75, "rescale": True, "seed": 0}]


def test_tensors_of_one_content_are_dropped_differently(tmp_path: Path, base: Path) -> None:
    """The seed of a tensor comes from its content and its name."""
    twin = NAME.replace("layers.1", "layers.0")

    def alike(tensors: dict[str, torch.Tensor]) -> None:
        tensors[twin] = tensors[NAME].clone()

    origin = models.fine_tune(base, tmp_path / "origin", 7, change=alike)
    model = models.fine_tune(origin, tmp_path / "alice", 1, change=alike)
    asked = making.Recipe(rule="task-arithmetic", options={"before": ["drop:rate=0.75"]}, scale="1")
    with opened(tmp_path, origin, asked) as merge:
        assert merge.fold(model).fate == "folded"
        first, second = merge.read(NAME) != 0, merge.read(twin) != 0
    agree = float((first == second).float().mean())
    assert 0.5 < agree < 0.75, "independent masks with a quarter kept agree on 0.75² + 0.25² = 0.625 of all elements"


def test_trim_before_a_rule_counts_over_the_whole_model(tmp_path: Path, base: Path) -> None:
    model = models.fine_tune(base, tmp_path / "alice", 1)
    with opened(
        tmp_path, base, making.Recipe(rule="task-arithmetic", options={"before": ["trim:density=0.1"]}, scale="1")
    ) as merge:
        assert merge.plan(model).passes == pytest.approx(2 + 1 / 16)
        merge.fold(model)
        kept = sum(int(merge.read(spec.name).count_nonzero()) for spec in merge.state.format.tensors)
        assert kept == int(0.1 * sum(spec.numel for spec in merge.state.format.tensors))


def test_the_scale_of_the_merge_and_of_its_layers_changes_without_a_fold(tmp_path: Path, base: Path) -> None:
    model = models.fine_tune(base, tmp_path / "alice", 1)
    with opened(tmp_path, base, making.Recipe(rule="task-arithmetic", scale="1")) as merge:
        merge.fold(model)
        generation = merge.state.ledger.head.generation
        merge.rescale("0.5", "0.25:0.5")
        with pytest.raises(Misconfigured, match="ALPHA:BETA"):
            merge.rescale(lines="1:2:3")
    with opened(tmp_path, base, making.Recipe()) as merge:
        assert merge.state.ledger.head.generation == generation
        origin = load_file(base / "model.safetensors")
        found = load_file(merge.export(Target(tmp_path / "merged")) / "model.safetensors")
        for spec in merge.state.format.tensors:
            change = load_file(model / "model.safetensors")[spec.name] - origin[spec.name]
            torch.testing.assert_close(
                found[spec.name] - origin[spec.name], 0.5 * (0.25 + 0.5 * spec.depth) * change, rtol=1e-3, atol=1e-7
            )
        assert {spec.depth for spec in merge.state.format.tensors} >= {0.0, 1.0}
        merge.rescale(lines="none")
        torch.testing.assert_close(merge.read(NAME), 0.5 * tau(base, model), rtol=1e-5, atol=1e-9)
        merge.rescale("norm:1")
        assert merge.state.ledger.read_options(merge.state.ledger.head.seq) == {"policy": "norm", "value": 1.0}
