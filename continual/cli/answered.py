"""What the commands print that a daemon may have done for them: tables and lines out of an answer, which is JSON as
`continual.service.control.acting` makes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

from continual.cli import recorded
from continual.cli.console import say, table
from continual.outside import counted, few_shares
from continual.texts import Json, figure, size

Body: TypeAlias = Mapping[str, Any]


def fields(value: Json) -> Body:
    """An object of an answer."""
    assert isinstance(value, dict)
    return value


def rows(value: Json) -> list[Body]:
    """A list of objects of an answer."""
    assert isinstance(value, list)
    return cast("list[Body]", value)


def rollback(found: Body, *, whole: bool = True) -> None:
    """What going back undid or would undo, and what expired with it; the folds that it is about where `whole`."""
    undone = rows(found["undone"])
    done = found["record"] is not None
    say(f"{'Went' if done else 'Would go'} back to record {found['to']}; {counted(len(undone), 'fold')} undone")
    if undone and whole:
        recorded.many(undone)
    if found["expires"]:
        lost = ranges(runs(found["lost"]))
        say(
            f"{len(found['expires'])} generations {'are gone' if done else 'would go'} with it: "
            f"records {lost} can {'no longer' if done else 'then no longer'} be gone back to"
        )


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers in rising order as the first and the last of each row without a gap."""
    from continual.state.going_back import runs as found

    return list(found(numbers))


def ranges(found: Iterable[Iterable[int]]) -> str:
    """Rows of numbers, as `0, 5 to 9, 12`."""
    pairs = [tuple(pair) for pair in found]
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in pairs) or "none"


def unfold_plan(found: Body) -> None:
    """What taking a model out takes."""
    plan = fields(found["plan"])
    say(
        f"{found['line']}: {size(plan['read_bytes'])} of models to read, "
        f"{size(plan['disk_bytes'])} of disk while it lasts"
    )


def round_told(found: Body) -> None:
    """A round for people."""
    shown = [
        (r["name"], r["fate"], r["reason"], *(figure(r.get(k)) for k in ("score", "change", "error", "z", "weight")))
        for r in rows(found["members"])
    ]
    table(("model", "fate", "reason", "score", "change", "error", "z", "weight"), shown)
    gap = "" if found.get("gap") is None else f", gap {found['gap']:.3g}"
    loss = f"loss {found['before']:.6g} to {found['loss']:.6g}{gap}"
    record = "nothing recorded" if found["record"] is None else f"recorded as record {found['record']}"
    say(f"{loss}; {found['folds']} folded in {found['seconds']:.1f} s; {record}")
    if cut := fields(found.get("cut", {})):
        say(f"cut off to make room, of the square of a model's length: {few_shares(cut)}")


def release_look(found: Body) -> None:
    """What a release would do, and its card."""
    there = "nothing is there yet" if found["there"] is None else f"record {found['there']} is there"
    say(
        f"{'Is out already' if found['out'] else 'Would release'}: record {found['seq']} to {found['repo']}, "
        f"branch {found['branch']} ({there}); {found['licences']['message']}"
    )
    say("")
    say(found["card"], lines=True)


def released(found: Body) -> None:
    """A release that is out."""
    tag = f", tag {found['tag']}" if found["tag"] else ""
    say(f"{'Released' if found['new'] else 'Was out already:'} record {found['seq']} as {found['url']}{tag}")
