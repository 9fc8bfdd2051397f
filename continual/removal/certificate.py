"""Writes the statement that a model was taken out of a merge: from the bytes of the state before and after, of the base
and of the model. What it says, and how it is checked, is in verifier.py, whose arithmetic is used here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from continual.engine.engine import Engine
from continual.errors import Damaged, Misconfigured, Refuse
from continual.executors.contract import Progress, Task
from continual.outside import few
from continual.records import Lineage, TensorSpec
from continual.removal import verifier
from continual.removal.verifier import FileWeights, Generations, Refused, SumFacts
from continual.rules import Rule
from continual.rules.sums import GROUP, SLOT
from continual.state import Commit, State
from continual.state.durable import environment, replace_bytes, usable
from continual.state.entries import UnfoldEntry
from continual.state.format import FoldCommit
from continual.stores import Where
from continual.tensors import Adapter, Checkpoint, Folder, Place, open_model
from continual.tensors.matched.matching import naming_of, sources
from continual.tensors.vectors.vectors import digest_of


def check_certifiable(state: State, rule: Rule) -> None:
    """Raises Misconfigured where no certificate of a removal can be written: what is kept is no plain sum, or is no
    files."""
    _on_a_disk(state.path)
    why = None
    if state.format.form is not None:
        why = "a state of adapters keeps models apart, and takes one out whole"
    elif rule.options.get("before"):
        why = "transforms change task vectors before they are folded"
    elif rule.laws.combine is None or rule.laws.keeps != GROUP.keeps:
        why = f"{rule.name} keeps something else"
    elif any(set(slots) - {SLOT} for slots in state.format.slots.values()):
        why = f"{rule.name} keeps more"
    if why:
        raise Misconfigured(
            "no certificate of a removal can be written here: it shows that a sum of task vectors is less by one, and "
            f"{why}"
        )


def check_place(file: Path) -> None:
    """Raises Misconfigured where a certificate cannot be written to `file`."""
    with usable(f"cannot write {file}"):
        if file.exists() or file.is_symlink():
            raise Misconfigured(f"certificate = {file}: is there already; name a file that is not")
        if not file.absolute().parent.is_dir():
            raise Misconfigured(f"certificate = {file}: no such directory to write it in")


def certified(engine: Engine, seq: int, file: Path, at: Place | None, progress: Progress) -> Mapping[str, Any]:
    """Writes to `file` the certificate that record `seq` took its model out, and returns it. `at` is where the model is
    now, if it was moved. Raises Misconfigured where that cannot be shown, naming what is in the way; Damaged where the
    state after is not the one before less the model; Retry."""
    state = engine.state
    check_certifiable(state, engine.rule)
    where = _on_a_disk(state.path)
    last = state.ledger.get(seq)
    first = state.ledger.get(seq - 1)
    entry = last.entry
    if not isinstance(entry, UnfoldEntry) or entry.tau_norm is None or entry.again:
        raise Misconfigured(f"record {seq} subtracted no model: there is nothing to certify")
    fold = next(f for f in state.ledger.folds(at=first.seq) if (f.seq, f.entry.candidate.key) == (entry.of, entry.key))
    with state.lease(first.seq), state.lease(seq):
        before, after = state.generation_of(first), state.generation_of(last)
        assert before is not None, "it had the model"
        assert after is not None, "it was written"
        earlier, later = (where / "generations" / found.directory.name for found in (before, after))
        try:
            with sources_shown(engine, fold, at) as (base, model, said):
                places = Generations(earlier, later, base, model)
                return _written(engine, (first, last, fold), places, said, file, progress)
        except Refused as error:
            raise Damaged(f"{fold.entry.candidate.name}: what record {seq} says cannot be shown: {error}") from None


class OpenWeights(FileWeights):
    """The tensors of an open model whose files are elsewhere, as on the Hub: read from there by ranges."""

    def __init__(self, model: Checkpoint) -> None:
        """Raises Refused where not all of its weight files make the model: who has them all could not check it."""
        self.where = Path(str(model.place))
        self._model = model
        there = {name for name in model.place.names() if name.endswith(".safetensors")}
        left = sorted((there - {file.name for file in model.files}) | set(model.unlisted))
        verifier.must(not left, f"{model.place}: {few(left)} lies beside it, and is no part of it")

    @property
    def names(self) -> set[str]:
        """The tensors of numbers that can be trained."""
        return {name for name, info in self._model.tensors.items() if info.dtype.startswith(("F", "BF"))}

    def read(self, name: str) -> tuple[str, tuple[int, ...], bytes]:
        """Dtype, shape and bytes of a tensor. Raises Refused, and Retry where it cannot be had now."""
        verifier.must(name in self._model.tensors, f"{self.where} has no tensor {name}")
        info = self._model.tensors[name]
        verifier.must(info.dtype in ("F32", "F16", "BF16"), f"{self.where}: tensor {name} is {info.dtype}")
        raw = bytearray(info.nbytes)
        if raw:
            self._model.read_part(info, 0, memoryview(raw))
        return info.dtype, info.shape, bytes(raw)


class FoldedWeights(FileWeights):
    """The weights of a model, and the hash of each tensor that was read, as a fold makes it: of so many `rows`, or of
    all. Sums that do not fit because the files were exchanged say nothing of the state."""

    def __init__(self, weights: FileWeights, rows: Mapping[str, int]) -> None:
        self.where, self._weights, self._rows = weights.where, weights, rows
        self.hashes: dict[str, bytes] = {}

    @property
    def names(self) -> set[str]:
        """As of the weights."""
        return self._weights.names

    def read(self, name: str) -> tuple[str, tuple[int, ...], bytes]:
        """As of the weights."""
        dtype, shape, raw = self._weights.read(name)
        first = (self._rows[name], *shape[1:]) if name in self._rows else shape
        hashed = blake3(f"{dtype} {first}".encode())
        hashed.update(memoryview(raw)[: len(raw) * math.prod(first) // max(1, math.prod(shape))])
        self.hashes[name] = hashed.digest()
        return dtype, shape, raw


@contextlib.contextmanager
def sources_shown(
    engine: Engine, fold: FoldCommit, at: Place | None
) -> Iterator[tuple[FileWeights, FoldedWeights, dict[str, dict[str, Any]]]]:
    """The weights of the base and of a folded model, open while the block runs, and what a certificate says of where
    each tensor comes from; only headers are read for that. Raises Misconfigured where a certificate cannot show that,
    naming what is in the way, Retry."""
    candidate = fold.entry.candidate
    with contextlib.ExitStack() as stack:
        try:
            model = open_model(at or engine.locate(candidate))
            stack.enter_context(contextlib.closing(model))
            if isinstance(model, Adapter):
                raise Misconfigured(f"{candidate.name} is an adapter: a certificate is of whole fine-tunes")
            lineage = engine.lineage(model, by_token=bool(fold.entry.numbers.tokens))
            said = _named(engine, model, lineage)
            rows = {one["from"]: lineage.rows[name] for name, one in said.items() if name in lineage.rows}
            base, files = _weights(engine.base.checkpoint), FoldedWeights(_weights(model), rows)
            carried = {spec.name for spec in engine.state.format.tensors if not engine.state.format.slots[spec.name]}
            verifier.check_used({"tensors": said, "extra": list(fold.entry.numbers.extra or ())}, files.names, carried)
        except (Refused, Refuse) as error:
            raise Misconfigured(f"{candidate.name}: a certificate does not show it: {error}") from None
        yield base, files, said


def _weights(model: Checkpoint) -> FileWeights:
    """What is read of a model: its files where they are on this machine, each by itself, as a verifier does."""
    return FileWeights(model.place.path) if isinstance(model.place, Folder) else OpenWeights(model)


def _written(
    engine: Engine,
    records: tuple[Commit, Commit, FoldCommit],
    places: Generations,
    said: Mapping[str, dict[str, Any]],
    file: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    first, last, fold = records
    made, candidate = engine.state.format, fold.entry.candidate
    weight = 1.0 if fold.entry.numbers.weight is None else fold.entry.numbers.weight
    found = _facts(engine, places, said, weight, progress)
    _check_was_folded(fold, places.model, said)
    verdict = verifier.judged(found)
    tensors = {
        name: said[name] | {key: getattr(one, key) for key in ("before", "after", "base", "model", "bound", "off")}
        for name, one in found.items()
    }
    body: dict[str, Any] = {
        "kind": verifier.KIND,
        "state": made.id,
        "rule": made.rule,
        "options": json.loads(json.dumps(dict(made.options))),
        "model": {
            "name": candidate.name,
            "revision": candidate.revision,
            "digest": fold.entry.digest,
            "weight": float(weight),
        },
        "fold": {"seq": fold.seq, "sha256": _sha(engine.state, fold.seq)},
        "before": {"seq": first.seq, "sha256": _sha(engine.state, first.seq), "generation": first.generation},
        "after": {"seq": last.seq, "sha256": _sha(engine.state, last.seq), "generation": last.generation},
        "tensors": tensors,
        "bound": verdict.share,
        "extra": list(fold.entry.numbers.extra or ()),
    }
    body["digest"] = verifier.digest(body)
    state = _on_a_disk(engine.state.path)
    verifier.check_form(body)
    verifier.check_records(body, state, state)
    with usable(f"cannot write {file}"):
        replace_bytes(file, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
    return body


def _facts(
    engine: Engine, places: Generations, said: Mapping[str, Mapping[str, Any]], weight: float, progress: Progress
) -> dict[str, SumFacts]:
    specs = {spec.name: spec for spec in engine.state.format.tensors}
    tasks = [
        Task(name, _need(specs[name]), partial(verifier.facts, places, name, weight, one)) for name, one in said.items()
    ]
    found: dict[str, SumFacts] = {}
    progress("certify", 0, len(tasks))
    for name, one in engine.executor.map(tasks):
        found[name] = one
        progress("certify", len(found), len(tasks))
    return {name: found[name] for name in said}


def _check_was_folded(fold: FoldCommit, model: FileWeights, said: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises Misconfigured where what was read of a model is not what was folded."""
    assert isinstance(model, FoldedWeights)
    read = {name: model.hashes[one["from"]] for name, one in said.items() if one["from"] is not None}
    if digest_of(read) != fold.entry.digest:
        raise Misconfigured(
            f"{fold.entry.candidate.name}: its files are not those any more that were folded as record {fold.seq}: no "
            "certificate was written; if the model is somewhere else now, name the place with --at"
        )


def _need(spec: TensorSpec) -> int:
    """Bytes that one tensor takes: two sums and their files, the values of base and model, and the task vector."""
    return 4 * 4 * spec.numel + 4 * spec.nbytes + 12 * spec.numel


def _named(engine: Engine, model: Checkpoint, lineage: Lineage) -> dict[str, dict[str, Any]]:
    """By tensor of the state its shape, the tensor of the model that it comes from, and those that have to be equal to
    it. Raises Misconfigured where a tensor of the state is made of something else than one tensor of a file."""
    base, made = engine.base, engine.state.format
    if lineage.tokens or lineage.repackings or base.untied or model.parts[0].folder:
        raise Misconfigured(
            f"{model.place}: its tensors are not laid out as those of the base (rows matched by token, packed experts, "
            "tables apart, several folders), which a certificate does not show"
        )
    found, _ = sources(base, model, naming_of(lineage))
    folded = frozenset(lineage.folded)
    said: dict[str, dict[str, Any]] = {}
    for name, slots in made.slots.items():
        if not slots:
            continue
        source = found[name] if name in folded else None
        full = None if source is None else source.full
        there = [] if source is None or full is None else [full, *source.twins]
        if source is not None and (full is None or name not in base.checkpoint.tensors):
            raise Misconfigured(f"{model.place}: {name} is no tensor of a file, which a certificate does not show")
        names = [one.name for one in there]
        said[name] = {"shape": list(slots[SLOT].shape), "from": names[0] if names else None, "twins": names[1:]}
    if missing := [
        one["from"] for one in said.values() if one["from"] is not None and one["from"] not in model.tensors
    ]:
        raise Misconfigured(f"{model.place}: {few(missing)}: in no file, which a certificate does not show")
    return said


def _on_a_disk(path: Where) -> Path:
    """Raises Misconfigured for a state on an object store: who checks a certificate reads the two generations and their
    records as files."""
    if isinstance(path, Path):
        return path
    raise Misconfigured(
        f"{path}: a certificate is of files, and this state is on an object store: make a backup in a directory, "
        "unfold and certify there"
    )


def _sha(state: State, seq: int) -> str:
    with environment(f"cannot read record {seq}"):
        return hashlib.sha256((state.path / "commits" / f"{seq:08d}.json").read_bytes()).hexdigest()
