"""Every rule over a suite: fold its fine-tunes in several orders, and ask the merge about the tasks in it. Results go
to a file a line, and are not made twice.

Ways of reading each merge: `paper`, as its paper scales it; `default`, as continual reads it unless told
otherwise, without data; `tuned`, the best on validation rows of nine multiples of the default's number, from a quarter
to four times, the same for every rule. Test rows never choose. `sum`: of task arithmetic alone, all task vectors added.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

import continual
from continual.engine.reading import Reading
from continual.engine.views import ReadView
from continual.executors.contract import silent
from continual.making import DEFAULT, WIDTH, Recipe
from continual.rules import RULES, ReadOptions, read_options
from tests.campaigns.bench.quality.suite import Form, Part, Suite, Watching, fine_tune

RULE_NAMES = tuple(name for name in RULES if name != "fisher")
"""fisher wants Fisher values beside the weights, which these fine-tunes do not ship."""
CHECKPOINTS = (2, 4, 8)
SUM = ReadOptions("number", 1.0)
MULTIPLES = tuple(2.0 ** (step / 2) for step in range(-4, 5))


@dataclass(frozen=True)
class Key:
    """One result: the merge of the first `count` tasks of an order, read in one way; rule `base` and `own` are the base
    and the fine-tunes themselves."""

    order: int
    rule: str
    count: int
    read: str


def order_of(tasks: Sequence[str], seed: int) -> list[str]:
    """The tasks in the order of this seed."""
    shuffled = list(tasks)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def bits(found: Mapping[str, Tensor]) -> dict[str, str]:
    """Right and wrong answers by task, as text."""
    return {task: "".join("1" if right else "0" for right in answers.tolist()) for task, answers in found.items()}


class Results:
    """A file of results, one a line; what stands there is not made again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.known = {Key(row["order"], row["rule"], row["count"], row["read"]) for row in self.rows}

    def add(self, key: Key, **values: Any) -> None:
        row = {"order": key.order, "rule": key.rule, "count": key.count, "read": key.read, **values}
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self.known.add(key)


@dataclass(frozen=True)
class Plan:
    """What is asked: at which numbers of models, all of them always among these, and at which of them the scale is
    tuned, all of them again."""

    counts: tuple[int, ...] = CHECKPOINTS
    tuned: tuple[int, ...] | None = (4, 8)
    """None: nowhere."""


PLAN = Plan()


class Campaign:
    """One suite in one form of fine-tunes, in `work`."""

    def __init__(self, suite: Suite, form: Form, work: Path, progress: Progress, plan: Plan = PLAN) -> None:
        self.suite, self.form, self.progress, self.plan = suite, form, progress, plan
        work.mkdir(parents=True, exist_ok=True)
        self.state = work / f"state-{suite.name}-{form}"
        self.results = Results(work / f"{suite.name}-{form}.jsonl")
        base = load_file(suite.prepare() / "model.safetensors")
        self.base = {name: value.float() for name, value in base.items() if value.is_floating_point()}

    def run(self, orders: int, rules: Sequence[str]) -> None:
        """Everything that is not in the results yet."""
        bar = self.progress.add_task(f"{self.suite.name} {self.form}: train", total=len(self.suite.tasks))
        models = {}
        for task in self.suite.tasks:
            models[task] = fine_tune(self.suite, task, self.form)
            self.progress.advance(bar)
        self.progress.update(bar, description=f"{self.suite.name} {self.form}: ends", total=1, completed=0)
        self.ends(models)
        self.progress.update(bar, description=f"{self.suite.name} {self.form}: merge", total=orders * len(rules))
        for order in range(orders):
            self.order(order, rules, models, lambda: self.progress.advance(bar))

    def order(self, order: int, rules: Sequence[str], models: Mapping[str, Path], advance: Callable[[], None]) -> None:
        """One order of the tasks, by every rule; `advance` is called for each."""
        for name in rules:
            self.trajectory(order, name, models)
            advance()

    def ends(self, models: Mapping[str, Path]) -> None:
        """The base and each fine-tune on its own task."""
        count = len(models)
        if Key(0, "base", count, "paper") not in self.results.known:
            found = bits(self.ask({}, list(models), "test"))
            self.results.add(Key(0, "base", count, "paper"), test=found, **self.watched({}, list(models)))
        if Key(0, "own", count, "paper") not in self.results.known:
            own, each = {}, {}
            for task, weights in self.alone(models):
                own[task] = self.suite.correct(weights, task, "test")
                each[task] = self.watched(weights, [task])
            self.results.add(Key(0, "own", count, "paper"), test=bits(own), each=each)

    def alone(self, models: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The weights of each fine-tune, as a merge of it alone holds them: read through continual by the plain sum."""
        for task, path in models.items():
            with self.opened("task-arithmetic") as (fold, merge):
                fold(path)
                yield task, self.weights(*self.read(merge()), SUM)

    def trajectory(self, order: int, name: str, models: Mapping[str, Path]) -> None:
        """Folds the tasks in this order with one rule and asks at every checkpoint. A rule that no order changes is
        asked about all tasks only once."""
        tasks = order_of(self.suite.tasks, order)
        asked = self.asked(order, name)
        if not asked:
            return
        with self.opened(name) as (fold, merge):
            costs = []
            for count, task in enumerate(tasks[: max(asked)], 1):
                costs.append(fold(models[task]))
                if count in asked:
                    self.checkpoint(order, name, tasks[:count], costs, *self.read(merge()))

    def asked(self, order: int, name: str) -> list[int]:
        """At which numbers of models something is not asked of a rule yet."""
        most = len(self.suite.tasks)
        counts = {count for count in (*self.plan.counts, most) if count <= most}
        if order and RULES[name].rule().laws.order_free:
            counts.discard(most)
        return sorted(
            c for c in counts if {Key(order, name, c, way) for way in self.ways(name, c)} - self.results.known
        )

    def ways(self, name: str, count: int) -> list[str]:
        """In which ways a merge of so many models is read."""
        tuned = self.plan.tuned is not None and count in (*self.plan.tuned, len(self.suite.tasks))
        return ["paper", "default", *(["sum"] if name == "task-arithmetic" else []), *(["tuned"] if tuned else [])]

    def watched(self, weights: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Any]:
        """What the merge must not break, where the suite says so."""
        return {"watched": self.suite.watch(weights, tasks)} if isinstance(self.suite, Watching) else {}

    def checkpoint(
        self,
        order: int,
        name: str,
        tasks: list[str],
        costs: list[dict[str, float]],
        reading: Reading,
        unit: Mapping[str, Tensor],
    ) -> None:
        """Asks about the tasks that are merged, read in each way."""
        default = read_options(name)
        ways = {"paper": read_options(name, "paper"), "default": default}
        if name == "task-arithmetic":
            ways["sum"] = SUM
        scores: dict[str, float] = {}
        tuned = "tuned" in self.ways(name, len(tasks))
        if tuned and Key(order, name, len(tasks), "tuned") not in self.results.known:
            for multiple in MULTIPLES:
                options = ReadOptions(default.policy, default.value * multiple)
                scores[str(options)] = mean(self.ask(self.weights(reading, unit, options), tasks, "validation"))
            ways["tuned"] = ReadOptions.parse(max(scores, key=scores.__getitem__))
        told: dict[str, dict[str, Any]] = {}
        for read, options in ways.items():
            key = Key(order, name, len(tasks), read)
            if key in self.results.known:
                continue
            if str(options) not in told:
                weights = self.weights(reading, unit, options)
                told[str(options)] = {"test": bits(self.ask(weights, tasks, "test")), **self.watched(weights, tasks)}
            factor = options.factors(reading.totals, reading.size())[0]
            extra = {"validation": scores} if read == "tuned" else {"costs": costs} if read == "default" else {}
            self.results.add(key, scale=str(options), factor=factor, **told[str(options)], **extra)

    def ask(self, weights: Mapping[str, Tensor], tasks: Sequence[str], part: Part) -> dict[str, Tensor]:
        return {task: self.suite.correct(weights, task, part) for task in tasks}

    def weights(self, reading: Reading, unit: Mapping[str, Tensor], options: ReadOptions) -> dict[str, Tensor]:
        """θ₀ + s·X with these options, float32."""
        factors = options.factors(reading.totals, reading.size())
        is_matrix = reading.rule.read.matrix or (lambda _spec: True)
        return {
            spec.name: self.base[spec.name]
            + unit[spec.name] * (factors[0 if is_matrix(spec) else 1] * options.layer(spec))
            for spec in reading.state.format.tensors
            if spec.name in unit
        }

    def read(self, merge: continual.Merge, view: ReadView | None = None) -> tuple[Reading, dict[str, Tensor]]:
        """All of X, and how long it is."""
        unit: dict[str, Tensor] = {}
        reading = merge.reading(view=view)
        reading.measure(merge.executor, silent, lambda spec, found: unit.__setitem__(spec.name, found))
        return reading, unit

    def opened(self, name: str) -> Folding:
        return Folding(self.state, self.suite.prepare(), Recipe(rule=name))


class Adapters(Campaign):
    """The same of a state of adapters: LoRA adapters are folded into one state, which every rule reads."""

    def __init__(self, suite: Suite, form: Form, work: Path, progress: Progress, plan: Plan = PLAN) -> None:
        super().__init__(suite, form, work, progress, plan)
        self.state = work / f"state-{suite.name}-{form}-kept"
        self.results = Results(work / f"{suite.name}-{form}-kept.jsonl")

    def opened(self, name: str) -> Folding:
        return Folding(self.state, self.suite.prepare(), Recipe(rule=name, width=WIDTH))

    def alone(self, models: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The same, as views of one state."""
        with self.opened("task-arithmetic") as (fold, merge):
            for path in models.values():
                fold(path)
            for task, path in models.items():
                yield task, self.weights(*self.read(merge(), ReadView(only=(str(path),))), SUM)

    def order(self, order: int, rules: Sequence[str], models: Mapping[str, Path], advance: Callable[[], None]) -> None:
        tasks = order_of(self.suite.tasks, order)
        wanted = {name: asked for name in rules if (asked := self.asked(order, name))}
        last = max((max(asked) for asked in wanted.values()), default=0)
        with self.opened(DEFAULT) as (fold, merge):
            costs = []
            for count, task in enumerate(tasks[:last], 1):
                costs.append(fold(models[task]))
                for name in (name for name, asked in wanted.items() if count in asked):
                    self.checkpoint(order, name, tasks[:count], costs, *self.read(merge(), ReadView(rule=name)))
        for _ in rules:
            advance()


class Folding:
    """A new state, a worker that folds into it, and the state opened for reading; a context manager."""

    def __init__(self, state: Path, base: Path, recipe: Recipe) -> None:
        self.state, self.base, self.recipe = state, base, recipe
        self._open: list[continual.Merge] = []

    def __enter__(self) -> Folding:
        shutil.rmtree(self.state, ignore_errors=True)
        continual.init(self.base, self.state, self.recipe)
        command = [sys.executable, "-m", "tests.campaigns.bench.quality.worker", str(self.state)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter((self.fold, self.merge))

    def fold(self, path: Path) -> dict[str, float]:
        """Folds a model; what it took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{path}: was not folded with {self.recipe.rule}")
        took: dict[str, float] = json.loads(line)
        return took

    def merge(self) -> continual.Merge:
        """The state as it is now."""
        self._open.append(continual.open(self.state, workers=1))
        return self._open[-1]

    def __exit__(self, *_: object) -> None:
        for merge in self._open:
            merge.close()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.state, ignore_errors=True)


def mean(found: Mapping[str, Tensor]) -> float:
    """Mean accuracy over tasks."""
    return sum(float(answers.float().mean()) for answers in found.values()) / len(found)


def settle_threads(count: int) -> None:
    """How many threads a run of the benchmark takes: runs beside each other want one each."""
    torch.set_num_threads(count)
