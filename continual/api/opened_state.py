"""An open state as it is read: its base, its rule, what is in force, and exports of it."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from continual import selection
from continual.api.asking_about import AroundMerge, asker_of, judge_of
from continual.api.looked_state import LookedState
from continual.config import Settings
from continual.engine import explaining
from continual.engine.base import may_have_weights, open_base, weighted_base
from continual.engine.block_reading import BlockReading
from continual.engine.engine import Engine
from continual.engine.explaining import Explanation
from continual.engine.reading import Reading
from continual.engine.resources import Resources
from continual.engine.standing import Standing
from continual.engine.views import ReadView, check_read_at, view_of
from continual.errors import Misconfigured, Retry
from continual.evaluation.askers import Asker
from continual.executors.contract import Executor, Progress, silent
from continual.executors.device import pick_device
from continual.executors.local import Local
from continual.executors.ray import OnRay, RayAsked
from continual.hub.locate import Places
from continual.lazily import torch
from continual.publish import folder, lora
from continual.records import TensorSpec
from continual.rules import ReadOptions
from continual.signing import signer as signing
from continual.signing.signer import Signer
from continual.sources.roster import openers
from continual.state import State, leasing
from continual.tensors import BaseModel, Folder
from continual.timing.clock import stage

if TYPE_CHECKING:
    from continual.hub import Hub

_NO_ROUNDS = (
    "select = none: no model waits for rounds; set select = relevance, or make a state with the rule frank-wolfe"
)


class OpenedState(LookedState):
    """An open state with its base and its rule, to read. A context manager."""

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
        super().__init__(settings, write=write, on_step=on_step)
        self._base: BaseModel | None = None
        self._weighted: BaseModel | None = None
        self._engine: tuple[Settings, Engine] | None = None
        self.places = Places(settings, self.state.format.base.repo, client, openers(settings))
        self.standing = Standing(self.state, lambda: self.settings)
        self._lengths: dict[str, tuple[float, float]] = {}
        self.releasing = threading.Lock()  # held while a release is on its way: two would write to one place

    def close(self) -> None:
        """Closes the base's files and the state."""
        for base in (self._base, self._weighted):
            if base is not None:
                base.checkpoint.close()
        super().close()

    @property
    def base(self) -> BaseModel:
        """The base that the state was made from. Raises Misconfigured if it is gone, Damaged if it is another."""
        if self._base is None:
            with stage("open"):
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
            self._engine = self.settings, self.engine_over(self.base)
        return self._engine[1]

    def engine_over(self, base: BaseModel) -> Engine:
        """The same over another opening of the base: of a state of adapters that with its weights. Raises
        Misconfigured for a device that is not there."""
        device = pick_device(self.settings.device)
        resources = Resources(
            self.executor,
            device,
            locate=self.places.of,
            stop=self.stopping,
            open_weights=self._open_values,
            reads=self.settings.reading,
            judge=judge_of(self.settings, self._around()),
        )
        return Engine(self.state, base, self.rule, self.standing.gates, resources)

    def asker(self) -> Asker | None:
        """Who says what a merge is worth, as the settings in `evaluation` name them; None where they name nobody.
        Raises Misconfigured."""
        return asker_of(self.settings, self._around())

    def _around(self) -> AroundMerge:
        return AroundMerge(self.weights, self.reading_of, self.executor, self.stopping)

    @property
    def signer(self) -> Signer | None:
        """What signs what goes out; None where the settings have nothing signed. Raises Misconfigured where it cannot
        be."""
        signing.check(self.settings.signing)
        return Signer(self.settings.signing) if signing.is_asked(self.settings.signing) else None

    @property
    def executor(self) -> Executor:
        """Threads of this process, within the settings `workers` and `memory`; or the cluster that the settings name.
        Raises Misconfigured."""
        local, asked = Local(self.settings.workers, self.settings.memory), self.settings.ray
        if self.settings.executor == "local":
            return local
        wanted = RayAsked(
            asked.address,
            asked.memory,
            asked.gpus,
            asked.max_retries,
            self.settings.workers,
            seconds=asked.order_timeout,
        )
        return OnRay(wanted, local, self.stopping)

    @property
    def _exporter(self) -> Executor:
        """What makes exports: `executor`, or this process alone where the settings say so."""
        alone = self.settings.ray.exports == "driver"
        return Local(self.settings.workers, self.settings.memory) if alone else self.executor

    @property
    def stopping(self) -> threading.Event:
        """Set once `give_up` was called."""
        return self.places.stop

    def asked(self) -> selection.RoundOptions:
        """How rounds choose, by the settings. Raises Misconfigured where no rounds are set up, or naming what they
        lack; of a state of adapters the base with its weights, where it is known that there is none."""
        if self.selects == "none":
            raise Misconfigured(_NO_ROUNDS)
        found = selection.options_of(self.settings)
        if self.state.format.form is not None:
            may_have_weights(self.state, self.settings.base)
        return found

    def read(self, name: str, *, at: int | None = None) -> torch.Tensor:
        """The merged task vector of the tensor `name` at record `at` (default: the newest): float32, with the tensor's
        shape, before any cast. Raises Misconfigured for another name, or a record that has expired."""
        with _held(self, at) as reading:
            reading.settle(self.executor, silent)
            return reading.vector(_kept(self.state, name))

    def reading(
        self, at: int | None = None, options: ReadOptions | None = None, view: ReadView | None = None
    ) -> Reading:
        """The merged model at record `at` (default: the newest), read by `options` (default: those in force there, and
        as `view` says). Raises Misconfigured if the record has expired, or the view cannot be read."""
        view = (view or ReadView()).by(self.settings.reading)
        view.check(self.state)
        if self.state.format.form is not None:
            beside = BlockReading(self.state, self.rule, at, view, options)
            beside.device = self.settings.device
            return beside
        now = ReadOptions.from_mapping(self.state.ledger.read_options(self.head if at is None else at))
        by, read = view.read_by(self.rule, now, self.state)
        found = Reading(self.state, by if options is None else self.rule, at, options or read, self._lengths)
        found.view, found.device = view, self.settings.device
        return found

    def reading_of(self, state: State) -> Reading:
        """The merged model at the newest record of `state`: this one, or one made of it on trial."""
        other = copy.copy(self)
        other.state = state
        return other.reading()

    def _open_values(self) -> BaseModel:
        """The base of a state of adapters with its weights, of which a fold reads a few: from the Hub by ranges. It
        stays open until all is closed, or until its files have changed and nobody reads from it any more. Raises
        Misconfigured and Damaged where they are not there, Retry."""
        if (there := self._weighted) is not None:
            if not isinstance(there.checkpoint.place, Folder):
                return there  # a commit of the Hub does not change
            with contextlib.suppress(Retry):
                there.checkpoint.check_unchanged()
                return there
        found = weighted_base(self.state, self.places, self.settings.base, fetch=False)
        weakref.finalize(found, found.checkpoint.close)  # a fold or a plan on another thread may still read the former
        self._weighted = found
        return found

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
        if target.tokenizer is None:
            folded = [fold.entry.candidate for fold in self.state.ledger.folds()]
            target = replace(target, tokenizer=self.places.tokenizer(self.settings.tokenizer, folded))
        target = replace(target, signer=self.signer, bom=self.settings.bom)
        with _held(self, target.at, view) as reading, self.weights() as base:
            return folder.export(base, reading, target, self._exporter, progress)

    def export_lora(
        self, target: lora.LoraTarget, view: ReadView | None = None, progress: Progress = silent
    ) -> lora.LoraReport:
        """Writes the merged model as a LoRA adapter, as near as one of the target's rank comes to it. Raises
        Misconfigured and Halt; then nothing is left behind."""
        target = replace(target, signer=self.signer, bom=self.settings.bom)
        with _held(self, target.at, view) as reading:
            return lora.export(self.base, reading, target, self._exporter, progress)

    def view(self, name: str) -> ReadView:
        """The view that the settings call `name`. Raises Misconfigured where they name no such view."""
        return view_of(self.settings, name)

    def contents(self, view: ReadView | None = None, *, at: int | None = None) -> str:
        """A digest of what `view` reads of the merge at record `at` (default: the newest): where it is the same at two
        records, the same is read. Raises Misconfigured."""
        with _held(self, at, view) as reading:
            return reading.contents

    def explain(
        self, view: ReadView | None = None, *, at: int | None = None, progress: Progress = silent
    ) -> Explanation:
        """What each model has in the merge at record `at` (default: the newest), read as `view` says: its share, its
        cosine with the merge, what leaving it out changes, over the whole and by layer. Of states of adapters. Raises
        Misconfigured, Retry and Damaged."""
        with _held(self, at, view) as reading:
            return explaining.explain(reading, self.executor, progress)

    def check_readable(self) -> None:
        """Raises Misconfigured where the merge has models that what reads it does not take: with other weights, or
        without the inputs of their tasks. A repair can bring such back."""
        check_read_at(self.state, self.rule, self.scale(), self.head)


@contextlib.contextmanager
def _held(merge: OpenedState, at: int | None, view: ReadView | None = None) -> Iterator[Reading]:
    """What `OpenedState.reading` gives, kept from expiring while the block runs. The newest record may be newer than
    when the state was opened, where a daemon let that one expire."""
    with leasing.newest(merge.state) if at is None else merge.state.lease(at):
        yield merge.reading(at, view=view)


def _kept(state: State, name: str) -> TensorSpec:
    """The tensor `name`. Raises Misconfigured if the state has none, or if it is carried untouched."""
    for spec in state.format.tensors:
        if spec.name == name and spec.kind != "carried":
            return spec
    raise Misconfigured(f"{name}: the state keeps no such tensor")
