"""`State`: a directory opened for reading or writing. The commit protocol, what is in force, rollback, tags, retention.
FORMAT.md has every byte."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from continual.errors import Damaged, Misconfigured, Retry
from continual.records import SlotSpec, TensorSpec
from continual.state import framing, lock, names, opening
from continual.state.arrays import Array
from continual.state.durable import environment, link_new, move_away, replace_bytes, sync_file, write_temporary
from continual.state.entries import Entry, InitEntry, RollbackEntry, TagEntry
from continual.state.format import VERSION, Commit, Format
from continual.state.generation import Generation
from continual.state.ledger import Ledger
from continual.state.transaction import Transaction, room

if TYPE_CHECKING:
    import zarr

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_EXPIRED = ".expired-"
Step = Callable[[str], None]


class State:
    """An open state. Make one with `State.create`, open it with `State.open`; a context manager.

    Reading is safe from several threads and beside a writer in another process; one process at a time opens it for
    writing.
    """

    def __init__(self, path: Path, form: Format, ledger: Ledger, lock_fd: int | None, on_step: Step) -> None:
        self.path = path
        self.format = form
        self.orphans: tuple[str, ...] = ()
        self.ledger = ledger
        self._lock_fd = lock_fd
        self._on_step = on_step
        self._open: dict[str, Generation] = {}

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        base: Mapping[str, Any],
        tensors: Sequence[TensorSpec],
        rule: str,
        options: Mapping[str, Any],
        read: Mapping[str, Any],
        slots: Mapping[str, Mapping[str, SlotSpec]],
        software: Mapping[str, str],
        device: str,
    ) -> State:
        """Makes a state in `path`, which must be absent or empty (hidden files and FORMAT.md aside), and opens it for
        writing.

        Raises Misconfigured if something is there, Retry if the disk gets in the way, Refuse for tensor names that
        cannot be stored.
        """
        if (path / "format.json").exists():
            raise Misconfigured(f"{path} already is a state: open it, or name another directory")
        opening.must_be_free(path)
        for tensor in tensors:
            names.encode(tensor.name)
        ordered = tuple(sorted(tensors, key=lambda t: t.name))
        form = Format(VERSION, secrets.token_hex(16), base, ordered, rule, options, slots)
        with environment(f"cannot make a state in {path}"):
            path.mkdir(parents=True, exist_ok=True)
            for name in opening.DIRECTORIES:
                (path / name).mkdir(exist_ok=True)
            state = cls(path, form, Ledger(), lock.take(path / "lock"), _nothing)
            state._append(InitEntry(read=read, software=software, device=device), None, None)
            # last: a directory without format.json is no state, so a kill before this leaves none behind
            replace_bytes(path / "format.json", framing.encode(form.body())[0])
            sync_file(path.absolute().parent)
        return state

    @classmethod
    def open(cls, path: Path, *, write: bool = False, on_step: Step | None = None) -> State:
        """Opens the state in `path`. For writing it takes the lock, completes a commit that was in flight and removes
        orphans.

        Raises Misconfigured if there is none or it is read-only, Busy if another process writes, Damaged for anything
        that is not as it was written.
        """
        if not (path / "format.json").exists():
            if opening.unfinished(path) is False:
                raise Damaged(f"{path / 'format.json'} is missing; restore it from a backup")
            raise Misconfigured(f"no state in {path}: make one with 'continual init BASE --state {path}'")
        form = Format.of(framing.decode(path / "format.json")[0], path / "format.json")
        lock_fd = lock.take(path / "lock") if write else None
        try:
            ledger = opening.load(path)
            state = cls(path, form, ledger, lock_fd, on_step or _nothing)
            if (now := state._generation(ledger.log[-1])) is not None:
                _ = opening.in_force(now)
            unnamed = set(opening.listed(path / "generations")) - {c.generation for c in ledger.log if c.generation}
            state.orphans = tuple(sorted(name for name in unnamed if not name.startswith(_EXPIRED)))
            if write:
                state._settle_head()
                for name in unnamed:
                    shutil.rmtree(path / "generations" / name, ignore_errors=True)
        except BaseException:
            if lock_fd is not None:
                os.close(lock_fd)
            raise
        return state

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    @property
    def id(self) -> str:
        return self.format.id

    def begin(self, after: Generation | Literal["now"] | None = "now") -> Transaction:
        """Begins a fold, on the generation in force or on `after` (None: on zeros). Raises Retry if the disk has no
        room for one more generation."""
        self._needs_lock()
        self._on_step("begin")
        room(self.path, self.format.generation_bytes)
        head = self.ledger.head
        before = self._generation(head) if isinstance(after, str) else after

        def publish(entry: Entry, generation: str, receipts: str) -> Commit:
            if self.ledger.head.generation != head.generation:
                raise Retry("another fold was committed meanwhile; nothing was settled")
            try:
                return self._append(entry, generation, receipts)
            finally:  # whatever fails once the record stands, it names this generation
                if self.ledger.head.generation == generation:
                    transaction.committed()

        transaction = Transaction(self.path / "generations", self.format, before, publish, self._on_step)
        self._on_step("chunks")
        return transaction

    def record(self, entry: Entry, generation: Generation | Literal["now"] | None = "now") -> Commit:
        """Adds a record that writes no tensor: the generation in force stays so, or `generation` is (None: zeros).
        Durable when it returns."""
        self._needs_lock()
        if isinstance(generation, str):
            return self._append(entry, self.ledger.head.generation, self.ledger.head.receipts)
        if generation is None:
            return self._append(entry, None, None)
        return self._append(entry, generation.directory.name, generation.checksum)

    def generation_of(self, commit: Commit) -> Generation | None:
        """The generation of a record, None where it holds nothing. Raises Misconfigured if it has expired."""
        generation = self._generation(commit)
        if generation is not None:
            _ = generation.receipts
        return generation

    def rollback(self, seq: int) -> Commit:
        """Puts the generation of record `seq` in force again. Raises Misconfigured if it has expired."""
        self._needs_lock()
        target = self.ledger.get(seq)
        self.generation_of(target)
        undone = len(self.ledger.undone(seq))
        entry = RollbackEntry(to=seq, undone=undone, message=f"back to record {seq}")
        return self._append(entry, target.generation, target.receipts)

    def tag(self, name: str, seq: int | None = None) -> Commit:
        """Names record `seq` (default: the newest), so that its generation does not expire. Raises Misconfigured for a
        bad name or an expired record."""
        self._needs_lock()
        if not _TAG.fullmatch(name):
            raise Misconfigured(
                f"tag {name!r}: use letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit"
            )
        target = self.ledger.get(self.ledger.head.seq if seq is None else seq)
        self.generation_of(target)
        commit = self.record(TagEntry(tag=name, of=target.seq))
        with environment(f"cannot write tag {name}"):
            replace_bytes(self.path / "tags" / f"{name}.json", framing.encode({"tag": name, "seq": target.seq})[0])
        return commit

    def read(self, name: str, slot: str, at: int | None = None) -> Array:
        """An accumulator in force now or at record `at`, checked against its receipt; zeros before the first fold."""
        import numpy as np

        generation = self._generation(self.ledger.head if at is None else self.ledger.get(at))
        if generation is None:
            spec = self.format.slots[name][slot]
            return np.zeros(spec.shape, spec.dtype)
        return generation.read(name, slot)

    def group(self, at: int | None = None) -> zarr.Group:
        """The generation of record `at` (default: the newest) as zarr-python opens it, read-only. Raises Misconfigured
        before the first fold."""
        import zarr

        commit = self.ledger.head if at is None else self.ledger.get(at)
        if commit.generation is None:
            raise Misconfigured(f"record {commit.seq}: nothing is folded yet, so there is no generation to open")
        return zarr.open_group(self.path / "generations" / commit.generation, mode="r", zarr_format=3)

    def generations(self) -> list[str]:
        """Generations on disk that a record names."""
        named = {c.generation for c in self.ledger.log if c.generation}
        return [g for g in opening.listed(self.path / "generations") if g in named]

    def generation_bytes(self) -> int:
        """Bytes of the accumulators in one generation: the same from the first fold on."""
        return self.format.generation_bytes if self.ledger.head.generation else 0

    @contextlib.contextmanager
    def lease(self, seq: int | None = None) -> Iterator[None]:
        """Keeps the generation of record `seq` (default: the newest) from expiring while the block runs."""
        commit = self.ledger.head if seq is None else self.ledger.get(seq)
        if commit.generation is None:
            yield
            return
        with lock.lease(self.path / "leases", commit.generation):
            self.generation_of(commit)
            yield

    def expire(self, keep: int) -> list[str]:
        """Deletes generations but the last `keep`, the tagged ones and those a living reader has leased; returns what
        was deleted."""
        self._needs_lock()
        recent = list(dict.fromkeys(c.generation for c in reversed(self.ledger.log) if c.generation))[:keep]
        held = (
            {self.ledger.get(seq).generation for seq in self.ledger.tags.values()}
            | lock.leased(self.path / "leases")
            | {self.ledger.head.generation, *recent}
        )
        expired = [g for g in self.generations() if g not in held]
        with environment("cannot delete old generations"):
            for generation in expired:
                # renamed first: a kill while its files are deleted must not leave half of it under a name that a record
                # knows
                self._open.pop(generation, None)
                move_away(self.path / "generations" / generation, self.path / "generations" / f"{_EXPIRED}{generation}")
            for generation in expired:
                shutil.rmtree(self.path / "generations" / f"{_EXPIRED}{generation}")
        return expired

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Checks every byte of what is kept; returns what is wrong. The log and format.json were checked when the state
        was opened."""
        from continual.state.verify import verify

        return verify(self, progress or (lambda _done, _total: None))

    def set_url(self, url: str) -> None:
        """Tells who asks the lock where the daemon answers."""
        assert self._lock_fd is not None
        lock.tell(self._lock_fd, {"pid": os.getpid(), "url": url})

    def _needs_lock(self) -> None:
        if self._lock_fd is None:
            raise Misconfigured(f"{self.path} is open for reading only: open it with write=True")

    def _generation(self, commit: Commit) -> Generation | None:
        if commit.generation is None:
            return None
        found = self._open.get(commit.generation)
        if found is None:
            found = Generation(self.path / "generations" / commit.generation, self.format, commit.receipts or "")
            self._open[commit.generation] = found
        return found

    def _append(self, entry: Entry, generation: str | None, receipts: str | None) -> Commit:
        """The commit protocol from the record on: temporary file, link, fsync, HEAD. Durable when it returns."""
        last = self.ledger.log[-1] if self.ledger.log else None
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        commit = Commit(last.seq + 1 if last else 0, last.crc if last else None, "", generation, receipts, time, entry)
        data, checksum = framing.encode(commit.body())
        commit = Commit(commit.seq, commit.prev, checksum, generation, receipts, time, entry)
        place = self.path / "commits" / f"{commit.seq:08d}.json"
        with environment("cannot write the record"):
            self._on_step("temp-commit")
            temporary = write_temporary(place, data)
            self._on_step("link")
            link_new(place, temporary)
        # the commit point is passed: whatever fails from here on, the record stands and the next open completes it
        self.ledger.add(commit)
        self._on_step("fsync-commits")
        sync_file(place.parent)
        self._on_step("head")
        with environment(f"record {commit.seq} is committed, but HEAD could not be written"):
            self._write_head(commit)
        self._on_step("acknowledged")
        return commit

    def _write_head(self, commit: Commit) -> None:
        replace_bytes(self.path / "HEAD", framing.encode({"seq": commit.seq, "crc": commit.crc})[0])

    def _settle_head(self) -> None:
        """Completes the commit that was in flight when the last writer died."""
        sync_file(self.path / "commits")
        if framing.decode(self.path / "HEAD")[0]["seq"] != self.ledger.head.seq:
            self._write_head(self.ledger.head)
        for leftover in self.path.rglob(".*.tmp"):
            if leftover.parent.parent == self.path or leftover.parent == self.path:
                leftover.unlink(missing_ok=True)


def _nothing(_step: str) -> None:
    pass
