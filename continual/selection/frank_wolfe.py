"""Frank-Wolfe over the models that wait: which of them a calibration objective wants, and with which weights, over
ρ·conv({0} ∪ {τ_i}).

The steps are `continual.selection.steps`, in weights; here is what a point costs: the model put at it, a gradient, a
pass over the members' files. A model enters only if a trial on held-out rows finds it relevant where it would enter,
and stays only if held-out rows are worse without it. What is done with the weights is not decided here: they are the
merge, or say what a rule folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from continual.engine.engine import Engine
from continual.errors import Refuse
from continual.executors.contract import Progress
from continual.records import TensorSpec
from continual.selection.active import Active
from continual.selection.asked import Asked
from continual.selection.judging import Judgement, judge
from continual.selection.loaded import Loaded, Score
from continual.selection.members import Member
from continual.selection.mixing import Mix, Mixing, mix
from continual.selection.steps import Plan, Taken, solve

LEAST_TRIAL = 0.1
"""The least share of what a trial may add that it does add: of less, rounding has a say."""


class Origin(NamedTuple):
    """X, which the weights are counted from, tensor by tensor in new memory; `need` is the peak of reading one.
    `fixed`: it stays as it is, and weights are added to it; else it is the weighted sum that the active models and the
    rest make up."""

    vector: Callable[[TensorSpec], Tensor]
    need: Callable[[TensorSpec], int]
    fixed: bool


class Chosen(NamedTuple):
    """What came of it. `scores`: ⟨g, τ⟩ at the end; `judged`: the last trial of each, for those in the merge what it
    does by being there; `lost`: why a member could not be had; `left`: models that had weight, and have none now;
    `numbers`: `loss` and `before` of the driving rows, `gap` over who is in or was let in, `pool_gap` over all,
    `steps`."""

    active: Active
    mix: Mix
    scores: Mapping[str, Score]
    judged: Mapping[str, Judgement]
    lost: Mapping[str, Refuse]
    left: Sequence[str]
    numbers: dict[str, Any]


class Search:
    """The problem as `steps` sees it: vertices are the active models, the candidates that wait, and the rest of X where
    there is one, as the last."""

    def __init__(
        self,
        engine: Engine,
        loaded: Loaded,
        origin: Origin,
        now: Active,
        waiting: Sequence[Member],
        asked: Asked,
        progress: Progress,
    ) -> None:
        self.loaded, self.origin, self.asked, self.progress = loaded, origin, asked, progress
        self.lost: dict[str, Refuse] = {}
        self.judged: dict[str, Judgement] = {}
        self.scores: dict[str, Score] = {}
        self.members = {m.key: m for m in (*(now.members[key] for key in now.weights), *waiting)}
        self.now, self.rest = dict(now.weights), now.rest
        self.banned: set[str] = set()
        self._mixing = Mixing(engine, origin.vector, self.members, loaded.layers)
        self._at: Tensor | None = None
        self._graded: tuple[Tensor, float] | None = None
        self._held: tuple[Tensor, list[Tensor]] | None = None

    @property
    def keys(self) -> list[str]:
        """The vertices that are models, in a fixed order."""
        return [key for key in self.members if key not in self.lost]

    def start(self) -> Tensor:
        """The weights there are: vertices × layers."""
        width = self.loaded.count
        rows = [_wide(self.now.get(key, (0.0,)), width) for key in self.keys]
        return torch.tensor(rows + ([_wide(self.rest, width)] if self.rest else []), dtype=torch.float64).reshape(
            -1, width
        )

    def caps(self) -> Tensor:
        """What a weight may be at most: the rest of X can only shrink."""
        caps = torch.full((len(self.keys) + bool(self.rest), self.loaded.count), torch.inf, dtype=torch.float64)
        if self.rest:
            caps[-1] = torch.tensor(_wide(self.rest, self.loaded.count), dtype=torch.float64)
        return caps

    def mix(self, weights: Tensor) -> Mix:
        """What makes the merge with these weights of X."""
        if self.origin.fixed:
            return Mix(
                (1.0,) * weights.shape[1],
                {key: tuple(weights[i].tolist()) for i, key in enumerate(self.keys) if bool(weights[i].any())},
            )
        return mix(self.start(), weights, self.rest, self.keys)

    def put(self, weights: Tensor) -> None:
        """The model in memory at these weights. Raises Abandoned when told to stop."""
        self.loaded.engine.go_on("a round")
        if self._at is not None and torch.equal(self._at, weights):
            return
        wanted = self.mix(weights)
        with ExitStack() as stack:
            files = self._mixing.files(wanted, stack)
            self.loaded.put(
                partial(self._mixing.vector, wanted, files),
                lambda spec: self._mixing.need(spec) + self.origin.need(spec),
            )
        self._at = weights.clone()

    def loss(self, weights: Tensor) -> float:
        """On the rows that drive."""
        self.put(weights)
        self.progress("line search", 0, 1)
        return self.loaded.calibration.loss()

    def gradient(self, weights: Tensor, of: Tensor | None = None) -> tuple[float, Tensor]:
        """The loss, and ⟨g_l, τ_l⟩ of every vertex, or of those `of` asks for and all that have weight (0 for the
        others)."""
        if self._graded is None or not torch.equal(self._graded[0], weights):
            self.put(weights)
            self.progress("gradient", 0, 1)
            self._graded, self.scores = (weights.clone(), self.loaded.backward()), {}
        keys, start = self.keys, self.start()
        wanted = [key for i, key in enumerate(keys) if of is None or bool(of[i]) or bool(start[i].any())]
        found = self.loaded.scores([self.members[key] for key in wanted if key not in self.scores], self.progress)
        for key, score in found.items():
            if isinstance(score, Refuse):
                raise Lost(key, score)
            self.scores[key] = score
        slopes = torch.zeros(start.shape, dtype=torch.float64)
        for i, key in enumerate(keys):
            if key in self.scores:
                slopes[i] = torch.tensor(self.scores[key].slopes, dtype=torch.float64)
        if self.rest:  # R = X − Σ w_i τ_i, of weight r
            along = torch.tensor(self.loaded.along(self.origin.vector), dtype=torch.float64) - (
                start[:-1] * slopes[:-1]
            ).sum(0)
            slopes[-1] = torch.where(start[-1] > 0, along / start[-1].clamp_min(1e-300), torch.zeros_like(along))
        return self._graded[1], slopes

    def admit(self, vertex: int, weights: Tensor) -> bool:
        """Whether a trial finds the vertex relevant at these weights, where the gradient is known."""
        keys = self.keys
        return vertex < len(keys) and keys[vertex] not in self.banned and self.relevant(keys[vertex], weights)

    def relevant(self, key: str, weights: Tensor) -> bool:
        """The same of a member by its key. What is added of it is the best share up to `trial` by the parabola through
        the loss of the driving rows."""
        assert self._graded is not None
        assert torch.equal(self._graded[0], weights)
        loss, slope, most, member = self._graded[1], self.scores[key].total, self.asked.trial, self.members[key]
        if slope >= 0:
            return False
        without = self.held(weights)
        self.put(weights)
        self.progress("trial", 0, 1)
        self.loaded.move(member, most)
        bend = self.loaded.calibration.loss() - loss - slope * most
        share = min(max(-slope * most**2 / (2 * bend), LEAST_TRIAL * most), most) if bend > 0 else most
        self.loaded.move(member, share - most)
        self.judged[key] = judge(without, self.loaded.calibration.held())
        self.loaded.move(member, -share)
        self._at = None  # it is back up to rounding: the next point is put anew
        return self.judged[key].z < -self.asked.sigmas

    def held(self, weights: Tensor) -> list[Tensor]:
        """The losses of held-out rows at these weights."""
        if self._held is None or not torch.equal(self._held[0], weights):
            self.put(weights)
            self._held = weights.clone(), self.loaded.calibration.held()
        return self._held[1]

    def useless(self, weights: Tensor) -> list[str]:
        """The models without which held-out rows are no worse."""
        found = []
        with_all = self.held(weights)
        for i, key in enumerate(self.keys):
            if bool(weights[i].any()):
                self.put(weights)
                self.progress("trial", 0, 1)
                self.loaded.move(self.members[key], [-float(w) for w in weights[i]])
                self._at = None
                self.judged[key] = judge(self.loaded.calibration.held(), with_all)
                if not self.judged[key].z < -self.asked.stays:
                    found.append(key)
        return found


class Lost(Exception):
    """A member is gone: the round goes on without it."""

    def __init__(self, key: str, refusal: Refuse) -> None:
        super().__init__(key)
        self.key, self.refusal = key, refusal


def choose(
    engine: Engine,
    loaded: Loaded,
    origin: Origin,
    now: Active,
    waiting: Sequence[Member],
    asked: Asked,
    plan: Plan,
    progress: Progress,
    told: Callable[[Taken], None],
) -> Chosen:
    """The weights, and what every member came to; nothing is written. Raises Retry and Halt."""
    search = Search(engine, loaded, origin, now, waiting, asked, progress)
    try:
        while True:
            try:
                return _choose(search, plan, told)
            except Lost as lost:
                search.lost[lost.key] = lost.refusal
                if lost.key in search.now:  # it is in the merge, and cannot be weighed any more
                    search.rest = together(search.rest, search.now.pop(lost.key), loaded.count)
                search._at = search._graded = search._held = None
    finally:
        loaded.clear()


def _choose(search: Search, plan: Plan, told: Callable[[Taken], None]) -> Chosen:
    search.judged, search.banned = {}, set()
    solved = solve(search, search.start(), search.caps(), plan, search.admit, told)
    first, steps = solved.first, len(solved.steps)
    while useless := search.useless(solved.weights):
        search.banned |= set(useless)
        weights = solved.weights.clone()
        for key in useless:
            weights[search.keys.index(key)] = 0.0
        solved = solve(search, weights, search.caps(), plan, search.admit, told)
        steps += len(solved.steps)
    _, slopes = search.gradient(solved.weights)
    keys, weights = search.keys, solved.weights
    for i, key in enumerate(keys):  # the last word on those that stay out
        if not bool(weights[i].any()) and key not in search.banned:
            search.judged.pop(key, None)
            search.relevant(key, weights)
    chosen = {key: tuple(weights[i].tolist()) for i, key in enumerate(keys) if bool(weights[i].any())}
    rest = tuple(weights[-1].tolist()) if search.rest else ()
    norms = {key: math.sqrt(search.scores[key].tau_sq) for key in chosen}
    active = Active(chosen, rest if any(rest) else (), {key: search.members[key] for key in chosen}, norms)
    most = (plan.rho * slopes.min(0).values).clamp_max(0.0).sum() if len(slopes) else 0.0
    pool_gap = float((weights * slopes).sum() - most)
    numbers = {"loss": solved.loss, "before": first, "gap": solved.gap, "pool_gap": pool_gap, "steps": steps}
    left = [key for key in search.now if key not in chosen]
    return Chosen(active, search.mix(weights), search.scores, search.judged, search.lost, left, numbers)


def room(now: Active, waiting: Sequence[Member], plan: Plan) -> Active:
    """The merge with its lightest models not weighed any more, where it is full and candidates wait: a quarter of the
    places is theirs."""
    most = plan.most - min(max(1, plan.most // 4), len(waiting), plan.most - 1)
    if not waiting or len(now.weights) <= most:
        return now
    by_weight = sorted(now.weights, key=lambda key: (sum(now.weights[key]), key), reverse=True)
    width, rest = max(len(w) for w in now.weights.values()), now.rest
    for key in by_weight[most:]:
        rest = together(rest, now.weights[key], width)
    return now._replace(weights={key: w for key, w in now.weights.items() if key in by_weight[:most]}, rest=rest)


def together(rest: Sequence[float], weights: Sequence[float], width: int) -> tuple[float, ...]:
    """Weights added, layer by layer."""
    return tuple(a + b for a, b in zip(_wide(rest or (0.0,), width), _wide(weights, width), strict=True))


def _wide(weights: Sequence[float], width: int) -> list[float]:
    """One weight for each layer, where one is given for all."""
    return list(weights) if len(weights) == width else [weights[0]] * width
