"""Opening a state: what a directory must hold to be one, or to become one, and its commit log, checked record by
record. What may stand above HEAD, and when it counts, is in adoption.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from continual.errors import ContinualError, Damaged, Misconfigured, Retry
from continual.state import adoption, excerpts, framing, predecessors, protocol, storing
from continual.state.durable import usable
from continual.state.format import Commit, Format
from continual.state.generation import Generation
from continual.state.ledger import Ledger
from continual.state.protocol import Head
from continual.stores import Where

DIRECTORIES = ("commits", "generations", "tags", "leases")
PARTIAL = "backup.json"
"""The file that is in a backup while it is made: of its records only those up to HEAD count then."""
_READS = 50
"""How often the log is read again because a writer went on meanwhile."""


class Loaded(NamedTuple):
    """What the commit log says: the ledger, and the number of the record that HEAD names."""

    ledger: Ledger
    acknowledged: int


def unfinished(path: Where) -> bool:
    """Whether a directory without format.json holds no more than a killed `create` leaves. Its hidden files do not
    count: they are temporary."""
    return {"00000000.json"}.issuperset(_listed(path / "commits")) and not _listed(path / "generations")


def must_be_free(path: Where) -> None:
    """Raises Misconfigured unless a state can be made in `path`, where what a killed `create` left may lie."""
    must_be_apart(path)
    with usable(f"cannot look into {path}"):
        if not path.exists():
            return
        found = (
            {name for name in storing.names(path) if name != "FORMAT.md" and not name.startswith(".")}
            if path.is_dir()
            else {path.name}
        )
        if "format.json" in found:
            raise Misconfigured(f"{path} already is a state: open it, or name another directory")
        if found and not (path.is_dir() and found <= {*DIRECTORIES, "HEAD", "lock"} and unfinished(path)):
            raise Misconfigured(f"{path} is not empty: a state needs a directory of its own")


def must_be_apart(path: Where) -> None:
    """Raises Misconfigured where `path` lies in a state: what no record of that names may be deleted there. Above what
    this user may see no state is looked for."""
    with usable(f"cannot look into {path}"):
        for above in path.resolve().parents:
            with contextlib.suppress(PermissionError):
                if (above / "format.json").exists() and (above / "commits").exists():
                    raise Misconfigured(f"{path} lies in the state {above}: name a directory outside of it")


def clear(path: Where) -> None:
    """Removes what a killed `create` left in `path`, which `must_be_free` has looked into. Raises OSError."""
    storing.remove(path / "HEAD")
    if (path / "commits").exists():
        storing.remove_tree(path / "commits")
    storing.clear_temporaries(path)


def read_format(path: Where) -> tuple[Format, str]:
    """What format.json of the state in `path` says, and its CRC. Raises Misconfigured if there is no state, Damaged,
    Retry."""
    file = path / "format.json"
    with usable(f"cannot open the state {path}"):
        if (path / PARTIAL).exists() and not (path / "HEAD").exists():
            raise Misconfigured(f"{path} is a backup that was not completed: make it again with 'continual backup'")
        if not file.exists():
            if (path / "commits").is_dir() and not unfinished(path):
                raise Damaged(f"{file} is missing; restore it from a backup")
            raise Misconfigured(f"no state in {path}: make one with 'continual init BASE --state {path}'")
    body, checksum = framing.decode(file)
    return Format.of(body, file), checksum


def complete(path: Where) -> None:
    """Makes the directories that a state has and that a backup or git left out because they were empty. Raises
    OSError."""
    for name in DIRECTORIES:
        (path / name).mkdir(exist_ok=True)


def cut(path: Where, last: int) -> None:
    """Removes the records after `last` from the copy of a state: a backup that was killed left them, and HEAD does not
    name them yet. Raises OSError."""
    for name in _listed(path / "commits"):
        if name > f"{last:08d}.json":
            storing.remove(path / "commits" / name)


def whole_again(path: Where, ledger: Ledger) -> None:
    """Makes a state of its own of a backup in which a later one was killed: it is as HEAD says. Raises OSError and
    Halt."""
    if not (path / PARTIAL).exists():
        return
    cut(path, ledger.head.seq)
    storing.sync(path / "commits")
    for tag, seq in ledger.tags.items():
        with contextlib.suppress(Damaged):  # an altered file is for `verify` to report
            if not protocol.tag_stands(path, tag, seq):
                protocol.write_tag(path, tag, seq)
    storing.remove(path / PARTIAL)


@contextlib.contextmanager
def way_out() -> Iterator[None]:
    """Around the opening of a state for a person: a Damaged says how to find out what is whole."""
    try:
        yield
    except Damaged as error:
        raise Damaged(f"{error}. 'continual repair --dry-run' says what is whole") from error


def load(path: Where, form: Format, checksum: str) -> Loaded:
    """Replays the commit log of the state in `path`, up to a record whose generation is there and has its receipts.
    `checksum` is that of format.json.

    Raises Damaged for a missing HEAD, record or generation in force, a gap, a broken chain of checksums, records above
    HEAD that cannot be adopted, and a format.json that is not the one the log began with. A writer may go on meanwhile:
    then HEAD, what was listed or the generation in force is older than what else is there, and what is new is read,
    too. Raises Retry where the writer is always faster.
    """
    read: dict[str, Commit] = {}
    for _ in range(_READS):
        head, names = protocol.read_head(path), _listed(path / "commits")
        if len(names) > head.seq + 2 and protocol.read_head(path) != head:
            continue  # records were added between the two looks
        try:
            ledger = _replayed(path, head, names[: head.seq + 1] if _is_partial(path) else names, read)
            adoption.bound(path, ledger, checksum)
            adoption.check(path, form, ledger.log, head.seq)
            _in_force(path, form, ledger.head)
        except (Damaged, Misconfigured):
            if _listed(path / "commits") == names:
                raise
            continue  # it expired between the two looks, or records were added while they were listed
        return Loaded(ledger, head.seq)
    raise Retry(f"{path} changes faster than it can be opened: try again")


def _is_partial(path: Where) -> bool:
    """Whether the state is a backup under way, of which nothing above HEAD counts."""
    with usable(f"cannot open the state {path}"):
        return (path / PARTIAL).exists()


def _in_force(path: Where, form: Format, commit: Commit) -> None:
    """Raises Damaged unless the generation of `commit` is there with its receipts."""
    if commit.generation is None:
        return
    directory = path / "generations" / commit.generation
    with contextlib.suppress(Misconfigured):
        Generation(directory, form, commit.receipts or "").load()
        return
    raise Damaged(f"{directory} is missing, and it is the generation in force; restore it from a backup")


def _listed(directory: Where) -> list[str]:
    """The names in `directory` but hidden ones, in order; none where it is not there."""
    with usable(f"cannot open the state {directory.parent}"), contextlib.suppress(FileNotFoundError):
        return [name for name in storing.names(directory) if not name.startswith(".")]
    return []


def _missing(path: Where, head: Head, names: list[str]) -> str:
    return (
        f"{path / 'commits'}: HEAD is at record {head.seq} and {len(names)} files are there: "
        "records are missing; restore from a backup"
    )


def _replayed(path: Where, head: Head, names: list[str], read: dict[str, Commit]) -> Ledger:
    """The records in the files `names`, each of which must follow the one before it; those that excerpts are of are not
    read, unless what the excerpts say cannot be. `read` has those that were read before, and gets the others: a record
    never changes. Raises Damaged."""
    if names != [f"{seq:08d}.json" for seq in range(len(names))] or not head.seq < len(names):
        raise Damaged(_missing(path, head, names))
    commits = storing.stem(path / "commits")

    def record(seq: int) -> Commit:
        name = names[seq]
        found = read.get(name)
        if found is None:
            file = storing.below(commits, name)
            found = read[name] = Commit.of(*framing.decode(file), file)
        return found

    sealed = excerpts.believed(path, head.seq, head.crc, record)
    _ahead(path / "commits", [name for seq, name in enumerate(names) if seq not in sealed and name not in read], read)
    try:
        return _chained(path, head, len(names), lambda seq: sealed.get(seq) or record(seq))
    except Damaged:
        if not sealed:
            raise
        return _chained(path, head, len(names), record)


def _ahead(commits: Where, names: list[str], read: dict[str, Commit]) -> None:
    """Reads records, on an object store several at a time. One that cannot be read is met again, and told, in its
    turn."""
    stem = storing.stem(commits)

    def one(name: str) -> Commit | None:
        with contextlib.suppress(ContinualError):
            file = storing.below(stem, name)
            return Commit.of(*framing.decode(file), file)
        return None

    found = list(storing.each((commits,), one, names))
    read |= {name: commit for name, commit in zip(names, found, strict=True) if commit is not None}


def _chained(path: Where, head: Head, count: int, record: Callable[[int], Commit]) -> Ledger:
    """So many records, one after the other. Raises Damaged."""
    ledger, commits = Ledger(), storing.stem(path / "commits")
    for seq in range(count):
        commit = record(seq)
        predecessors.must_follow(ledger, commit, storing.below(commits, f"{seq:08d}.json"))
        ledger.add(commit)
    _ = ledger.head.entry  # the newest is read in any case
    if ledger.get(head.seq).crc != head.crc:
        raise Damaged(
            f"{path / 'HEAD'} names another record {head.seq} than the one in commits/: restore from a backup"
        )
    return ledger
