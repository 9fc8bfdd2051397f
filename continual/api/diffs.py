"""What the history of a merge answers: what tells two of its records apart, or a record from files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from continual.engine import comparing
from continual.engine.comparing import Compared, ComparedModel, ComparedRecord, Diff
from continual.errors import Misconfigured
from continual.executors.contract import Progress
from continual.outside import shown
from continual.state.refs import record_named
from continual.tensors import BaseModel, open_model

if TYPE_CHECKING:
    from continual.api.opened_state import OpenedState


def diff(merge: OpenedState, a: str, b: str, progress: Progress) -> Diff:
    """What tells the merge `b` from the merge `a`; each is a record (its number, a tag, HEAD) or a model of the base: a
    directory, or a repo of the Hub. Raises Misconfigured for what is neither, for a record that has expired, and where
    files are compared and the base's weights are gone; Refuse for a model that cannot be read, Retry, Damaged."""
    seqs = {word: record_named(merge.state.ledger, word) for word in (a, b)}
    with contextlib.ExitStack() as held:
        base = None if None not in seqs.values() else held.enter_context(merge.weights())
        ours, theirs = (held.enter_context(_compared(merge, word, seqs[word], base, progress)) for word in (a, b))
        return comparing.diff(merge.state.format.tensors, ours, theirs, merge.executor, progress)


@contextlib.contextmanager
def _compared(
    merge: OpenedState, word: str, seq: int | None, base: BaseModel | None, progress: Progress
) -> Iterator[Compared]:
    if seq is not None:
        with merge.state.lease(seq):
            reading = merge.reading(seq)
            reading.settle(merge.executor, progress)
            yield ComparedRecord(word, reading)
        return
    assert base is not None, "files are compared"
    if not Path(word).exists() and "/" not in word:
        raise Misconfigured(
            f"{shown(word)}: is no record, no tag ('continual tag' lists them), not HEAD, and no directory of a model"
        )
    with open_model(merge.places.named(word)) as model:
        yield ComparedModel(word, base, model)
