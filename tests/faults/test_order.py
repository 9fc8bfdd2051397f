"""What must survive a power cut is on disk before anybody is told: of everything that the package writes durably, the
contents are synced before the name appears, and the name is synced before the call returns."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from continual import api, making
from continual.errors import Halt
from continual.publish import folder
from continual.publish.folder import Target
from continual.publish.heat_map import draw
from continual.publish.lora import LoraTarget
from continual.state import State, paused
from continual.state.backup import Wish, backup
from continual.state.canaries import CanaryRecord
from continual.state.inbox import Inbox, PushRecord, save_cursor
from continual.state.repair import look, repair
from continual.state.verify import verify
from tests.helpers import house, models, stores
from tests.helpers.trace import Trace, power_cuts, traced, tree, write

pytestmark = pytest.mark.slow

MAKERS = {"replace_bytes", "replace_link", "link_new", "move_away", "publish_dir"}
MAKERS |= {"storing.replace", "storing.creating", "storing.appearing"}
"""The functions of durable.py and storing.py that make a name or take it away."""


def folded(state: State, number: int) -> int:
    """Fold `number` with all that a rule may do: a tensor that is written, one that is kept, one rewritten in runs."""
    with state.begin() as transaction:
        for name in stores.SHAPES:
            if name == "scalar":
                transaction.keep(name)
            elif name == "wide":
                for _, _, values in transaction.runs(name, 7):
                    values["sum"] += number
            else:
                transaction.write(name, "sum", stores.value(name, number))
        return state.commit(transaction, stores.entry(number)).seq


def initiation(place: Path) -> tuple[Trace, list[Path]]:
    with traced(place) as trace:
        state = stores.make(place / "in/a/new/s")
    state.close()
    assert trace.appeared(state.path / "HEAD") < trace.appeared(state.path / "format.json"), "format.json comes last"
    for made in ("in", "in/a", "in/a/new", "in/a/new/s", *(f"in/a/new/s/{n}" for n in ("commits", "generations"))):
        trace.listed(place / made)
    return trace, [state.path / name for name in ("commits/00000000.json", "HEAD", "format.json")]


def commit(place: Path) -> tuple[Trace, list[Path]]:
    with stores.make(place / "s") as state:
        with traced(place) as trace:  # from the first fold on: what the second links was synced by it
            stores.fold(state, 1)
            folded(state, 2)
        first, record, head = (state.path / name for name in ("commits/00000001.json", "commits/00000002.json", "HEAD"))
        generation = state.path / "generations" / str(state.ledger.head.generation)
    point = trace.appeared(record)
    trace.whole(generation, before=point)
    trace.listed(generation, before=point)
    assert point < trace.listed(record, after=point) < trace.appeared(head), "HEAD names a record that is on disk"
    return trace, [first, record, head, head]


def commit_on_sealed(place: Path) -> tuple[Trace, list[Path]]:
    """What a fold takes from a generation that no record names is not on disk yet."""
    with stores.make(place / "s") as state, traced(place) as trace:
        stores.fold(state, 1)
        with state.begin() as between:
            for name in stores.SHAPES:
                between.write(name, "sum", stores.value(name, 2))
            sealed = between.seal()
        with state.begin(sealed) as transaction:
            for name in stores.SHAPES:
                transaction.keep(name)
            state.commit(transaction, stores.entry(2))
        between.abandon()
        generation = state.path / "generations" / str(state.ledger.head.generation)
    first, record, head = (place / "s" / name for name in ("commits/00000001.json", "commits/00000002.json", "HEAD"))
    trace.whole(generation, before=trace.appeared(record))
    return trace, [first, record, head, head]


def tag(place: Path) -> tuple[Trace, list[Path]]:
    with stores.make(place / "s") as state:
        stores.fold(state, 1)
        with traced(place) as trace:
            state.tag("v1")
    record, head, tags = (place / "s" / name for name in ("commits/00000002.json", "HEAD", "tags/v1.json"))
    assert trace.listed(head, after=trace.appeared(head)) < trace.appeared(tags), "a tag is a record first"
    return trace, [record, head, tags]


def adoption(place: Path) -> tuple[Trace, list[Path]]:
    with stores.make(place / "s") as state:
        before = (place / "s/HEAD").read_bytes()
        stores.fold(state, 1)
    (place / "s/HEAD").write_bytes(before)
    with traced(place) as trace:
        State.open(place / "s", write=True).close()
    record, head = place / "s/commits/00000001.json", place / "s/HEAD"
    assert trace.listed(record) < trace.appeared(head), "the record that was in flight is on disk before HEAD names it"
    return trace, [head]


def push(place: Path) -> tuple[Trace, list[Path]]:
    stores.make(place / "s").close()
    with traced(place) as trace:
        assert Inbox(place / "s").put("a" * 32, PushRecord("org/ft", None, 1.0))
    trace.listed(place / "s/inbox")
    return trace, [place / f"s/inbox/{'a' * 32}.json"]


def cursor(place: Path) -> tuple[Trace, list[Path]]:
    stores.make(place / "s").close()
    with traced(place) as trace:
        save_cursor(place / "s", "hub", {"seen": []})
    trace.listed(place / "s/sources")
    return trace, [place / "s/sources/hub.json"]


def expiry(place: Path) -> tuple[Trace, list[Path]]:
    with stores.make(place / "s") as state:
        for number in (1, 2, 3):
            stores.fold(state, number)
        generations = state.path / "generations"
        with traced(place) as trace:
            gone = state.expire(1)
    assert len(gone) == 2
    away = [generations / f".expired-{name}" for name in gone]
    assert trace.names() == away
    for name, path in zip(gone, away, strict=True):
        synced = [
            i
            for i, e in enumerate(trace.events)
            if e.what == "fsync" and e.path == generations and name not in e.contents
        ]
        assert trace.appeared(path) < synced[0] < trace.removed(path), "its name is gone before anything in it is"
    return trace, []


def merged(place: Path) -> api.Merge:
    base = models.base(place / "base")
    making.init(base, place / "s", making.Recipe(rule="mean"))
    merge = api.open(place / "s", write=True)
    assert merge.fold(models.fine_tune(base, place / "ft", 1)).fate == "folded"
    return merge


def export(place: Path) -> tuple[Trace, list[Path]]:
    with merged(place) as merge, traced(place) as trace:
        merge.export(Target(place / "out", shard_size=4000))
    return trace, [place / "out"]


def adapter(place: Path) -> tuple[Trace, list[Path]]:
    with merged(place) as merge, traced(place) as trace:
        merge.export_lora(LoraTarget(place / "out", 2))
    return trace, [place / "out"]


def current(place: Path) -> tuple[Trace, list[Path]]:
    with merged(place) as merge:

        def write_out(directory: Path) -> Path:
            return merge.export(Target(directory))

        folder.keep_current(place / "link", 1, write_out)
        with traced(place) as trace:
            folder.keep_current(place / "link", 2, write_out)
    directory, link = place / "link-00000002", place / "link"
    assert trace.listed(directory) < trace.appeared(link), "the link points at what is on disk"
    away = next(e for e in trace.events if e.what == "rename" and e.source == place / "link-00000001")
    assert trace.listed(link, after=trace.appeared(link)) < trace.events.index(away) < trace.removed(away.path)
    return trace, [directory, link]


def pause(place: Path) -> tuple[Trace, list[Path]]:
    stores.make(place / "s").close()
    with traced(place) as trace:
        paused.pause(place / "s")
    return trace, [place / "s/paused"]


def canary(place: Path) -> tuple[Trace, list[Path]]:
    with stores.make(place / "s") as state, traced(place) as trace:
        state.canaries.put(CanaryRecord(view=None, seq=0, mark="m", back=None))
    return trace, [place / "s/canaries/merge.json"]


def picture(place: Path) -> tuple[Trace, list[Path]]:
    with merged(place) as merge:
        found = merge.diff("0", "HEAD")
    with traced(place) as trace:
        draw(found, place / "diff.svg")
    return trace, [place / "diff.svg"]


def certificate(place: Path) -> tuple[Trace, list[Path]]:
    with merged(place) as merge:
        commit = merge.unfold(merge.look_unfold("ft"))
        with traced(place) as trace:
            merge.certify(commit.seq, place / "proof.json")
    return trace, [place / "proof.json"]


def copy(place: Path) -> tuple[Trace, list[Path]]:
    with stores.make(place / "s") as state:
        stores.fold(state, 1)
        state.tag("v1")
    made = place / "copy"
    with traced(place) as trace:
        backup(place / "s", made, Wish(copy=True), lambda _what, _done, _all: None)
    (generation,) = (made / "generations").iterdir()
    head = trace.appeared(made / "HEAD")
    for record in (made / "commits").iterdir():
        trace.synced(record, before=head)
        trace.listed(record, before=head)
    trace.listed(generation, before=head)
    partial = trace.appeared(made / "backup.json")
    assert partial < head, "until HEAD is there it is said that the copy is not whole"
    del trace.events[partial]
    return trace, [generation, made / "format.json", made / "tags/v1.json", made / "HEAD"]


def repaired(place: Path) -> tuple[Trace, list[Path]]:
    path = place / "s"
    with stores.make(path) as state:
        stores.fold(state, 1)
        state.tag("v1")
        stores.fold(state, 2)
    for damaged in (path / "commits/00000003.json", path / "tags/v1.json"):
        damaged.write_bytes(b"x")
    with traced(place) as trace:
        repair(path, look(path, lambda _done, _all: None), lambda _done, _all: None)
    (aside,) = path.glob(".repaired-*")
    record, head = path / "commits/00000003.json", path / "HEAD"
    moved = [e for e in trace.events if e.what == "rename" and e.source in (record, path / "tags/v1.json")]
    point = trace.appeared(record)
    for event in moved:
        assert trace.listed(event.path) < point, "the old files are in their place before the record says so"
    generations = [e for e in trace.events if e.what == "rename" and "generations" in e.path.parts]
    assert len(generations) == 1, "that of the record which is lost"
    trace.events = [e for e in trace.events if e not in moved and e not in generations]
    return trace, [aside / "HEAD", path / "tags/v1.json", record, head]


class Write(NamedTuple):
    """A durable write: what does it, which returns the trace and the names that it must make, and the functions of the
    package that it goes through."""

    do: Callable[[Path], tuple[Trace, list[Path]]]
    through: tuple[str, ...]


WRITES = (
    Write(initiation, ("state.store._seal", "state.protocol.append", "state.protocol.write_head")),
    Write(commit, ("state.protocol.append", "state.protocol.write_head")),
    Write(commit_on_sealed, ("state.protocol.append", "state.protocol.write_head")),
    Write(tag, ("state.protocol.write_tag",)),
    Write(adoption, ("state.protocol.write_head",)),
    Write(push, ("state.inbox.put",)),
    Write(cursor, ("state.inbox.save_cursor",)),
    Write(expiry, ("state.disk_holds.mark",)),
    Write(pause, ("state.paused.pause",)),
    Write(canary, ("state.canaries._write",)),
    Write(picture, ("publish.heat_map.draw",)),
    Write(certificate, ("removal.certificate._written",)),
    Write(copy, ("state.backup._begun", "state.backup._records", "state.backup._beside", "state.copying.tree")),
    Write(repaired, ("state.repair._move", "state.protocol.write_tag", "state.protocol.append")),
    Write(export, ("publish.folder.written",)),
    Write(adapter, ("publish.folder.written",)),
    Write(current, ("publish.folder.keep_current", "publish.folder.written", "publish.folder._remove")),
)


@pytest.mark.parametrize("do", [w.do for w in WRITES], ids=lambda do: do.__name__)
def test_contents_then_name_then_directory_then_return(
    tmp_path: Path, do: Callable[[Path], tuple[Trace, list[Path]]]
) -> None:
    trace, names = do(tmp_path)
    for path in names:
        appeared = trace.appeared(path)
        if path.is_dir() and not path.is_symlink():
            trace.whole(path, before=appeared)
        elif not path.is_symlink():
            trace.synced(path, before=appeared)
        trace.listed(path, after=appeared)
    others = [p for p in trace.names() if p not in names and tmp_path / "s/generations" not in p.parents]
    assert others == [], "a name that this test does not ask about"


def test_the_trace_finds_what_is_out_of_order(tmp_path: Path) -> None:
    """The control: the same questions of writes that leave something out."""
    late, never = tmp_path / "late", tmp_path / "never"
    with traced(tmp_path) as trace:
        for path in (late, never):
            path.with_suffix(".tmp").write_text("x")
            path.with_suffix(".tmp").rename(path)
        import os

        fd = os.open(late, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    trace.synced(late, after=trace.appeared(late))
    for path in (late, never):
        with pytest.raises(AssertionError, match="not synced as it is"):
            trace.synced(path, before=trace.appeared(path))
        with pytest.raises(AssertionError, match="was not synced with"):
            trace.listed(path)


def callers(names: set[str]) -> dict[str, set[str]]:
    """The functions of the package, as `room.module.function`, that call one of `names`, and which; durable.py,
    disk.py and storing.py, which call it, aside, and bucket_holds.py, which is for an object store alone. `x.rename` is
    a name with its object, `.rename` one of any object."""
    found: dict[str, set[str]] = {}
    for name, module in house.modules().items():
        if name in [f"continual.state.{own}" for own in ("durable", "disk", "storing", "bucket_holds")]:
            continue
        if not any(n.lstrip(".") in module.text for n in names):
            continue
        for function in (n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
            called = {ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}
            if mine := {c for c in called if c in names or ("." in c and f".{c.split('.')[-1]}" in names)}:
                found[f"{name.removeprefix('continual.')}.{function.name}"] = mine
    return found


def test_every_durable_write_of_the_package_is_in_the_table() -> None:
    found = set(callers(MAKERS))
    assert found == {function for w in WRITES for function in w.through}


def test_nobody_else_syncs_or_renames() -> None:
    calls = {".fsync", ".fdatasync", ".link", ".symlink", ".hardlink_to", ".symlink_to", ".rename"}
    assert callers(calls | {"os.replace", "shutil.move"}) == {
        "state.copying._linked": {"os.link"},  # before the copy's HEAD, with all of the copy
        "state.repair._move": {"storing.rename"},  # of old files, before the record of the repair
        "demo.digits.save": {"temporary.rename"},  # a model that a publisher would write
    }


def test_a_power_cut_at_any_event_of_two_folds_leaves_one_that_was(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    with stores.make(place / "s") as state:
        stores.fold(state, 1)
        start = tree(place)
        with traced(place, trees=True) as trace:
            folded(state, 2)
            state.tag("two")
            folded(state, 4)
            state.expire(1)
    acknowledged = [i for i, e in enumerate(trace.events) if e.what == "rename" and e.path.name == "HEAD"]
    seen = set[int]()
    for number, (event, image) in enumerate(power_cuts(trace, start)):
        cut = tmp_path / f"cut-{number}"
        write(image, place.stat().st_ino, cut)
        with State.open(cut / "s", write=True) as left:
            told = sum(1 for i in acknowledged if i + 1 < event)  # after the rename there is one fsync
            assert 1 + told <= left.ledger.head.seq <= 4, (event, trace.events[event - 1])
            assert verify(left) == [], (event, trace.events[event - 1])
            seen.add(left.ledger.head.seq)
            model = {1: 1, 2: 2, 3: 2, 4: 4}[left.ledger.head.seq]
            np.testing.assert_array_equal(left.read("a.weight", "sum"), stores.value("a.weight", model))
    assert seen == {1, 2, 3, 4}


def test_a_fold_that_cannot_sync_is_not_acknowledged(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
        (tmp_path / "s/commits/00000002.json").write_text("taken")
        with traced(tmp_path) as trace, pytest.raises(Halt):
            folded(state, 2)
    assert [path for path in trace.names() if path.name == "HEAD"] == []
