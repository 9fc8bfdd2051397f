"""Coefficients of layers, learned at reading: what the merged task vector of each layer is multiplied by, or what each
model has in it, so that the loss on calibration rows is least. Nothing is folded.

In the spirit of AdaMerging (Yang et al. 2024, "AdaMerging: Adaptive Model Merging for Multi-Task Learning", equation 5)
and aTLAS (Zhang et al. 2024, "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", equation 3).
Both have one coefficient a layer and model: Θ = θ₀ + s·Σ_i c_il·X_il in layer l, where X = ΣX_i is read, and s is as
long as X without coefficients asks for. Where a state has no model apart it is one a layer: Θ = θ₀ + c_l·v_l, v being
what is read now. One pass backwards gives every ∂loss/∂c = ⟨g_l, s·X_il⟩, and quasi-Newton steps on the logarithms
follow from them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from continual.config import CalibrationSettings
from continual.engine.block_reading import BlockReading
from continual.engine.engine import Engine
from continual.engine.reading import Reading
from continual.errors import Misconfigured
from continual.executors.contract import Progress
from continual.lazily import torch
from continual.objectives.calibration import Calibration, load
from continual.objectives.parameters import HeldIn, Parameters, find_parameters
from continual.objectives.wanted_losses import Wanted
from continual.records import TensorSpec
from continual.tensors.layouts.in_classes import elsewhere
from continual.tuning import choosing, scoring
from continual.tuning.coefficients import Coefficients, OfLayers, OfTerms
from continual.tuning.descent import Here, descend
from continual.tuning.search import LEAST, Trial, best
from continual.tuning.teaching import teach

MOST = 16.0
"""No coefficient becomes more than so many times larger or smaller in one run."""
FIRST = 1.35
"""By what the first step changes the layer with the steepest slope."""
HELD = 0.2
"""The share of the rows that judge. They end a run, and compare its best with its start: fewer do than in a round,
which judges each model by them."""
DRIFT = 0.02
"""How far what is predicted of texts that must stay may go from what was predicted at the start: KL in nats a token."""
PATIENCE = 5
"""So many candidates one after the other that do not lower the loss of the rows that judge end a run."""

_HINT = "a gradient in float16 underflows or is too large; take dtype = bfloat16 or float32"


@dataclass(frozen=True, slots=True)
class Learning:
    """What to go by, and what to try: at most so many candidates.

    `objective` is causal-lm, classification, heads, or module:function; `rows` is a JSONL file for each task, and
    `heads` a JSON file of prompts for each, for the objective heads alone. `calibration`: `seed`, `held` (the share of
    the rows that judge), `batch`, `dtype`, `checkpointing` and `unsupervised` (entropy, without labels), where they are
    not as by default. `teachers`: a model for each task, which says what is right in place of labels: a model
    directory, or in a state of adapters the name, path, key or record number of a model. `models`: a coefficient for
    each model in each layer, and not for each layer alone. `keep`: a JSONL file of texts of which what the model
    predicts must stay, for causal-lm; by default these are the prompts of rows. `drift` is how far that may go: the
    mean of KL in nats a token; with infinity nothing has to stay. `rule` reads, by default the one in force. `work` is
    the directory for the scratch file; `dry_run` records nothing.

    Raises Misconfigured naming what is missing or cannot be used.
    """

    objective: str
    rows: tuple[str | Path, ...] = ()
    heads: tuple[str | Path, ...] = ()
    calibration: Mapping[str, object] = field(default_factory=dict)
    candidates: int = 20
    work: str | Path | None = None
    dry_run: bool = False
    rule: str | None = None
    teachers: tuple[str, ...] = ()
    models: bool = False
    keep: str | Path | None = None
    drift: float = DRIFT

    def __post_init__(self) -> None:
        if not self.drift > 0:
            raise Misconfigured(f"drift = {self.drift:g}: write a number over 0, in nats a token")
        if self.keep is not None and math.isinf(self.drift):
            raise Misconfigured(f"keep = {self.keep} says what must stay, and drift = inf that nothing has to")
        if self.candidates < LEAST:
            raise Misconfigured(f"candidates = {self.candidates}: coefficients of layers take at least {LEAST}")
        choosing.check_work(self.work)
        self.asked()

    def asked(self) -> Wanted:
        """The losses that are wanted. Raises Misconfigured."""
        try:
            settings = CalibrationSettings.model_validate({"held": HELD, **self.calibration})
        except ValidationError as error:
            first = error.errors()[0]
            raise Misconfigured(f"{' '.join(map(str, first['loc']))}: {first['msg']}") from None
        rows, heads = (tuple(Path(file) for file in files) for files in (self.rows, self.heads))
        if self.teachers and rows and len(self.teachers) != len(rows):
            raise Misconfigured(f"teachers: one for each file of rows; there are {len(self.teachers)} for {len(rows)}")
        keep = None if self.keep is None else Path(self.keep)
        return Wanted(self.objective, rows, heads, settings, bool(self.teachers), keep)


def learn(
    engine: Engine,
    reading: Reading,
    wanted: Learning,
    progress: Progress,
    told: choosing.Told | None = None,
) -> choosing.Tuned:
    """Finds the coefficients of the layers of what `reading` reads under which the rows that judge have the least loss,
    going where the rows that drive say, and records them; nothing is recorded where none is better than what is in
    force. Scores are minus the mean over tasks of the mean loss of the rows that judge.

    Raises Misconfigured where nothing is folded or the objective cannot be used, Retry where the environment got in the
    way or the state moved on meanwhile; then nothing is recorded.
    """
    started = time.perf_counter()
    choosing.check_folded(engine.state, reading)
    objective = wanted.asked()
    objective.check()
    with choosing.scratch_directory(wanted.work) as work, ExitStack() as held:
        losses = load(objective, engine.base.checkpoint.directory, engine.device)
        parameters, specs = _learned(engine, reading, losses)
        kind = OfTerms if wanted.models else OfLayers
        numbers = kind(reading, specs, work, (engine.executor, progress), held)
        way = held.enter_context(_Way(engine, numbers, losses, (parameters, specs), wanted.drift))
        taught = teach(engine, reading, objective, (losses, way.held), wanted.teachers) if wanted.teachers else ()
        asked = objective.told(taught)
        progress("tune", 0, wanted.candidates)

        def evaluate(factors: tuple[float, ...]) -> Here:
            here = way(factors, progress)
            progress("tune", len(way.trials), wanted.candidates)
            if told is not None:
                told(way.trials[-1].options, way.trials[-1].score)
            return here

        descend(evaluate, len(numbers.layers), wanted.candidates, MOST, FIRST, way.is_enough)
    drift = wanted.drift if losses.kept else None
    found = choosing.Found(way.trials, asked, False, time.perf_counter() - started, drift)
    better = best(way.trials).score > way.trials[0].score
    return choosing.settled(engine, reading, found, dry_run=wanted.dry_run or not better)


def _learned(engine: Engine, reading: Reading, losses: Calibration) -> tuple[Parameters, list[TensorSpec]]:
    """Where the model has the tensors of the base, and those of them that the merge can change: no other needs a
    gradient, which of a table of tokens is as large as it is. Raises Misconfigured where a tensor of the base is no
    parameter of the model."""
    base, blocks = engine.base, reading if isinstance(reading, BlockReading) else None
    there = [spec for spec in base.specs if spec.kind == "carried" or spec.name in base.checkpoint.tensors]
    held = find_parameters(losses.model, there, base.aliases, elsewhere(base))
    return held, [spec for spec in base.specs if spec.name in held and (blocks is None or blocks.columns(spec))]


class _Way:
    """What factors for the layers are worth on the rows, and which way the loss falls there. A context manager.

    Each gradient is let go as soon as its products with what is multiplied are known, so that the model is in memory
    once.
    """

    def __init__(
        self,
        engine: Engine,
        numbers: Coefficients,
        losses: Calibration,
        learned: tuple[Parameters, Sequence[TensorSpec]],
        drift: float,
    ) -> None:
        """`drift`: how far what must stay may go."""
        self.held, specs = learned
        self._drift = drift
        self._engine, self._numbers, self._losses = engine, numbers, losses
        self._specs = {spec.name: spec for spec in specs}
        self.trials: list[Trial] = []
        self._reading = numbers.reading(numbers.options([1.0] * len(numbers.layers)))
        self._dots: list[list[float]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> _Way:
        within: dict[torch.Tensor, list[tuple[TensorSpec, HeldIn]]] = {}
        for name, found in self.held.items():
            for one in found if name in self._specs else ():
                within.setdefault(one.tensor, []).append((self._specs[name], one))
        for parameter in self._losses.model.parameters():
            if parameter in within:
                take = partial(self._take, within[parameter])
                hook = parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
                self._hooks.callback(hook.remove)
            else:
                parameter.requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def __call__(self, factors: tuple[float, ...], progress: Progress) -> Here:
        """Raises Misconfigured for a loss or a gradient that is not finite."""
        options = self._numbers.options(factors)
        self._reading = self._numbers.reading(options)
        self._reading.settle(self._engine.executor, progress)
        scoring.fill(self.held, self._engine.base, self._reading, self._engine.executor)
        if not self.trials and math.isfinite(self._drift):
            self._losses.remember()
        drift = self._losses.drift()
        judged = [float(each.mean()) for each in self._losses.held()]
        self._dots = [[] for _ in factors]
        loss = self._losses.backward()
        for name, place, enlarged in self._numbers.rest(self._reading):
            self._note(name, place, enlarged)
        too_far = bool(self.trials) and drift is not None and drift > self._drift  # the start is where it is
        self.trials.append(Trial(options, -math.fsum(judged) / len(judged), loss, drift, too_far))
        return Here(loss, tuple(math.fsum(dots) for dots in self._dots))

    def is_enough(self) -> bool:
        """Whether the last candidates did not lower the loss of the rows that judge, or went too far."""
        scores = [-math.inf if trial.too_far else trial.score for trial in self.trials]
        return len(scores) - 1 - scores.index(max(scores)) >= PATIENCE

    def _take(self, within: Sequence[tuple[TensorSpec, HeldIn]], parameter: torch.Tensor) -> None:
        """Adds what the gradient of this parameter, of one batch of rows, says of its layers."""
        for spec, held in within:
            gradient = held.gradient
            assert gradient is not None, spec.name
            for place, enlarged in self._numbers.slopes(self._reading, spec, gradient):
                self._note(spec.name, place, enlarged)
        parameter.grad = None

    def _note(self, name: str, place: int, enlarged: float) -> None:
        """Adds what the gradient in a tensor says of a number."""
        slope = enlarged / self._losses.enlarged
        if not math.isfinite(slope):
            raise Misconfigured(f"the loss is finite, and its gradient in {name} is not: {_HINT}")
        self._dots[place].append(slope)
