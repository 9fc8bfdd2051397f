"""Whatever is done to the files of a state, the repair door ends in words or in a state that opens and verifies clean;
nothing goes that was not said before, and no file is deleted.

`CONTINUAL_REPAIR_EXAMPLES=2000 python -m pytest tests/property/test_repair.py` looks further.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from continual.errors import ContinualError, Damaged
from continual.records import Candidate
from continual.state import State
from continual.state.damage import RepairPlan
from continual.state.entries import DeferEntry, RefuseEntry
from continual.state.inbox import Inbox, PushRecord, name_of, save_cursor
from continual.state.repair import look, repair
from continual.state.verify import verify
from tests.helpers import stores

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("CONTINUAL_REPAIR_EXAMPLES", "40"))
NEEDED = ("format.json", "commits/00000000.json")
"""Nothing else in a state has what these hold."""


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where an example lies: an fsync takes no time there, and this is about no power cut."""


def silent(_done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def whole() -> Iterator[Path]:
    """A state with folds, a refusal, tags, a rollback, an expired generation, a pool, a push and a cursor."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        path = Path(place) / "whole"
        stores.history(path)
        with State.open(path, write=True) as state:
            for number in (4, 5):
                stores.fold(state, number)
            state.expire(2)
            state.record(RefuseEntry(candidate=candidate("late"), reason="shape"))
            state.tag("second", 8)
            state.record(DeferEntry(candidate=candidate("waits")))
        Inbox(path).put(name_of("org/a", "0" * 40), PushRecord("org/a", "0" * 40, 1.0))
        save_cursor(path, "hub", {"asked": "x", "high": {}, "swept": {}, "seen": []})
        yield path


def candidate(name: str) -> Candidate:
    return Candidate(f"k-{name}", name, "folder", f"/in/{name}", "full", 1)


def files(path: Path) -> list[Path]:
    """The files of a state but the lock, by path below it."""
    return sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file() and p.name != "lock")


harms = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "delete", "empty", "other")),
        st.sampled_from(("HEAD", "commits/", "tags/", "generations/", "sources/", "inbox/", "")),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=4,
)


def hurt(path: Path, harm: str, among: str, which: int, where: int) -> str | None:
    """Does something to a file whose path begins with `among`; its path, None if there is none."""
    found = [file for file in files(path) if str(file).startswith(among)]
    if not found:
        return None
    file = path / found[which % len(found)]
    data = bytearray(file.read_bytes())
    if harm == "flip" and data:
        data[where % len(data)] ^= 1 << where % 8
        file.unlink()  # it may be a hard link to another file of the state
        file.write_bytes(data)
    elif harm == "delete":
        file.unlink()
    else:
        other = (path / found[where % len(found)]).read_bytes()
        file.unlink()
        file.write_bytes({"cut": data[: where % max(1, len(data))], "empty": b"", "other": other}.get(harm, data))
    return str(found[which % len(found)])


@settings(
    deadline=None,
    max_examples=EXAMPLES,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # an example is a whole state: to shrink takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(harms=harms)
def test_what_is_not_said_is_not_lost(whole: Path, harms: list[tuple[str, str, int, int]]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        path = Path(place) / "hurt"
        shutil.copytree(whole, path)
        touched = {hurt(path, *harm) for harm in harms}
        plan = looked(path)
        if not isinstance(plan, RepairPlan):
            assert "cannot be repaired" in plan
            assert touched & set(NEEDED), plan
            return
        told = findings(path)
        assert bool(plan.findings) == bool(told), (plan.findings, told)
        before = contents(path)
        assert look(path, silent) == plan, "looking changes nothing"
        commit = repair(path, plan, silent)
        assert (commit is not None) == bool(plan.findings)
        left = contents(path)
        assert not before - left, "a file is gone"
        assert findings(path) == []
        nothing_unsaid(whole, path, plan)
        assert not look(path, silent).findings
        with State.open(path, write=True) as state:
            stores.fold(state, 6)
            assert verify(state) == []


def looked(path: Path) -> RepairPlan | str:
    """What a repair would do, or why there is none."""
    try:
        return look(path, silent)
    except Damaged as error:
        return str(error)


def findings(path: Path) -> list[str]:
    """What opening and verifying report."""
    try:
        with State.open(path) as state:
            return verify(state)
    except ContinualError as error:
        return [str(error)]


def contents(path: Path) -> Counter[bytes]:
    """What the files hold, and how many hold it; HEAD is replaced, and its old contents are kept aside."""
    return Counter((path / file).read_bytes() for file in files(path))


def nothing_unsaid(whole: Path, path: Path, plan: RepairPlan) -> None:
    """Every record, fold, tag, generation, push and cursor that is not there any more was said."""
    said = "\n".join(plan.lost)
    with State.open(whole) as old, State.open(path) as new:
        same = [a.crc == b.crc for a, b in zip(old.ledger.log, new.ledger.log, strict=False)]
        kept = len(same) if all(same) else same.index(False)
        for commit in old.ledger.log[kept:]:
            assert f"record {commit.seq}:" in said or "cannot be known" in said or "which HEAD names" in said, commit
        gone = {c.seq for c in old.ledger.log[kept:]}
        undone = {int(line.split(":")[0].removeprefix("record ")) for line in plan.undone}
        in_force = {c.seq for c in new.ledger.folds()}
        assert {c.seq for c in old.ledger.folds()} - in_force <= gone | undone
        for tag, seq in old.ledger.tags.items():
            if new.ledger.tags.get(tag) != seq:
                assert tag in plan.tags or gone, tag
        named = {c.generation for c in old.ledger.log[:kept]}
        for name in set(old.generations()) - set(new.generations()):
            assert name in plan.generations or name not in named or not (path / "generations" / name).exists()
        for kind in ("inbox", "sources"):
            for file in (whole / kind).iterdir():
                if not (path / kind / file.name).exists():
                    assert f"{kind}/{file.name}" in said or not any(path.glob(f".repaired-*/{kind}/{file.name}"))
