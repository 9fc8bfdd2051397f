"""An objective that is a function of the user's: how it is called, what it may return, and what its record keeps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from continual.errors import Misconfigured
from continual.objectives import function
from continual.objectives.calibration import load
from continual.objectives.wanted_losses import Wanted
from tests.helpers.pools import wanted

CPU = torch.device("cpu")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `mine` of the user's, in the current directory, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "mine.py"
    forget("mine")


def forget(*names: str) -> None:
    function._imported.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


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
    for look in (Wanted("sys:exit").told, Wanted("sys:exit").check):
        with pytest.raises(Misconfigured, match="sys has no source file"):
            look()


def test_the_digest_is_of_the_code_that_runs(code: Path) -> None:
    code.write_text(MINE)
    mine = Wanted("mine:make")
    told = mine.told()
    assert (told.kind, told.objective, told.code.name) == ("function", "mine:make", "mine.py")
    assert told.rows is None
    code.write_text(MINE + "# another comment\n")
    assert mine.told() == told  # the module is in memory as it was
    forget("mine")
    assert mine.told().digest != told.digest


def test_prompts_that_are_a_list_of_texts_are_the_functions_own(code: Path, tmp_path: Path) -> None:
    head, said = "    count = 10\n", "Said(self.model.weight.repeat(len(rows), 1), torch.arange(len(rows)))"
    texts = MINE.replace(head, f'{head}    prompts = ["a text"]\n')
    method = MINE.replace("Given\n", "Given, Said\n")
    method = method.replace(head, f"{head}    def prompts(self, rows): return {said}\n")
    for text, kept in ((MINE, 0), (texts, 0), (method, 2)):
        code.write_text(text)
        forget("mine")
        found = load(wanted("mine:make"), tmp_path, CPU)
        found.remember()
        assert len(found.kept) == kept
        assert (found.drift() is None) == (not kept)
