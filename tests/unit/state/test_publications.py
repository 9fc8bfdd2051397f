"""Records of releases and hooks: what is found is the newest, and no record is read twice."""

from __future__ import annotations

import random
from typing import Any

from continual.state.entries import Entry, HookEntry, ReleaseEntry, TagEntry
from continual.state.format import Commit
from continual.state.parts import HookCall
from continual.state.publications import Publications


class Book(list[Any]):
    """A log that says which of its records were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def write(self, entry: Entry) -> None:
        self.append(Commit(len(self), None, f"{len(self):08x}", None, None, "", entry))

    def __getitem__(self, seq: Any) -> Any:
        self.read.append(seq)
        return super().__getitem__(seq)


def release(of: int, repo: str = "o/r", branch: str = "main") -> ReleaseEntry:
    return ReleaseEntry(of=of, repo=repo, branch=branch, commit="c", tag=None, uploaded_bytes=0, files=0)


def call(of: int, *, ok: bool = True, view: str | None = None, number: int = 1, target: str = "u") -> HookEntry:
    told = HookCall(number=number, kind="http", target=target, ok=ok, attempts=1, seconds=0.0, message="")
    return HookEntry(of=of, hook=told, view=view)


def test_the_newest_is_found_however_questions_and_records_come() -> None:
    draw, log = random.Random(0), Book()
    for _ in range(7):
        log.write(release(0))
    found = Publications(log)
    for seq in range(7, 400):
        what = draw.randrange(5)
        place = {"repo": draw.choice(["o/a", "o/b"]), "branch": draw.choice(["main", "x"])}
        whom = {"view": draw.choice([None, "v"]), "number": draw.choice([1, 2]), "target": draw.choice(["u", "w"])}
        if what == 0:
            log.write(release(seq, **place))
        elif what == 1:
            log.write(call(seq, ok=draw.random() < 0.5, **whom))
        elif what == 2:
            log.write(TagEntry(tag="t", of=0))
        else:
            entries = [commit.entry for commit in reversed(log)]
            releases = [e for e in entries if isinstance(e, ReleaseEntry) and (e.repo, e.branch) == (*place.values(),)]
            assert found.release(**place) == (releases or [None])[0]
            calls = [e for e in entries if isinstance(e, HookEntry) and e.hook.ok]
            calls = [e for e in calls if (e.view, e.hook.number, e.hook.target) == (*whom.values(),)]
            assert found.call(**whom) == (calls or [None])[0]
    assert found.release("o/r", "main") == log[6].entry


def test_no_record_is_read_twice_nor_further_back_than_is_needed() -> None:
    log = Book()
    for seq in range(50):
        log.write(call(seq, ok=False) if seq != 20 else release(seq))
    found = Publications(log)
    assert found.release("o/r", "main") == release(20)
    assert log.read == list(range(49, 19, -1))
    assert found.call(None, 1, "u") is None
    for _ in range(3):
        log.write(call(len(log), ok=False))
        assert found.call(None, 1, "u") is None
        assert found.release("o/r", "main") == release(20)
    assert sorted(log.read) == list(range(53))
