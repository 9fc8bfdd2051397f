"""A release of the merge on the Hub: which record is released, what is exported of it, what its card says, whether the
licences allow it, and the record that is kept of it. How it is committed there is in `publish/hub.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from continual.api import Merge
from continual.engine.block_reading import BlockReading
from continual.errors import Misconfigured, Retry
from continual.publish import card, folder, hub, proposals
from continual.publish.hub import Released
from continual.publish.provenance import figures_in
from continual.publish.share_columns import SHARES
from continual.service.outgoing import OutPlan, mark_of, models_in, outgoing, write
from continual.signing.manifests import SIGNATURE
from continual.signing.signer import Signer
from continual.state import Commit
from continual.state.durable import environment, link_tree
from continual.state.entries import ReleaseEntry
from continual.state.format import FoldCommit
from continual.state.software import software
from continual.stores import here
from continual.tensors.adapters.adapter_config import CONFIG
from continual.tensors.checkpoints.place import RELEASE
from continual.tuning.choosing import scratch_directory


class Look(NamedTuple):
    """What a release would do. `out`: whether the record is out already; `there`: the record that is on the branch,
    None where nothing is."""

    repo: str
    branch: str
    seq: int
    out: bool
    there: int | None
    licences: card.Agreement
    card: str


def record_of(merge: Merge, out: OutPlan, at: int | None = None) -> Commit:
    """The record that is released: `at`, or the newest that changed the model. Raises Misconfigured where nothing is
    folded or no repo is named."""
    if out.asked.repo is None and out.view is not None:
        raise Misconfigured(f"views.{out.name}.repo is not set: name the repo (ORG/NAME) the view is released to")
    if out.asked.repo is None:
        raise Misconfigured(
            "release.repo is not set: name the repo (ORG/NAME) the merge is released to, as --release repo=ORG/NAME"
        )
    hub.check(out.asked)
    found = merge.state.ledger.model if at is None else merge.state.ledger.get(at)
    if found is None or not merge.state.ledger.folds(found.seq):
        raise Misconfigured("nothing is folded yet, so there is nothing to release")
    return found


def look(merge: Merge, at: int | None = None, view: str | None = None) -> Look:
    """Says what `release` would do; only asks the Hub. Raises Misconfigured, Trouble."""
    out = outgoing(merge.settings, view)
    if out.canary is not None:
        out = out.as_candidate()
    asked = out.asked
    seq = record_of(merge, out, at).seq
    remote = hub.look(merge.hub, asked)
    done = not hub.may_follow(remote, asked, _ours(merge, out, seq))
    facts = facts_of(merge, out, seq)
    there = None if remote.release is None else remote.release.seq
    return Look(
        asked.repo or "", asked.branch, seq, done, there, card.licences(facts.base, facts.folded), card.card(facts)
    )


def release(merge: Merge, at: int | None = None, *, view: str | None = None, wait: bool = False) -> Released:
    """Publishes a record, of the merge or of a view, unless it is out already; the caller makes the record of it
    (`entry`). One goes on its way after the other: where one is, it is waited for if `wait`.

    Raises Misconfigured (also where licences differ and the settings refuse that), Trouble, Retry.
    """
    return release_as(merge, outgoing(merge.settings, view), at, wait=wait)


def release_as(merge: Merge, out: OutPlan, at: int | None = None, *, wait: bool = False, report: str = "") -> Released:
    """The same as `out` says: as a canary, or where that is promoted to. `report`: what a pull request says."""
    if not merge.releasing.acquire(blocking=wait):
        raise Retry("another release is on its way: try again when it is out; nothing was done")
    try:
        return _release(merge, out, at, report)
    finally:
        merge.releasing.release()


def _release(merge: Merge, out: OutPlan, at: int | None, report: str) -> Released:
    asked = out.asked
    seq = record_of(merge, out, at).seq
    shutil.rmtree(_staging(merge), ignore_errors=True)  # what a killed process left, also where the record is out
    facts = facts_of(merge, out, seq)
    agreement = card.licences(facts.base, facts.folded)
    if agreement.conflict and asked.licences == "refuse":
        raise Misconfigured(
            f"{asked.repo}: {agreement.message}; nothing is released: unfold the models in question, "
            "or set release.licences = warn"
        )

    def texts(directory: Path) -> dict[str, bytes]:
        has = figures_in(json.loads((directory / RELEASE).read_bytes()))
        told = [replace(model, has=has.get(model.seq, model.has)) for model in facts.folded]
        text = card.card(replace(facts, folded=told))
        found = {hub.CARD: text.encode(), RELEASE: public(directory / RELEASE)}
        if (directory / CONFIG).is_file():
            found[CONFIG] = _public_config(directory / CONFIG)
        if (signer := merge.signer) is not None:
            found[SIGNATURE] = _signed(directory, found, signer, asked.repo or "")
        return found

    ours = _ours(merge, out, seq)
    if out.request:
        export = partial(exported, merge, out, seq, ours.mark)
        return proposals.propose(merge.hub, asked, ours, export, texts, report)
    if out.merges is not None:
        proposals.merge(merge.hub, asked.repo or "", out.merges)
    return hub.release(merge.hub, asked, ours, lambda: exported(merge, out, seq, ours.mark), texts)


def _signed(directory: Path, texts: Mapping[str, bytes], signer: Signer, name: str) -> bytes:
    """The signature of what is released: of the files in `directory`, with `texts` in the place of its own. Raises
    Misconfigured, Retry."""
    with environment(f"cannot sign {name}"), scratch_directory(directory.parent) as place:
        signed = place / "signed"
        if not link_tree(directory, signed):
            shutil.copytree(directory, signed)
        for file, text in texts.items():
            (signed / file).unlink(missing_ok=True)  # a link: what it leads to stays
            (signed / file).write_bytes(text)
        signer.sign(signed, name)
        return (signed / SIGNATURE).read_bytes()


def _ours(merge: Merge, out: OutPlan, seq: int) -> hub.Ours:
    generations = [commit.generation for commit in merge.state.ledger.log]
    mark = mark_of(merge, out, seq, folder.parse_dtype(out.asked.dtype))
    return hub.Ours(merge.state.id, seq, generations, out.name or "", mark, out.backwards)


def close_requests(merge: Merge, out: OutPlan, seq: int, why: str) -> list[int]:
    """Closes the open pull requests of this state and view, and returns their numbers. Raises Trouble."""
    repo, ours = out.asked.repo or "", _ours(merge, out, seq)
    found = list(proposals.opened(merge.hub, repo, ours))
    for number in found:
        proposals.close(merge.hub, repo, number, why)
    return found


def is_out(merge: Merge, out: OutPlan, seq: int, done: ReleaseEntry | None) -> bool:
    """Whether nothing is to be released at record `seq`, as far as the ledger knows: what goes out is what `done`, the
    newest release, has, in the same form; or no model is in it. Raises Misconfigured for a view that cannot be read."""
    if not models_in(merge, out, seq):
        return out.view is None or done is None
    if done is None:
        return False
    if (
        out.view is None and not out.backwards and (done.of != seq or done.mark is None)
    ):  # an earlier version knew no marks
        return done.of >= seq
    return done.mark == mark_of(merge, out, seq, folder.parse_dtype(out.asked.dtype))


def public(file: Path) -> bytes:
    """A `continual.json` as strangers may read it: without the folders of this machine."""
    body = json.loads(file.read_bytes())
    for ours in ("made", "weights"):  # for the next export here
        body.pop(ours, None)
    for row, key in [(body["base"], "path"), *((fold, "origin") for fold in body["folded"])]:
        if "://" not in str(row[key]):
            row[key] = Path(str(row[key])).name
    view = body.get("view", {})
    for key in {"only", "without"} & view.keys():
        view[key] = [_last(word) for word in view[key]]
    if "weights" in view:
        view["weights"] = {_last(word): weight for word, weight in view["weights"].items()}
    return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()


def _public_config(file: Path) -> bytes:
    """An adapter_config.json as strangers may read it: a base that is a folder of this machine by its name alone."""
    body = json.loads(file.read_bytes())
    body["base_model_name_or_path"] = _last(str(body["base_model_name_or_path"]))
    return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()


def _last(word: str) -> str:
    """The name of a model that was named by a path."""
    return Path(word).name if word.startswith(("/", "./", "../", "~")) else word


def entry(released: Released, view: str | None = None) -> ReleaseEntry:
    """The record of a release, of the merge or of a view."""
    of = f" of the view {view}" if view else ""
    return ReleaseEntry(
        message=f"record {released.seq}{of} released as {released.url}",
        of=released.seq,
        repo=released.repo,
        branch=released.branch,
        commit=released.commit,
        tag=released.tag,
        uploaded_bytes=released.uploaded,
        files=released.files,
        view=view,
        mark=released.mark,
        shares=None if released.shares is None else released.shares[:SHARES],
        models=None if released.shares is None else len(released.shares),
    )


def facts_of(merge: Merge, out: OutPlan, seq: int) -> card.Facts:
    """What the card of record `seq` says. Of a view of adapters it is as if the models that are read had been folded by
    the rule that reads."""
    state, settings = merge.state, merge.settings
    made, commit = state.format, state.ledger.get(seq)
    read = merge.scale(seq, out.view)
    made_of, asked = made.base, out.asked
    name, options, reading = made.rule, made.options, read.rule
    folded = [_model(fold) for fold in state.ledger.folds(seq)]
    chosen = out.view is not None or bool(read.weights)
    if chosen and isinstance(found := merge.reading(seq, view=out.view), BlockReading):
        name, options, read, reading = found.rule.name, found.rule.options, found.options, None
        weights = {fold.seq: found.chosen.get(fold.entry.numbers.block or -1) for fold in state.ledger.folds(seq)}
        folded = [replace(model, weight=weights[model.seq]) for model in folded if weights[model.seq] is not None]
    before = state.publications.release(asked.repo or "", asked.branch)
    defaults = type(settings).model_fields
    kept = {
        name: getattr(settings, name)
        for name in ("missing", "vocab", "updates")
        if getattr(settings, name) != defaults[name].default
    }
    listed = merge.base.checkpoint.config.get("architectures")
    return card.Facts(
        base=card.Base(made_of.repo or Path(made_of.path).name, made_of.repo, made_of.revision, made_of.licence),
        folded=folded,
        state=state.id,
        seq=seq,
        rule=name,
        reading=reading,
        scale=read.scale,
        generated=commit.time,
        software=dict(software()),
        options=dict(options),
        lines=None if read.lines is None else f"{read.lines[0]}:{read.lines[1]}",
        layers=len(read.layers),
        terms=str(read.terms) if read.terms else "",
        plain=made_of.plain,
        exclude=made_of.exclude,
        width=made.form.width if made.form else None,
        settings=kept,
        export=() if asked.dtype is None else ("--dtype", asked.dtype),
        repo=asked.repo,
        architecture=str(listed[0]) if isinstance(listed, list) and listed else None,
        previous=None if before is None else before.commit,
        view=out.name or "",
        of=len(state.ledger.folds(seq)),
        lora=None if out.as_lora is None else (out.as_lora, out.layout),
    )


def _model(fold: FoldCommit) -> card.Model:
    candidate = fold.entry.candidate
    return card.Model(
        seq=fold.seq,
        name=candidate.name,
        origin=candidate.origin,
        form=candidate.form,
        digest=fold.entry.digest,
        revision=candidate.revision,
        licence=candidate.licence,
        weight=fold.entry.numbers.weight,
    )


def next_record(merge: Merge, after: int) -> int:
    """The first record after `after` that changed the model, has one in it and can still be read: generations that have
    expired cannot be released any more."""
    state, kept = merge.state, set(merge.state.generations())
    return next(
        c.seq for c in state.ledger.models if c.seq > after and c.generation in kept and state.ledger.folds(c.seq)
    )


@contextmanager
def exported(merge: Merge, out: OutPlan, seq: int, mark: str) -> Iterator[Path]:
    """A directory with record `seq` as it is to be released, which goes again: links to the files of `current` where
    that has this mark, else an export.

    Links, because `current` moves on while a release is on its way.
    """
    beside = None if out.current is None else out.current.resolve()
    there = {} if beside is None else folder.provenance_in(beside)
    staging = _staging(merge)
    with environment(f"cannot make {staging}"):
        staging.mkdir()
    try:
        if beside is not None and (there.get("seq"), there.get("mark")) == (seq, mark):
            linked = staging / beside.name
            if link_tree(beside, linked) and folder.provenance_in(linked).get("mark") == mark:
                yield linked
                return
        dtype = folder.parse_dtype(out.asked.dtype)
        yield write(merge, out, seq, staging / f"release-{seq:08d}", mark, dtype)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(merge: Merge) -> Path:
    """Where what is on its way to the Hub lies."""
    return here(merge.settings.state).absolute() / "staging"
