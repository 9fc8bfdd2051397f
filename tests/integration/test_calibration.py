"""Losses on calibration rows, with real, tiny transformers models, against a plain loop over single rows, finite
differences and a dense search."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional

from continual.errors import Misconfigured
from continual.objectives import FittedTask, fitted, function
from continual.objectives.calibration import Calibration, Wanted, load
from continual.objectives.classes import WIDEST, Classes
from continual.objectives.heads import TEMPERATURE
from tests.helpers.pools import wanted
from tests.integration.test_tune_rows import CPU, MODELS, WORDS, embedded, loaded, transformers, write_tokenizer

CLASSES = ["neg", "pos"]
ROWS = 24
PROMPTS = {"neg": ["bad", "very bad film"], "pos": ["good", "a good book", "the good film is good"]}


def changed(given: Wanted, **changes: Any) -> Wanted:
    """With other files, or other settings."""
    files = {name: changes.pop(name) for name in ("objective", "rows", "heads") if name in changes}
    return replace(given, **files, settings=given.settings.model_copy(update=changes))


class Place(NamedTuple):
    """A base and rows of two tasks beside it."""

    base: Path
    wanted: Wanted

    def load(self, **changes: Any) -> Calibration:
        return load(changed(self.wanted, **changes), self.base, CPU)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def fixed_heads(name: str, base: Path) -> Any:
    """Class heads as `Heads` documents them, of the base: classes × width."""
    if name != "heads":
        return None
    model, tokenizer = loaded(name, base), transformers.AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return functional.normalize(
            torch.stack([embedded(model, tokenizer, p).mean(0) for p in PROMPTS.values()]), dim=-1
        )


def plain_logits(name: str, model: Any, base: Path, texts: list[str]) -> torch.Tensor:
    """One text after the other, without padding: rows × classes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    if name == "heads":
        return (embedded(model, tokenizer, texts) @ fixed_heads(name, base).T / TEMPERATURE).double()
    return torch.cat([model(torch.tensor([tokenizer(t)["input_ids"]])).logits for t in texts]).double()


def searched(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The best confidence, by ever denser grids of its logarithm."""
    low, high = -WIDEST, WIDEST
    for _ in range(6):
        grid = torch.linspace(low, high, 401, dtype=torch.float64)
        losses = torch.stack([functional.cross_entropy(b * logits, labels) for b in grid.exp()])
        best = int(losses.argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 400)])
    return float(grid[best].exp())


def plain_losses(name: str, model: Any, base: Path, rows: list[dict[str, Any]]) -> torch.Tensor:
    """What the calibration says it computes, a row at a time."""
    if name == "causal-lm":
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        ids = [torch.tensor([tokenizer(row["text"])["input_ids"]]) for row in rows]
        return torch.stack([model(i, labels=i).loss for i in ids]).double()
    logits = plain_logits(name, model, base, [row["text"] for row in rows])
    labels = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    return functional.cross_entropy(searched(logits.detach(), labels) * logits, labels, reduction="none")


def slopes(model: Any) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], within: float) -> None:
    """The whole gradients, relative to their length."""
    a, b = (torch.cat([g[n].double().flatten() for n in sorted(g)]) for g in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert float(b.norm()) > 1e-3
    assert float((a - b).norm() / b.norm()) < within


def made(name: str, place: Path) -> Place:
    """Two tasks whose rows the base mostly gets right, every third one not, so that no fitted confidence is at its
    bounds."""
    torch.manual_seed(0)
    base = place / "base"
    MODELS[name]().save_pretrained(base)
    write_tokenizer(base)
    heads = place / "heads.json"
    heads.write_text(json.dumps(PROMPTS))
    files = []
    for task in range(2):
        draw = random.Random(task)
        texts = [" ".join(draw.choices(WORDS[2:], k=draw.randint(2, 9))) for _ in range(ROWS)]
        classes = [draw.randrange(2) for _ in texts]
        if name != "causal-lm":
            with torch.no_grad():
                classes = plain_logits(name, loaded(name, base), base, texts).argmax(1).tolist()
        labels = [CLASSES[c ^ (i % 3 == 0)] for i, c in enumerate(classes)]
        files.append(
            write(place / f"task-{task}.jsonl", [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)])
        )
    return Place(base, wanted(name, tuple(files), (heads, heads) if name == "heads" else (), batch=5, seed=3))


@pytest.fixture(scope="module", params=list(MODELS))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return made("classification", tmp_path_factory.mktemp("classes"))


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `mine` of the user's, in the current directory, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path / "mine.py"
    forget(*(set(sys.modules) - before))


def forget(*names: str) -> None:
    function._imported.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


def test_the_loss_its_gradient_and_the_held_losses_are_those_of_a_plain_loop(place: Place) -> None:
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


def test_the_gradient_is_that_of_finite_differences_the_confidence_fitted_anew_at_each(place: Place) -> None:
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


def test_the_fitted_confidence_is_the_best_one(place: Place) -> None:
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


def test_the_best_confidence_of_given_logits_and_its_bounds() -> None:
    torch.manual_seed(1)
    for scale in (1e-2, 1.0, 40.0):
        logits = torch.randn(60, 5, dtype=torch.float64) * scale
        labels = torch.where(torch.rand(60) < 0.6, logits.argmax(1), torch.randint(5, (60,)))
        assert fitted(logits, labels) == pytest.approx(searched(logits, labels), rel=1e-5)
        assert fitted(logits + 1e6, labels) == pytest.approx(searched(logits, labels), rel=1e-4)
        assert fitted(logits, logits.argmin(1)) == pytest.approx(0.1)
        assert fitted(logits, logits.argmax(1)) == pytest.approx(10)
    assert fitted(torch.ones(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])) == 1.0
    assert fitted(torch.tensor([[1.0, float("nan")]]), torch.tensor([0])) == 1.0


def test_checkpointing_changes_no_number(place: Place) -> None:
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
def test_products_in_half_precision_are_near_and_see_changed_weights(place: Place, dtype: Any) -> None:
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


def test_rows_are_dealt_by_the_seed(classes: Place) -> None:
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


MINE = """
import torch
from continual.objectives import Given

class Quadratic:
    count = 10
    def __init__(self, model): self.model, self.asked, self.data = model, [], torch.arange(10.0)
    def losses(self, rows):
        self.asked.append(list(rows))
        return (self.model.weight.sum() - self.data[list(rows)]) ** 2

class Shifted(Quadratic):
    by = 0.0
    def fit(self, rows):
        assert not torch.is_grad_enabled()
        self.by = float((self.model.weight.sum() - self.data[list(rows)]).mean())
        return self.losses(rows)
    def losses(self, rows):
        return (self.model.weight.sum() - self.by - self.data[list(rows)]) ** 2

def make(directory, device):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    return Given(model, [Quadratic(model), Shifted(model)])
"""


def test_an_objective_of_the_users(code: Path) -> None:
    code.write_text(MINE)
    path = list(sys.path)
    found = load(wanted("mine:make", batch=2, held=0.3), Path("anywhere"), CPU)
    assert sys.path == path
    first = found.dealt[0]
    weight = float(found.model.get_parameter("weight").detach().sum())
    driving = torch.tensor(first.drive, dtype=torch.float32)
    spread = float((driving - driving.mean()).square().mean())
    assert found.loss() == pytest.approx((float((weight - driving).square().mean()) + spread) / 2, rel=1e-5)
    asked = first.task.asked  # type: ignore[attr-defined]
    assert [len(rows) for rows in asked] == [2, 2, 2, 1]
    assert found.backward() == pytest.approx(found.loss(), rel=1e-5)
    slope = found.model.get_parameter("weight").grad
    assert slope is not None
    torch.testing.assert_close(slope, torch.full((1, 2), float((weight - driving).mean())), rtol=1e-4, atol=1e-5)
    assert [len(rows) for rows in found.held()] == [3, 3] == [len(d.judge) for d in found.dealt]
    assert sorted(row for rows in [*asked[:4], *asked[-2:]] for row in rows) == list(range(10))
    assert [d.name for d in found.dealt] == ["mine:make, task 0", "mine:make, task 1"]


GIVES = "\ndef make(d, v): return Given(L, [T()])"
BROKEN = {
    "x = (": "mine:make raised SyntaxError",
    "x = 1": "mine:make: mine has no function make",
    "make = 3": "mine has something else than a function make",
    "def make(): pass": "mine:make raised TypeError: make",
    "def make(d, v): raise KeyError('a')": "mine:make raised KeyError: 'a'",
    "def make(d, v): pass": "has to return a Given of a model and tasks, and returned NoneType",
    "def make(d, v): return 1, [2]": "has to return a torch.nn.Module as the model, and returned int",
    "def make(d, v): return Given(L, [])": r"at least one task in a list, and returned \[\]",
    "def make(d, v): return Given(L, [3])": (
        "mine:make, task 0: a task has a number `count` and a method `losses`, and int has not"
    ),
    "T.count = 3" + GIVES: "mine:make, task 0: of its 3 rows 2 would judge and 1 drive",
    "T.losses = lambda s, r: 1.0" + GIVES: "task 0: .* of 2 rows has to be a tensor of as many losses, and is float",
    "T.losses = lambda s, r: L.weight.sum()" + GIVES: r"task 0: .* and is torch.float32 of shape \[\]",
    "T.losses = lambda s, r: torch.tensor(r)" + GIVES: "and is torch.int64 of shape",
    "T.losses = lambda s, r: L.weight.sum() / (torch.tensor(r) != 2)" + GIVES: "task 0: the loss of row 2 is -?inf",
    "T.losses = lambda s, r: torch.ones(len(r))" + GIVES: "task 0: its losses have no gradient",
    "T.losses = lambda s, r: (L.weight.sum() * 0).sqrt() + torch.ones(len(r))" + GIVES: "its gradient in weight is not",
    "T.losses = lambda s, r: r.nothing" + GIVES: "mine:make raised AttributeError: ",
    "T.fit = lambda s, r: torch.ones(1)" + GIVES: r"task 0: .* of 2 rows has to be .* of shape \[1\]",
}


@pytest.mark.parametrize("source", list(BROKEN))
def test_what_is_wrong_with_a_function_is_said(code: Path, source: str) -> None:
    head = "import torch\nfrom continual.objectives import Given\nL = torch.nn.Linear(2, 1)\n"
    code.write_text(
        head
        + "class T:\n    count = 4\n    def losses(self, rows): return L.weight.sum() + torch.ones(len(rows))\n"
        + source
    )
    with pytest.raises(Misconfigured, match=BROKEN[source]):
        load(Wanted("mine:make"), Path("anywhere"), CPU).backward()


@pytest.mark.usefixtures("code")
def test_a_module_that_is_nowhere_or_has_no_source() -> None:
    with pytest.raises(
        Misconfigured, match="nowhere:f raised ModuleNotFoundError: No module named 'nowhere'"
    ) as caught:
        load(Wanted("nowhere:f"), Path("anywhere"), CPU)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(Misconfigured, match="sys has no source file"):
        Wanted("sys:exit").told()


ROW = (Path("rows.jsonl"),)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"objective": "accuracy"},
            "objective = 'accuracy': use one of causal-lm, classification, heads, or module:function",
        ),
        ({"objective": "a b:c"}, "objective = 'a b:c'"),
        ({"objective": "causal-lm"}, "rows: the objective causal-lm needs a JSONL file"),
        ({"objective": "causal-lm", "rows": ROW, "batch": 0}, "batch = 0"),
        ({"objective": "causal-lm", "rows": ROW, "held": 1.0}, "held = 1.0"),
        ({"objective": "causal-lm", "rows": ROW, "held": float("nan")}, "held = nan"),
        (
            {"objective": "causal-lm", "rows": ROW, "dtype": "int8"},
            "dtype = 'int8': use one of float32, bfloat16, float16",
        ),
        (
            {"objective": "causal-lm", "rows": ROW, "unsupervised": True},
            "unsupervised .* causal-lm needs no labels anyway",
        ),
        (
            {"objective": "causal-lm", "rows": ROW, "heads": ROW},
            "heads are for the objective heads; causal-lm takes none",
        ),
        (
            {"objective": "heads", "rows": ROW},
            "heads: one JSON file of prompts for each file of rows; there are 0 for 1",
        ),
        ({"objective": "m:f", "rows": ROW}, "rows is for the built-in objectives; with m:f"),
        ({"objective": "m:f", "heads": ROW}, "heads is for the built-in"),
        ({"objective": "m.n:f", "checkpointing": True}, "checkpointing is for the built-in"),
        ({"objective": "m:f", "unsupervised": True}, "unsupervised is for the built-in"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(Misconfigured, match=words):
        wanted(**settings)


def test_rows_that_are_too_few_or_missing_are_named(classes: Place, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", read(classes.wanted.rows[0])[:6])
    with pytest.raises(
        Misconfigured, match=r"few.jsonl: of its 6 rows 1 would judge and 5 drive \(held = 0.1\); at least 2 of each"
    ):
        classes.load(rows=(few,), held=0.1)
    with pytest.raises(Misconfigured, match=r"none.jsonl: No such file"):
        changed(classes.wanted, rows=(tmp_path / "none.jsonl",)).told()


def test_a_loss_that_is_not_finite_names_the_file_and_the_line(classes: Place, tmp_path: Path) -> None:
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


def test_what_a_record_keeps(place: Place, tmp_path: Path) -> None:
    told = place.wanted.told()
    assert json.loads(json.dumps(told)) == told == place.wanted.told()
    assert (told["kind"], told["objective"], told["seed"], told["held"], told["batch"]) == (
        "rows",
        place.wanted.objective,
        3,
        0.5,
        5,
    )
    assert [file["name"] for file in told["rows"]] == ["task-0.jsonl", "task-1.jsonl"]
    assert ("heads" in told) == (place.wanted.objective == "heads")
    moved = tmp_path / "task-0.jsonl"
    moved.write_bytes(place.wanted.rows[0].read_bytes())
    other = changed(place.wanted, rows=(moved, place.wanted.rows[1]))
    assert other.told() == told  # where a file lies does not matter
    assert all(digest.startswith("blake3:") for digest in (told["digest"], told["rows"][0]["digest"]))
    moved.write_bytes(moved.read_bytes() + b"\n")
    others = [
        other,
        *(changed(place.wanted, **c) for c in ({"seed": 4}, {"held": 0.4}, {"batch": 6}, {"dtype": "bfloat16"})),
    ]
    assert len({w.told()["digest"] for w in [place.wanted, *others]}) == 1 + len(others)


def test_the_digest_is_of_the_code_that_runs(code: Path) -> None:
    code.write_text(MINE)
    mine = Wanted("mine:make")
    told = mine.told()
    assert (told["kind"], told["objective"], told["code"]["name"]) == ("function", "mine:make", "mine.py")
    assert "rows" not in told
    code.write_text(MINE + "# another comment\n")
    assert mine.told() == told  # the module is in memory as it was
    forget("mine")
    assert mine.told()["digest"] != told["digest"]
