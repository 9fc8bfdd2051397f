"""What is damaged in a state, and what is whole: read file by file, without a guess. Nothing is written here; what is
done about it is in repair.py."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from continual.errors import ContinualError, Damaged, Misconfigured
from continual.state import adoption, framing, predecessors, protocol, storing, task_inputs
from continual.state.entries import CombineEntry, RepairEntry, SelectEntry, TagEntry
from continual.state.format import Commit, Format
from continual.state.generation import Generation
from continual.state.ledger import Ledger, same
from continual.state.opening import PARTIAL
from continual.state.protocol import Head
from continual.state.strays import ASIDE
from continual.state.verify import OnPart, loose, tag_finding
from continual.stores import Where


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What is damaged in a state, and what following the rest comes to. Nothing is damaged where `findings` is empty.

    `last` is the newest record that an unbroken chain leads to, `to` the newest up to it whose generation is whole: its
    merge is in force afterwards. `lost` has a line for each record after `last`, and for each push or cursor that
    cannot be read; `undone` the folds up to `last` that go with the way back to `to`, `again` those that come back with
    it. `tags` go because their generations are not whole. `generations` can no longer be gone back to. `aside`: the
    files and directories that are moved; `tag_files` are written anew; `inputs` of tasks are not whole, and no longer
    in force.
    """

    findings: tuple[str, ...]
    last: int
    to: int
    lost: tuple[str, ...] = ()
    undone: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    generations: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    tag_files: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def loses(self) -> bool:
        """Whether anything goes that the records know of."""
        return bool(self.lost or self.undone or self.tags or self.generations)


class Inspection:
    """What is whole in the state in `path`. `ledger` has the records up to the last that an unbroken chain leads to;
    `unfinished` is the directory of a repair that was killed."""

    def __init__(self, path: Where, progress: OnPart) -> None:
        self.path = path
        self.findings: list[str] = []
        self.lost: list[str] = []
        self.aside: list[str] = []
        _must_be_readable(path)
        self.form, checksum = _format(path)
        self.ledger = self._chain()
        _bound(path, self.ledger, checksum)
        self.acknowledged = self.last
        named = {c.entry.aside for c in self.ledger.log if isinstance(c.entry, RepairEntry)}
        dirs = [path / d for d in storing.names(path) if d.startswith(ASIDE) and d not in named]
        dirs = [d for d in dirs if d.is_dir()]
        self.unfinished = dirs[-1] if dirs else None
        if self.unfinished is not None:
            self.findings.append(f"{self.unfinished}: a repair was not completed")
        self._after()
        broken = self._generations(progress)
        self.plan = self._planned(broken)

    @property
    def last(self) -> int:
        return len(self.ledger.log) - 1

    def _chain(self) -> Ledger:
        """The records that follow each other from the first. Raises Damaged where there is none."""
        ledger = Ledger()
        limit = self._limit()
        while limit is None or len(ledger.log) <= limit:
            try:
                file = self.path / "commits" / _file(len(ledger.log))
                commit = Commit.of(*framing.decode(file), file)
                predecessors.must_follow(ledger, commit, file)
            except (ContinualError, OSError) as error:
                self._broken_off(error, len(ledger.log))
                break
            ledger.add(commit)
        if not ledger.log:
            raise Damaged(
                f"{self.path} cannot be repaired: {self.findings[-1] if self.findings else 'there is no record'}; "
                "every record follows from the first one: copy commits/00000000.json from a backup of this state, then "
                "look again"
            )
        return ledger

    def _broken_off(self, error: Exception, seq: int) -> None:
        """The chain ends before record `seq`: it is the end where no file has a number from there on."""
        file = self.path / "commits" / _file(seq)
        if file.exists():
            self.findings.append(str(error))

    def _limit(self) -> int | None:
        """In a backup that was not completed, records after HEAD do not count."""
        with contextlib.suppress(ContinualError):
            return protocol.read_head(self.path).seq if (self.path / PARTIAL).exists() else None
        return None

    def _head(self) -> Head | None:
        """What HEAD says; None where it cannot be read."""
        try:
            return protocol.read_head(self.path)
        except (ContinualError, OSError) as error:
            self.findings.append(str(error))
        return None

    def _is_old(self, head: Head | None) -> bool:
        """Whether HEAD is what it was before the newest record, a repair that was killed before it replaced HEAD."""
        newest = self.ledger.head.entry
        if not isinstance(newest, RepairEntry) or (head is not None and self._names(head)):
            return False
        return _bytes(self.path / "HEAD") == _bytes(self.path / newest.aside / "HEAD")

    def _names(self, head: Head) -> bool:
        """Whether HEAD names a record of the chain."""
        return head.seq <= self.last and self.ledger.get(head.seq).crc == head.crc

    def _after(self) -> None:
        """What stands after the chain: records that are lost, and files in commits/ that are none."""
        head, last, commits = self._head(), self.last, self.path / "commits"
        if self._is_old(head):
            self.findings.append(f"{self.path / 'HEAD'}: record {last}, a repair, was not completed")
            head = Head(last, self.ledger.head.crc)
        elif head is not None and self._names(head):
            self.acknowledged = head.seq
            try:
                adoption.check(self.path, self.form, self.ledger.log, head.seq)
            except ContinualError as error:
                self.findings.append(str(error))
        acknowledged = last if head is None else head.seq
        files = {name: commits / name for name in _visible(commits)}
        aside = self.unfinished / "commits" if self.unfinished else None
        beside = {name: aside / name for name in _visible(aside)} if aside else {}
        limit = self._limit()
        numbers = {int(name[:-5]) for name in {**beside, **files} if _is_record(name)} | set(range(acknowledged + 1))
        for seq in sorted(n for n in numbers if n > last and (limit is None or n <= limit)):
            name = _file(seq)
            if name not in files and name not in beside:
                self.findings.append(f"{commits / name} is missing")
            self.lost.append(f"record {seq}: {_told(files.get(name) or beside.get(name))}")
        if self.lost and _file(last + 1) not in files and not self.findings:
            self.findings.append(f"{commits / _file(last + 1)} is missing")
        for name in sorted(files):
            if not _is_record(name):
                self.findings.append(f"{files[name]} is no record")
            if not _is_record(name) or int(name[:-5]) > last:
                self.aside.append(f"commits/{name}")
        if head is None:
            self.lost.append(f"HEAD: whether there were records after {max([last, *numbers])} cannot be known")
        elif head.seq <= last and not self._names(head):
            self.findings.append(f"{self.path / 'HEAD'} names another record {head.seq} than the one in commits/")
            self.lost.append(f"record {head.seq} with the checksum {head.crc}, which HEAD names: it is not there")

    def _generations(self, progress: OnPart) -> dict[str, str]:
        """Reads all generations that are there; of those that are not whole, what is wrong."""
        receipts = {name: c.receipts or "" for name, c in self.ledger.generations.items()}
        there = [name for name in _visible(self.path / "generations") if name in receipts]
        arrays, done = sum(len(slots) for slots in self.form.slots.values()), 0

        def step() -> None:
            nonlocal done
            done += 1
            progress(done, len(there) * arrays)

        broken = {}
        for name in there:
            found = list(Generation(self.path / "generations" / name, self.form, receipts[name]).check(step))
            if found:
                broken[name] = found[0]
                self.findings += found
                self.aside.append(f"generations/{name}")
        for name in receipts.keys() - set(there):
            broken[name] = "is not there"
        return broken

    def _planned(self, broken: dict[str, str]) -> RepairPlan:
        ledger, last = self.ledger, self.last
        to = next((seq for seq in range(last, -1, -1) if ledger.get(seq).generation not in broken), None)
        if to is None:
            raise Damaged(f"{self.path} cannot be repaired: the generation of no record is whole")
        if to < last and f"generations/{ledger.head.generation}" not in self.aside:
            self.findings.append(f"generation {ledger.head.generation}, the one in force, is missing")
        tags = self._tags(broken)
        self._loose()
        inputs = self._inputs()
        now, then = ledger.folds(), ledger.folds(to)
        kept, before = {same(fold) for fold in then}, {same(fold) for fold in now}
        gone = [name for name in broken if f"generations/{name}" in self.aside or name == ledger.head.generation]
        if self.unfinished is not None:
            gone += [name for name in _visible(self.unfinished / "generations") if name in broken]
        if self.lost:  # of the records that are lost, or of a fold that was not committed: never deleted
            left = [name for name in _visible(self.path / "generations") if name not in ledger.generations]
            self.aside += [f"generations/{name}" for name in left]
        if (self.path / PARTIAL).exists():
            self.aside.append(PARTIAL)
        if (self.path / "HEAD").is_dir():
            self.aside.append("HEAD")
        rewritten = tuple(sorted(tag for tag in ledger.tags if f"tags/{tag}.json" in tags.bad and tag not in tags.gone))
        return RepairPlan(
            findings=tuple(self.findings),
            last=last,
            to=to,
            lost=tuple(self.lost),
            undone=tuple(f"record {f.seq}: {f.entry.candidate.name}" for f in now if same(f) not in kept),
            again=tuple(f"record {f.seq}: {f.entry.candidate.name}" for f in then if same(f) not in before),
            tags=tags.gone,
            generations=tuple(sorted(set(gone))),
            aside=tuple(sorted(self.aside)),
            tag_files=rewritten,
            inputs=inputs,
        )

    def _tags(self, broken: dict[str, str]) -> _Tags:
        """Tags whose generation is not whole, and files of tags that are not as the ledger has them."""
        ledger = self.ledger
        gone = tuple(sorted(t for t, seq in ledger.tags.items() if ledger.get(seq).generation in broken))
        bad = set()
        for tag, seq in ledger.tags.items():
            file = self.path / "tags" / f"{tag}.json"
            if tag in gone:
                self.findings.append(f"generation {ledger.get(seq).generation} is tagged {tag}, but not whole")
            elif _stands(self.path, tag, seq):
                continue
            elif finding := tag_finding(self.path, ledger, self.acknowledged, tag):
                self.findings.append(finding)
            # one that was in flight is no finding, and is written all the same: the repair is the newest record then
            bad.add(f"tags/{tag}.json")
            if file.exists():
                self.aside.append(f"tags/{tag}.json")
        if self.lost:
            names = [name for name in _visible(self.path / "tags") if name.removesuffix(".json") not in ledger.tags]
            self.aside += [f"tags/{name}" for name in names if name.endswith(".json")]
        return _Tags(gone, bad)

    def _loose(self) -> None:
        """Pushes and cursors that cannot be read."""
        for kind, what in (("inbox", "a push"), ("sources", "a cursor: its source is asked for everything again")):
            for name in _visible(self.path / kind):
                try:
                    loose(self.path / kind / name)
                except (ContinualError, OSError) as error:
                    self.findings.append(str(error))
                    self.lost.append(f"{kind}/{name}: {what}")
                    self.aside.append(f"{kind}/{name}")

    def _inputs(self) -> tuple[str, ...]:
        """The directories of the inputs of tasks that are not whole."""
        found = task_inputs.findings(self.path, self.form, self.ledger)
        words = {one.task.id: one.words for one in task_inputs.in_force(self.ledger)}
        for name, wrong in found.items():
            self.findings += wrong
            self.lost.append(f"{task_inputs.DIRECTORY}/{name}: the inputs of {words[name]}, which can be read again")
            if (self.path / task_inputs.DIRECTORY / name).exists():
                self.aside.append(f"{task_inputs.DIRECTORY}/{name}")
        return tuple(sorted(found))


@dataclass(frozen=True, slots=True)
class _Tags:
    """Tags that go, and the files of those that are not as the ledger has them."""

    gone: tuple[str, ...]
    bad: set[str] = field(default_factory=set)


def _must_be_readable(path: Where) -> None:
    """Raises Misconfigured where a file may not be read: it says nothing of what is in it, and nothing is to be given
    up for it. Raises OSError."""
    for file in storing.unreadable(path, ("format.json", "HEAD", "commits", "generations", "tags")):
        raise Misconfigured(f"{file}: permission denied, so whether it is whole is not known: run as its owner")


def _format(path: Where) -> tuple[Format, str]:
    """What format.json says, and its CRC. Raises Damaged."""
    file = path / "format.json"
    try:
        body, checksum = framing.decode(file)
        return Format.of(body, file), checksum
    except (ContinualError, OSError) as error:
        raise Damaged(
            f"{path} cannot be repaired: {error}. It holds the hashes of the base, the kinds of its tensors and the "
            "rule, and nothing else in the state has them. It never changes: copy format.json from any backup of this "
            "state, then look again"
        ) from None


def _bound(path: Where, ledger: Ledger, checksum: str) -> None:
    """Raises Damaged where format.json is not the one of the ledger."""
    try:
        adoption.bound(path, ledger, checksum)
    except Damaged as error:
        raise Damaged(f"{path} cannot be repaired: {error}, then look again") from None


def _stands(path: Where, tag: str, seq: int) -> bool:
    """Whether the file of a tag is there and says what the ledger says."""
    with contextlib.suppress(ContinualError, OSError):
        return protocol.tag_stands(path, tag, seq)
    return False


def _bytes(file: Where) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _file(seq: int) -> str:
    return f"{seq:08d}.json"


def _is_record(name: str) -> bool:
    return name.endswith(".json") and name[:-5].isascii() and name[:-5].isdigit() and name == _file(int(name[:-5]))


def _visible(directory: Where) -> list[str]:
    """The names in a directory but hidden ones; none where it is not there."""
    return [name for name in storing.names(directory) if not name.startswith(".")]


def _told(file: Where | None) -> str:
    """What a record that is lost said."""
    if file is None:
        return "is missing"
    try:
        body, checksum = framing.decode(file)
        entry = Commit.of(body, checksum, file).entry
    except (ContinualError, OSError):
        return "cannot be read"
    if entry.candidate is not None:
        return f"{entry.kind} of {entry.candidate.name}" + (f" ({entry.reason})" if entry.reason else "")
    if isinstance(entry, TagEntry):
        return f"tag {entry.tag}"
    if isinstance(entry, CombineEntry | SelectEntry):
        names = [fold.candidate.name for fold in entry.folds or ()]
        fates = [f"{row.name} {row.fate}" for row in (entry.scores if isinstance(entry, SelectEntry) else ())]
        return f"{entry.kind} of {', '.join([*names, *fates]) or 'nothing'}"
    return f"{entry.kind}" + (f": {entry.message}" if entry.message else "")
