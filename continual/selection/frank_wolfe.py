"""Frank-Wolfe over the models that wait: which of them a calibration objective wants, and with which weights, over
ρ·conv({0} ∪ {τ_i}).

The steps themselves, in weights, are in `continual.selection.steps`. Here is what a point costs: the model put at it, a
gradient, a pass over the members' files. A model enters only if a trial on held-out rows finds it relevant at the point
where it would enter. It stays only if held-out rows are worse without it. What is done with the weights is not decided
here: they make the merged model, or say which models a rule folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from continual.errors import Refuse
from continual.executors.contract import Progress
from continual.lazily import Tensor, torch
from continual.records import TensorSpec
from continual.selection.active import Active
from continual.selection.in_memory import ModelInMemory, Score
from continual.selection.judging import Judgement, judge
from continual.selection.members import Member
from continual.selection.mixing import Mix, Mixing, mix
from continual.selection.round_options import RoundOptions
from continual.selection.steps import Hear, Stepping, solve

LEAST_TRIAL = 0.1
"""A trial adds at least this share of what it may add: rounding has a say in less."""


class MergedVector(NamedTuple):
    """X, the merged task vector that weights are counted from. `vector` gives one tensor of it, float32, in new memory;
    `need` the peak bytes of that. `fixed`: X stays as it is, and weighted task vectors are added to it; else X is the
    weighted sum that the active models and the rest make up."""

    vector: Callable[[TensorSpec], Tensor]
    need: Callable[[TensorSpec], int]
    fixed: bool


class SearchSpace(NamedTuple):
    """What a search is over: the model in memory, X, the models that have weights now, and the candidates that wait."""

    model: ModelInMemory
    merged: MergedVector
    now: Active
    waiting: Sequence[Member]


class Figures(NamedTuple):
    """How a search went: `loss` of the driving rows at the end and `before` it; the duality gap over the models that
    have weight or were let in (`gap`), and over all (`pool_gap`); how many steps were taken."""

    loss: float
    before: float
    gap: float
    pool_gap: float
    steps: int


class Chosen(NamedTuple):
    """What a search found.

    `active`: the weights; `mix`: what makes their sum of X. `scores`: ⟨g, τ⟩ at the end. `judged`: the last trial of
    each; for a model with weight, what it does by being in. `lost`: why a member could not be had. `left`: models that
    had weight and have none now.
    """

    active: Active
    mix: Mix
    scores: Mapping[str, Score]
    judged: Mapping[str, Judgement]
    lost: Mapping[str, Refuse]
    left: Sequence[str]
    figures: Figures


class Lost(Exception):
    """A member cannot be had; the search goes on without it."""

    def __init__(self, key: str, refusal: Refuse) -> None:
        super().__init__(key)
        self.key = key
        self.refusal = refusal


class Search:
    """The problem as `steps` sees it. Its vertices are the active models, the candidates that wait, and, as the last
    one where there is one, the rest of X."""

    def __init__(self, space: SearchSpace, options: RoundOptions, progress: Progress) -> None:
        now = space.now
        self.model = space.model
        self.merged = space.merged
        self.settings = options.settings
        self.progress = progress
        self.lost: dict[str, Refuse] = {}
        self.judged: dict[str, Judgement] = {}
        self.scores: dict[str, Score] = {}
        self.members = {m.key: m for m in (*(now.members[key] for key in now.weights), *space.waiting)}
        self.now = dict(now.weights)
        self.rest = now.rest
        self.banned: set[str] = set()
        """Members that were found useless, and may not come back."""
        self._mixing = Mixing(space.model.engine, space.merged.vector, self.members, space.model.layers)
        self._at: Tensor | None = None
        self._graded: tuple[Tensor, float] | None = None
        self._held: tuple[Tensor, list[Tensor]] | None = None

    @property
    def keys(self) -> list[str]:
        """The vertices that are models, in an order that does not change."""
        return [key for key in self.members if key not in self.lost]

    def start(self) -> Tensor:
        """The weights there are now: vertices × layers, float64."""
        width = self.model.count
        rows = [wide(self.now.get(key, (0.0,)), width) for key in self.keys]
        if self.rest:
            rows.append(wide(self.rest, width))
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, width)

    def caps(self) -> Tensor:
        """What each weight may be at most, vertices × layers, float64: the rest of X can only shrink."""
        caps = torch.full((len(self.keys) + bool(self.rest), self.model.count), torch.inf, dtype=torch.float64)
        if self.rest:
            caps[-1] = torch.tensor(wide(self.rest, self.model.count), dtype=torch.float64)
        return caps

    def mix(self, weights: Tensor) -> Mix:
        """What makes the sum with these weights of X."""
        if not self.merged.fixed:
            return mix(self.start(), weights, self.rest, self.keys)
        added = {key: tuple(weights[i].tolist()) for i, key in enumerate(self.keys) if bool(weights[i].any())}
        return Mix((1.0,) * weights.shape[1], added)

    def lose(self, lost: Lost) -> None:
        """Goes on without a member. What it has in the sum goes into the rest: it cannot be weighed any more."""
        self.lost[lost.key] = lost.refusal
        if lost.key in self.now:
            self.rest = together(self.rest, self.now.pop(lost.key), self.model.count)
        self._at = None
        self._graded = None
        self._held = None

    def put(self, weights: Tensor) -> None:
        """Puts the model in memory at these weights. Raises Abandoned when told to stop, Refuse where a member is
        gone, Retry."""
        self.model.engine.go_on("a round")
        if self._at is not None and torch.equal(self._at, weights):
            return
        wanted = self.mix(weights)
        with ExitStack() as stack:
            files = self._mixing.files(wanted, stack)
            vector = partial(self._mixing.vector, wanted, files)
            self.model.put(vector, lambda spec: self._mixing.need(spec) + self.merged.need(spec))
        self._at = weights.clone()

    def loss(self, weights: Tensor) -> float:
        """The loss on the rows that drive. Raises as `put` does, and Misconfigured for a loss that is not finite."""
        self.put(weights)
        self.progress("line search", 0, 1)
        return self.model.calibration.loss()

    def gradient(self, weights: Tensor, of: Tensor | None = None) -> tuple[float, Tensor]:
        """The loss, and ⟨g_l, τ_l⟩ of every vertex (vertices × layers, float64); where `of` marks some, of these and of
        all that have weight now, and 0 for the others. Raises Lost for a member that cannot be had, else as `loss`."""
        if self._graded is None or not torch.equal(self._graded[0], weights):
            self.put(weights)
            self.progress("gradient", 0, 1)
            self._graded = weights.clone(), self.model.backward()
            self.scores = {}
        keys = self.keys
        start = self.start()
        wanted = [key for i, key in enumerate(keys) if of is None or bool(of[i]) or bool(start[i].any())]
        self._score([self.members[key] for key in wanted if key not in self.scores])
        slopes = torch.zeros(start.shape, dtype=torch.float64)
        for i, key in enumerate(keys):
            if key in self.scores:
                slopes[i] = torch.tensor(self.scores[key].slopes, dtype=torch.float64)
        if self.rest:
            slopes[-1] = self._slope_of_rest(start, slopes)
        return self._graded[1], slopes

    def _score(self, members: Sequence[Member]) -> None:
        for key, score in self.model.scores(members, self.progress).items():
            if isinstance(score, Refuse):
                raise Lost(key, score)
            self.scores[key] = score

    def _slope_of_rest(self, start: Tensor, slopes: Tensor) -> Tensor:
        """⟨g_l, R_l/r_l⟩ (layers), where R = X − Σ w_i τ_i is the rest of X, and r its weight."""
        along = torch.tensor(self.model.along(self.merged.vector), dtype=torch.float64)
        along = along - (start[:-1] * slopes[:-1]).sum(0)
        return torch.where(start[-1] > 0, along / start[-1].clamp_min(1e-300), torch.zeros_like(along))

    def admit(self, vertex: int, weights: Tensor) -> bool:
        """Whether a trial finds the vertex relevant at these weights, at which the last gradient was taken."""
        keys = self.keys
        return vertex < len(keys) and keys[vertex] not in self.banned and self.relevant(keys[vertex], weights)

    def relevant(self, key: str, weights: Tensor) -> bool:
        """Whether a trial finds the member `key` relevant at these weights, at which the last gradient was taken.

        The trial adds the share of its task vector that is best by the parabola through the loss of the driving rows
        here, its slope, and the loss at the share `trial`, which is the most that is added. Raises as `loss`.
        """
        assert self._graded is not None
        assert torch.equal(self._graded[0], weights)
        loss = self._graded[1]
        slope = self.scores[key].total
        most = self.settings.trial
        member = self.members[key]
        if slope >= 0:
            return False
        without = self.held(weights)
        self.put(weights)
        self.progress("trial", 0, 1)
        self.model.move(member, most)
        bend = self.model.calibration.loss() - loss - slope * most
        share = min(max(-slope * most**2 / (2 * bend), LEAST_TRIAL * most), most) if bend > 0 else most
        self.model.move(member, share - most)
        self.judged[key] = judge(without, self.model.calibration.held())
        self.model.move(member, -share)
        self._at = None  # rounding is left of the trial: the next point is put anew
        return self.judged[key].z < -self.settings.sigmas

    def held(self, weights: Tensor) -> list[Tensor]:
        """The losses of held-out rows at these weights, as `Calibration.held` has them. Raises as `loss`."""
        if self._held is None or not torch.equal(self._held[0], weights):
            self.put(weights)
            self._held = weights.clone(), self.model.calibration.held()
        return self._held[1]

    def useless(self, weights: Tensor) -> list[str]:
        """The models with weight without which held-out rows are no worse. Each is taken out by itself. Raises as
        `loss`."""
        found: list[str] = []
        with_all = self.held(weights)
        for i, key in enumerate(self.keys):
            if not bool(weights[i].any()):
                continue
            self.put(weights)
            self.progress("trial", 0, 1)
            self.model.move(self.members[key], [-float(w) for w in weights[i]])
            self._at = None
            self.judged[key] = judge(self.model.calibration.held(), with_all)
            if not self.judged[key].z < -self.settings.stays:
                found.append(key)
        return found


def choose(space: SearchSpace, options: RoundOptions, stepping: Stepping, progress: Progress, hear: Hear) -> Chosen:
    """Finds the weights, and what every member came to. Writes nothing. Raises Refuse where a member vanishes while the
    model is put at a point, Misconfigured for an objective that cannot be used, Retry and Halt."""
    search = Search(space, options, progress)
    try:
        while True:
            try:
                return _choose(search, stepping, hear)
            except Lost as lost:
                search.lose(lost)
    finally:
        space.model.clear()


def _choose(search: Search, stepping: Stepping, hear: Hear) -> Chosen:
    search.judged = {}
    search.banned = set()
    solved = solve(search, search.start(), search.caps(), stepping, search.admit, hear)
    before = solved.first
    steps = len(solved.steps)
    while useless := search.useless(solved.weights):
        search.banned |= set(useless)
        weights = solved.weights.clone()
        for key in useless:
            weights[search.keys.index(key)] = 0.0
        solved = solve(search, weights, search.caps(), stepping, search.admit, hear)
        steps += len(solved.steps)
    keys = search.keys
    weights = solved.weights
    _, slopes = search.gradient(weights)
    for i, key in enumerate(keys):  # the last word on those that stay out
        if not bool(weights[i].any()) and key not in search.banned:
            search.judged.pop(key, None)
            search.relevant(key, weights)
    chosen = {key: tuple(weights[i].tolist()) for i, key in enumerate(keys) if bool(weights[i].any())}
    rest = tuple(weights[-1].tolist()) if search.rest else ()
    norms = {key: math.sqrt(search.scores[key].tau_sq) for key in chosen}
    active = Active(chosen, rest if any(rest) else (), {key: search.members[key] for key in chosen}, norms)
    rho = stepping.settings.rho
    most = (rho * slopes.min(0).values).clamp_max(0.0).sum() if len(slopes) else 0.0
    pool_gap = float((weights * slopes).sum() - most)
    figures = Figures(solved.loss, before, solved.gap, pool_gap, steps)
    left = [key for key in search.now if key not in chosen]
    return Chosen(active, search.mix(weights), search.scores, search.judged, search.lost, left, figures)


def room(now: Active, waiting: Sequence[Member], most: int) -> Active:
    """Makes room for candidates that wait where `most` models may be weighed: a quarter of the places is theirs. The
    lightest models of `now` go into the rest, where they are not weighed any more."""
    left = most - min(max(1, most // 4), len(waiting), most - 1)
    if not waiting or len(now.weights) <= left:
        return now
    by_weight = sorted(now.weights, key=lambda key: (sum(now.weights[key]), key), reverse=True)
    width = max(len(w) for w in now.weights.values())
    rest = now.rest
    for key in by_weight[left:]:
        rest = together(rest, now.weights[key], width)
    return now._replace(weights={key: w for key, w in now.weights.items() if key in by_weight[:left]}, rest=rest)


def together(rest: Sequence[float], weights: Sequence[float], width: int) -> tuple[float, ...]:
    """Two weights added, layer by layer; `width` is the number of layers."""
    return tuple(a + b for a, b in zip(wide(rest or (0.0,), width), wide(weights, width), strict=True))


def wide(weights: Sequence[float], width: int) -> list[float]:
    """One weight for each layer, where one is given for all."""
    return list(weights) if len(weights) == width else [weights[0]] * width
