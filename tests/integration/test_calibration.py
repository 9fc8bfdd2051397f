"""Losses on calibration rows, with real, tiny transformers models, against a plain loop over single rows, finite
differences and a dense search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from continual.errors import Misconfigured
from continual.objectives import FittedTask, taught
from continual.objectives.calibration import Dealt, load
from continual.objectives.classes import Classes
from tests.helpers.calibrated import (
    CLASSES,
    ROWS,
    Calibrated,
    changed,
    made,
    plain_logits,
    plain_losses,
    read,
    same,
    searched,
    slopes,
    write,
)
from tests.helpers.tiny import CPU, MODELS, loaded, transformers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=list(MODELS))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return made("classification", tmp_path_factory.mktemp("classes"))


def test_the_loss_its_gradient_and_the_held_losses_are_those_of_a_plain_loop(place: Calibrated) -> None:
    found, name = place.load(), place.wanted.objective
    plain = loaded(name, place.base)
    total = torch.zeros((), dtype=torch.float64)
    for file, dealt in zip(place.wanted.rows, found.dealt, strict=True):
        rows = read(file)
        total = total + plain_losses(name, plain, place.base, [rows[i] for i in dealt.drive]).mean() / 2
    total.backward()
    expected = float(total.detach())
    assert found.loss() == pytest.approx(expected, rel=1e-5)
    for parameter in found.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert found.backward() == pytest.approx(expected, rel=1e-5)
    same(slopes(found.model), slopes(plain), 1e-3)
    held = found.held()
    for file, dealt, losses in zip(place.wanted.rows, found.dealt, held, strict=True):
        rows = read(file)
        assert (losses.dtype, losses.shape, losses.requires_grad) == (torch.float64, (ROWS // 2,), False)
        torch.testing.assert_close(
            losses, plain_losses(name, plain, place.base, [rows[i] for i in dealt.judge]).detach(), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(torch.cat(held), torch.cat(found.held()))
    assert found.loss() == found.loss()


def test_the_gradient_is_that_of_finite_differences_the_confidence_fitted_anew_at_each(place: Calibrated) -> None:
    found = place.load()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in found.model.parameters())
    found.model.double()
    found.backward()
    gradient = slopes(found.model)
    length = float(torch.stack([g.double().norm() for g in gradient.values()]).norm())
    parameters = dict(found.model.named_parameters())

    def along(direction: dict[str, torch.Tensor], step: float) -> float:
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for name, change in direction.items():
                    parameters[name].add_(change, alpha=sign * step)
                values.append(found.loss())
        return (values[0] - values[1]) / (2 * step)

    assert along({n: g / length for n, g in gradient.items()}, 2e-5) == pytest.approx(length, rel=1e-2)
    for name in sorted(gradient, key=lambda n: -float(gradient[n].abs().max()))[:3]:
        at = int(gradient[name].abs().argmax())
        unit = torch.zeros(gradient[name].numel(), dtype=torch.float64)
        unit[at] = 1
        expected = float(gradient[name].flatten()[at])
        assert along({name: unit.view_as(gradient[name])}, 3e-4) == pytest.approx(expected, rel=2e-2)


def test_the_fitted_confidence_is_the_best_one(place: Calibrated) -> None:
    for dealt, file in zip(place.load().dealt, place.wanted.rows, strict=True):
        if place.wanted.objective == "causal-lm":
            assert not isinstance(dealt.task, FittedTask)
            continue
        assert isinstance(dealt.task, Classes)
        losses = dealt.task.fit(dealt.drive)
        rows = [read(file)[i] for i in dealt.drive]
        with torch.no_grad():
            logits = plain_logits(
                place.wanted.objective,
                loaded(place.wanted.objective, place.base),
                place.base,
                [r["text"] for r in rows],
            )
        best = searched(logits, torch.tensor([CLASSES.index(r["label"]) for r in rows]))
        assert 1e-2 < best < 1e2
        assert dealt.task.confidence == pytest.approx(best, rel=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(dealt.task.losses(dealt.drive), losses, rtol=1e-5, atol=1e-6)


def test_checkpointing_changes_no_number(place: Calibrated) -> None:
    found, kept = place.load(checkpointing=True), place.load()
    runs: list[int] = []
    layer = next(
        m for m in found.model.modules() if isinstance(m, transformers.modeling_layers.GradientCheckpointingLayer)
    )
    next(layer.children()).register_forward_pre_hook(lambda *_: runs.append(1))
    assert found.loss() == pytest.approx(kept.loss(), rel=1e-6)
    runs.clear()
    assert found.backward() == pytest.approx(kept.backward(), rel=1e-6)
    fits = 0 if place.wanted.objective == "causal-lm" else 2 * 3
    assert len(runs) == 2 * 2 * 3 + fits  # each batch of each task forward once more, while it is differentiated
    same(slopes(found.model), slopes(kept.model), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_in_half_precision_are_near_and_see_changed_weights(place: Calibrated, dtype: Any) -> None:
    found, full = place.load(dtype=dtype), place.load()
    for _ in range(2):
        assert found.backward() == pytest.approx(full.backward(), rel=2e-2)
        assert found.loss() != full.loss()
        assert all(p.dtype == torch.float32 for p in found.model.parameters())
        same(slopes(found.model), slopes(full.model), 0.1)
        torch.manual_seed(5)
        change = [torch.randn_like(p) * 0.05 for p in full.model.parameters()]
        with torch.no_grad():
            for model in (found.model, full.model):
                for parameter, by in zip(model.parameters(), change, strict=True):
                    parameter += by


def test_rows_are_dealt_by_the_seed(classes: Calibrated) -> None:
    def dealt(**changes: Any) -> list[tuple[list[int], list[int]]]:
        found = classes.load(**changes)
        assert [d.name for d in found.dealt] == [str(file) for file in classes.wanted.rows[: len(found.dealt)]]
        for task in found.dealt:
            assert sorted(task.drive + task.judge) == list(range(ROWS))
        return [(d.drive, d.judge) for d in found.dealt]

    assert dealt() == dealt()
    assert dealt(seed=4) != dealt()
    assert dealt(rows=classes.wanted.rows[:1]) == dealt()[:1]
    assert [len(judge) for _, judge in dealt(held=0.2)] == [5, 5]


@pytest.mark.parametrize("name", ["classification", "heads"])
def test_without_labels_a_loss_is_an_entropy(name: str, tmp_path: Path) -> None:
    place = made(name, tmp_path)
    for file in place.wanted.rows:
        write(file, [{"text": row["text"]} for row in read(file)])
    with pytest.raises(Misconfigured, match="no label"):
        place.load()
    found = place.load(unsupervised=True)
    means = []
    for dealt, file in zip(found.dealt, place.wanted.rows, strict=True):
        assert not isinstance(dealt.task, FittedTask)
        with torch.no_grad():
            logits = plain_logits(
                name, loaded(name, place.base), place.base, [read(file)[i]["text"] for i in dealt.drive]
            )
        means.append(torch.distributions.Categorical(logits=logits).entropy().mean())
    assert found.loss() == pytest.approx(float(sum(means)) / 2, rel=1e-5)
    assert found.backward() == pytest.approx(found.loss(), rel=1e-6)
    assert slopes(found.model)


@pytest.mark.parametrize("name", ["causal-lm", "classification", "heads"])
@pytest.mark.parametrize("kept", [64, 3])
def test_a_teacher_says_what_is_right(name: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught, "KEPT", kept)
    place = made(name, tmp_path)
    for file in place.wanted.rows:
        write(file, [{"text": row["text"]} for row in read(file)])
    found = load(replace(place.wanted, taught=True), place.base, CPU)
    told = [found.teach(number) for number in range(len(found.dealt))]
    assert found.loss() == pytest.approx(0.0, abs=1e-6), "it agrees with itself"

    def says(dealt: Dealt) -> list[Tensor]:
        assert isinstance(dealt.task, taught.Taught)
        with torch.no_grad():
            return [dealt.task._of.says([row]).logits.double().log_softmax(-1) for row in dealt.drive]

    before = [says(dealt) for dealt in found.dealt]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    means = []
    for dealt, teacher in zip(found.dealt, before, strict=True):
        each = []
        for there, here in zip(teacher, says(dealt), strict=True):
            top = there.topk(min(kept, there.shape[-1]), -1).indices
            p, q = there.exp().gather(-1, top), here.exp().gather(-1, top)
            if top.shape[-1] < there.shape[-1]:
                p, q = (torch.cat([one, 1.0 - one.sum(-1, keepdim=True)], -1) for one in (p, q))
            each.append(torch.xlogy(p, p / q).sum(-1).mean())
        means.append(torch.stack(each).mean())
    assert found.loss() == pytest.approx(float(sum(means)) / len(means), rel=1e-3)
    assert found.backward() == pytest.approx(found.loss(), rel=1e-6)
    assert slopes(found.model)
    assert [found.teach(0, load(replace(place.wanted, taught=True), place.base, CPU))] == told[:1], (
        "from another memory"
    )
    assert found.teach(0) != told[0], "another teacher"


def test_rows_that_are_too_few_or_missing_are_named(classes: Calibrated, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", read(classes.wanted.rows[0])[:6])
    with pytest.raises(
        Misconfigured, match=r"few.jsonl: of its 6 rows 1 would judge and 5 drive \(held = 0.1\); at least 2 of each"
    ):
        classes.load(rows=(few,), held=0.1)
    absent = changed(classes.wanted, rows=(tmp_path / "none.jsonl",))
    for look in (absent.told, absent.check):
        with pytest.raises(Misconfigured, match=r"none.jsonl: No such file"):
            look()
    with pytest.raises(Misconfigured, match="is no regular file"):
        changed(classes.wanted, rows=(tmp_path,)).check()
    classes.wanted.check()


def test_a_loss_that_is_not_finite_names_the_file_and_the_line(classes: Calibrated, tmp_path: Path) -> None:
    rows = read(classes.wanted.rows[0])
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    found = classes.load(rows=(file,))
    with torch.no_grad():
        found.model.get_parameter("classifier.bias").fill_(float("nan"))
    for call in (found.loss, found.backward):
        with pytest.raises(Misconfigured, match=rf"rows.jsonl: the loss of line {found.dealt[0].drive[0] + 2} is nan"):
            call()
    with pytest.raises(Misconfigured, match=rf"the loss of line {found.dealt[0].judge[0] + 2} is nan"):
        found.held()


def test_what_a_record_keeps(place: Calibrated, tmp_path: Path) -> None:
    told = place.wanted.told()
    assert told == place.wanted.told()
    assert (told.kind, told.objective, told.seed, told.held, told.batch) == (
        "rows",
        place.wanted.objective,
        3,
        0.5,
        5,
    )
    assert [file.name for file in told.rows] == ["task-0.jsonl", "task-1.jsonl"]
    assert (told.heads is not None) == (place.wanted.objective == "heads")
    moved = tmp_path / "task-0.jsonl"
    moved.write_bytes(place.wanted.rows[0].read_bytes())
    other = changed(place.wanted, rows=(moved, place.wanted.rows[1]))
    assert other.told() == told  # where a file lies does not matter
    assert all(digest.startswith("blake3:") for digest in (told.digest, told.rows[0].digest))
    moved.write_bytes(moved.read_bytes() + b"\n")
    others = [
        other,
        *(changed(place.wanted, **c) for c in ({"seed": 4}, {"held": 0.4}, {"batch": 6}, {"dtype": "bfloat16"})),
    ]
    assert len({w.told().digest for w in [place.wanted, *others]}) == 1 + len(others)
