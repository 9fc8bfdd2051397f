"""What `unfold --certificate` does around the unfold: it is refused before where no certificate could be written, the
generation before is kept meanwhile, and the certificate is written after, whoever took the model out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from continual.cli import console, opened

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.cli.flags import Flags


@dataclass(slots=True)
class Proof:
    """The record that took the model out: None until it is there."""

    seq: int | None = None


@contextlib.contextmanager
def proving(file: Path, model: str, at: Path | None, flags: Flags) -> Iterator[Proof]:
    """Gives a proof without a record, or with that of an unfold before, where the model was taken out already; writes
    the certificate of the record that is in it at the end. Raises Misconfigured before anything is changed."""
    from continual import removal

    removal.check_place(file)
    with opened.merge(flags) as before:
        removal.check_certifiable(before.state, before.rule)
        proof = Proof(_taken_out(before, model))
        if proof.seq is None:
            _must_be_shown(before, model, at)
        with before.state.lease():
            yield proof
    if proof.seq is None:
        return
    with opened.merge(flags) as merge, console.progress() as progress:
        merge.certify(proof.seq, file, at=at, progress=progress)
    if not flags.json:
        console.say(f"Wrote {file}: check it with continual/removal/verifier.py, which needs numpy alone")


def _must_be_shown(merge: Merge, word: str, at: Path | None) -> None:
    """Raises Misconfigured where a certificate could not be of the model that `word` names."""
    from continual import removal
    from continual.errors import Misconfigured

    plan = merge.look_unfold(word, at)
    if not plan.exact:
        raise Misconfigured(f"{plan.line()}: nothing is subtracted, so there is nothing to certify")
    fold = next(f for f in merge.state.ledger.folds() if (f.seq, f.key) == (plan.seq, plan.key))
    with removal.sources_shown(merge.engine, fold, None if at is None else merge.places.named(at)):
        pass


def _taken_out(merge: Merge, word: str) -> int | None:
    """The record that took out the model that `word` names, where it is not in the merge any more."""
    if any(word == str(fold.seq) or fold.entry.candidate.answers(word) for fold in merge.state.ledger.folds()):
        return None
    found = [c for c in merge.state.ledger.log if c.kind == "unfold" and c.entry.candidate is not None]
    return next((c.seq for c in reversed(found) if c.entry.candidate and c.entry.candidate.answers(word)), None)
