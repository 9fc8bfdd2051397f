"""Every rule over a suite: fold its fine-tunes in several orders, and ask the merge about the tasks in it. Results go
to a file a line, and are not made twice.

Ways of reading each merge: `paper`, as its paper scales it; `default`, as continual reads it unless told
otherwise, without data; `tuned`, the best on validation rows of nine multiples of the default's number, from a quarter
to four times, the same for every rule. Test rows never choose. `sum`: of task arithmetic alone, all task vectors added.
Besides, the scales that are named.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

import continual
from continual.engine.reading import Reading
from continual.engine.views import ReadView
from continual.executors.contract import silent
from continual.making import DEFAULT, OF_ADAPTERS, WIDTH, Recipe
from continual.rules import RULES, ReadOptions, read_options, readings
from tests.campaigns.bench.quality.folding import Folding
from tests.campaigns.bench.quality.results import Key, Results, bits, rows_of
from tests.campaigns.bench.quality.suite import Form, Part, Suite, Watching, fine_tune

FIRST = ("iso-c", "tsv-m", "gram", "opcm", "task-arithmetic")
RULE_NAMES = (*FIRST, *(name for name in RULES if name not in (*FIRST, "fisher")))
"""All rules, what decides first. fisher wants Fisher values beside the weights, which these fine-tunes do not ship."""
CHECKPOINTS = (2, 4, 8)
SUM = ReadOptions("number", 1.0)
READS = ("default", "paper", "sum", "tuned")
"""The ways of reading, in the order in which they are asked."""
Two = tuple[dict[str, Tensor], dict[str, Tensor]]
MULTIPLES = tuple(2.0 ** (step / 2) for step in range(-4, 5))


def order_of(tasks: Sequence[str], seed: int) -> list[str]:
    """The tasks in the order of this seed."""
    shuffled = list(tasks)
    random.Random(seed).shuffle(shuffled)
    return shuffled


@dataclass(frozen=True)
class Plan:
    """What is asked: at which numbers of models, all of them always among these; at which of them the scale is tuned,
    all of them again; and which ways of reading are asked at all."""

    counts: tuple[int, ...] = CHECKPOINTS
    tuned: tuple[int, ...] | None = (4, 8)
    """None: nowhere."""
    reads: tuple[str, ...] = READS
    keep: bool = False
    """Whether the states stay, at each number of models, so that they can be read in other ways later."""
    scales: tuple[str, ...] = ()
    """Scales at which every rule is read besides, as `ReadOptions` writes them (`spread:0.8`)."""


PLAN = Plan()


class Campaign:
    """One suite in one form of fine-tunes, in `work`. A context manager, which holds the file of results.

    What says most comes first: the base, then the first order, rule by rule as they are named, each as it is read by
    default before the other ways; then the fine-tunes by themselves, then the other orders. A run that was killed goes
    on: results stand, a fine-tune is whole or not there, and a state is folded on from its last fold.
    """

    kept, default = "", DEFAULT
    """What the files of this kind of campaign end with, and the rule that such a state has unless told otherwise."""

    def __init__(self, suite: Suite, form: Form, work: Path, progress: Progress, plan: Plan = PLAN) -> None:
        self.suite, self.form, self.progress, self.plan, self.work = suite, form, progress, plan, work
        work.mkdir(parents=True, exist_ok=True)
        self.states = work / f"states-{suite.name}-{form}{self.kept}"
        self.results = Results(work / f"{suite.name}-{form}{self.kept}.jsonl")
        base = load_file(suite.prepare() / "model.safetensors")
        self.base = {name: value.float() for name, value in base.items() if value.is_floating_point()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.results.close()

    def run(self, orders: int, rules: Sequence[str]) -> None:
        """Everything that is not in the results yet."""
        homes = self.homes(rules)
        bar = self.progress.add_task(f"{self.suite.name} {self.form}", total=orders * len(homes))
        self.origin()
        for order in range(orders):
            for home, names in homes.items():
                self.trajectory(order, home, names)
                self.progress.advance(bar)
            if order == 0:
                self.alone()

    def model(self, task: str) -> Path:
        """A fine-tune, trained when it is first wanted."""
        return fine_tune(self.suite, task, self.form)

    def homes(self, rules: Sequence[str]) -> dict[str, list[str]]:
        """The rules that states are made with, and which of `rules` each state is read by: one that keeps the same as
        an earlier one reads its state."""
        found: dict[str, list[str]] = {}
        for name in rules:
            home = next((home for home in found if name in readings(RULES[home].rule())), name)
            found.setdefault(home, []).append(name)
        return found

    def origin(self) -> None:
        """The base, asked once for all forms of a suite."""
        key = Key(0, "base", len(self.suite.tasks), "paper")
        if key in self.results.known:
            return
        for file in sorted(self.work.glob(f"{self.suite.name}-*.jsonl")):
            for row in rows_of(file):
                if row["rule"] == "base" and list(row["test"]) == list(self.suite.tasks):
                    self.results.add(key, **{name: row[name] for name in ("test", "watched") if name in row})
                    return
        found = bits(self.ask({}, self.suite.tasks, "test"))
        self.results.add(key, test=found, **self.watched({}, self.suite.tasks))

    def alone(self) -> None:
        """Each fine-tune on its own task: as it is, which is the plain sum of it alone, and read by the default rule as
        a merge of one model."""
        keys = (
            Key(0, "own", len(self.suite.tasks), "paper"),
            Key(0, self.default, len(self.suite.tasks), "alone"),
        )
        if self.results.known.issuperset(keys):
            return
        own, each, read, apart = {}, {}, {}, 0.0
        for task, (weights, merged) in self.ones():
            own[task], each[task] = self.suite.correct(weights, task, "test"), self.watched(weights, [task])
            read[task] = self.suite.correct(merged, task, "test")
            long = math.hypot(*(float((weights[name] - self.base[name]).norm()) for name in weights))
            apart = max(apart, math.hypot(*(float((merged[n] - weights[n]).norm()) for n in weights)) / long)
        if keys[0] not in self.results.known:
            self.results.add(keys[0], test=bits(own), each=each)
        if keys[1] not in self.results.known:
            self.results.add(keys[1], test=bits(read), apart=apart)

    def ones(self) -> Iterator[tuple[str, Two]]:
        """Of each task the weights of its fine-tune as they are, and as a merge of it alone is read by default."""
        default = read_options(self.default)
        for task in self.suite.tasks:
            yield task, (self.one("task-arithmetic", task, SUM), self.one(self.default, task, default))

    def one(self, name: str, task: str, options: ReadOptions) -> dict[str, Tensor]:
        """The weights of a merge of one model."""
        with self.opened(name, "one") as folding:
            if not folding.begin([task], 1):
                folding.fold(self.model(task))
            return self.weights(*self.read(folding.merge()), options)

    def trajectory(self, order: int, home: str, rules: Sequence[str]) -> None:
        """Folds the tasks in this order into a state made with `home`, and asks at every checkpoint how `rules` read
        it. A rule that no order changes is asked about all tasks only once."""
        tasks = order_of(self.suite.tasks, order)
        asked = {name: self.asked(order, name) for name in rules}
        counts = sorted({count for found in asked.values() for count in found})
        if not counts:
            return
        with self.opened(home, str(order)) as folding:
            count = folding.begin(tasks, counts[0])
            while counts:
                if count == counts[0]:
                    for name in (name for name in rules if count in asked[name]):
                        read = self.read(folding.merge(), ReadView(rule=None if name == home else name))
                        self.checkpoint(order, name, tasks[:count], folding.costs if name == home else [], *read)
                    counts.pop(0)
                else:
                    if count in self.plan.counts:
                        folding.copy(count)
                    folding.fold(self.model(tasks[count]))
                    count += 1

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
        """In which ways a merge of so many models is read, the first one first."""
        tuned = self.plan.tuned is not None and count in (*self.plan.tuned, len(self.suite.tasks))
        possible = {"sum": name == "task-arithmetic", "tuned": tuned}
        known = [read for read in READS if read in self.plan.reads and possible.get(read, True)]
        return [*known, *self.plan.scales]

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
        ways = {"default": read_options(name), "paper": read_options(name, "paper"), "sum": SUM}
        told: dict[str, dict[str, Any]] = {}
        for read in self.ways(name, len(tasks)):
            key = Key(order, name, len(tasks), read)
            if key in self.results.known:
                continue
            scores: dict[str, float] = {}
            if read == "tuned":
                scores = self.scores(name, tasks, reading, unit)
            chosen = max(scores, key=scores.__getitem__) if scores else read
            options = ways.get(chosen) or ReadOptions.parse(chosen)
            if str(options) not in told:
                weights = self.weights(reading, unit, options)
                told[str(options)] = {"test": bits(self.ask(weights, tasks, "test")), **self.watched(weights, tasks)}
            factor = options.factors(reading.totals, reading.size())[0]
            extra: dict[str, Any] = {"validation": scores} if read == "tuned" else {}
            if read == "default":
                extra = {"costs": list(costs), "each": spread_of(reading)}
            self.results.add(key, scale=str(options), factor=factor, **told[str(options)], **extra)

    def scores(self, name: str, tasks: Sequence[str], reading: Reading, unit: Mapping[str, Tensor]) -> dict[str, float]:
        """Validation accuracy at nine multiples of the default's number, by the read-time options as text."""
        found, default = {}, read_options(name)
        for multiple in MULTIPLES:
            options = ReadOptions(default.policy, default.value * multiple)
            found[str(options)] = mean(self.ask(self.weights(reading, unit, options), tasks, "validation"))
        return found

    def ask(self, weights: Mapping[str, Tensor], tasks: Sequence[str], part: Part) -> dict[str, Tensor]:
        return {task: self.suite.correct(weights, task, part) for task in tasks}

    def weights(self, reading: Reading, unit: Mapping[str, Tensor], options: ReadOptions) -> dict[str, Tensor]:
        """θ₀ + s·X with these options, float32."""
        factors = options.factors(reading.totals, reading.size())
        is_matrix = reading.rule.read.matrix or (lambda _spec: True)
        return {
            spec.name: self.base[spec.name]
            + unit[spec.name] * (factors.of(spec, matrix=is_matrix(spec)) * options.layer(spec))
            for spec in reading.state.format.tensors
            if spec.name in unit
        }

    def read(self, merge: continual.Merge, view: ReadView | None = None) -> tuple[Reading, dict[str, Tensor]]:
        """All of X, and how long it is."""
        unit: dict[str, Tensor] = {}
        reading = merge.reading(view=view)
        reading.measure(merge.executor, silent, lambda spec, found: unit.__setitem__(spec.name, found))
        return reading, unit

    def opened(self, name: str, what: str) -> Folding:
        """A state made with the rule `name`; `what` tells it from others of that rule."""
        keep = self.plan.keep and what != "one"
        return Folding(self.states / f"{name}-{what}", self.suite.prepare(), Recipe(rule=name), keep)


class Adapters(Campaign):
    """The same of a state of adapters: LoRA adapters are folded into one state, which every rule reads."""

    kept, default = "-kept", OF_ADAPTERS

    def homes(self, rules: Sequence[str]) -> dict[str, list[str]]:
        return {self.default: list(rules)}

    def opened(self, name: str, what: str) -> Folding:
        recipe = Recipe(rule=name, width=WIDTH)
        return Folding(self.states / f"{name}-{what}", self.suite.prepare(), recipe, self.plan.keep)

    def ones(self) -> Iterator[tuple[str, Two]]:
        """The same, as views of one state."""
        with self.opened(self.default, "0") as folding:
            tasks = order_of(self.suite.tasks, 0)
            for task in tasks[folding.begin(tasks, len(tasks)) :]:
                folding.fold(self.model(task))
            merge = folding.merge()
            for task in self.suite.tasks:
                plain, default = (ReadView(rule=rule, only=(task,)) for rule in ("task-arithmetic", self.default))
                weights = self.weights(*self.read(merge, plain), SUM)
                yield task, (weights, self.weights(*self.read(merge, default), read_options(self.default)))


def spread_of(reading: Reading) -> list[tuple[float, float]]:
    """ρ and ‖τ‖ over the matrices, of each model that is merged; none where the state measures no matrices."""
    return [
        (model.spread_sum / model.matrix_norm_sum, model.matrix_norm_sum)
        for model in reading.totals.each
        if model.matrix_norm_sum
    ]


def mean(found: Mapping[str, Tensor]) -> float:
    """Mean accuracy over tasks."""
    return sum(float(answers.float().mean()) for answers in found.values()) / len(found)


def settle_threads(count: int) -> None:
    """How many threads a run of the benchmark takes: runs beside each other want one each."""
    torch.set_num_threads(count)
