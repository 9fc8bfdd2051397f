"""Excerpts of the ledger: a state opened by them says what its records say, and none that does not fit is believed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from continual.errors import Damaged
from continual.records import Candidate
from continual.state import State, excerpts, framing
from continual.state.entries import DeferEntry, RetryEntry
from continual.state.excerpts import Sealed
from continual.state.ledger import Ledger
from continual.state.verify import verify
from tests.helpers import stores


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state with a long history, of which two excerpts are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(excerpts, "SPAN", 4)
        path = tmp_path_factory.mktemp("known") / "state"
        stores.history(path)
        with State.open(path, write=True) as state:
            for entry in (DeferEntry, RetryEntry):
                state.record(entry(candidate=Candidate("waits", "w", "test", "/w", "full", 1)))
            stores.fold(state, 4)
        assert [file.name for file in sorted((path / "excerpts").iterdir())] == ["00000000.json", "00000004.json"]
        yield path


@pytest.fixture
def state(known: Path, tmp_path: Path) -> Path:
    return shutil.copytree(known, tmp_path / "state")


def sealed(path: Path) -> list[int]:
    """The records that are not read when the state is opened."""
    with State.open(path) as opened:
        return [c.seq for c in opened.ledger.log if isinstance(c, Sealed)]


def said(ledger: Ledger) -> dict[str, Any]:
    """All that a ledger answers."""
    log = range(len(ledger.log))
    keys = {c.key for c in ledger.log if c.key}
    return {
        "log": [c.body() for c in ledger.log],
        "folds": [[f.body() for f in ledger.folds(seq)] for seq in log],
        "totals": [ledger.totals_at(seq) for seq in log],
        "read": [ledger.read_options(seq) for seq in log],
        "fates": {key: fate and fate.body() for key in sorted(keys) for fate in (ledger.fate(key),)},
        "digests": {d: found.seq for n in range(9) if (found := ledger.folded_digest(d := f"blake3:{n}"))},
        "revisions": [c.seq for n in range(9) for c in ledger.revisions(f"/o{n}")],
        "rest": (ledger.tags, sorted(ledger.pool), ledger.models == [*ledger.models], ledger.cloned),
        "refused": [c.body() for c in ledger.refusals],
        "retried": ledger.retried(),
    }


def without(path: Path) -> Ledger:
    """The ledger of the state, read from its records alone."""
    bare = shutil.copytree(path, path.with_name("bare"), ignore=shutil.ignore_patterns("excerpts"))
    with State.open(bare) as opened:
        assert not any(isinstance(c, Sealed) for c in opened.ledger.log)
    shutil.rmtree(bare)
    return opened.ledger


def test_a_ledger_by_excerpts_says_what_its_records_say(state: Path) -> None:
    with State.open(state) as opened:
        assert sealed(state) == [1, 2, 3, 5, 7]  # not the beginning, a tag, a rollback, and what came last
        assert said(opened.ledger) == said(without(state))
        assert opened.ledger.log == without(state).log
        assert verify(opened) == []


def test_records_of_which_an_excerpt_is_are_not_read(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    decode = framing.decode
    monkeypatch.setattr(framing, "decode", lambda file: (seen.append(str(file)), decode(file))[1])
    with State.open(state) as opened:
        read = {Path(file).name for file in seen if "/commits/" in file}
        # the beginning, a tag, a rollback, and what came last
        assert read == {f"{seq:08d}.json" for seq in (0, 4, 6, 8, 9)}
        assert len(opened.ledger.folds()) == 3
        assert opened.ledger.revisions("/o2")[0].entry.candidate.name == "n2"
    assert [Path(file).name for file in seen].count("00000002.json") == 1


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def changed(change: Callable[[list[Any]], object]) -> Callable[[bytes], bytes]:
    """Another excerpt, with a right checksum."""

    def act(data: bytes) -> bytes:
        body = framing._DECODER.decode(data.split(b"\n", 1)[1].decode())
        change(body["rows"])
        return framing.encode(body)[0]

    return act


NOT_BELIEVED: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flipped,
    "cut": lambda data: data[:-20],
    "empty": lambda _: b"",
    "no-json": lambda _: b"00000000\nno",
    "a-row-less": changed(lambda rows: rows.pop()),
    "a-cell-more": changed(lambda rows: rows[1].append("x")),
    "no-list": changed(lambda rows: rows.__setitem__(1, 7)),
    "no-rows": changed(lambda rows: rows.clear()),
    "no-cells": changed(lambda rows: rows[1].clear()),
    "a-cell-less": changed(lambda rows: rows[1].pop()),
    "another-kind": changed(lambda rows: rows[0].__setitem__(1, "made-up")),
    "a-long-row-of-a-short-one": changed(lambda rows: rows[1].__setitem__(1, "tag")),
    "another-chain": changed(lambda rows: rows[-1].__setitem__(0, "00000000")),
}


CELLS = ("crc", "kind", "generation", "receipts", "time", "key", "origin", "digest")
NOT_BELIEVED |= {
    f"{name}-{value!r}": changed(lambda rows, at=at, value=value: rows[1].__setitem__(at, value))
    for at, name in enumerate(CELLS)
    for value in (None, 7, True, [], {})
}


@pytest.mark.parametrize("harm", NOT_BELIEVED.values(), ids=NOT_BELIEVED)
def test_an_excerpt_that_does_not_fit_is_not_believed(state: Path, harm: Callable[[bytes], bytes]) -> None:
    file = state / "excerpts/00000000.json"
    before = file.read_bytes()
    file.write_bytes(harm(before))
    assert sealed(state) == [5, 7]
    with State.open(state) as opened:
        assert said(opened.ledger) == said(without(state))
        assert [line.split(",")[0] for line in verify(opened)] == [f"{file} does not fit its records"]
    State.open(state, write=True).close()
    assert file.read_bytes() == before
    assert sealed(state) == [1, 2, 3, 5, 7]


@pytest.mark.parametrize("name", ["00000000.json", "00000004.json"])
def test_an_excerpt_that_is_missing_is_made_anew(state: Path, name: str) -> None:
    (state / "excerpts" / name).unlink()
    with State.open(state) as opened:
        assert said(opened.ledger) == said(without(state))
        assert verify(opened) == []
    State.open(state, write=True).close()
    assert sealed(state) == [1, 2, 3, 5, 7]


LIES: dict[str, Callable[[list[Any]], object]] = {
    "a-key": lambda rows: rows[1].__setitem__(5, "other"),
    "a-digest": lambda rows: rows[1].__setitem__(7, "blake3:9"),
    "a-kind": lambda rows: rows[1].__setitem__(1, "refuse"),
    "a-time": lambda rows: rows[1].__setitem__(4, "2000-01-01T00:00:00.000Z"),
    "a-generation": lambda rows: rows[1].__setitem__(2, "0" * 16),
    "a-checksum": lambda rows: rows[1].__setitem__(0, "00000000"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_excerpt_that_lies_is_found_where_the_record_is_read(
    state: Path, lie: Callable[[list[Any]], object]
) -> None:
    """It has a right checksum, and fits the chain at its end: nobody but who wanted to could write it."""
    file = state / "excerpts/00000000.json"
    file.write_bytes(changed(lie)(file.read_bytes()))
    with State.open(state) as opened:
        said = f"{file} is damaged: it says otherwise than {state}/commits/0000000{{}}.json, which is whole; delete"
        assert any(line.startswith((said.format(1), said.format(2))) for line in verify(opened))
        with pytest.raises(Damaged, match=f"^{said.format(1)} {file}, and nothing is lost"):
            _ = opened.ledger.get(1).entry
    file.unlink()
    with State.open(state) as opened:
        assert verify(opened) == []
    State.open(state, write=True).close()
    assert sealed(state) == [1, 2, 3, 5, 7]


def test_a_lie_about_a_record_that_is_read_is_not_believed(state: Path) -> None:
    file = state / "excerpts/00000000.json"
    file.write_bytes(changed(lambda rows: rows[0].__setitem__(0, "00000000"))(file.read_bytes()))
    with State.open(state) as opened:
        assert not any(isinstance(c, Sealed) for c in opened.ledger.log)
        assert said(opened.ledger) == said(without(state))


def test_damage_of_an_old_record_is_found_when_it_is_asked_for_and_by_verify(state: Path) -> None:
    file = state / "commits/00000002.json"
    file.write_bytes(flipped(file.read_bytes()))
    with State.open(state) as opened:
        assert any(str(file) in line for line in verify(opened))
        with pytest.raises(Damaged, match=file.name):
            _ = opened.ledger.get(2).entry


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "another-number": ({"seq": 3}, "does not follow the record before it"),
    "another-before": ({"prev": "00000000"}, "does not follow the record before it"),
    "another-fate": ({"message": "other"}, "is another record 2 than the one in the ledger"),
}


@pytest.mark.parametrize(("change", "said"), MISFITS.values(), ids=MISFITS)
def test_another_record_with_a_right_checksum_is_damage(state: Path, change: dict[str, Any], said: str) -> None:
    file = state / "commits/00000002.json"
    body, _ = framing.decode(file)
    file.write_bytes(framing.encode(body | change)[0])
    with State.open(state) as opened:
        assert [line for line in verify(opened) if line.startswith(f"{file} {said}")]
        with pytest.raises(Damaged, match=f"^{file} {said}"):
            _ = opened.ledger.get(2).entry
    shutil.rmtree(state / "excerpts")
    with pytest.raises(Damaged, match="does not follow the record before it"):
        State.open(state)


def test_excerpts_that_the_disk_does_not_give_are_done_without(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with State.open(state) as opened:
        expected = said(opened.ledger)

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **more: Any) -> Any:
            if str(path).startswith(str(state / "excerpts")):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **more)

        return call

    for name in ("stat", "open", "scandir"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    monkeypatch.setattr("builtins.open", failing(open))
    with State.open(state) as opened:
        assert said(opened.ledger) == expected


def test_an_excerpt_of_another_state_is_not_believed(state: Path, tmp_path: Path) -> None:
    """Also one that has the same number of records."""
    with stores.make(tmp_path / "other") as other:
        for number in range(1, 9):
            stores.fold(other, number)
    for name in ("00000000.json", "00000004.json"):
        shutil.copy(tmp_path / "other/excerpts" / name, state / "excerpts" / name)
    assert sealed(state) == []
    with State.open(state) as opened:
        assert len(verify(opened)) == 2
        assert said(opened.ledger) == said(without(state))
    State.open(state, write=True).close()
    assert sealed(state) == [1, 2, 3, 5, 7]


def test_an_excerpt_of_records_that_are_no_longer_there_harms_nothing(state: Path) -> None:
    """As where commits/ and HEAD came back from an older copy, and other records took their numbers."""
    before = (state / "excerpts/00000004.json").read_bytes()
    for seq in range(7, 10):
        (state / f"commits/{seq:08d}.json").unlink()
    head, crc = framing.decode(state / "commits/00000006.json")
    (state / "HEAD").write_bytes(framing.encode({"seq": head["seq"], "crc": crc})[0])
    with State.open(state, write=True) as opened:
        assert verify(opened) == []
        assert stores.fold(opened, 7) == 7
    assert (state / "excerpts/00000004.json").read_bytes() != before
    with State.open(state) as opened:
        assert [c.seq for c in opened.ledger.log if isinstance(c, Sealed)] == [1, 2, 3, 5, 7]
        assert verify(opened) == []


def test_rows_in_another_order_are_found_where_a_record_is_read(state: Path) -> None:
    file = state / "excerpts/00000000.json"
    file.write_bytes(changed(lambda rows: rows.insert(1, rows.pop(2)))(file.read_bytes()))
    with State.open(state) as opened:
        assert [line for line in verify(opened) if line.startswith(f"{file} is damaged")]
        with pytest.raises(Damaged, match=f"^{file} is damaged"):
            _ = opened.ledger.get(1).entry


def test_what_a_kill_leaves_of_an_excerpt_harms_nothing(state: Path) -> None:
    file = state / "excerpts/00000004.json"
    data = file.read_bytes()
    file.unlink()
    for count in range(0, len(data), 97):
        file.with_name(".00000004.json.tmp").write_bytes(data[:count])
        assert sealed(state) == [1, 2, 3]
    State.open(state, write=True).close()
    assert [left.name for left in sorted(file.parent.iterdir())] == ["00000000.json", file.name]
    assert file.read_bytes() == data


@pytest.mark.parametrize("call", ["mkdir", "open", "write", "rename"])
def test_a_disk_that_refuses_an_excerpt_undoes_nothing(state: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(state / "excerpts")
    true = getattr(os, call)

    def refuses(what: Any, *rest: Any, **more: Any) -> Any:
        if (isinstance(what, int) and b'"rows"' in bytes(rest[0])) or "excerpts" in str(what):
            raise OSError(28, "No space left on device", str(what))
        return true(what, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuses)
        with State.open(state, write=True) as opened:
            assert stores.fold(opened, 5) == 10
            assert stores.fold(opened, 6) == 11
    assert sealed(state) == []
    with State.open(state, write=True) as opened:
        assert verify(opened) == []
    assert sealed(state) == [1, 2, 3, 5, 7, 8, 9, 10, 11]
