"""`State`: a directory opened for reading or writing, and everything that changes it. How a record gets to disk is in
protocol.py, what expires in retention.py, what happened so far in ledger.py; FORMAT.md has every byte."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from continual.errors import Halt, Misconfigured, Retry
from continual.state import adoption, arrays, framing, names, opening, retention, storing, task_inputs
from continual.state import lock as locking
from continual.state.arrays import Array
from continual.state.canaries import Canaries
from continual.state.durable import environment, usable
from continual.state.entries import Entry, InitEntry, RollbackEntry, TagEntry
from continual.state.format import Commit, Format
from continual.state.generation import Generation
from continual.state.holding import Lock
from continual.state.ledger import Ledger
from continual.state.protocol import Held, Journal, OnStep
from continual.state.publications import Publications
from continual.state.transaction import Transaction, room
from continual.stores import Where

if TYPE_CHECKING:
    import zarr

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class State:
    """An open state. Make one with `State.create`, open it with `State.open`; a context manager.

    Reading is safe from several threads and beside a writer in another process; one process at a time opens it for
    writing.
    """

    def __init__(self, path: Where, form: Format, ledger: Ledger, lock: Lock | None, on_step: OnStep) -> None:
        self.path = path
        self.format = form
        self.orphans: tuple[str, ...] = ()
        self.adopted: tuple[int, ...] = ()
        self.acknowledged = -1
        self.ledger = ledger
        self.publications = Publications(ledger.log)
        self.canaries = Canaries(path)
        self._lock = lock
        self.on_step = on_step
        self._journal = Journal(path, ledger, on_step, lock)
        self._open: dict[str, Generation] = {}

    @classmethod
    def create(cls, path: Where, form: Format, *, read: Mapping[str, object], device: str) -> State:
        """Makes a state of the format `form` in `path`, which must be absent or empty (hidden files, FORMAT.md and what
        a killed `create` left aside), and opens it for writing. `read` are its first read-time options.

        Raises Misconfigured if something is there or cannot be, Busy if another process makes one there, Retry if the
        disk gets in the way, Refuse for tensor names that cannot be stored.
        """
        opening.must_be_free(path)
        for tensor in form.tensors:
            names.encode(tensor.name)
        data, checksum = framing.encode(form.body())
        with usable(f"cannot make a state in {path}"):
            made = storing.made(path)
            state = cls(path, form, Ledger(), locking.take(path), _nothing)
            try:
                opening.must_be_free(path)  # another process may have made one before the lock was taken
                opening.clear(path)
                opening.complete(path)
                state._journal.append(InitEntry(read=read, device=device, format=checksum), Held())
                state._journal.mend()
                _seal(path / "format.json", data, state._journal.must_hold)
                for directory in made:
                    storing.sync(directory.parent)
            except BaseException:
                state.close()
                raise
        return state

    @classmethod
    def open(cls, path: Where, *, write: bool = False, on_step: OnStep | None = None) -> State:
        """Opens the state in `path`. For writing it takes the lock, acknowledges the records that a writer left above
        HEAD, makes directories that a backup left out, and removes orphans.

        Raises Misconfigured if there is none or it is read-only, Busy if another process writes, Damaged for anything
        that is not as it was written, Retry if the disk gets in the way.
        """
        form, checksum = opening.read_format(path)
        lock = locking.take(path) if write else None
        try:
            ledger, acknowledged = opening.load(path, form, checksum)
            state = cls(path, form, ledger, lock, on_step or _nothing)
            state.acknowledged = acknowledged
            state.adopted = tuple(range(acknowledged + 1, len(ledger.log)))
            with environment(f"cannot open the state {path}"):
                unnamed = (retention.dead if write else retention.unnamed)(path, ledger)
            state.orphans = retention.orphans(unnamed)
            if write:
                state._complete(unnamed)
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        return state

    def _complete(self, unnamed: list[str]) -> None:
        """Makes up for what the last writer could not do. What it left goes first: that may make room for the rest."""
        retention.clear(self.path, self.ledger, unnamed)
        task_inputs.clear(self.path, self.ledger)
        with environment(f"cannot open {self.path} for writing"):
            opening.complete(self.path)
            opening.whole_again(self.path, self.ledger)
        adoption.make_durable(self.path, self.ledger.log, self.acknowledged)
        self._journal.settle(self.acknowledged)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def behind(self) -> str | None:
        """What could not be written after records that stand, in words; None where all is. The next write begins with
        it."""
        return self._journal.behind

    @property
    def id(self) -> str:
        """Tells the state from every other: a clone has one of its own."""
        return self.ledger.id or self.format.id

    def begin(self, after: Generation | Literal["now"] | None = "now", writes: int | None = None) -> Transaction:
        """Begins a fold, on the generation in force or on `after` (None: on zeros). Raises Retry if the disk has no
        room for the bytes that it `writes` (None: a whole generation)."""
        self.must_be_writable()
        self._journal.mend()
        self.on_step("begin")
        room(self.path, self.format.generation_bytes if writes is None else writes)
        head = self.ledger.head
        before = self._generation(head) if isinstance(after, str) else after
        transaction = Transaction(self.path / "generations", self.format, before, head.generation, self.on_step)
        self.on_step("chunks")
        return transaction

    def commit(self, transaction: Transaction, entry: Entry) -> Commit:
        """Puts the generation that `transaction` wrote in force, with a record of `entry`. Returns only when both are
        on disk.

        Raises Retry (nothing settled) if the disk or another writer got in the way, Halt if an fsync failed.
        """
        self.must_be_writable()
        generation = transaction.sync()
        if self.ledger.head.generation != transaction.in_force:
            raise Retry("another fold was committed meanwhile; nothing was settled")
        try:
            return self._journal.append(entry, Held(transaction.id, generation.checksum))
        except Halt:  # whether the record stands may be unknown: then what it names must stay
            transaction.committed()
            raise
        except Exception:
            raise
        except BaseException:  # an interrupt may come between the record and its place in the ledger: the next opening
            transaction.committed()  # for writing adopts the record, or removes what none names
            raise
        finally:  # whatever fails once the record stands, it names this generation
            if self.ledger.head.generation == transaction.id:
                transaction.committed()

    def record(self, entry: Entry, generation: Generation | Literal["now"] | None = "now") -> Commit:
        """Adds a record that writes no tensor: the generation in force stays so, or `generation` is (None: zeros).
        Durable when it returns. Raises Retry, Halt."""
        self.must_be_writable()
        if isinstance(generation, str):
            return self._journal.append(entry, Held(self.ledger.head.generation, self.ledger.head.receipts))
        if generation is None:
            return self._journal.append(entry, Held())
        return self._journal.append(entry, Held(generation.directory.name, generation.checksum))

    def generation_of(self, commit: Commit) -> Generation | None:
        """The generation of a record, None where it holds nothing. Raises Misconfigured if it has expired."""
        generation = self._generation(commit)
        if generation is not None:
            generation.load()
        return generation

    def rollback(self, seq: int, because: str | None = None) -> Commit:
        """Puts the generation of record `seq` in force again; `because`: why, for the record. Raises Misconfigured if
        it has expired."""
        self.must_be_writable()
        target = self.ledger.get(seq)
        self.generation_of(target)
        said = f"back to record {seq}{f': {because}' if because else ''}"
        entry = RollbackEntry(to=seq, undone=len(self.ledger.undone(seq)), message=said)
        return self._journal.append(entry, Held(target.generation, target.receipts))

    def tag(self, name: str, seq: int | None = None, *, force: bool = False) -> Commit:
        """Names record `seq` (default: the newest), so that its generation does not expire. A tag that names another
        record is only moved by `force`. Raises Misconfigured for that, for a bad name and for an expired record."""
        self.must_be_writable()
        target = self.ledger.get(self.ledger.head.seq if seq is None else seq)
        self.generation_of(target)
        _may_name(self.ledger, name, target, force=force)
        return self.record(TagEntry(tag=name, of=target.seq))

    def read(self, name: str, slot: str, at: int | None = None) -> Array:
        """An accumulator in force now or at record `at`, checked against its receipt; zeros before the first fold."""
        generation = self._generation(self.ledger.head if at is None else self.ledger.get(at))
        if generation is None:
            return arrays.nothing(self.format.slots[name][slot])
        return generation.read(name, slot)

    def group(self, at: int | None = None) -> zarr.Group:
        """The generation of record `at` (default: the newest) as zarr-python opens it, read-only. Raises Misconfigured
        before the first fold."""
        commit = self.ledger.head if at is None else self.ledger.get(at)
        if commit.generation is None:
            raise Misconfigured(f"record {commit.seq}: nothing is folded yet, so there is no generation to open")
        return storing.zarr_group(self.path / "generations" / commit.generation)

    def generations(self) -> list[str]:
        """The generations on disk that a record names, in order of their names."""
        with environment(f"cannot look into {self.path}"):
            return retention.kept(self.path, self.ledger)

    def generation_bytes(self) -> int:
        """Bytes of the accumulators in the generation in force."""
        generation = self._generation(self.ledger.head)
        return generation.nbytes if generation else 0

    @contextlib.contextmanager
    def lease(self, seq: int | None = None) -> Iterator[None]:
        """Keeps the generation of record `seq` (default: the newest) from expiring while the block runs. Raises
        Misconfigured if it has expired already."""
        commit = self.ledger.head if seq is None else self.ledger.get(seq)
        if commit.generation is None:
            yield
            return
        with retention.lease(self.path, commit.generation):
            self.generation_of(commit)
            yield

    def expire(self, keep: int, nbytes: int | None = None) -> list[str]:
        """Deletes generations but the newest `keep` (fewer where they take more than `nbytes`), the tagged ones and
        those that a living reader has leased; returns those it deleted. What cannot be deleted now is tried again the
        next time, and the log says so. Raises Halt if an fsync failed, or another process may write by now."""
        self.must_be_writable()
        if self._journal.behind is not None:
            return []  # nothing is written before that is made up for
        gone = retention.expire(self.path, self.ledger, retention.Keep(keep, nbytes), self._journal.must_hold)
        for generation in gone:
            self._open.pop(generation, None)
        return gone

    def set_url(self, url: str) -> None:
        """Tells who asks the lock where the daemon answers."""
        assert self._lock is not None
        self._lock.tell(url)

    def must_be_writable(self) -> None:
        """Raises Misconfigured where the state is not open for writing."""
        if self._lock is None:
            raise Misconfigured(f"{self.path} is open for reading only: open it with write=True")

    def _generation(self, commit: Commit) -> Generation | None:
        if commit.generation is None:
            return None
        found = self._open.get(commit.generation)
        if found is None:
            found = Generation(self.path / "generations" / commit.generation, self.format, commit.receipts or "")
            self._open[commit.generation] = found
        return found


def _seal(file: Where, data: bytes, may: Callable[[], None]) -> None:
    """Makes format.json, as the last: a directory without it is no state, so a kill before this leaves none behind. Of
    two processes that make a state there one does."""
    with storing.creating(file, data, _nothing) as new:
        new.make(may)
        new.sync()


def _may_name(ledger: Ledger, tag: str, target: Commit, *, force: bool) -> None:
    """Raises Misconfigured unless `tag` can be the name of the record `target`."""
    if not _TAG.fullmatch(tag):
        raise Misconfigured(
            f"tag {tag!r}: use letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit"
        )
    named = ledger.tags.get(tag, target.seq)
    if named != target.seq and not force:
        raise Misconfigured(
            f"tag {tag} names record {named}, whose generation would no longer be kept for good: take another "
            f"name for record {target.seq}, or move the tag with --force"
        )


def _nothing(_step: str) -> None:
    pass
