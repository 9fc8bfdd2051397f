"""A state read by another rule than the one that it was made with: the same as a state of that rule, and refused where
what is kept does not have it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import continual
from continual import api, making
from continual.cli import main
from continual.config import Settings
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from tests.helpers import models, stores

pytestmark = pytest.mark.slow

SUMS = ["mean", "task-arithmetic", "iso-c"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path, base: Path) -> list[Path]:
    return [models.fine_tune(base, tmp_path / f"model-{i}", i, size=0.02 * (i + 1)) for i in range(2)]


def folded(place: Path, base: Path, recipe: making.Recipe, tuned: list[Path], name: str) -> None:
    making.init(base, place / name, recipe)
    with api.Merge(Settings(state=place / name), write=True) as merge:
        for model in tuned:
            assert merge.fold(model).fate == "folded"


def merge_of(place: Path, *, write: bool = False, **settings: object) -> api.Merge:
    return api.Merge(Settings.model_validate({"state": place, **settings}), write=write)


def read(merge: api.Merge) -> dict[str, torch.Tensor]:
    return {spec.name: merge.read(spec.name) for spec in merge.state.format.tensors if spec.kind != "carried"}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("before", [(), ("trim:density=0.5",)])
def test_every_state_of_a_sum_reads_as_each_rule_that_keeps_it(
    tmp_path: Path, base: Path, tuned: list[Path], before: tuple[str, ...]
) -> None:
    options = {"before": list(before)} if before else {}
    expected = {}
    for name in SUMS:
        folded(tmp_path, base, making.Recipe(rule=name, options=options, scale="norm:1.5"), tuned, name)
        with merge_of(tmp_path / name) as merge:
            expected[name] = read(merge)
    for made in SUMS:
        for name in SUMS:
            with merge_of(tmp_path / made, write=True) as merge:
                assert str(merge.rescale("norm:1.5", rule=name)).startswith("norm:1.5")
                assert same(read(merge), expected[name]), (made, name)
            with merge_of(tmp_path / made) as merge:  # and from the record
                assert same(read(merge), expected[name]), (made, name)


def test_a_state_of_triplets_reads_as_each_rule_that_reads_them(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    names, expected = ["tsv-m", "isotropic"], {}
    for name in names:
        folded(tmp_path, base, making.Recipe(rule=name), tuned, name)
        with merge_of(tmp_path / name) as merge:
            expected[name] = read(merge)
    for made in (names[0], names[-1]):
        with merge_of(tmp_path / made, write=True) as merge:
            for name in names:
                merge.rescale(rule=name)
                assert same(read(merge), expected[name]), (made, name)


@pytest.mark.parametrize("options", [{}, {"side": "left", "include": ["*embed*"]}], ids=["usual", "given"])
def test_the_sums_of_gram_read_as_gram_and_as_flow(
    tmp_path: Path, base: Path, tuned: list[Path], options: dict[str, object]
) -> None:
    """With the options of the state that say what is kept; a state that keeps more is read all the same."""
    expected = {}
    for name in ("gram", "flow"):
        folded(tmp_path, base, making.Recipe(rule=name, options=options), tuned, name)
        with merge_of(tmp_path / name) as merge:
            expected[name] = read(merge)
    assert not same(expected["gram"], expected["flow"])
    folded(tmp_path, base, making.Recipe(rule="gram", options={**options, "pull": 0.5}), tuned, "more")
    for made, name in (("gram", "flow"), ("flow", "gram"), ("more", "flow")):
        with merge_of(tmp_path / made, write=True) as merge:
            merge.rescale(rule=name)
            assert same(read(merge), expected[name]), (made, name)


def test_options_that_matter_at_reading_alone_are_given_there(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    recipe = making.Recipe(rule="flow", options={"time": 20.0}, scale="1")
    folded(tmp_path, base, recipe, tuned, "slow")
    with merge_of(tmp_path / "slow") as merge:
        wanted = weights(merge.export(tmp_path / "wanted"))
    for made in ("gram", "flow"):
        folded(tmp_path, base, making.Recipe(rule=made, scale="1"), tuned, made)
        with merge_of(tmp_path / made) as merge:
            plain = weights(merge.export(tmp_path / f"{made}-as-it-is", view=ReadView(rule="flow", scale="1")))
        typed = f"export {tmp_path / made}-slow --state {tmp_path / made} --rule flow --scale 1 --option time=20.0"
        said = CliRunner().invoke(main.app, typed.split())
        assert said.exit_code == 0, said.output
        assert weights(tmp_path / f"{made}-slow") == wanted != plain
        with merge_of(tmp_path / made) as merge:
            for option, why in (("start=sum", "needs more with"), ("include=x", "as the state was made with it")):
                key, _, value = option.partition("=")
                view = ReadView(rule="flow", options={key: [value] if key == "include" else value})
                with pytest.raises(Misconfigured, match=why):
                    merge.export(tmp_path / "out", view=view)
    folded(tmp_path, base, making.Recipe(rule="ties"), tuned, "ties")
    with merge_of(tmp_path / "ties") as merge, pytest.raises(Misconfigured, match="density is as the state was made"):
        merge.export(tmp_path / "out", view=ReadView(options={"density": 0.5}))


def test_a_state_of_gram_goes_on_as_it_was_made_before_its_grams_were_packed(
    tmp_path: Path, base: Path, tuned: list[Path]
) -> None:
    whole = making.Recipe(rule="gram", options={"grams": "float64"})
    folded(tmp_path, base, whole, tuned, "expected")
    making.init(base, tmp_path / "old", whole)
    with stores.made_otherwise(tmp_path / "old") as body:
        del body["options"]["grams"]
    for model in tuned:  # opened, and taken for what it is, each time
        with merge_of(tmp_path / "old", write=True) as merge:
            assert merge.fold(model).fate == "folded"
    folded(tmp_path, base, making.Recipe(rule="gram"), tuned, "packed")
    with merge_of(tmp_path / "expected", write=True) as merge, merge_of(tmp_path / "old", write=True) as old:
        expected = read(merge)
        assert same(read(old), expected)
        with pytest.raises(Misconfigured, match="grams=float32"):
            old.combine(tmp_path / "packed")
        for one, other in ((old, "expected"), (merge, "old")):
            with pytest.raises(Misconfigured, match="2 models are in both"):
                one.combine(tmp_path / other)
    with merge_of(tmp_path / "packed") as merge:
        found = read(merge)
        assert not same(found, expected)
        assert all(torch.allclose(value, expected[name], rtol=1e-4, atol=1e-7) for name, value in found.items())
        assert merge.state.format.generation_bytes < 0.7 * old.state.format.generation_bytes
    with pytest.raises(Misconfigured, match="grams = float32, and the state was made with float64"):
        merge_of(tmp_path / "old", options={"grams": "float32"})


def test_what_was_read_before_is_read_again_with_no_fold(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    folded(tmp_path, base, making.Recipe(rule="iso-c"), tuned, "state")
    with merge_of(tmp_path / "state", write=True) as merge:
        first, head = read(merge), merge.state.ledger.head
        assert str(merge.rescale(rule="task-arithmetic")) == "norm:1.0, read by task-arithmetic"
        assert merge.state.ledger.read_options(merge.state.ledger.head.seq) == {
            "policy": "norm",
            "value": 1.0,
            "rule": "task-arithmetic",
        }
        assert not same(read(merge), first)
        assert str(merge.rescale("0.5")) == "0.5, read by task-arithmetic", "the rule in force stays"
        assert str(merge.rescale(rule="iso-c")) == "spread:1.15"
        assert same(read(merge), first)
        assert merge.state.ledger.head.generation == head.generation
        assert same({n: merge.reading(head.seq).unit(s) for n, s in _specs(merge)}, _units(merge))


def _specs(merge: api.Merge) -> list[tuple[str, continual.records.TensorSpec]]:
    return [(spec.name, spec) for spec in merge.state.format.tensors if spec.kind != "carried"]


def _units(merge: api.Merge) -> dict[str, torch.Tensor]:
    return {name: merge.reading().unit(spec) for name, spec in _specs(merge)}


def test_an_export_is_read_by_another_rule_and_nothing_is_recorded(
    tmp_path: Path, base: Path, tuned: list[Path]
) -> None:
    folded(tmp_path, base, making.Recipe(rule="iso-c"), tuned, "iso")
    folded(tmp_path, base, making.Recipe(rule="mean"), tuned, "mean")
    with merge_of(tmp_path / "iso") as merge, merge_of(tmp_path / "mean") as other:
        other.export(tmp_path / "expected")
        merge.export(tmp_path / "found", view=ReadView(rule="mean"))
        assert weights(tmp_path / "found") == weights(tmp_path / "expected")
        assert len(merge.state.ledger.log) == 3
        assert '"rule": "mean"' in (tmp_path / "found" / "continual.json").read_text()
    with merge_of(tmp_path / "iso", reading="mean") as merge:  # and as the settings say
        merge.export(tmp_path / "set")
        assert weights(tmp_path / "set") == weights(tmp_path / "expected")
        assert str(merge.scale()) == "1.0, read by mean"


def test_a_state_begins_with_the_reading_of_its_recipe(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    folded(tmp_path, base, making.Recipe(reading="iso-c", rule="mean", scale="norm:2"), tuned, "state")
    with merge_of(tmp_path / "state") as merge:
        assert str(merge.scale()) == "norm:2.0, read by iso-c"
    assert making.recipe_for(Settings(reading="mean")).reading == "mean"


@pytest.mark.parametrize(
    ("made", "wanted", "said"),
    [
        ("iso-c", "gram", "a state made with iso-c cannot be read by gram; it can be by mean, task-arithmetic, iso-c"),
        ("opcm", "mean", "made with opcm cannot be read by mean; it can be by opcm"),
        ("magmax", "task-arithmetic", "cannot be read by task-arithmetic; it can be by magmax"),
        ("mean", "iso-c", "scale = spread:1.15: a state made with mean measures nothing of its matrices"),
        ("gram", "iso-c", "made with gram cannot be read by iso-c; it can be by gram, flow"),
        ("mean", "nonsense", "unknown rule 'nonsense'"),
    ],
)
def test_what_the_state_does_not_have_is_refused(tmp_path: Path, base: Path, made: str, wanted: str, said: str) -> None:
    making.init(base, tmp_path / "state", making.Recipe(rule=made))
    with merge_of(tmp_path / "state", write=True) as merge:
        with pytest.raises(Misconfigured, match=re.escape(said)):
            merge.rescale(rule=wanted)
        with pytest.raises(Misconfigured, match=re.escape(said)):
            merge.export(tmp_path / "out", view=ReadView(rule=wanted))
        assert len(merge.state.ledger.log) == 1
    if made != "mean":
        with pytest.raises(Misconfigured, match=re.escape(said)):
            merge_of(tmp_path / "state", reading=wanted)
    with pytest.raises(Misconfigured, match=re.escape(said)):
        making.init(base, tmp_path / "other", making.Recipe(rule=made, reading=wanted))
    assert not (tmp_path / "other").exists()


def test_models_cannot_be_chosen_of_a_merge_of_whole_tensors(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    folded(tmp_path, base, making.Recipe(), tuned, "state")
    for view in (ReadView(only=("model-0",)), ReadView(without=("model-0",)), ReadView(weights={"model-0": 2.0})):
        with merge_of(tmp_path / "state") as merge, pytest.raises(Misconfigured, match="no models can be chosen"):
            merge.export(tmp_path / "out", view=view)


def test_tuning_finds_the_scale_of_another_rule(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    folded(tmp_path, base, making.Recipe(rule="mean"), tuned, "state")
    script = tmp_path / "score.py"
    script.write_text("import sys\nprint(len(sys.argv))\n")
    evaluation = continual.Command(("python", str(script), "{model}"))
    with merge_of(tmp_path / "state", write=True) as merge:
        found = merge.tune(evaluation, continual.Tuning(candidates=3, policy="norm", rule="iso-c"))
        assert found.read.rule == "iso-c"
        assert found.read.policy == "norm"
        assert merge.scale() == found.read
        merge.rescale(rule="mean")
        assert merge.rescale("tuned") == found.read
        with pytest.raises(Misconfigured, match="read by iso-c, not by mean"):
            merge.rescale("tuned", rule="mean")
