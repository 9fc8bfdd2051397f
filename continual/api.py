"""The public Python API: make a state, open it, plan, fold, read, export. The commands call this and nothing below it.

import continual
with continual.open("state", write=True) as merge:
    merge.fold("fine-tunes/alice")
    merge.export("merged")
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from continual import gates, provenance, tuning
from continual import selection as rounds
from continual.config import Settings, load
from continual.engine import combining, planning, unfolding
from continual.engine.base import fetched, files_of, measure_base, open_base, open_checkpoint
from continual.engine.engine import Engine
from continual.engine.folding import state_bytes
from continual.engine.outcomes import Outcome, Plan
from continual.engine.reading import Reading
from continual.engine.resources import Resources
from continual.errors import Misconfigured
from continual.executors.contract import Progress, silent
from continual.executors.device import pick_device
from continual.executors.local import Local
from continual.hub import Repo
from continual.hub.locate import Places
from continual.publish import folder, lora
from continual.records import Entry, Event, TensorSpec
from continual.rules import ReadOptions, read_options, rule
from continual.selection import admission
from continual.selection.steps import Taken
from continual.state import Commit, State
from continual.state.ledger import Waiting
from continual.tensors import BaseModel, Folder, Place, describe
from continual.tuning import Evaluation, Told, Tuned, Tuning

DEFAULT = "iso-c"
"""The rule of a state unless another is asked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a state is to be. `options` are fold-time options of the rule and part of the state; `scale` is the
    read-time policy (`norm`, `norm:KAPPA`, a number or `auto`) and `lines` the layer scaling at reading (`ALPHA:BETA`),
    which can change later; tensors whose names match `plain` take the rule's plain form, those that match `exclude` are
    carried untouched."""

    rule: str = DEFAULT
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: str | None = None
    lines: str | None = None
    plain: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Survey:
    """What a state of a base holds: `kinds` are rows of (kind, tensors, parameters), `tensors` the kind of each by
    name."""

    base: str
    rule: str
    options: Mapping[str, Any]
    scale: str
    lines: tuple[float, float] | None
    state_bytes: int
    kinds: tuple[tuple[str, int, int], ...]
    tensors: Mapping[str, str]
    aliases: Mapping[str, str]


def survey(base: str | Path, asked: Asked | None = None) -> Survey:
    """What `init` would make of `base`, from its headers; of a repo on the Hub nothing else is read. Raises as `init`
    does."""
    asked = asked or Asked()
    with open_checkpoint(Places(load({}, environ={})).named(base)) as checkpoint:
        return _survey(str(checkpoint.place), describe(checkpoint, plain=asked.plain, exclude=asked.exclude), asked)


def init(base: str | Path, state: str | Path, asked: Asked | None = None, *, progress: Progress = silent) -> Survey:
    """Makes a state for the model directory `base`, or a repo of the Hub (`ORG/NAME@REVISION`), in the directory
    `state`.

    Reads the base once, for its digests and norms; a repo is fetched into the cache of the Hub's client, and its commit
    is pinned. Raises Misconfigured for unknown rules or options, Refuse for a base that cannot be read, Retry.
    """
    asked = asked or Asked()
    rule(asked.rule, asked.options)  # before anything is fetched
    place: Place = Places(load({}, environ={})).named(base)
    remote: dict[str, Any] = {"revision": None}
    if isinstance(place, Repo):
        path, remote = fetched(place.hub, place.info.id, place.info.sha, progress)
        place = Folder(path)
    assert isinstance(place, Folder)
    with open_checkpoint(place) as checkpoint:
        model = describe(checkpoint, plain=asked.plain, exclude=asked.exclude)
        found = _survey(f"{remote['repo']}@{remote['revision']}" if "repo" in remote else str(base), model, asked)
        chosen = rule(asked.rule, asked.options)
        record = {
            "path": str(place.path.absolute() if "repo" in remote else place.path.resolve()),
            **remote,
            "files": files_of(checkpoint),
            **measure_base(model, progress),
            "plain": list(asked.plain),
            "exclude": list(asked.exclude),
        }
        checkpoint.check_unchanged()
    State.create(
        Path(state),
        base=record,
        tensors=model.specs,
        rule=asked.rule,
        options=chosen.options,
        read=read_options(asked.rule, asked.scale, asked.lines).to_mapping(),
        slots={spec.name: chosen.slots(spec) if spec.kind != "carried" else {} for spec in model.specs},
        software=provenance.software(),
        device="cpu",
    ).close()
    return found


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs as rule options; values are TOML where they can be, else text. Raises Misconfigured for what is
    no pair."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise Misconfigured(f"option {pair!r}: write it as key=value, as alpha=0.5")
        try:
            options[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[key.strip()] = value.strip()
    return options


def open(state: str | Path = "state", *, write: bool = False, **settings: Any) -> Merge:
    """Opens the state at `state`; `settings` are those of `continual.config.Settings`. Raises Misconfigured, Busy or
    Damaged."""
    return Merge(Settings(state=Path(state), **settings), write=write)


class Merge:
    """An open state with its base and rule: what the commands and the daemon work with. A context manager."""

    def __init__(
        self, settings: Settings, *, write: bool = False, on_step: Callable[[str], None] | None = None
    ) -> None:
        """Opens the state; `on_step` hears of each step of the commit protocol before it begins (for fault campaigns)."""
        self.settings = settings
        self.state = State.open(settings.state, write=write, on_step=on_step)
        try:
            agree(self.state, settings)
        except Misconfigured:
            self.state.close()
            raise
        self.rule = rule(self.state.format.rule, self.state.format.options)
        self._base: BaseModel | None = None
        self._engine: Engine | None = None
        self.places = Places(settings, self.state.format.base.get("repo"))
        self._lengths: dict[str, tuple[float, float]] = {}

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
        """The base, checked against what the state was made from. Raises Misconfigured if it is gone, Damaged if it is
        another."""
        if self._base is None:
            self._base = open_base(self.state, self.places, self.settings.base)
        return self._base

    @property
    def engine(self) -> Engine:
        """The engine on this state, with the gates and the executor that the settings ask for."""
        if self._engine is None:
            made = gates.make(self.settings)
            resources = Resources(
                self.executor, pick_device(self.settings.device), locate=self.places.of, stop=self.places.stop
            )
            self._engine = Engine(self.state, self.base, self.rule, made, resources)
        return self._engine

    @property
    def executor(self) -> Local:
        """Threads of this process, as many and with as much memory as the settings say."""
        return Local(self.settings.workers, self.settings.memory)

    def plan(self, model: str | Path) -> Plan:
        """What folding `model` would take and whether it would be let in; reads headers only."""
        return planning.plan(self.engine, self.places.named(model))

    def fold(self, model: str | Path | Event, *, progress: Progress = silent) -> Outcome:
        """Folds one model and drops generations beyond those kept; where rounds choose, puts it into the pool instead.

        `model` is a directory, a repo of the Hub (`hf://ORG/NAME@REVISION`), or what a source saw. Raises Misconfigured
        if there is no such thing, Skip for what a source saw and the settings leave out, Retry and Halt; a refusal is
        an outcome.
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
        """Who chooses what is folded: nobody, or rounds over the pool, and how."""
        return "frank-wolfe" if self.rule.rounds else self.settings.select or "none"

    def asked(self) -> rounds.Asked:
        """What rounds are asked to do, by the settings. Raises Misconfigured where nothing asks for rounds, or naming
        what they lack."""
        if self.selects == "none":
            raise Misconfigured(
                "select = none: no model waits for rounds; set select = relevance, or make a state with the rule frank-wolfe"
            )
        return rounds.asked(self.settings)

    def pool(self) -> dict[str, Waiting]:
        """The candidates that wait for a round, by key."""
        return self.state.ledger.pool

    def round(self, progress: Progress = silent, told: rounds.Told | None = None) -> rounds.Round:
        """Runs a round over the pool: scores all that wait, folds what is relevant, settles the others' fates. Raises
        Misconfigured, Retry and Halt."""

        def hear(what: Outcome | Taken) -> None:
            if isinstance(what, Outcome) and what.fate == "folded":
                self.state.expire(self.settings.keep)
            if told is not None:
                told(what)

        found = rounds.run(self.engine, self.reading, self.asked(), progress, hear, weighed=self.rule.rounds)
        self.state.expire(self.settings.keep)
        return found

    def look_round(self, progress: Progress = silent) -> rounds.Round:
        """Scores all that wait at the merge as it is, and tries those that promise something; nothing is folded or
        recorded. Raises as `round`."""
        return rounds.look(self.engine, self.reading, self.asked(), progress, weighed=self.rule.rounds)

    def why(self, word: str) -> rounds.Why:
        """What is known of the candidate that `word` names (a name, path or key). Raises Misconfigured if it was never
        seen."""
        return rounds.why(self.state, word)

    def read(self, name: str, *, at: int | None = None) -> torch.Tensor:
        """The merged task vector of tensor `name` (float32, the tensor's shape) at record `at`, before any cast."""
        spec, reading = self.spec(name), self.reading(at)
        reading.settle(self.executor, silent)
        return reading.vector(spec)

    def reading(self, at: int | None = None, options: ReadOptions | None = None) -> Reading:
        """The merged model at record `at` (default: the newest), under `options` in place of those in force there."""
        return Reading(self.state, self.rule, at, options, self._lengths)

    def spec(self, name: str) -> TensorSpec:
        """The tensor `name` of the base. Raises Misconfigured if there is none or it is carried untouched."""
        for spec in self.state.format.tensors:
            if spec.name == name and spec.kind != "carried":
                return spec
        raise Misconfigured(f"{name}: the state keeps no such tensor")

    def export(self, target: folder.Target, progress: Progress = silent) -> Path:
        """Writes the merged model as an ordinary model directory."""
        return folder.export(self.base, self.reading(target.at), target, self.executor, progress)

    def export_lora(
        self,
        directory: str | Path,
        rank: int,
        *,
        at: int | None = None,
        dtype: str = "F32",
        progress: Progress = silent,
    ) -> lora.LoraReport:
        """Writes the merged model as a LoRA adapter of this rank, as near as one comes to it. Raises Misconfigured and
        Halt."""
        return lora.export(self.base, self.reading(at), Path(directory), rank, self.executor, progress, dtype=dtype)

    def rescale(self, scale: str | None = None, lines: str | None = None) -> ReadOptions:
        """How the merge is read from now on: the scale, the layer scaling, or both; nothing is folded again. Returns
        what is in force then.

        `scale` is `norm`, `norm:KAPPA`, a number, `auto` (the rule's default) or `tuned` (what the newest `tune` chose,
        its layer scaling too). Raises Misconfigured for texts that are malformed, and for `tuned` where nothing was
        tuned.
        """
        now = ReadOptions.from_mapping(self.state.ledger.read_options(self.state.ledger.head.seq))
        if scale != "tuned":
            then, numbers = read_options(self.rule.name, scale, lines, now), None
        else:
            found = tuning.newest(self.state)
            if found is None:
                raise Misconfigured("scale = tuned: nothing was tuned yet; run 'continual tune' first")
            then = read_options(self.rule.name, None, lines, tuning.chosen(found))
            numbers = (
                {"of": found.seq} if then == tuning.chosen(found) and tuning.in_force(self.state) != found else None
            )
        if then != now or numbers:
            self.state.record(Entry(kind="tune", read=then.to_mapping(), numbers=numbers, message=f"scale {then}"))
        return then

    def tune(
        self, evaluation: Evaluation, asked: Tuning | None = None, progress: Progress = silent, told: Told | None = None
    ) -> Tuned:
        """Finds the scale of the merge by evaluating candidates, and records it; `told` hears of each. Nothing is
        folded again.

        Raises Misconfigured where nothing is folded or the evaluation cannot be used, Retry where the environment got
        in the way; then nothing is recorded.
        """
        return tuning.tune(self.engine, self.reading(), evaluation, asked or Tuning(), progress, told)

    def look_unfold(self, word: str, at: str | Path | None = None) -> unfolding.Unfolding:
        """What taking the model that `word` names out of the merge takes; `at` is where it is now, if it was moved.
        Raises Misconfigured."""
        return unfolding.look(self.engine, word, None if at is None else self.places.named(at))

    def unfold(self, plan: unfolding.Unfolding, progress: Progress = silent) -> Commit:
        """Takes a model out of the merge, as `look_unfold` found. Raises Refuse, Retry and Halt; then nothing has
        changed."""
        take_out = rounds.unfold if self.rule.rounds else unfolding.unfold
        commit = take_out(self.engine, plan, progress)
        self.state.expire(self.settings.keep)
        return commit

    def combine(
        self, other: str | Path, *, dry_run: bool = False, progress: Progress = silent
    ) -> tuple[list[Commit], Commit | None]:
        """Adds the models of the state at `other` to this one; returns them, and the record. Raises Misconfigured,
        Damaged, Retry and Halt."""
        with State.open(Path(other)) as found:
            combining.check(self.state, found, self.rule)
            folds = found.ledger.folds()
            if dry_run:
                return folds, None
            commit = combining.combine(self.state, found, self.rule, self.executor, progress)
        self.state.expire(self.settings.keep)
        return folds, commit

    def retry(self, word: str) -> list[Commit]:
        """Makes the settled candidates that `word` names (a name, path, key or record number) be looked at again.

        Raises Misconfigured if it names none that is settled and not in the merge.
        """
        found = self._settled(word)
        if not found:
            raise Misconfigured(
                f"{word}: no refused or rolled-back candidate of this name, path, key or record number; see 'continual log'"
            )
        return [
            self.state.record(
                Entry(kind="retry", candidate=c.entry.candidate, fate="retry", message=f"after record {c.seq}")
            )
            for c in found
        ]

    def _settled(self, word: str) -> list[Commit]:
        latest: dict[str, Commit] = {}
        place = str(Path(word).absolute())
        for commit in self.state.ledger.log:
            candidate = commit.entry.candidate
            if candidate and (
                word in (candidate["name"], candidate["key"], str(commit.seq)) or candidate["origin"] in (word, place)
            ):
                fate = self.state.ledger.fate(candidate["key"])
                if fate is not None and fate.entry.fate != "folded":
                    one = (
                        candidate["origin"]
                        if candidate.get("revision") and word not in (candidate["key"], str(commit.seq))
                        else None
                    )
                    latest[one or candidate["key"]] = fate  # of a repo the newest commit that was seen
        return list(latest.values())


def agree(state: State, settings: Settings) -> None:
    """Raises Misconfigured where the settings ask for another rule, or other fold-time options, than the state was made
    with."""
    made = state.format
    advice = f"{state.path} goes on as it was made; make a new state with 'continual init', or take the setting out"
    if settings.rule not in (None, made.rule):
        raise Misconfigured(f"rule = {settings.rule}, and the state was made with {made.rule}: {advice}")
    if settings.select is not None and (settings.select == "frank-wolfe") != (made.rule == "frank-wolfe"):
        told = (
            "it weighs its models in rounds"
            if made.rule == "frank-wolfe"
            else "only a state of the rule frank-wolfe can be weighed so"
        )
        raise Misconfigured(f"select = {settings.select}, and the state was made with {made.rule}: {told}; {advice}")
    asked = (
        dict(made.options) | settings.options | ({} if settings.before is None else {"before": list(settings.before)})
    )
    wanted = rule(made.rule, asked).options
    for key in sorted({*wanted, *made.options}):
        if wanted.get(key) != made.options.get(key):
            raise Misconfigured(
                f"{key} = {wanted.get(key)}, and the state was made with {made.options.get(key)}: {advice}"
            )


def asked_for(settings: Settings, **given: Any) -> Asked:
    """What a state is to be, from the settings and what was `given` besides: the fields of Asked, and `before`; None
    and {} leave it to the settings."""
    before = given.pop("before", None) or settings.before
    options = settings.options | (given.pop("options", None) or {}) | ({"before": list(before)} if before else {})
    name = given.pop("rule", None) or settings.rule or ("frank-wolfe" if settings.select == "frank-wolfe" else DEFAULT)
    return Asked(rule=name, options=options, **given)


def _survey(base: str, model: BaseModel, asked: Asked) -> Survey:
    if asked.scale == "tuned":
        raise Misconfigured(
            "scale = tuned: nothing is folded yet to tune; make the state with another, fold, and run 'continual tune'"
        )
    chosen, read = rule(asked.rule, asked.options), read_options(asked.rule, asked.scale, asked.lines)
    counted = {
        kind: [spec.numel for spec in model.specs if spec.kind == kind] for kind in ("matrix", "plain", "carried")
    }
    return Survey(
        base=base,
        rule=asked.rule,
        options=chosen.options,
        scale=str(read),
        lines=read.lines,
        state_bytes=state_bytes(chosen, model.specs),
        kinds=tuple((kind, len(sizes), sum(sizes)) for kind, sizes in counted.items()),
        tensors={spec.name: spec.kind for spec in model.specs},
        aliases=model.aliases,
    )
