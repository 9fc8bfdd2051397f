"""Forgeries of a certificate whose model lies on the Hub: the branch moves, bytes are exchanged at the commit that was
folded, the repo is gone, or it is of another state. Nothing is written then, and no verifier believes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from continual import api
from continual.errors import ContinualError
from continual.removal.verifier import Refused
from tests.helpers import hubs, models
from tests.helpers.forgeries import Taken
from tests.loopback import Hub, serving
from tests.loopback.hostile import flipped

pytestmark = pytest.mark.slow

SHAPES = {n: s for n, s in models.SHAPES.items() if ".layers." not in n}
OFF = ["noise.act=off", "norms.act=off", "copies.act=off"]
MODEL = "hf://org/ft-1"
FROM = {"before": "state", "after": "state", "model": "model"}


class World:
    """A Hub with a base and three fine-tunes, and a state that has folded these."""

    def __init__(self, work: Path, hub: Hub) -> None:
        self.work, self.hub = work, hub
        self.base = hubs.made(work, hub, rule="mean", shapes=SHAPES)
        with self.opened() as merge:
            for number in range(3):
                tune = models.fine_tune(self.base, work / f"ft-{number}", number)
                hubs.publish(hub, f"org/{tune.name}", tune)
                assert merge.fold(f"hf://org/{tune.name}").fate == "folded"

    def opened(self, state: str = "state") -> AbstractContextManager[api.Merge]:
        return hubs.merge(self.work / state, self.hub, gates=OFF)

    def exchanged(self) -> None:
        """From now on one bit of what is read of the weights is another one, the lowest of a number or so; headers and
        sizes are as they were."""
        self.hub.faults = lambda request: flipped(0.97) if request.origin == "cdn" else None

    @property
    def certificate(self) -> Path:
        return self.work / "c.json"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with serving() as hub:
        yield World(tmp_path, hub)


def test_a_branch_that_moved_is_another_model(world: World) -> None:
    """The commit that was folded is certified; whoever checks it with the files of the branch is refused."""
    new = models.fine_tune(world.base, world.work / "new", 9)
    hubs.publish(world.hub, "org/ft-1", new)
    with world.opened() as merge, merge.state.lease():
        commit = merge.unfold(merge.look_unfold(MODEL))
        certificate = dict(merge.certify(commit.seq, world.certificate))
    taken = Taken(certificate, world.work / "state", world.work / "ft-1", world.base)
    assert taken.verify().tensors == len(SHAPES)
    for other in (new, world.work / "ft-0"):
        with pytest.raises(Refused):
            taken.verify(model=other)


def test_bytes_that_were_exchanged_before_it_is_taken_out(world: World) -> None:
    world.exchanged()
    with world.opened() as merge, merge.state.lease():
        before = merge.head
        with pytest.raises(ContinualError):
            merge.unfold(merge.look_unfold(MODEL))
        assert merge.head == before


def test_bytes_that_were_exchanged_before_it_is_certified(world: World) -> None:
    with world.opened() as merge, merge.state.lease():
        commit = merge.unfold(merge.look_unfold(MODEL))
        world.exchanged()
        with pytest.raises(ContinualError, match=r"ft-1.*(are not those any more|has not the hash that the Hub says)"):
            merge.certify(commit.seq, world.certificate)
        assert not world.certificate.exists()
        world.hub.faults = None
        merge.certify(commit.seq, world.certificate)


def test_a_repo_that_is_gone(world: World) -> None:
    with world.opened() as merge, merge.state.lease():
        commit = merge.unfold(merge.look_unfold(MODEL))
        world.hub.delete("org/ft-1")
        with pytest.raises(ContinualError, match="ft-1"):
            merge.certify(commit.seq, world.certificate)
        assert not world.certificate.exists()


def test_a_certificate_of_another_state(world: World) -> None:
    """Of one with the same models, folded in another order, and of a copy that went on otherwise."""
    shutil.copytree(world.work / "state", world.work / "copy")
    taken: dict[str, Taken] = {}
    for state, model in (("state", 1), ("copy", 2)):
        with world.opened(state) as merge, merge.state.lease():
            commit = merge.unfold(merge.look_unfold(f"hf://org/ft-{model}"))
            certificate = dict(merge.certify(commit.seq, world.work / f"{state}.json"))
        taken[state] = Taken(certificate, world.work / state, world.work / f"ft-{model}", world.base)
        taken[state].verify()
    for one, other in (("state", "copy"), ("copy", "state")):
        for words in (("after",), ("before", "after"), ("after", "model")):
            with pytest.raises((Refused, KeyError)):
                taken[one].verify(**{word: getattr(taken[other], FROM[word]) for word in words})
    moved = json.loads(json.dumps(taken["state"].certificate))
    moved["model"] |= {"revision": "0" * 40}
    with pytest.raises(Refused):
        taken["state"].verify(certificate=moved)
