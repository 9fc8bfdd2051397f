"""Every rule over a suite: fold its fine-tunes in several orders, and ask the merge about the tasks in it. Results go
to a file a line, and are not made twice.

Three ways of reading each merge: `paper`, as its paper scales it; `default`, as continual reads it unless told
otherwise, without data; `tuned`, the best on validation rows of nine multiples of the default's number, from a quarter
to four times, the same for every rule. Test rows never choose.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

import continual
from continual.engine.reading import Reading
from continual.executors.contract import silent
from continual.making import Recipe
from continual.rules import RULES, ReadOptions, read_options
from tests.campaigns.bench.quality.suite import Form, Part, Suite, fine_tune

RULE_NAMES = tuple(name for name in RULES if name != "fisher")
"""fisher wants Fisher values beside the weights, which these fine-tunes do not ship."""
CHECKPOINTS, TUNED_AT = (2, 4, 8), (4, 8)
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


class Campaign:
    """One suite in one form of fine-tunes, in `work`."""

    def __init__(self, suite: Suite, form: Form, work: Path, progress: Progress) -> None:
        self.suite, self.form, self.progress = suite, form, progress
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
            for name in rules:
                self.trajectory(order, name, models)
                self.progress.advance(bar)

    def ends(self, models: Mapping[str, Path]) -> None:
        """The base and each fine-tune on its own task."""
        count = len(models)
        if Key(0, "base", count, "paper") not in self.results.known:
            self.results.add(Key(0, "base", count, "paper"), test=bits(self.ask({}, list(models), "test")))
        if Key(0, "own", count, "paper") not in self.results.known:
            own = {task: self.suite.correct(self.own(path), task, "test") for task, path in models.items()}
            self.results.add(Key(0, "own", count, "paper"), test=bits(own))

    def own(self, path: Path) -> dict[str, Tensor]:
        """The weights of one fine-tune, as a merge of it alone holds them: read through continual by the plain sum."""
        with self.opened("task-arithmetic") as (fold, merge):
            fold(path)
            return self.weights(*self.read(merge()), ReadOptions("number", 1.0))

    def trajectory(self, order: int, name: str, models: Mapping[str, Path]) -> None:
        """Folds the tasks in this order with one rule and asks at every checkpoint. A rule that no order changes is
        asked about all tasks only once."""
        tasks = order_of(self.suite.tasks, order)
        counts = [count for count in (*CHECKPOINTS, len(tasks)) if count <= len(tasks)]
        asked = sorted({c for c in counts if not (order and RULES[name].order_free and c == len(tasks))})
        wanted = {Key(order, name, c, "default") for c in asked}
        if wanted <= self.results.known:
            return
        with self.opened(name) as (fold, merge):
            costs = []
            for count, task in enumerate(tasks[: max(asked)], 1):
                costs.append(fold(models[task]))
                if count in asked:
                    self.checkpoint(order, name, tasks[:count], costs, *self.read(merge()))

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
        scores: dict[str, float] = {}
        if len(tasks) in (*TUNED_AT, len(self.suite.tasks)):
            for multiple in MULTIPLES:
                options = ReadOptions(default.policy, default.value * multiple)
                scores[str(options)] = mean(self.ask(self.weights(reading, unit, options), tasks, "validation"))
            ways["tuned"] = ReadOptions.parse(max(scores, key=scores.__getitem__))
        for read, options in ways.items():
            found = bits(self.ask(self.weights(reading, unit, options), tasks, "test"))
            key = Key(order, name, len(tasks), read)
            if key not in self.results.known:
                factor = options.factors(reading.totals, reading.size())[0]
                extra = {"validation": scores} if read == "tuned" else {"costs": costs} if read == "default" else {}
                self.results.add(key, scale=str(options), factor=factor, test=found, **extra)

    def ask(self, weights: Mapping[str, Tensor], tasks: Sequence[str], part: Part) -> dict[str, Tensor]:
        return {task: self.suite.correct(weights, task, part) for task in tasks}

    def weights(self, reading: Reading, unit: Mapping[str, Tensor], options: ReadOptions) -> dict[str, Tensor]:
        """θ₀ + s·X with these options, float32."""
        factors = options.factors(reading.totals, reading.size())
        is_matrix = reading.rule.matrix or (lambda _spec: True)
        return {
            spec.name: self.base[spec.name]
            + unit[spec.name] * (factors[0 if is_matrix(spec) else 1] * options.layer(spec))
            for spec in reading.state.format.tensors
            if spec.name in unit
        }

    def read(self, merge: continual.Merge) -> tuple[Reading, dict[str, Tensor]]:
        """All of X, and how long it is."""
        unit: dict[str, Tensor] = {}
        reading = merge.reading()
        reading.measure(merge.executor, silent, lambda spec, found: unit.__setitem__(spec.name, found))
        return reading, unit

    def opened(self, name: str) -> Folding:
        return Folding(self.state, self.suite.prepare(), name)


class Folding:
    """A new state of one rule, a worker that folds into it, and the state opened for reading; a context manager."""

    def __init__(self, state: Path, base: Path, rule: str) -> None:
        self.state, self.base, self.rule = state, base, rule
        self._open: list[continual.Merge] = []

    def __enter__(self) -> Folding:
        shutil.rmtree(self.state, ignore_errors=True)
        continual.init(self.base, self.state, Recipe(rule=self.rule))
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
            raise SystemExit(f"{path}: was not folded with {self.rule}")
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
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.state, ignore_errors=True)


def mean(found: Mapping[str, Tensor]) -> float:
    """Mean accuracy over tasks."""
    return sum(float(answers.float().mean()) for answers in found.values()) / len(found)


def settle_threads(count: int) -> None:
    """How many threads a run of the benchmark takes: runs beside each other want one each."""
    torch.set_num_threads(count)
