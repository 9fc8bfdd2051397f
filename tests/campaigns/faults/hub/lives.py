"""What is published on the Hub in the campaign, each repo with its life, and what may become of it."""

from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from tests.helpers import hubs, models
from tests.loopback import TOKEN, Hub

READER = "hf_the_daemon_of_the_campaign"
SECRET = "the-secret-of-the-campaign"
SETTLED = ("folded", "duplicate")
RULES = ("iso-c", "opcm", "task-arithmetic")
SHAPES = {
    "model.embed_tokens.weight": (60, 64),
    **{f"model.layers.{n}.self_attn.q_proj.weight": (64, 64) for n in range(2)},
    **{f"model.layers.{n}.mlp.up_proj.weight": (160, 64) for n in range(2)},
    **{f"model.layers.{n}.input_layernorm.weight": (64,) for n in range(2)},
    "model.norm.weight": (64,),
}
MOMENTS = ("fold", "poll", "look", "push", "commit", "time")
"""When the daemon is killed: as it asks for weights, a list or a repo, after it accepted a push, after a record came to
be, or at any time."""


class World:
    """The Hub, a publisher with the real client, and what the ledger says so far."""

    def __init__(self, work: Path, hub: Hub, draw: random.Random) -> None:
        self.work, self.hub, self.draw = work, hub, draw
        self.api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        self.base = models.base(work / "base", shapes=SHAPES)
        self.lives: dict[str, str] = {}
        """The name of every repo, old ones too, and the life it belongs to."""
        self.fates: dict[str, str] = {}
        """By commit; the watcher fills it."""
        self._made = 0

    def tuned(self, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
        """Another fine-tune."""
        self._made += 1
        return models.fine_tune(self.base, self.work / f"models/{self._made}", self._made, change=change)

    def sharded(self) -> Path:
        tuned = self.tuned()
        return hubs.sharded(tuned, tuned.with_name(f"{tuned.name}-sharded"))

    def adapter(self) -> Path:
        self._made += 1
        (self.work / "models").mkdir(exist_ok=True)
        return hubs.adapter(self.base, self.work / f"models/{self._made}", self._made)

    def create(self, repo: str, *, private: bool = False) -> None:
        self.lives.setdefault(repo, repo)
        insist(lambda: self.api.create_repo(repo, private=private, exist_ok=True))

    def commit(self, repo: str, directory: Path | None, readme: bytes | None = None) -> None:
        """One commit of a model directory and a card."""
        files = {} if directory is None else hubs.files_of(directory)
        files["README.md"] = hubs.card(note=self.draw.random()) if readme is None else readme
        parent = self.hub.head(repo)

        def commit() -> None:
            operations = [CommitOperationAdd(path, io.BytesIO(data)) for path, data in files.items()]
            self.api.create_commit(repo, operations, commit_message="A commit", parent_commit=parent)

        insist(commit, lambda: self.hub.head(repo) != parent)

    def publish(self, repo: str, directory: Path, readme: bytes | None = None, **how: Any) -> Life:
        self.create(repo, **how)
        yield None
        self.commit(repo, directory, readme)

    def fated(self, repo: str) -> Callable[[], bool]:
        head = self.hub.head(repo)
        return lambda: head in self.fates


Life = Iterator[Callable[[], bool] | None]
"""What happens to a repo, step by step; goes on once what it yields is true."""


def insist(call: Callable[[], Any], happened: Callable[[], bool] = lambda: False) -> None:
    """Calls until it succeeds, or until what it was for has happened although it failed."""
    for attempt in range(30):
        try:
            call()
            return
        except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError):  # the last of an upload
            if happened():
                return
            if attempt == 29:
                raise
            time.sleep(0.05)


def full(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.tuned())


def sharded(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.sharded())


def adapter(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.adapter())


def gated(w: World, repo: str, *, admitted: bool) -> Life:
    w.create(repo)
    insist(lambda: w.api.update_repo_settings(repo, gated="manual"))
    if admitted:
        w.hub.admit(READER, repo)
    yield None
    w.commit(repo, w.tuned())


def private(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.tuned(), private=True)


def wrong_base(w: World, repo: str) -> Life:
    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)

    yield from w.publish(repo, w.tuned(other))


def not_a_number(w: World, repo: str) -> Life:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 6] = math.nan

    yield from w.publish(repo, w.tuned(spoil))


def pickle(w: World, repo: str) -> Life:
    w.create(repo)
    yield None
    directory = w.work / f"models/{repo.replace('/', '-')}"
    directory.mkdir(parents=True)
    (directory / "pytorch_model.bin").write_bytes(w.draw.randbytes(50_000))
    (directory / "config.json").write_text("{}")
    w.commit(repo, directory)


def unrelated(w: World, repo: str) -> Life:
    yield from w.publish(repo, w.tuned(), hubs.card(None, license="mit"))
    yield None
    w.commit(repo, None, hubs.card("org/another"))


def soon(w: World, repo: str) -> Life:
    """Weights follow weights, mostly before the first were looked at."""
    yield from w.publish(repo, w.tuned())
    for _ in range(w.draw.randint(1, 2)):
        if w.draw.random() < 0.5:
            yield None
        w.commit(repo, w.tuned())


def later(w: World, repo: str) -> Life:
    """Weights follow weights that are folded."""
    yield from w.publish(repo, w.tuned())
    yield w.fated(repo)
    w.commit(repo, w.tuned())


def card(w: World, repo: str) -> Life:
    """Another card follows, at any time."""
    yield from w.publish(repo, w.tuned())
    yield None
    w.commit(repo, None)


def deleted(w: World, repo: str) -> Life:
    """At any time."""
    yield from w.publish(repo, w.tuned())
    for _ in range(w.draw.randint(0, 3)):
        yield None
    insist(lambda: w.api.delete_repo(repo, missing_ok=True))


def deleted_later(w: World, repo: str) -> Life:
    """Once it is folded."""
    yield from w.publish(repo, w.tuned())
    yield w.fated(repo)
    insist(lambda: w.api.delete_repo(repo, missing_ok=True))


def reborn(w: World, repo: str) -> Life:
    """Deleted, and made anew with other weights."""
    yield from deleted(w, repo)
    yield None
    yield from w.publish(repo, w.tuned())


def renamed(w: World, repo: str) -> Life:
    """At any time."""
    yield from w.publish(repo, w.tuned())
    for _ in range(w.draw.randint(0, 3)):
        yield None
    w.lives[f"{repo}-renamed"] = repo
    insist(lambda: w.api.move_repo(repo, f"{repo}-renamed"), lambda: f"{repo}-renamed" in w.hub.state())


def copied(w: World, repo: str) -> Life:
    """The same weights under two names."""
    tuned = w.tuned()
    yield from w.publish(repo, tuned)
    yield None
    yield from w.publish(f"{repo}-copy", tuned)


class Kind(NamedTuple):
    """How repos of a kind live, what may become of their commits, of the last one if it is there in the end, and how
    many of their weights go in: None where that is left to chance."""

    live: Callable[[World, str], Life]
    fates: frozenset[str | None]
    last: frozenset[str | None]
    taken: int | None


def kind(
    live: Callable[[World, str], Life], *fates: str | None, last: Sequence[str | None] = (), taken: int | None = None
) -> Kind:
    return Kind(live, frozenset(fates), frozenset(last or fates), taken)


KINDS: Mapping[str, Kind] = {
    "full": kind(full, "folded", taken=1),
    "sharded": kind(sharded, "folded", taken=1),
    "adapter": kind(adapter, "folded", taken=1),
    "soon": kind(soon, "folded", "superseded", "update", None, last=("folded", "update"), taken=1),
    "deleted": kind(deleted, "folded", "gone", None),
    "later": kind(later, "folded", "update", last=("update",), taken=1),
    "unrelated": kind(unrelated, None),
    "wrong-base": kind(wrong_base, "shape", taken=0),
    "gated-out": kind(lambda w, repo: gated(w, repo, admitted=False), "gated", taken=0),
    "card": kind(card, "folded", "superseded", "update", None, last=("folded", "update"), taken=1),
    "copied": kind(copied, "folded", "duplicate", taken=1),
    "gated-in": kind(lambda w, repo: gated(w, repo, admitted=True), "folded", taken=1),
    "renamed": kind(renamed, "folded", "duplicate", None, last=("folded", "duplicate"), taken=1),
    "reborn": kind(reborn, "folded", "superseded", "gone", "update", None, last=("folded", "update")),
    "private-ours": kind(private, "folded", taken=1),
    "private-theirs": kind(private, "gone", None, taken=0),
    "pickle": kind(pickle, "pickle", taken=0),
    "not-a-number": kind(not_a_number, "non-finite", taken=0),
    "deleted-later": kind(deleted_later, "folded", taken=1),
}
NONE: Sequence[str | None] = (None,)
EMPTY: frozenset[str | None] = frozenset(("superseded", "gone", None))
"""What may become of the commit with which a repo begins: it has no card yet, so it is left out, unless there is
another by then."""
