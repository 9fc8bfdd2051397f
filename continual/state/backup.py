"""A second directory that holds a state as it was at one record: a backup, which the next call brings up to date, or a
clone, which goes on as a state of its own. The state may be written meanwhile.

Files of generations and records are taken as hard links where that is possible: nobody ever writes into one of them
again. HEAD, format.json, tags, cursors and pushes are written anew, and leases and the lock are left out. HEAD of the
backup is written last: until then the backup is what it was before (FORMAT.md).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from continual.errors import Busy, Damaged, Misconfigured, Retry
from continual.state import framing, opening, protocol, retention, storing, task_inputs
from continual.state import lock as locking
from continual.state.copying import Taking, on_disks
from continual.state.durable import environment
from continual.state.entries import CloneEntry
from continual.state.format import Format
from continual.state.generation import Generation
from continual.state.holding import Lock
from continual.state.names import RECEIPTS
from continual.state.opening import PARTIAL
from continual.state.protocol import Held, Journal
from continual.state.store import State
from continual.state.transaction import room
from continual.state.verify import loose, loose_files, verify
from continual.stores import Where

_COPYING = ".copying-"
_LOOSE = ("inbox", "sources")
_TRIES = 20
"""How often the state is opened again because a writer let what was to be copied expire."""
OnStage = Callable[[str, int, int], None]
"""Is called with what is done (`copy` or `check`), and how many files or arrays of all are done."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How a backup is made. `copy`: no hard links to the state; `check`: every byte of it is read afterwards; `clone`:
    it gets an id of its own; `dry_run`: nothing is written."""

    copy: bool = False
    check: bool = True
    clone: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What was made, or would be: a copy in `directory` of a state at record `head`; `id` is the copy's.

    `records` and `generations` are new in it, `dropped` are generations that neither keeps any more. `linked` files are
    hard links to the state; `copied` have `copied_bytes`. `nbytes` is the size of the new generations, and of inputs of
    tasks.
    """

    directory: Where
    id: str
    head: int
    records: int
    generations: tuple[str, ...]
    dropped: tuple[str, ...]
    nbytes: int
    linked: int = 0
    copied: int = 0
    copied_bytes: int = 0
    checked: bool = False


class _Gone(Exception):
    """A generation that the copy needs has expired meanwhile."""


def backup(path: Where, directory: Where, wish: Wish, progress: OnStage) -> BackupReport:
    """Makes or goes on with a backup of the state in `path`.

    Raises Misconfigured where `directory` holds something else or another history, Busy where another process writes
    there, Damaged where the state or the backup is damaged (then the backup stays as it was), Retry and Halt.
    """
    opening.must_be_apart(directory)
    if directory.resolve() == path.resolve():
        raise Misconfigured(f"{directory} is the state: a backup needs a directory of its own")
    for _ in range(_TRIES):
        with environment("cannot make the backup"), contextlib.suppress(_Gone):
            # cursors first: what they have passed without a record would not be looked at again
            loose_files = {} if wish.clone else _loose_files(path)
            with State.open(path) as source:
                storing.sync(path / "commits")  # the newest record may be in flight: it must not be here and lost there
                return _Copy(source, directory, wish, progress).make(loose_files)
    raise Retry(f"{path} changes faster than it can be copied: try again; nothing was settled")


class _Copy:
    """One backup: `source` is open and stays at the record where it was opened, whatever is written meanwhile."""

    def __init__(self, source: State, directory: Where, wish: Wish, progress: OnStage) -> None:
        self.source = source
        self.directory = directory
        self.wish = wish
        self.progress = progress
        self._lock: Lock | None = None
        self.id = secrets.token_hex(16) if wish.clone else source.id
        self.have = _have(source, directory, wish)
        self.wanted = source.generations()
        # without receipts, the last that is copied, it is half of one; on a store that has its name already
        self.there = {n for n in retention.standing(directory) if (directory / "generations" / n / RECEIPTS).is_file()}
        named = {c.generation for c in source.ledger.log[: self.have + 1]}
        self.left = sorted(self.there - named - set(self.wanted))

    def make(self, loose_files: dict[str, bytes]) -> BackupReport:
        """Makes it. Raises _Gone where the state has to be opened again."""
        ledger = self.source.ledger
        tagged = {ledger.get(seq).generation for seq in ledger.tags.values()}
        kept = {ledger.head.generation, *tagged, *self.wanted}
        new = tuple(name for name in self.wanted if name not in self.there)
        report = BackupReport(
            directory=self.directory,
            id=self.id,
            head=ledger.head.seq,
            records=ledger.head.seq - self.have,
            generations=new,
            dropped=tuple(sorted(self.there - set(self.left) - kept)),
            nbytes=sum(max(0, storing.weight(self.source.path / "generations" / name)) for name in new)
            + self._missing(),
        )
        if self.wish.dry_run:
            return report
        with self._begun() as lock:
            copies = self.wish.copy or not _on_one_disk(self.source.path, self.directory)
            room(self.directory, report.nbytes if copies else 0, "the backup")
            taking = self._generations(new)
            self._records(taking)
            lock.must_hold()  # a later backup may have gone on with it
            if self.have < 0:  # nobody sees it yet, and HEAD makes it whole
                self._beside(loose_files)
                self._head()
            else:  # tags and cursors must not be ahead of the records
                self._head()
                self._beside(loose_files)
            retention.drop(self.directory, report.dropped)
            task_inputs.clear(self.directory, ledger)
        if self.wish.check:
            self._checked()
        return replace(
            report,
            head=ledger.head.seq,
            linked=taking.linked,
            copied=taking.copied,
            copied_bytes=taking.copied_bytes,
            checked=self.wish.check,
        )

    @contextlib.contextmanager
    def _begun(self) -> Iterator[Lock]:
        """Holds the lock of the copy, in which PARTIAL says that it is not whole; what a killed backup left there is
        removed first."""
        directory = self.directory
        for made in storing.made(directory):
            storing.sync(made.parent)
        self._lock = lock = locking.take(directory)
        try:
            if _have(self.source, directory, self.wish) != self.have:
                raise Busy(f"{directory} was written meanwhile: try again")
            storing.replace(directory / PARTIAL, framing.encode({"clone": self.wish.clone, "of": self.source.id})[0])
            for name in opening.DIRECTORIES:
                (directory / name).mkdir(exist_ok=True)
            storing.clear_temporaries(directory)
            opening.cut(directory, self.have)
            if self.have < 0:
                storing.remove(directory / "HEAD")
            for name in _names(directory / "generations"):
                if name in self.left or name not in self.there:
                    storing.remove_tree(directory / "generations" / name)
            yield lock
            storing.remove(directory / PARTIAL)
            storing.sync(directory)
        finally:
            lock.close()

    def _generations(self, new: tuple[str, ...]) -> Taking:
        """Takes the new generations and checks all. Raises Damaged where one is not whole: then HEAD is not written."""
        generations, done = self.source.path / "generations", 0
        total = sum(len(storing.sizes(generations / name)) for name in new)

        def step() -> None:
            nonlocal done
            done += 1
            self.progress("copy", done, max(done, total))

        taking = Taking(not self.wish.copy, step)
        for name in self.wanted:
            if name not in new:
                taking.know(generations / name, self.directory / "generations" / name)
        for name in new:
            self._take(taking, name)
        self._inputs(taking)
        if self.wish.check:
            self._check(taking)
        return taking

    def _missing(self) -> int:
        """Bytes of the inputs of tasks that the copy lacks."""
        kept = [one.task for one in task_inputs.in_force(self.source.ledger)]
        there = set(_names(self.directory / task_inputs.DIRECTORY))
        return sum(task.nbytes for task in kept if task.id not in there)

    def _inputs(self, taking: Taking) -> None:
        """Takes the inputs of tasks that are in force. Those that were read again meanwhile are gone: then the state
        has to be opened again."""
        below = task_inputs.DIRECTORY
        for kept in task_inputs.in_force(self.source.ledger):
            source, target = (place / below / kept.task.id for place in (self.source.path, self.directory))
            if (target / RECEIPTS).is_file():
                continue
            storing.drop_tree(storing.stem(target))
            target.parent.mkdir(exist_ok=True)
            try:
                taking.tree(source, target, f"{_COPYING}{kept.task.id}", RECEIPTS)
            except FileNotFoundError:
                with State.open(self.source.path) as now:
                    if kept.task.id not in {one.task.id for one in task_inputs.in_force(now.ledger)}:
                        raise _Gone from None
                raise Damaged(f"{source} is missing, or not whole: see 'continual verify'") from None
        if (self.directory / below).exists():
            storing.sync(self.directory)
            storing.sync(self.directory / below)

    def _take(self, taking: Taking, name: str) -> None:
        """Takes a generation, which must not expire meanwhile. One that is not needed may have expired before."""
        commit = self.source.ledger.generations[name]
        target = self.directory / "generations"
        try:
            with self.source.lease(commit.seq):
                # who reads a generation holds a lock on its receipts: the copy has readers of its own
                source = self.source.path / "generations" / name
                taking.tree(source, target / name, f"{_COPYING}{name}", RECEIPTS)
        except Misconfigured:
            if name == self.source.ledger.head.generation:
                raise _Gone from None

    def _check(self, taking: Taking) -> None:
        """Reads every byte of the copy's generations. One that was there and is damaged is taken again."""
        arrays, done = sum(len(slots) for slots in self.source.format.slots.values()), 0

        def step() -> None:
            nonlocal done
            done += 1
            self.progress("check", done, max(done, len(self.wanted) * arrays))

        for name in self.wanted:
            directory = self.directory / "generations" / name
            commit = self.source.ledger.generations[name]
            generation = Generation(directory, self.source.format, commit.receipts or "")
            if not directory.exists():
                continue
            findings = list(generation.check(step))
            if findings and name in self.there:
                storing.remove_tree(directory)
                taking.same.clear()
                self._take(taking, name)
                findings = list(Generation(directory, self.source.format, commit.receipts or "").check(step))
            if findings:
                raise Damaged(
                    f"{findings[0]} ({len(findings)} findings): the backup stays at the record where it was; "
                    "'continual verify' says whether the state itself is damaged"
                )
        for name, wrong in task_inputs.findings(self.directory, self.source.format, self.source.ledger).items():
            storing.drop_tree(storing.stem(self.directory / task_inputs.DIRECTORY / name))  # to be taken again
            raise Damaged(f"{wrong[0]}: the backup stays at the record where it was; make it again")

    def _records(self, taking: Taking) -> None:
        for commit in self.source.ledger.log[self.have + 1 :]:
            name = f"commits/{commit.seq:08d}.json"
            taking.file(self.source.path / name, self.directory / name)
        storing.sync_tree(self.directory / "commits")
        storing.sync(self.directory / "generations")
        if self.have < 0:
            storing.replace(self.directory / "format.json", (self.source.path / "format.json").read_bytes())

    def _head(self) -> None:
        """From here on the copy is at the new record."""
        ledger, head = self.source.ledger, self.source.ledger.head
        if self.wish.clone:
            told = f"a clone of the state {self.source.path.absolute()}, record {head.seq}"
            entry = CloneEntry(id=self.id, of=self.source.id, message=told)
            Journal(self.directory, ledger, _silent, self._lock).append(entry, Held(head.generation, head.receipts))
        else:
            protocol.write_head(self.directory, head)

    def _beside(self, files: dict[str, bytes]) -> None:
        """Makes tags, pushes and cursors those of the state."""
        tags = {
            f"tags/{tag}.json": framing.encode({"seq": seq, "tag": tag})[0]
            for tag, seq in self.source.ledger.tags.items()
        }
        for name, data in {**tags, **files}.items():
            (self.directory / name).parent.mkdir(exist_ok=True)
            if not (self.directory / name).exists() or (self.directory / name).read_bytes() != data:
                storing.replace(self.directory / name, data)
        for kind in ("tags", *_LOOSE):
            for file in loose_files(self.directory / kind):
                if f"{kind}/{file.name}" not in {**tags, **files}:
                    storing.remove(file)

    def _checked(self) -> None:
        """Opens the copy and reads all but its generations, which were read before. Raises Damaged."""
        with State.open(self.directory) as copy:
            if findings := verify(copy, generations=False):
                raise Damaged(f"the backup is not whole: {findings[0]} ({len(findings)} findings)")


def _have(source: State, directory: Where, wish: Wish) -> int:
    """The newest record that the backup in `directory` has, −1 where there is none yet. Raises Misconfigured where
    something else is there, Damaged."""
    if not directory.exists():
        return -1
    if not directory.is_dir():
        raise Misconfigured(f"{directory} is no directory")
    names = {name for name in _names(directory) if name != "lock" and not name.startswith(f".{PARTIAL}.")}
    if not names or (PARTIAL in names and "HEAD" not in names):
        return -1
    if wish.clone and PARTIAL in names and framing.decode(directory / PARTIAL)[0].get("clone") is True:
        return -1
    if "format.json" not in names:
        raise Misconfigured(f"{directory} is not empty, and no backup: name another directory")
    form = Format.of(framing.decode(directory / "format.json")[0], directory / "format.json")
    if wish.clone:
        raise Misconfigured(f"{directory} is a state already: a clone needs a directory of its own")
    if form != source.format:
        raise Misconfigured(f"{directory} holds another state ({form.id[:12]}): name another directory")
    if wish.copy and _are_links(source.path, directory):
        raise Misconfigured(f"{directory} was made with hard links: copies need a directory of their own")
    head = protocol.read_head(directory)
    if head.seq >= len(source.ledger.log) or source.ledger.get(head.seq).crc != head.crc:
        raise Misconfigured(
            f"{directory} is at record {head.seq} of another history: this state was restored or repaired since, or "
            "the other one went on; name another directory, and keep this one until you know which of them is right"
        )
    return head.seq


def _are_links(path: Where, directory: Where) -> bool:
    """Whether any record of the copy is a hard link to the state's."""
    disks = on_disks(path / "commits", directory / "commits")
    if disks is None:
        return False
    files = [disks[0] / name for name in _names(disks[1])]
    return any(file.exists() and file.samefile(disks[1] / file.name) for file in files)


def _on_one_disk(path: Where, directory: Where) -> bool:
    disks = on_disks(path, directory)
    return disks is not None and disks[0].stat().st_dev == disks[1].stat().st_dev


def _loose_files(path: Where) -> dict[str, bytes]:
    """The pushes and cursors of the state in `path`, by path below it. Raises Damaged."""
    found = {}
    for name in _LOOSE:
        for file in loose_files(path / name):
            with contextlib.suppress(FileNotFoundError):  # settled meanwhile
                data = file.read_bytes()
                loose(file)
                found[f"{name}/{file.name}"] = data
    return found


def _names(directory: Where) -> list[str]:
    return storing.names(directory)


def _silent(_step: str) -> None:
    pass
