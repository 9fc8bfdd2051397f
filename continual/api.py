"""An open merge: plan, fold, read, export, take out. `continual.making` makes the state that is opened here.

The commands and the daemon work with `Merge`, and so can any program:

    import continual

    with continual.open("state", write=True) as merge:
        merge.fold("fine-tunes/alice")
        merge.export("merged")
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from continual import selection, tuning
from continual.config import Settings, settings_of
from continual.engine import combining, planning, unfolding
from continual.engine.base import open_base, weighted_base
from continual.engine.block_reading import BlockReading
from continual.engine.engine import Engine
from continual.engine.outcomes import Outcome, Plan
from continual.engine.reading import Reading
from continual.engine.resources import Resources
from continual.engine.standing import Standing
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.executors.contract import Progress, silent
from continual.executors.device import pick_device
from continual.executors.local import Local
from continual.hub.locate import Places
from continual.making import agree
from continual.publish import folder, lora
from continual.records import Event, TensorSpec
from continual.rules import ReadAs, ReadOptions, rule
from continual.selection import admission
from continual.selection.steps import Taken
from continual.sources.roster import openers
from continual.state import Commit, State, leasing
from continual.state.entries import Entry
from continual.state.format import FoldCommit
from continual.state.ledger import Waiting
from continual.tensors import BaseModel
from continual.tuning import Evaluation, Told, Tuned, Tuning

if TYPE_CHECKING:
    from continual.hub import Hub

_NO_ROUNDS = (
    "select = none: no model waits for rounds; set select = relevance, or make a state with the rule frank-wolfe"
)


def open(state: str | Path = "state", *, write: bool = False, **settings: object) -> Merge:
    """Opens the state in the directory `state`; `settings` are fields of `continual.Settings`.

    Any number of processes may open a state for reading, one at a time for writing. Raises Misconfigured where there
    is no state or a setting cannot be used, Busy where another process writes to it, Damaged.
    """
    return Merge(settings_of({"state": Path(state), **settings}), write=write)


class Merge:
    """An open state with its base and its rule. A context manager."""

    def __init__(
        self,
        settings: Settings,
        *,
        write: bool = False,
        client: Hub | None = None,
        on_step: Callable[[str], None] | None = None,
    ) -> None:
        """Opens the state that `settings` name. `client` is asked in place of the Hub that the environment names;
        `on_step` is called before each step of the commit protocol. Raises Misconfigured, Busy and Damaged."""
        self.settings = settings
        self.state = State.open(settings.state, write=write, on_step=on_step)
        try:
            agree(self.state, settings)
        except Misconfigured:
            self.state.close()
            raise
        self.rule = rule(self.state.format.rule, self.state.format.options)
        self._base: BaseModel | None = None
        self._engine: tuple[Settings, Engine] | None = None
        self.places = Places(settings, self.state.format.base.repo, client, openers(settings))
        self.standing = Standing(self.state, lambda: self.settings)
        self._lengths: dict[str, tuple[float, float]] = {}
        self.releasing = threading.Lock()  # held while a release is on its way: two would write to one place

    def __enter__(self) -> Merge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the base's files and the state."""
        if self._base is not None:
            self._base.checkpoint.close()
        self.state.close()

    @property
    def base(self) -> BaseModel:
        """The base that the state was made from. Raises Misconfigured if it is gone, Damaged if it is another."""
        if self._base is None:
            self._base = open_base(self.state, self.places, self.settings.base)
        return self._base

    @property
    def hub(self) -> Hub:
        """The Hub that this merge asks. Raises Misconfigured where the Hub must not be asked (HF_HUB_OFFLINE)."""
        return self.places.hub

    @property
    def engine(self) -> Engine:
        """The engine that folds into this state, with the gates and the executor that `settings` name now."""
        if self._engine is None or self._engine[0] is not self.settings:
            device = pick_device(self.settings.device)
            resources = Resources(self.executor, device, locate=self.places.of, stop=self.stopping)
            self._engine = self.settings, Engine(self.state, self.base, self.rule, self.standing.gates, resources)
        return self._engine[1]

    @property
    def executor(self) -> Local:
        """Threads of this process, within the settings `workers` and `memory`."""
        return Local(self.settings.workers, self.settings.memory)

    @property
    def stopping(self) -> threading.Event:
        """Set once `give_up` was called."""
        return self.places.stop

    @property
    def head(self) -> int:
        """The number of the newest record."""
        return self.state.ledger.head.seq

    def record(self, entry: Entry) -> Commit:
        """Adds a record that leaves the model as it is. Raises Retry and Halt."""
        return self.state.record(entry)

    def announce(self, url: str) -> None:
        """Says in the lock, for other processes, where the service of this state listens."""
        self.state.set_url(url)

    def give_up(self) -> None:
        """Ends for good what another thread does: a fold or a round raises Abandoned soon, a wait for the Hub ends."""
        self.stopping.set()

    def check(self, models: Iterable[str | Path]) -> None:
        """Raises Misconfigured where one of the models is not there, or where rounds choose and lack something: all
        that can be known before any is folded."""
        for model in models:
            self.places.named(model)
        if self.selects != "none":
            self.asked().calibration.told()

    def plan(self, model: str | Path) -> Plan:
        """Says from headers alone what folding `model` would take, and whether it would be let in. Raises
        Misconfigured if there is no such model, Retry."""
        return planning.plan(self.engine, self.places.named(model))

    def fold(self, model: str | Path | Event, *, progress: Progress = silent) -> Outcome:
        """Folds one model, and drops the generations beyond those that are kept. Where rounds choose, the model is put
        into the pool instead.

        `model` is a directory, a repo of the Hub (`hf://ORG/NAME@REVISION`), or what a source saw. A refusal is an
        outcome. Raises Misconfigured if there is no such model, Skip for what a source saw and the settings leave out,
        Retry and Halt; then nothing has changed.
        """
        place = self.places.seen(model) if isinstance(model, Event) else self.places.named(model)
        if self.selects != "none":
            return admission.admit(self.engine, place)
        outcome = self.engine.fold(place, progress=progress)
        if outcome.fate == "folded":
            self.state.expire(self.settings.keep)
        return outcome

    @property
    def selects(self) -> Literal["none", "relevance", "frank-wolfe"]:
        """Who chooses what is folded: nobody (`none`), or rounds over the pool, and how they do."""
        return "frank-wolfe" if self.rule.laws.rounds else self.settings.select or "none"

    def asked(self) -> selection.RoundOptions:
        """How rounds choose, by the settings. Raises Misconfigured where no rounds are set up, or naming what they
        lack."""
        if self.selects == "none":
            raise Misconfigured(_NO_ROUNDS)
        return selection.options_of(self.settings)

    def pool(self) -> dict[str, Waiting]:
        """The candidates that wait for a round, by key."""
        return self.state.ledger.pool

    def round(self, progress: Progress = silent, told: selection.HearRound | None = None) -> selection.Round:
        """Runs a round over the pool: scores all that wait, folds what is relevant, settles the others' fates. `told`
        is called with each fold or step when it is made. Raises Misconfigured, Retry and Halt."""

        def hear(what: Outcome | Taken) -> None:
            if isinstance(what, Outcome) and what.fate == "folded":
                self.state.expire(self.settings.keep)
            if told is not None:
                told(what)

        ground = selection.Ground(self.engine, self.reading, weighed=self.rule.laws.rounds)
        found = selection.run(ground, self.asked(), progress, hear)
        self.state.expire(self.settings.keep)
        return found

    def look_round(self, progress: Progress = silent) -> selection.Round:
        """Scores all that wait at the merge as it is, and tries those that promise something; folds and records
        nothing. Raises Misconfigured, Retry and Halt."""
        ground = selection.Ground(self.engine, self.reading, weighed=self.rule.laws.rounds)
        return selection.look(ground, self.asked(), progress)

    def why(self, word: str) -> selection.Why:
        """What is known of the candidate that `word` names (a name, path or key). Raises Misconfigured if it was never
        seen."""
        return selection.explain(self.state, word)

    def read(self, name: str, *, at: int | None = None) -> torch.Tensor:
        """The merged task vector of the tensor `name` at record `at` (default: the newest): float32, with the tensor's
        shape, before any cast. Raises Misconfigured for another name, or a record that has expired."""
        with _held(self, at) as reading:
            reading.settle(self.executor, silent)
            return reading.vector(_kept(self.state, name))

    def reading(self, at: int | None = None, options: ReadOptions | None = None, view: ReadView | None = None) -> Reading:
        """The merged model at record `at` (default: the newest), read by `options` (default: those in force there, and
        as `view` says). Raises Misconfigured if the record has expired, or the view cannot be read."""
        view = (view or ReadView()).by(self.settings.reading)
        view.check(self.state)
        if self.state.format.form is not None:
            return BlockReading(self.state, self.rule, at, view, options)
        return Reading(self.state, self.rule, at, options or self.scale(at, view), self._lengths)

    @contextlib.contextmanager
    def weights(self) -> Iterator[BaseModel]:
        """The base with its weights, which a state of adapters needs for whole models alone. Raises Misconfigured where
        they are gone."""
        if self.state.format.form is None:
            yield self.base
            return
        base = weighted_base(self.state, self.places, self.settings.base)
        try:
            yield base
        finally:
            base.checkpoint.close()

    def export(
        self, target: str | Path | folder.Target, progress: Progress = silent, *, view: ReadView | None = None
    ) -> Path:
        """Writes the merged model as an ordinary model directory: into a directory, which must not exist, or as
        `target` says; of a state of adapters what `view` reads. Returns the directory. Raises Misconfigured and Halt;
        then nothing is left behind."""
        target = target if isinstance(target, folder.Target) else folder.Target(target)
        with _held(self, target.at, view) as reading, self.weights() as base:
            return folder.export(base, reading, target, self.executor, progress)

    def export_lora(
        self,
        directory: str | Path,
        rank: int,
        *,
        at: int | None = None,
        dtype: str = "F32",
        view: ReadView | None = None,
        progress: Progress = silent,
    ) -> lora.LoraReport:
        """Writes the merged model at record `at` as a LoRA adapter of this rank, as near as one comes to it. `dtype` is
        a safetensors word. Raises Misconfigured and Halt; then nothing is left behind."""
        target = lora.LoraTarget(Path(directory), rank, dtype)
        with _held(self, at, view) as reading:
            return lora.export(self.base, reading, target, self.executor, progress)

    def scale(self, at: int | None = None, view: ReadView | None = None) -> ReadOptions:
        """How the merge is read: as the records up to `at` (default: the newest), the settings and `view` say."""
        ledger = self.state.ledger
        now = ReadOptions.from_mapping(ledger.read_options(ledger.head.seq if at is None else at))
        return (view or ReadView()).by(self.settings.reading).read_by(self.rule, now, self.state)[1]

    def rescale(self, scale: str | None = None, lines: str | None = None, rule: str | None = None) -> ReadOptions:
        """Changes how the merge is read: its scale, that of its layers, or the rule that reads it; nothing is folded
        again. Returns how it is read then.

        `scale` is `norm`, `norm:KAPPA`, a number, `auto` (the rule's default) or `tuned` (what the newest `tune` chose,
        its layer scaling and its rule too); `lines` is `ALPHA:BETA` or `none`; `rule` is one of those that `continual
        rules` lists for the rule of this state. Raises Misconfigured for texts that are malformed, for a rule that
        cannot read this state, and for `tuned` where nothing was tuned.
        """
        return tuning.rescale(self.state, self.rule, ReadAs(rule or self.settings.reading, scale, lines))

    def tune(
        self,
        evaluation: Evaluation,
        wanted: Tuning | None = None,
        progress: Progress = silent,
        told: Told | None = None,
    ) -> Tuned:
        """Finds the scale of the merge by evaluating candidates, and records it; nothing is folded again. `told` is
        called with each candidate and its score. Raises Misconfigured where nothing is folded or the evaluation cannot
        be used, Retry where the environment got in the way; then nothing is recorded."""
        wanted = wanted or Tuning()
        reading = self.reading(view=ReadView(rule=wanted.rule, scale=wanted.scale))
        return tuning.tune(self.engine, reading, evaluation, wanted, progress, told)

    def look_unfold(self, word: str, at: str | Path | None = None) -> unfolding.Unfolding:
        """Says what taking the model that `word` names (a name, path, key or record number) out of the merge takes;
        `at` is where it is now, if it was moved. Raises Misconfigured if `word` names none or several."""
        return unfolding.look(self.engine, word, None if at is None else self.places.named(at))

    def unfold(self, plan: unfolding.Unfolding, progress: Progress = silent) -> Commit:
        """Takes a model out of the merge, as `look_unfold` found, and returns the record of it. Raises Refuse, Retry
        and Halt; then nothing has changed."""
        take_out = selection.subtract if self.rule.laws.rounds else unfolding.unfold
        commit = take_out(self.engine, plan, progress)
        self.state.expire(self.settings.keep)
        return commit

    def combine(
        self, other: str | Path, *, dry_run: bool = False, progress: Progress = silent
    ) -> tuple[list[FoldCommit], Commit | None]:
        """Adds the models of the state in `other` to this one. Returns their folds, and the record (None of a dry run).
        Raises Misconfigured, Damaged, Retry and Halt; then nothing has changed."""
        with State.open(Path(other)) as found:
            combining.check(self.state, found, self.rule)
            folds = found.ledger.folds()
            if dry_run:
                return folds, None
            commit = combining.combine(self.state, found, self.rule, self.executor, progress)
        self.state.expire(self.settings.keep)
        return folds, commit

    def retry(self, word: str) -> list[Commit]:
        """Has the settled candidates that `word` names (a name, path, key or record number) looked at again: the
        records of it. Raises Misconfigured where none of them is settled and not in the merge."""
        return [self.state.record(entry) for entry in self.standing.retries(word)]


@contextlib.contextmanager
def _held(merge: Merge, at: int | None, view: ReadView | None = None) -> Iterator[Reading]:
    """What `Merge.reading` gives, kept from expiring while the block runs. The newest record may be newer than when the
    state was opened, where a daemon let that one expire."""
    with leasing.newest(merge.state) if at is None else merge.state.lease(at):
        yield merge.reading(at, view=view)


def _kept(state: State, name: str) -> TensorSpec:
    """The tensor `name`. Raises Misconfigured if the state has none, or if it is carried untouched."""
    for spec in state.format.tensors:
        if spec.name == name and spec.kind != "carried":
            return spec
    raise Misconfigured(f"{name}: the state keeps no such tensor")
