"""Configurations of mergekit as settings of continual: what is the same is taken, what is not is refused by its key."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from continual import api, making
from continual.config import load, mergekit, plain_yaml
from continual.errors import Misconfigured
from continual.rules import rule
from tests.helpers import models
from tests.helpers.pages import DOCS, blocks

A, B = {"model": "org/a"}, {"model": "org/b"}


def weighed(*weights: float, **more: float) -> list[dict[str, Any]]:
    return [{**one, "parameters": {"weight": w, **more}} for one, w in zip((A, B), weights, strict=True)]


def recipe(method: str, models: object, /, **more: object) -> dict[str, object]:
    return {"merge_method": method, "base_model": "org/base", "models": models, **more}


def read(tmp_path: Path, text: object) -> Any:
    file = tmp_path / "m.yml"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    return mergekit.read(file)


DENSE = weighed(0.5, 0.5, density=0.4)
NORM = {"parameters": {"normalize": True}}


@pytest.mark.parametrize(
    ("given", "rule_name", "scale", "options", "before", "weights"),
    [
        (recipe("task_arithmetic", weighed(0.5, 2)), "task-arithmetic", "1", {}, (), {"org/a": 0.5, "org/b": 2.0}),
        (recipe("task_arithmetic", weighed(0.5, 0.5)), "task-arithmetic", "1", {}, (), {"org/a": 0.5, "org/b": 0.5}),
        (recipe("task_arithmetic", weighed(1, 1), parameters={"lambda": 0.3}), "task-arithmetic", "0.3", {}, (), {}),
        (recipe("task_arithmetic", weighed(1, "5e-1"), **NORM), "mean", "1", {}, (), {"org/b": 0.5}),
        (
            recipe("linear", [*weighed(1, 1), {"model": "org/base", "parameters": {"weight": 2}}]),
            "mean",
            "0.5",
            {},
            (),
            {},
        ),
        (recipe("linear", [A, B], parameters={"weight": 0.5}), "mean", "0.666666666667", {}, (), {}),
        (recipe("ties", DENSE, dtype="float16"), "ties", "1", {"density": 0.4, "trim": "tensor"}, (), {}),
        (recipe("ties", [A | {"parameters": {}}, {"model": "org/base"}], parameters={"weight": 1, "density": 1}),
         "ties", "1", {"density": 1.0, "trim": "tensor"}, (), {}),
        (recipe("dare_linear", weighed(1, 1, density=0.53)), "task-arithmetic", "1", {}, ("drop:rate=0.47",), {}),
        (recipe("dare_ties", DENSE, **NORM), "ties", "1", {"density": 1.0}, ("drop:rate=0.6",), {}),
        (
            recipe("breadcrumbs", DENSE, parameters={"gamma": 0.1}),
            "task-arithmetic",
            "1",
            {},
            ("breadcrumbs:top=0.1:bottom=0.5",),
            {"org/a": 0.5, "org/b": 0.5},
        ),
    ],
)  # fmt: skip
def test_what_has_an_equal_is_taken(
    tmp_path: Path, given: object, rule_name: str, scale: str, options: object, before: object, weights: object
) -> None:
    found = read(tmp_path, given)
    assert (found.rule, found.scale, found.before, found.base) == (rule_name, scale, before, "org/base")
    assert (found.options, found.weights) == (options, weights)
    rule(found.rule, {**found.options, **({"before": list(found.before)} if found.before else {})})
    file = tmp_path / "continual.toml"
    file.write_text(found.settings())
    settings = load({}, file=file, environ={})
    assert (settings.rule, dict(settings.options), dict(settings.weights)) == (rule_name, options, weights)


@pytest.mark.parametrize(
    ("given", "key", "said"),
    [
        (recipe("slerp", [A, B], parameters={"t": 0.5}), "merge_method", "merge_method: linear"),
        (recipe("passthrough", [A]), "merge_method", "keeps the layers"),
        (recipe("newest", [A]), "merge_method", "continual rules"),
        (recipe("linear", weighed(1, 1)), "base_model, which linear counts as well", "weight: is missing"),
        ({"merge_method": "linear", "models": weighed(1, 1)}, "base_model", "--base"),
        (recipe("ties", DENSE, slices=[{"sources": []}]), "slices", "every layer"),
        (recipe("ties", weighed(1, 0.5, density=0.5)), "weight", "the same weight"),
        (recipe("ties", [DENSE[0], weighed(1, 1, density=0.3)[1]]), "density", "one for all models"),
        (recipe("ties", DENSE, parameters={"normalize": False}), "parameters.normalize", "adds what agrees"),
        (recipe("dare_ties", DENSE), "parameters.normalize", "true"),
        (recipe("task_arithmetic", weighed(1, -1)), "models, number 2, parameters.weight", "leave it out"),
        (recipe("task_arithmetic", [A, B]), "models, number 1, parameters.weight", "missing"),
        (recipe("task_arithmetic", [{**A, "parameters": {"weight": [0, 1]}}]), "models, number 1", "list"),
        (recipe("task_arithmetic", weighed(1, 1, t=1)), "models, number 1, parameters.t", "no equal"),
        (recipe("task_arithmetic", weighed(1, float("nan"))), "models, number 2, parameters.weight", "no number"),
        (recipe("ties", DENSE, tokenizer_source="union"), "tokenizer_source", "by-token"),
        (recipe("ties", DENSE, dtype="int8"), "dtype", "float32"),
        (recipe("ties", DENSE, chat_template="auto"), "chat_template", "tokenizer_source"),
        (recipe("ties", DENSE, typo=1), "typo", "known are"),
        (
            recipe("ties", [{"model": "other/base+org/lora"}], parameters={"weight": 1}),
            "models, number 1",
            "merge the two first",
        ),
        (recipe("ties", [{"model": "-rf /"}], parameters={"weight": 1}), "models, number 1", "no repo"),
        (recipe("ties", [{"model": "a\nb"}]), "models, number 1", "no name"),
        (recipe("linear", weighed(1, 1), parameters={"normalize": False}), "base_model", "missing"),
        ("merge_method: ties\nmerge_method: linear\n", "m.yml", "twice"),
        ("a: &x [1]\nb: *x\n", "m.yml", "alias"),
        ("[" * 3000, "m.yml", "no YAML"),
        ("- 1\n", "m.yml", "table"),
        ("!!python/object/apply:os.system [ls]", "m.yml", "no YAML"),
        ("a: 1\n---\nb: 2\n", "m.yml", "no YAML"),
    ],
)
def test_what_has_no_equal_is_refused_by_its_key(tmp_path: Path, given: object, key: str, said: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        read(tmp_path, given)
    assert f"{key}" in str(caught.value)
    assert said in str(caught.value)


def test_an_adapter_on_the_base_is_the_adapter_and_a_path_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "it's [one]").mkdir()
    given = recipe("task_arithmetic", [{"model": "org/base+org/lora"}, {"model": f"{tmp_path}/it's [one]"}])
    given["parameters"] = {"weight": 0.25}
    found = read(tmp_path, given)
    assert found.models == ("hf://org/lora", f"{tmp_path}/it's [one]")
    assert shlex.split(found.commands()[1])[2:4] == list(found.models)
    file = tmp_path / "continual.toml"
    file.write_text(found.settings())
    assert set(load({}, file=file, environ={}).weights) == {"org/lora", "it's [[]one]"}


def test_a_file_that_is_none_and_two_bases_are_told_of(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    large = tmp_path / "large.yml"
    large.write_text("#" * (plain_yaml.LARGEST + 1))
    for file, said in ((tmp_path / "pipe", "no regular file"), (tmp_path / "gone", "No such file"), (large, "bytes")):
        with pytest.raises(Misconfigured, match=said):
            mergekit.read(file)
    file = tmp_path / "m.yml"
    file.write_text(json.dumps(recipe("ties", DENSE)))
    assert mergekit.read(file, "org/base") == mergekit.read(file)
    with pytest.raises(Misconfigured, match="base_model: is org/base, and --base says org/other"):
        mergekit.read(file, "org/other")


def test_the_page_shows_what_is_printed(tmp_path: Path) -> None:
    page = DOCS / "recipes.md"
    (given,) = blocks(page, "yaml")
    assert read(tmp_path, given).settings() + "\n" in blocks(page, "toml")
    methods = re.findall(r"^\| (`\w+`(?:, `\w+`)?) \|", page.read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(methods))) == set(mergekit._FORMULAS)


def test_the_merge_is_the_weighted_sum(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    tuned = [models.fine_tune(base, tmp_path / name, n) for n, name in enumerate(("a", "b"))]
    listed = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(tuned, (0.5, 2.0), strict=True)]
    given = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": listed,
        "parameters": {"lambda": 0.5},
    }
    found = read(tmp_path, given)
    (tmp_path / "continual.toml").write_text(found.settings())
    settings = load({"state": tmp_path / "state"}, file=tmp_path / "continual.toml", environ={})
    chosen = making.recipe_for(settings, rule=None, options={}, before=None)
    making.init(found.base, settings.state, dataclasses.replace(chosen, scale=found.scale))
    with api.Merge(settings, write=True) as merge:
        for model in found.models:
            assert merge.fold(model).fate == "folded"
        merge.export(tmp_path / "merged")
    start, one, two, merged = (load_file(d / "model.safetensors") for d in (base, *tuned, tmp_path / "merged"))
    for name, tensor in merged.items():
        expected = start[name] + 0.5 * (0.5 * (one[name] - start[name]) + 2.0 * (two[name] - start[name]))
        assert (tensor - expected).norm() <= 1e-6 * expected.norm(), name
