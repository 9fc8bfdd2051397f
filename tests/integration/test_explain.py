"""What each model has in a merge of adapters, as the API, the command and a release say it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.engine.views import ReadView
from continual.publish.folder import Target
from continual.publish.provenance import figures_in
from continual.state.entries import CombineEntry, FoldEntry
from continual.state.parts import BroughtFold
from tests.helpers import adapters, models
from tests.helpers.command import machine, run

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


@pytest.fixture
def state(tmp_path: Path, base: Path) -> Path:
    """Three adapters: one of every module, one of the first layer alone, one of one module."""
    place = tmp_path / "state"
    making.init(base, place, making.Recipe(rule="iso-c", width=64))
    with api.Merge(Settings(state=place, max_base_ratio=100.0), write=True) as merge:
        for name, modules in (("all", ("q_proj", "down_proj")), ("some", ("q_proj",)), ("few", ("down_proj",))):
            made = adapters.lora(tmp_path / name, base, len(name), modules=modules)
            assert merge.fold(made).fate == "folded"
    return place


def vectors(merge: api.Merge, view: ReadView) -> dict[str, torch.Tensor]:
    reading = merge.reading(view=view)
    reading.settle(merge.executor, lambda *_: None)
    return {spec.name: reading.vector(spec).double() for spec in merge.state.format.tensors}


def flat(found: dict[str, torch.Tensor], word: str = "") -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in found.items() if word in name])


VIEWS = {
    "lines": ReadView(rule="mean", lines="0.5:1"),
    "elements": ReadView(rule="ties", lines="0.5:1"),
    "weights": ReadView(rule="iso-c", lines="0.5:1", weights={"all": 0.3, "few": 2.0}),
    "some": ReadView(rule="task-arithmetic", scale="norm:0.8", only=("all", "f*"), weights={"all": 3.0}),
    "options": ReadView(rule="gram", options={"ridge": 0.3}, weights={"some": 0.5}),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
def test_a_change_is_what_leaving_out_gives(state: Path, view: ReadView) -> None:
    with api.Merge(Settings(state=state)) as merge:
        found = merge.explain(view)
        assert (found.seq, found.rule, found.view) == (3, view.rule, view.described())
        whole = vectors(merge, view)
        weights = {"all": 1.0, "some": 1.0, "few": 1.0} | dict(view.weights)
        assert {one.name: one.weight for one in found.models} == {
            name: weight for name, weight in weights.items() if not view.only or name != "some"
        }
        assert sum(one.norm for one in found.models) == pytest.approx(1.0)
        for model in found.models:
            left = replace(view, without=(model.name,), weights={**view.weights})
            left.weights.pop(model.name, None)
            rest = vectors(merge, left)
            change = float((flat(whole) - flat(rest)).norm() / flat(whole).norm())
            assert model.change == pytest.approx(change, abs=1e-4)
            for layer in found.layers:
                mine = next((one for one in layer.models if one.name == model.name), None)
                part = flat(whole, f"{layer.name}.")
                change = float((part - flat(rest, f"{layer.name}.")).norm() / part.norm())
                assert mine is None or mine.change == pytest.approx(change, abs=1e-4)
        assert [layer.depth for layer in found.layers] == sorted(layer.depth for layer in found.layers)
        assert [one.change for one in found.models] == sorted((one.change for one in found.models), reverse=True)


def test_one_model_alone_is_all_of_it(state: Path) -> None:
    with api.Merge(Settings(state=state)) as merge:
        found = merge.explain(ReadView(rule="mean", only=("some",), weights={"some": 0.5}))
    (model,) = found.models
    assert (model.name, model.seq, model.weight) == ("some", 2, 0.5)
    assert (model.norm, model.cosine, model.change) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    assert found.view == {"rule": "mean", "only": ["some"], "weights": {"some": 0.5}}
    assert {layer.name for layer in found.layers} == {"model.layers.0", "model.layers.1"}


def test_the_command_beside_one_that_writes(state: Path) -> None:
    with api.Merge(Settings(state=state), write=True):
        body: dict[str, Any] = machine("explain", "--without", "few", "--state", state)
        said = run("explain", "--state", state)
        layers = run("explain", "--layers", "--only", "few", "--state", state)
    assert [one["name"] for one in body["models"]] == ["all", "some"]
    assert body["view"] == {"without": ["few"]}
    model, layer = {"name", "seq", "weight", "norm", "cosine", "change"}, {"name", "depth", "models"}
    assert set(body) == {"seq", "rule", "scale", "view", "models", "layers", "cut", "error"}, "as commands.md says"
    assert all(set(one) == model for one in (*body["models"], *body["layers"][0]["models"]))
    assert all(set(one) == layer for one in body["layers"])
    assert "3 models. share: of the lengths" in said.stdout
    assert "1 model. share: of the lengths" in layers.stdout
    assert said.stdout.count(" %") >= 6
    assert "model.layers.1  1.00   few    100.0 %" in layers.stdout
    missing = run("explain", "--only", "carol", "--state", state)
    assert missing.returncode == 2
    assert "no model of the merge is called so" in missing.stderr


def test_a_model_of_which_all_was_cut_off_is_told_of_with_what_it_changes(tmp_path: Path, base: Path) -> None:
    """Nothing is left of it, and a mean divides by it all the same."""
    making.init(base, tmp_path / "narrow", making.Recipe("mean", width=1))
    with api.Merge(Settings(state=tmp_path / "narrow", max_base_ratio=100.0), write=True) as merge:
        for number, name in enumerate(("first", "second", "third"), 1):
            merge.fold(adapters.lora(tmp_path / name, base, number, modules=("q_proj",)))
        found = merge.explain()
        names = {one.name for one in found.models}
        gone = [one for one in found.models if not one.norm]
        assert (names, len(gone)) == ({"first", "second", "third"}, 1)
        assert {one.name: one.cut for one in found.cut}[gone[0].name] == 1.0
        whole, rest = (flat(vectors(merge, view)) for view in (ReadView(), ReadView(without=(gone[0].name,))))
    assert gone[0].change == pytest.approx(float((whole - rest).norm() / whole.norm())) == pytest.approx(0.5)


def test_nothing_folded_has_nothing_in_it(tmp_path: Path, base: Path) -> None:
    making.init(base, tmp_path / "new", making.Recipe(width=8))
    assert machine("explain", "--state", tmp_path / "new")["models"] == []


@pytest.fixture
def whole(tmp_path: Path, base: Path) -> Path:
    """A merge of whole tensors: a model, one three times as long, and one of the first layer alone."""

    def first_alone(tensors: dict[str, torch.Tensor]) -> None:
        untouched = load_file(base / "model.safetensors")
        tensors |= {name: value for name, value in untouched.items() if ".layers.0." not in name}

    making.init(base, tmp_path / "dense", making.Recipe("task-arithmetic"))
    settings = Settings(state=tmp_path / "dense", weights={"one": 2.0}, gates=["norms.act=off", "copies.act=off"])
    with api.Merge(settings, write=True) as merge:
        assert merge.fold(models.fine_tune(base, tmp_path / "one", 1)).fate == "folded"
        assert merge.fold(models.fine_tune(base, tmp_path / "long", 2, size=0.06)).fate == "folded"
        assert merge.fold(models.fine_tune(base, tmp_path / "first", 3, change=first_alone)).fate == "folded"
    return tmp_path / "dense"


def test_a_merge_of_whole_tensors_tells_what_sketches_tell(tmp_path: Path, base: Path, whole: Path) -> None:
    theirs = load_file(base / "model.safetensors")
    taus = {
        name: {key: value - theirs[key] for key, value in load_file(tmp_path / name / "model.safetensors").items()}
        for name in ("one", "long", "first")
    }
    times = {"one": 2.0, "long": 1.0, "first": 1.0}
    with api.Merge(Settings(state=whole)) as merge:
        for view in (ReadView(), ReadView(rule="iso-c", scale="1")):
            found = merge.explain(view)
            merged = vectors(merge, view)
            assert found.error == pytest.approx((1 / 64, 2**-5.5))
            assert [layer.name for layer in found.layers] == ["model.layers.0", "model.layers.1"]
            lengths = {name: times[name] * float(flat(tau).norm()) for name, tau in taus.items()}
            assert {one.name: one.norm for one in found.models} == pytest.approx(
                {name: length / sum(lengths.values()) for name, length in lengths.items()}, rel=1e-4
            )
            for one in found.models:
                tau = flat(taus[one.name]).double()
                exact = float(tau @ flat(merged) / tau.norm() / flat(merged).norm())
                assert one.cosine == pytest.approx(exact, abs=4 * found.error[0])  # type: ignore[index]
            last = {one.name: one for one in found.layers[1].models}
            assert set(last) == {"one", "long"}, "the third has nothing there"
            assert last["long"].norm / last["one"].norm == pytest.approx(1.5, rel=0.1)


def test_an_export_of_whole_tensors_says_it_too(tmp_path: Path, whole: Path) -> None:
    """Cosines of sums are known at no cost; of other rules where they are asked for."""
    with api.Merge(Settings(state=whole)) as merge:
        body = json.loads((merge.export(tmp_path / "sum") / "continual.json").read_text())
        by_iso = ReadView(rule="iso-c", scale="1")
        plain = json.loads((merge.export(tmp_path / "plain", view=by_iso) / "continual.json").read_text())
        asked = json.loads(
            (merge.export(Target(tmp_path / "x", explain=True), view=by_iso) / "continual.json").read_text()
        )
        told, by_iso_told = merge.explain(), merge.explain(by_iso)
    assert {row["name"]: row["weight"] for row in body["folded"]} == {"one": 2.0, "long": 1.0, "first": 1.0}
    rows = {row["name"]: row for row in body["shares"]}
    for one in told.models:
        assert (rows[one.name]["norm"], rows[one.name]["change"]) == (one.norm, None)
        assert rows[one.name]["cosine"] == pytest.approx(one.cosine, abs=0.01)
    assert {row["cosine"] for row in plain["shares"]} == {None}
    assert "shares_error" not in plain
    assert [row["cosine"] for row in asked["shares"]] == [one.cosine for one in by_iso_told.models]
    assert [layer["name"] for layer in body["shares_by_layer"]] == ["model.layers.0", "model.layers.1"]
    assert figures_in(body)[1].norm == rows["one"]["norm"]
    said = run("explain", "--state", whole).stdout
    assert "an estimate, off by 0.02, in a layer by 0.02" in said
    assert "share by depth" in said


def test_models_without_a_sketch_have_lengths(tmp_path: Path, base: Path) -> None:
    """Those that came with another state of an earlier version, or through rounds that weigh."""
    making.init(base, tmp_path / "s", making.Recipe("mean"))
    with api.Merge(Settings(state=tmp_path / "s"), write=True) as merge:
        merge.fold(models.fine_tune(base, tmp_path / "a", 1))
        folded = merge.state.ledger.head.of_kind(FoldEntry)
        bare = replace(folded.numbers, sketch=None)
        brought = (BroughtFold(replace(folded.candidate, key="k"), "d", bare),)
        merge.record(CombineEntry(of="other", seq=1, folds=brought, totals=folded.totals))
        found = merge.explain()
    assert [(one.norm, one.cosine, one.change) for one in found.models] == [(0.5, None, None)] * 2
    assert (found.layers, found.error) == ((), None)


@pytest.mark.parametrize(("name", "there"), [("mean", True), ("tsv-m", True), ("opcm", False), ("ties", False)])
def test_an_export_says_what_each_model_has(tmp_path: Path, state: Path, name: str, there: bool) -> None:
    view = ReadView(rule=name, without=("few",))
    with api.Merge(Settings(state=state)) as merge:
        body = json.loads((merge.export(tmp_path / "out", view=view) / "continual.json").read_text())
        found = merge.explain(view)
    assert body["view"] == view.described()
    assert ("shares" in body) == there
    if there:
        assert [(one["name"], one["seq"]) for one in body["shares"]] == [(one.name, one.seq) for one in found.models]
        assert body["shares"][0]["change"] == pytest.approx(found.models[0].change)
        assert [layer["name"] for layer in body["shares_by_layer"]] == [layer.name for layer in found.layers]
        first = found.layers[0].models[0]
        row = [first.seq, first.norm, first.cosine, first.change]
        assert body["shares_by_layer"][0]["models"][0] == pytest.approx(row, rel=1e-3)
    assert [row["weight"] for row in body["folded"]] == [1.0, 1.0, None], "the third is not read"
