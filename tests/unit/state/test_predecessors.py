"""What a record has to do with those before it: one that does not fit them is damage, and one that goes by a damaged
one is never written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from continual.errors import Damaged
from continual.records import Candidate
from continual.state import Commit, State, excerpts, framing
from continual.state.entries import (
    DeferEntry,
    HookEntry,
    ReleaseEntry,
    RetryEntry,
    SelectEntry,
    UnfoldEntry,
)
from continual.state.parts import HookCall, MemberFate
from continual.state.repair import look
from continual.state.verify import verify
from tests.helpers import pools, stores


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records 1 and 2 are folds, 3 a refusal, 4 a tag of 1, 5 a fold, 6 a rollback to 2, 7 waits, and 8 is a fold; 1 to
    3, 5 and 7 are read when somebody asks for them."""
    monkeypatch.setattr(excerpts, "SPAN", 4)
    stores.history(tmp_path / "state")
    with State.open(tmp_path / "state", write=True) as opened:
        opened.record(DeferEntry(candidate=candidate("waits")))
        stores.fold(opened, 4)
    return tmp_path / "state"


def candidate(key: str) -> Candidate:
    return Candidate(key, key, "test", f"/{key}", "full", 1)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def release(of: int) -> ReleaseEntry:
    return ReleaseEntry(of=of, repo="o/r", branch="main", commit="c", tag=None, uploaded_bytes=0, files=0)


def selected(*, of: int = 0, out: tuple[str, ...] | None = None, scores: tuple[MemberFate, ...] = ()) -> SelectEntry:
    return SelectEntry(
        of=of, objective="x", loss=1.0, before=1.0, gap=0.0, pool_gap=0.0, steps=0, scores=scores, out=out
    )


CALL = HookCall(number=1, kind="http", target="u", ok=True, attempts=1, seconds=0.1, message="")
GO_BY: dict[str, tuple[int, Callable[[State], Commit]]] = {
    "a rollback past it": (2, lambda s: s.rollback(1)),
    "a rollback to it": (2, lambda s: s.rollback(2)),
    "a rollback to what holds it": (2, lambda s: s.rollback(4)),
    "a rollback to a refusal": (3, lambda s: s.rollback(3)),
    "a tag": (2, lambda s: s.tag("second", 2)),
    "a tag of a refusal": (3, lambda s: s.tag("third", 3)),
    "an unfold": (1, lambda s: s.record(UnfoldEntry(candidate=candidate("k1"), of=1, key="k1"))),
    "an unfold that folds it again": (
        2,
        lambda s: s.record(UnfoldEntry(candidate=candidate("k1"), of=1, key="k1", again=(2,))),
    ),
    "a release": (2, lambda s: s.record(release(2))),
    "a call of a hook": (2, lambda s: s.record(HookEntry(of=2, hook=CALL))),
    "another look": (3, lambda s: s.record(RetryEntry(candidate=candidate("bad")))),
    "another look at what was undone": (5, lambda s: s.record(RetryEntry(candidate=candidate("k3")))),
    "the end of its round": (3, lambda s: s.record(selected(of=3))),
    "a round that lets it go": (2, lambda s: s.record(selected(out=("k2",)))),
    "a round that refuses it": (
        7,
        lambda s: s.record(selected(scores=(MemberFate("waits", "waits", "refused", "irrelevant", "no"),))),
    ),
}


@pytest.mark.parametrize(("damaged", "act"), GO_BY.values(), ids=GO_BY)
def test_what_a_record_goes_by_is_read_before_it_is_written(
    state: Path, damaged: int, act: Callable[[State], Commit]
) -> None:
    file = state / f"commits/{damaged:08d}.json"
    whole = file.read_bytes()
    flip(file)
    before = pools.files(state)
    with State.open(state, write=True) as opened:
        kept = known_to(opened)
        with pytest.raises(Damaged, match=f"^{file} is damaged"):
            act(opened)
        assert known_to(opened) == kept
        assert stores.fold(opened, 9) == 9  # the writer goes on
    after = pools.files(state)
    assert {name for name in before if after.get(name) != before[name]} == {"HEAD"}
    assert [name for name in after.keys() - before.keys() if name.startswith("commits/")] == ["commits/00000009.json"]
    file.write_bytes(whole)
    with State.open(state, write=True) as opened:
        act(opened)
        assert verify(opened) == []


def known_to(state: State) -> tuple[object, ...]:
    """What the ledger says without reading a record."""
    ledger = state.ledger
    return len(ledger.log), ledger.tags, [f.seq for f in ledger.folds()], ledger.pool, len(ledger.refusals)


@pytest.mark.parametrize("act", [act for _, act in GO_BY.values()], ids=GO_BY)
def test_nothing_is_read_once_a_record_stands(
    state: Path, act: Callable[[State], Commit], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, late, decode = list[str](), list[str](), framing.decode

    def noted(file: Path | str) -> tuple[dict[str, object], str]:
        if "link" in steps:
            late.append(str(file))
        return decode(file)

    with State.open(state, write=True, on_step=steps.append) as opened:
        monkeypatch.setattr(framing, "decode", noted)
        act(opened)
        assert steps[-1] == "acknowledged"
        assert late == []


WRONG: dict[str, tuple[int, dict[str, Any], str]] = {
    "back to what is not there": (6, {"numbers": {"to": 99, "undone": 0}}, "it goes back to record 99"),
    "back to itself": (6, {"numbers": {"to": 6, "undone": 0}}, "it goes back to record 6"),
    "back to before the beginning": (6, {"numbers": {"to": -1, "undone": 0}}, "it goes back to record -1"),
    "a tag of what is not there": (4, {"numbers": {"tag": "first", "of": 99}}, "it names record 99"),
    "another beginning": (6, {"kind": "init", "numbers": None}, "a state begins once"),
    "taken out twice": (
        6,
        {
            "kind": "unfold",
            "candidate": {"key": "k9", "name": "n", "source": "t", "origin": "/o", "form": "full", "bytes": 1},
            "numbers": {"of": 2, "key": "k9", "again": []},
        },
        "it takes out k9, folded in record 2, which is not in the merge",
    ),
}


def rechained(state: Path, seq: int, change: dict[str, Any]) -> None:
    """Another record `seq`, and all after it with the checksums that follow: whoever did it wanted to."""
    count = len(list((state / "commits").glob("*.json")))
    _, prev = framing.decode(state / f"commits/{seq - 1:08d}.json")
    for number in range(seq, count):
        file = state / f"commits/{number:08d}.json"
        body, _ = framing.decode(file)
        data, crc = framing.encode(body | {"prev": prev} | (change if number == seq else {}))
        file.write_bytes(data)
        prev = crc
    (state / "HEAD").write_bytes(framing.encode({"seq": count - 1, "crc": prev})[0])


@pytest.mark.parametrize(("seq", "change", "said"), WRONG.values(), ids=WRONG)
def test_a_record_that_does_not_fit_those_before_it_is_damage(
    state: Path, seq: int, change: dict[str, Any], said: str
) -> None:
    rechained(state, seq, change)
    wanted = f"{state}/commits/{seq:08d}.json does not fit the records before it: {said}; restore from a backup"
    for write in (False, True):
        with pytest.raises(Damaged) as refused:
            State.open(state, write=write)
        assert str(refused.value) == wanted
    plan = look(state, lambda _done, _total: None)
    assert wanted in plan.findings
    assert plan.last == seq - 1
