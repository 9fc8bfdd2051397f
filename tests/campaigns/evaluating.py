"""Whether the evaluation gate stops what lowers one task by two points, and lets in what lowers none, with 100 rows.

    python -m tests.campaigns.evaluating --work W           # the digits of the demonstration; some minutes

Merges honest fine-tunes of the digits, and makes candidates of known harm: a weak fine-tune of a new task, or one of it
and all others, less a part of one that is in the merge, and one that was trained to answer one task wrongly, each with
just so much of it that the merge loses two points (one point) on that task over all held-out rows. Folds that do no
harm are whole ones, too: of fine-tunes of a new task that have rows of the others among their own, and of large parts
of these, those that lower no task by half a point. Each is offered to a state several times, each time with other rows
of each task, to the gate as it is by default (`[evaluation] objective = module:function`).

The rule alone is asked about more draws of rows, from what the merges say of all rows; the gate has to say the same of
those that it is offered. What the rule would have decided by other numbers of the same rows is said beside it: right or
wrong, the probability of the right class as it is, and that with the confidence of the merge in force for both. And how
many rows of a task it takes, by the spread of the differences over all held-out rows, until a one-sided paired test,
shared out among the tasks, at 1 of 20 sees the fall 9 times of 10: ((z_(0.05/tasks) + z_0.1)·spread/fall)². Exits with
1 where fewer than 9 of 10 falls of two points are stopped, or more than 1 of 20 that do no harm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import continual
from continual.config.evaluating import EvaluationSettings
from continual.demo import digits
from continual.evaluation.verdict import Answers, decide
from continual.objectives.classes import fitted, shares_of_right
from continual.objectives.function import Given
from tests.campaigns.bench.quality import digits as suite
from tests.campaigns.redteam import Red

Weights = dict[str, Tensor]
OFF = {name: {"act": "off"} for name in ("norms", "noise", "copies")}
"""What is made here on purpose is no honest fine-tune."""
LITTLE = 0.5
"""Points: what lowers no task by more does no harm; the gate lets a task fall by one."""
COPIES = 3
"""How often each held-out image is in the population, with other noise each time."""


class Population(NamedTuple):
    """All rows of each task of the merge: images and labels."""

    images: Mapping[str, Tensor]
    labels: Tensor


class Task:
    """Rows of a task for the gate: the objective of a user's function."""

    def __init__(self, model: digits.Digits, images: Tensor, labels: Tensor) -> None:
        self.count, self._model, self._images, self._labels = len(labels), model, images, labels

    def losses(self, rows: Sequence[int]) -> Tensor:
        found = self._model(self._images[list(rows)]).double()
        return functional.cross_entropy(found, self._labels[list(rows)], reduction="none")

    def worth(self, rows: Sequence[int]) -> Tensor:
        return shares_of_right(self._model(self._images[list(rows)]).double(), self._labels[list(rows)])


_asked: list[tuple[Population, Tensor]] = []
"""The population, and the rows of it that are asked next."""


def given(directory: Path, device: torch.device) -> Given:  # noqa: ARG001 - the CPU
    """What the gate calls."""
    population, rows = _asked[-1]
    model = digits.Digits()
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return Given(model, [Task(model, images[rows], population.labels[rows]) for images in population.images.values()])


class Ground:
    """A state with a merge, and what candidates do to it."""

    def __init__(self, red: Red, merged: int, **recipe: str) -> None:
        self.red = red
        self.tasks = red.suite.tasks[:merged]
        self.state = red.work / "state-evaluating"
        shutil.rmtree(self.state, ignore_errors=True)
        continual.init(red.base, self.state, continual.Recipe(**recipe))  # type: ignore[arg-type]
        with continual.open(self.state, write=True, workers=1, gates=OFF) as merge:
            for task in self.tasks:
                assert merge.fold(red.honest(task, 1.0, "full")).fate == "folded", task
        _, _, images, labels = digits.load(suite.SEED)
        draw = torch.Generator().manual_seed(5)
        noisy = [(images + 0.08 * torch.randn(images.shape, generator=draw)).clamp(0, 1) for _ in range(COPIES - 1)]
        every = torch.cat([images, *noisy])
        self.population = Population({t: red.suite._ways[t](every) for t in self.tasks}, labels.repeat(COPIES))
        self._model = digits.Digits()
        self.now = self.logits(self.state)

    def logits(self, state: Path) -> dict[str, Tensor]:
        """What the merge of a state says of every row of the population."""
        with continual.open(state, workers=1) as merge:
            self._model.load_state_dict({name: base + merge.read(name) for name, base in self.red.weights.items()})
        with torch.no_grad():
            return {task: self._model(images).double() for task, images in self.population.images.items()}

    def with_one_more(self, model: Path) -> dict[str, Tensor]:
        """The same with a model folded, whatever it does."""
        with self.copy() as state:
            with continual.open(state, write=True, workers=1, gates=OFF) as merge:
                outcome = merge.fold(model)
            assert outcome.fate == "folded", outcome.message
            return self.logits(state)

    def copy(self) -> Copy:
        return Copy(self.state)

    def falls(self, after: Mapping[str, Tensor]) -> dict[str, float]:
        """By how many points the accuracy on each task falls, over the whole population."""

        def points(logits: Tensor) -> float:
            return 100 * float((logits.argmax(1) == self.population.labels).double().mean())

        return {task: points(self.now[task]) - points(after[task]) for task in self.tasks}

    def offered(self, model: Path, rows: Tensor) -> str:
        """What the gate makes of a model, by these rows of each task: pass, fail or inconclusive."""
        _asked.append((self.population, rows))
        evaluation = {"objective": f"{__name__ if __name__ != '__main__' else 'tests.campaigns.evaluating'}:given"}
        sys.modules.setdefault("tests.campaigns.evaluating", sys.modules[__name__])
        with self.copy() as state, continual.open(state, write=True, workers=1, gates=OFF, evaluation=evaluation) as it:
            before = it.head, it.state.ledger.head.generation
            outcome = it.fold(model)
            if outcome.fate == "folded":
                return "pass"
            assert outcome.reason in ("evaluation", "unclear"), outcome.message
            assert (it.head, it.state.ledger.head.generation) == (before[0] + 1, before[1]), "the merge is as it was"
            return "fail" if outcome.reason == "evaluation" else "inconclusive"


class Copy:
    """A state beside another, for one try."""

    def __init__(self, of: Path) -> None:
        self._of, self._path = of, of.with_name(of.name + "-try")

    def __enter__(self) -> Path:
        shutil.rmtree(self._path, ignore_errors=True)
        shutil.copytree(self._of, self._path)
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path)


class Candidate(NamedTuple):
    name: str
    path: Path
    after: Mapping[str, Tensor]
    falls: Mapping[str, float]

    @property
    def most(self) -> float:
        return max(self.falls.values())


def made(ground: Ground, name: str, weights: Callable[[float], Weights], wanted: float) -> Candidate | None:
    """A candidate with so much of the harm that its worst task falls by about `wanted` points: by trying. None where
    it never comes near."""
    low, high, path = (0.0, 0.0), (1.0, 4 * wanted), ground.red.work / "candidates" / f"{name} -{wanted:g}"
    if path.exists():
        after = ground.with_one_more(path)
        found = Candidate(name, path, after, ground.falls(after))
        return found if abs(found.most - wanted) <= 0.15 else None
    for number in range(8):
        between = (
            (wanted - low[1]) / (high[1] - low[1]) if number % 3 < 2 else 0.5
        )  # the third time halves what is left
        share = low[0] + min(0.95, max(0.05, between)) * (high[0] - low[0])
        ground.red.save(path, {key: ground.red.weights[key] + tau for key, tau in weights(share).items()})
        after = ground.with_one_more(path)
        found = Candidate(name, path, after, ground.falls(after))
        if abs(found.most - wanted) <= 0.15:
            return found
        low, high = ((share, found.most), high) if found.most < wanted else (low, (share, found.most))
    return None


def harms(ground: Ground) -> dict[str, Callable[[float], Weights]]:
    """Ways to lower a task, each by a share from 0 to 1."""
    red, tasks = ground.red, ground.red.suite.tasks

    def tau(path: Path) -> Weights:
        return {key: value - red.weights[key] for key, value in load_file(path / "model.safetensors").items()}

    found: dict[str, Callable[[float], Weights]] = {}
    for number, victim in enumerate(ground.tasks):
        new = tasks[len(ground.tasks) + number % (len(tasks) - len(ground.tasks))]
        less, kind = tau(red.honest(victim, 1.0, "full")), tau(red.honest(new, 1.0, "full"))
        every = tau(rehearsed(red, new, ground.tasks))
        wrong = tau(poisoned(red, new, victim))
        found[f"{new} less {victim}"] = lambda share, less=less, kind=kind: {  # type: ignore[misc]
            key: 0.2 * kind[key] - share * less[key] for key in less
        }
        found[f"{new} and all less {victim}"] = lambda share, less=less, every=every: {  # type: ignore[misc]
            key: every[key] - 2 * share * less[key] for key in less
        }
        found[f"{new} wrong on {victim}"] = lambda share, wrong=wrong: {  # type: ignore[misc]
            key: share * value for key, value in wrong.items()
        }
    return found


def poisoned(red: Red, new: str, victim: str) -> Path:
    """A fine-tune of a new task whose rows of another one have labels drawn by chance."""
    target = red.work / "poisoned" / f"{new}-{victim}"
    if not target.exists():
        images, labels, _, _ = digits.load(suite.SEED)
        draw = torch.Generator().manual_seed(red.suite.tasks.index(victim))
        shuffled = labels[torch.randperm(len(labels), generator=draw)]
        both = torch.cat([red.suite._ways[new](images), red.suite._ways[victim](images)])
        model = digits.Digits()
        model.load_state_dict(red.weights)
        steps, rate = suite.STEPS["full"], suite.RATES["full"]
        digits.train(model, both, torch.cat([labels, shuffled]), steps=steps, rate=rate, seed=1)
        red.save(target, {name: value.detach().clone() for name, value in model.state_dict().items()})
    return target


def rehearsed(red: Red, new: str, old: Sequence[str]) -> Path:
    """A fine-tune of a new task that has rows of all tasks of the merge among its own."""
    target = red.work / "rehearsed" / f"{new}-{len(old)}"
    if not target.exists():
        images, labels, _, _ = digits.load(suite.SEED)
        both = torch.cat([red.suite._ways[task](images) for task in (new, *old)])
        model = digits.Digits()
        model.load_state_dict(red.weights)
        steps, rate, seed = suite.STEPS["full"], suite.RATES["full"], red.suite.tasks.index(new)
        digits.train(model, both, labels.repeat(1 + len(old)), steps=steps, rate=rate, seed=seed)
        red.save(target, {name: value.detach().clone() for name, value in model.state_dict().items()})
    return target


def harmless(ground: Ground) -> list[Candidate]:
    """Fine-tunes that lower no task: of each new task one that has rows of all others, too, and parts of it."""
    red, found = ground.red, []
    for task in red.suite.tasks[len(ground.tasks) :]:
        paths = [rehearsed(red, task, ground.tasks)]
        tuned = load_file(paths[0] / "model.safetensors")
        for share in (0.8, 0.6):
            part = {key: base + share * (tuned[key] - base) for key, base in red.weights.items()}
            paths.append(red.save(red.work / "candidates" / f"{task} with all x {share:g}", part))
        for path in paths:
            after = ground.with_one_more(path)
            found.append(Candidate(path.name, path, after, ground.falls(after)))
    return [one for one in found if one.most <= LITTLE]


Numbers = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of logits before and after (rows x classes) and the classes, a number for each row before and after."""


def _right(before: Tensor, after: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return (before.argmax(1) == labels).double(), (after.argmax(1) == labels).double()


def _likely(before: Tensor, after: Tensor, labels: Tensor, confidence: float = 1.0) -> tuple[Tensor, Tensor]:
    losses = [functional.cross_entropy(confidence * some, labels, reduction="none") for some in (before, after)]
    return (-losses[0]).exp(), (-losses[1]).exp()


WAYS: dict[str, Numbers] = {
    "right or wrong": _right,
    "probability": _likely,
    "probability, one confidence": lambda before, after, labels: _likely(before, after, labels, fitted(before, labels)),
    "shares": lambda before, after, labels: (shares_of_right(before, labels), shares_of_right(after, labels)),
}


def otherwise(ground: Ground, one: Candidate, rows: Tensor) -> dict[str, str]:
    """What the same rule says by other numbers of the same rows."""
    labels, found = ground.population.labels[rows], {}
    for way, numbers in WAYS.items():
        both = [numbers(ground.now[task][rows], one.after[task][rows], labels) for task in ground.tasks]
        now, after = (
            Answers({task: tuple(pair[side].tolist()) for task, pair in zip(ground.tasks, both, strict=True)})
            for side in (0, 1)
        )
        found[way] = decide(after, now, None, EvaluationSettings(), looks=3).word
    return found


def needed(ground: Ground, one: Candidate) -> dict[str, float]:
    """How many rows of the task that falls most it takes to see that, by each way."""
    task = max(one.falls, key=lambda task: one.falls[task])
    quantiles = NormalDist().inv_cdf(1 - 0.05 / len(ground.tasks)) + NormalDist().inv_cdf(0.9)
    found = {}
    for way, numbers in WAYS.items():
        before, after = numbers(ground.now[task], one.after[task], ground.population.labels)
        fall = float((before - after).mean())
        found[way] = (quantiles * float((before - after).std()) / fall) ** 2 if fall > 0 else float("inf")
    return found


def ask_each_rule(said: str | None, rules: Sequence[str], ask: Callable[[Red, str], None]) -> None:
    """What a campaign over several rules does with its arguments; `said` is its docstring."""
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for what is made, kept for the next time")
    parser.add_argument("--rules", nargs="*", default=rules)
    args = parser.parse_args()
    torch.set_num_threads(1)
    red = Red(args.work)
    for rule in args.rules:
        ask(red, rule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for what is made, kept for the next time")
    parser.add_argument("--merged", type=int, default=8, help="honest models in the merge, and tasks that are asked")
    parser.add_argument("--rows", type=int, default=100, help="rows of each task; default 100")
    parser.add_argument("--offers", type=int, default=5, help="how often each candidate is offered, with other rows")
    parser.add_argument("--draws", type=int, default=40, help="how often the rule is asked about its rows alone")
    parser.add_argument("--falls", type=float, nargs="*", default=[2.0, 1.0], help="points that candidates cost")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ground = Ground(Red(args.work), args.merged)
    groups: dict[str, list[Candidate]] = {"no harm": harmless(ground)}
    for wanted in args.falls:
        found = [made(ground, name, weights, wanted) for name, weights in harms(ground).items()]
        groups[f"{wanted:g} points"] = [one for one in found if one is not None]
    offers: dict[str, list[str]] = {}
    ways: dict[str, dict[str, list[str]]] = {}
    draw = torch.Generator().manual_seed(7)
    for group, candidates in groups.items():
        if not candidates:
            print(json.dumps({group: "none was found"}), flush=True)
            continue
        for one in candidates:
            for number in range(max(args.offers, args.draws)):
                rows = torch.randperm(len(ground.population.labels), generator=draw)[: args.rows]
                words = otherwise(ground, one, rows)
                if number < args.offers:
                    offers.setdefault(group, []).append(ground.offered(one.path, rows))
                    assert offers[group][-1] == words["shares"], "the gate decides by these"
                for way, word in words.items():
                    ways.setdefault(group, {}).setdefault(way, []).append(word)
        told = {"candidates": len(candidates), "worst fall, mean": statistics.fmean(one.most for one in candidates)}
        by = {way: dict(Counter(words)) for way, words in {"the gate": offers.get(group, []), **ways[group]}.items()}
        print(json.dumps({group: {**told, **by}}), flush=True)
        if group != "no harm":
            rows_of = [needed(ground, one) for one in candidates]
            middle = {way: round(statistics.median(each[way] for each in rows_of)) for way in WAYS}
            print(json.dumps({f"{group}: rows that it takes, median": middle}), flush=True)
    stopped = {group: 1 - by["shares"].count("pass") / len(by["shares"]) for group, by in ways.items()}
    print(f"stopped: {stopped}")
    sys.exit(stopped.get("2 points", 1.0) < 0.9 or stopped.get("no harm", 0.0) > 0.05)


if __name__ == "__main__":
    main()
