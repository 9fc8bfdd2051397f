"""An open merge: plan, fold, read, export, take out. `continual.making` makes the state that is opened here.

The commands and the daemon work with `Merge`, and so can any program:

    import continual

    with continual.open("state", write=True) as merge:
        merge.fold("fine-tunes/alice")
        merge.export("merged")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from continual import removal, selection, tuning
from continual.api import diffs, replaying
from continual.api.opened_state import OpenedState
from continual.config import settings_of
from continual.engine import combining, planning, unfolding
from continual.engine.block_reading import StoredLayers, cut_since
from continual.engine.combining import Combined
from continual.engine.comparing import Diff
from continual.engine.outcomes import Outcome, Plan
from continual.engine.views import ReadView
from continual.executors.contract import Progress, silent
from continual.records import Event
from continual.replay import Replayed
from continual.rules import ReadAs, ReadOptions
from continual.selection import admission
from continual.selection.steps import Taken
from continual.state import Commit, State
from continual.state.entries import Entry, ReleaseEntry
from continual.state.format import FoldCommit
from continual.state.ledger import kept_out
from continual.stores import Where, where
from continual.tuning import Evaluation, FoundInputs, Learning, TaskRows, Told, Tuned, Tuning, Weighing

if TYPE_CHECKING:
    pass


def open(state: str | Where = "state", *, write: bool = False, **settings: object) -> Merge:
    """Opens the state in the directory `state`; `settings` are fields of `continual.Settings`.

    Any number of processes may open a state for reading, one at a time for writing. Raises Misconfigured where there
    is no state or a setting cannot be used, Busy where another process writes to it, Damaged.
    """
    return Merge(settings_of({"state": state, **settings}), write=write)


class Merge(OpenedState):
    """An open state with its base and its rule, to read and to change. A context manager."""

    def record(self, entry: Entry) -> Commit | None:
        """Adds a record that leaves the model as it is; None, and no record, for a release that the ledger says is out:
        a command and the daemon may both have had it on the way. Raises Retry and Halt."""
        if isinstance(entry, ReleaseEntry):
            known = self.state.publications.release(entry.repo, entry.branch)
            said = entry.of, entry.mark, entry.view, entry.tag
            if known is not None and (known.of, known.mark, known.view, known.tag) == said:
                return None
        return self.state.record(entry)

    def announce(self, url: str) -> None:
        """Says in the lock, for other processes, where the service of this state listens."""
        self.state.set_url(url)

    def expire(self) -> None:
        """Drops the generations beyond those that the settings keep. Raises Halt."""
        self.state.expire(self.settings.keep, self.settings.keep_bytes)

    def give_up(self) -> None:
        """Ends for good what another thread does: a fold or a round raises Abandoned soon, a wait for the Hub ends."""
        self.stopping.set()

    def check(self, models: Iterable[str | Path]) -> None:
        """Raises Misconfigured where one of the models is not there, or where rounds choose and lack something: all
        that can be known before any is folded."""
        for model in models:
            self.places.named(model)
        if self.selects != "none":
            self.asked().calibration.check()

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
            self.expire()
        return outcome

    def round(self, progress: Progress = silent, told: selection.HearRound | None = None) -> selection.Round:
        """Runs a round over the pool: scores all that wait, folds what is relevant, settles the others' fates. `told`
        is called with each fold or step when it is made. Raises Misconfigured, Retry and Halt."""

        def hear(what: Outcome | Taken) -> None:
            if isinstance(what, Outcome) and what.fate == "folded":
                self.expire()
            if told is not None:
                told(what)

        weighs = self.rule.laws.rounds and self.state.format.form is not None
        before = StoredLayers(self.state, self.state.ledger.head).cut(self.state.ledger.folds()) if weighs else {}
        found = selection.run(self._ground(), self.asked(), progress, hear)
        if weighs:  # of others each fold has told
            found = found._replace(cut=cut_since(self.state, before))
        self.expire()
        return found

    def look_round(self, progress: Progress = silent) -> selection.Round:
        """Scores all that wait at the merge as it is, and tries those that promise something; folds and records
        nothing. Raises Misconfigured, Retry and Halt."""
        return selection.look(self._ground(), self.asked(), progress)

    def _ground(self) -> selection.Ground:
        return selection.Ground(self.engine, self.reading_of, self.rule.laws.rounds, self.weights)

    def why(self, word: str) -> selection.Why:
        """What is known of the candidate that `word` names (a name, path or key). Raises Misconfigured if it was never
        seen."""
        return selection.explain(self.state, word)

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
        called with each candidate and its score. Raises Misconfigured where nothing is folded, the evaluation cannot
        be used or the base's weights cannot be read, Retry where the environment got in the way; then nothing is
        recorded."""
        wanted = wanted or Tuning()
        reading = self.reading(view=ReadView(rule=wanted.rule, scale=wanted.scale))
        with self.weights() as base:
            engine = self.engine if self.state.format.form is None else self.engine_over(base)
            return tuning.tune(engine, reading, evaluation, wanted, progress, told)

    def tune_weights(
        self,
        evaluation: Evaluation,
        wanted: Weighing | None = None,
        progress: Progress = silent,
        told: Told | None = None,
    ) -> Tuned:
        """Finds with which weights the models of a state of adapters are read best, by evaluating candidates, and
        records it; nothing is folded again. Raises what `tune` raises."""
        wanted = wanted or Weighing()
        reading = self.reading(view=ReadView(rule=wanted.rule))
        with self.weights() as base:
            engine = self.engine if self.state.format.form is None else self.engine_over(base)
            return tuning.weigh(engine, reading, evaluation, wanted, progress, told)

    def tune_layers(self, wanted: Learning, progress: Progress = silent, told: Told | None = None) -> Tuned:
        """Learns from calibration rows what the merged task vector of each layer is multiplied by, and records it where
        rows that were held out are served better by it; nothing is folded again. Raises what `tune` raises."""
        reading = self.reading(view=ReadView(rule=wanted.rule))
        with self.weights() as base:
            engine = self.engine if self.state.format.form is None else self.engine_over(base)
            return tuning.learn(engine, reading, wanted, progress, told)

    def read_inputs(self, wanted: TaskRows, progress: Progress = silent) -> FoundInputs:
        """Runs the base on rows of each task, and records the second moments of what its linear layers are given, by
        which `regmean` reads a state of adapters; nothing is folded. Raises Misconfigured where a state keeps whole
        tensors, or the rows or the base's weights cannot be used, Retry and Halt; then nothing is recorded."""
        with self.weights() as base:
            engine = self.engine if self.state.format.form is None else self.engine_over(base)
            return tuning.read_inputs(engine, wanted, progress)

    def look_unfold(self, word: str, at: str | Path | None = None) -> unfolding.Unfolding:
        """Says what taking the model that `word` names (a name, path, key or record number) out of the merge takes;
        `at` is where it is now, if it was moved. Raises Misconfigured if `word` names none or several."""
        return unfolding.look(self.engine, word, None if at is None else self.places.named(at))

    def unfold(self, plan: unfolding.Unfolding, progress: Progress = silent) -> Commit:
        """Takes a model out of the merge, as `look_unfold` found, and returns the record of it. Raises Refuse, Retry
        and Halt; then nothing has changed."""
        summed = self.rule.laws.rounds and self.state.format.form is None
        take_out = selection.subtract if summed else unfolding.unfold
        commit = take_out(self.engine, plan, progress)
        self.expire()
        return commit

    def certify(
        self, seq: int, file: str | Path, *, at: str | Path | None = None, progress: Progress = silent
    ) -> Mapping[str, object]:
        """Writes to `file` the certificate that record `seq` took its model out, which anybody can check
        (`continual.removal.verifier`); `at` is where the model is now, if it was moved. The generation before has to be
        there still: `lease` it. Raises Misconfigured where that cannot be shown, Damaged where it is not so, Retry."""
        place = None if at is None else self.places.named(at)
        return removal.certified(self.engine, seq, Path(file), place, progress)

    def combine(
        self, other: str | Path, *, dry_run: bool = False, progress: Progress = silent
    ) -> tuple[list[FoldCommit], Combined | None]:
        """Adds the models of the state in `other` to this one. Returns their folds, and the record with what was cut
        off to make room (None of a dry run). Raises Misconfigured, Damaged, Retry and Halt; then nothing has
        changed."""
        with State.open(where(other)) as found:
            combining.check(self.state, found, self.rule)
            folds = found.ledger.folds()
            if dry_run:
                return folds, None
            combined = combining.combine(self.state, found, self.rule, self.executor, progress)
        self.expire()
        return folds, combined

    def diff(self, a: str, b: str = "HEAD", *, progress: Progress = silent) -> Diff:
        """What tells the merge `b` from the merge `a`: how long the difference of the merged task vectors is, over the
        whole, by layer and by tensor, and which models came and went. Each is a record (its number, a tag, HEAD) or a
        model of the base: a directory, or a repo of the Hub. Raises Misconfigured, Refuse, Retry and Damaged."""
        return diffs.diff(self, a, b, progress)

    def look_replay(
        self, models: Iterable[str | Path] = (), states: Iterable[str | Path] = (), *, progress: Progress = silent
    ) -> replaying.ReplayLook:
        """Says what building the state again would take, and whether every model that it folded is still there, below
        the directories `models` or where it came from, with the bytes that were folded. `states`: those that were
        combined into it, or backups of them. Raises Misconfigured."""
        given = replaying.ReplayFrom([Path(one) for one in models], [where(one) for one in states])
        return replaying.look_replay(self, given, progress)

    def replay(
        self,
        directory: str | Path,
        models: Iterable[str | Path] = (),
        states: Iterable[str | Path] = (),
        *,
        progress: Progress = silent,
    ) -> Replayed:
        """Builds this state again in `directory` from its ledger, the models that it folded and the `states` that were
        combined into it, and says whether it is equal bit for bit. What was begun there is gone on with. Raises
        Misconfigured, Refuse, Retry and Halt."""
        given = replaying.ReplayFrom([Path(one) for one in models], [where(one) for one in states])
        return replaying.replay(self, where(str(directory), self.settings.lease), given, progress)

    def retry(self, word: str, *, because: str | None = None, by: str | None = None) -> list[Commit]:
        """Has the settled candidates that `word` names (a name, path, key or record number) looked at again: the
        records of it. With `because` gates that go by likelihood (norms, noise, copies) only warn of them, and the
        record says why, and that `by` says so. Raises Misconfigured where none of them is settled and not in the
        merge."""
        return [self.state.record(entry) for entry in self.standing.retries(word, because, by)]

    def drop(self, word: str, *, because: str | None = None, by: str | None = None) -> list[Commit]:
        """Takes the candidates that `word` names (a name, path, key or record number) off the list of what is kept out:
        the records of it. They stay out, whatever settings change, until somebody asks for another look. Raises
        Misconfigured where none of them is on the list."""
        return [self.state.record(entry) for entry in self.standing.drops(word, because, by)]

    def kept_out(self, word: str) -> list[Commit]:
        """The records that settled the candidates that `word` names (a name, path, key or record number) and that are
        not in the merge."""
        return kept_out(self.state.ledger, word)

    def quarantine(self) -> list[Commit]:
        """What is kept out now: of each candidate the record that says why, the oldest first."""
        return self.standing.quarantine()
