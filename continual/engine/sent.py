"""What orders say of a candidate and a base, so that another process opens the same: places and the files that were
there, never a value of a tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from continual.engine.base import as_recorded, fetched, kept_headers
from continual.errors import Refuse, Retry
from continual.executors.contract import silent
from continual.hub.elsewhere import hub_of_worker, without_login
from continual.hub.repo import Repo
from continual.records import FileStat, Lineage
from continual.state.format import Format
from continual.tensors import BaseModel, Checkpoint, Folder, Model, Place, open_model, open_shipped
from continual.tensors.bases.kept import is_kept


class Sources(NamedTuple):
    """What is read of a candidate, open: the base of the state that has the format `form`, the candidate as `lineage`
    maps it, what it ships beside its weights, and the base with its weights where the state keeps none."""

    form: Format
    base: BaseModel
    model: Model
    lineage: Lineage
    shipped: Checkpoint | None = None
    weights: BaseModel | None = None

    def sent(self, shipped: str | None = None, whole: frozenset[str] = frozenset()) -> SentSources:
        """The same as plain data; `shipped` is the name of the file that ships values, `whole` as `SentFiles` has
        it."""
        return SentSources(
            self.form,
            SentBase.of(self.base),
            SentFiles(self.model.place, tuple(self.model.files), whole),
            self.lineage,
            shipped if self.shipped is not None else None,
            None if self.weights is None else SentBase.of(self.weights),
        )

    def close(self) -> None:
        """Closes all files."""
        weights = None if self.weights is None else self.weights.checkpoint
        for one in (self.base.checkpoint, self.model, self.shipped, weights):
            if one is not None:
                one.close()


class SentFiles(NamedTuple):
    """A model: its place, and its files as the process that sends it sees them. `whole`: those on the Hub that come in
    one order each."""

    place: Place
    files: tuple[FileStat, ...]
    whole: frozenset[str] = frozenset()

    def others(self, seen: Sequence[FileStat]) -> list[str]:
        """The names of those that this process sees with another size or time."""
        here = {file.name: (file.size, file.mtime_ns) for file in seen}
        return [file.name for file in self.files if here.get(file.name) != (file.size, file.mtime_ns)]

    def same(self, seen: Sequence[FileStat]) -> None:
        """Raises Retry naming one of the `others`. Inodes may differ: machines
        mount a shared folder each in its own way."""
        for name in self.others(seen):
            raise Retry(
                f"{self.place.file(name)}: this machine sees another file than the one that the order is for: "
                "it changed since, or is not in a folder that all machines share; nothing was settled"
            )


class SentBase(NamedTuple):
    """A base; without `files` it is the headers that the format of the state has. One that came from the Hub has the
    names that the client's cache gives to the contents of its files (`blobs`), and where this process asks the Hub."""

    files: SentFiles | None
    blobs: Mapping[str, str]
    endpoint: str = ""

    @classmethod
    def of(cls, base: BaseModel) -> SentBase:
        """Of an open base."""
        if is_kept(base):
            return cls(None, {})
        place, files = base.checkpoint.place, base.checkpoint.files
        blobs = blobs_of(place.directory, [f.name for f in files]) if isinstance(place, Folder) else {}
        return cls(SentFiles(place, tuple(files)), blobs, without_login(os.environ.get("HF_ENDPOINT", "")))

    def open(self, form: Format) -> BaseModel:
        """Opens it. One that came from the Hub, and that this machine does not see where the sender has it, is taken
        from the cache of this machine, into which it is fetched once: the client calls a file by its hash and does not
        look at it again, so each tensor is compared with what the state says of it. Raises Misconfigured, Damaged,
        Retry."""
        if self.files is None:
            return kept_headers(form)
        place, record = self.files.place, form.base
        if self.blobs and record.repo is not None and record.revision is not None:
            if not all(place.present(name) for name in self.blobs):
                place = Folder(self._in_cache(record.repo, record.revision))
            if isinstance(place, Folder) and blobs_of(place.directory, self.blobs) == self.blobs:
                found = as_recorded(form, place)
                if self.files.others(found.checkpoint.files):
                    found.checkpoint.compare(record.digests)
                return found
        found = as_recorded(form, place)
        try:
            self.files.same(found.checkpoint.files)
        except Retry:
            found.checkpoint.close()
            raise
        return found

    def _in_cache(self, repo: str, revision: str) -> Path:
        """Where the files of a base are in the cache of this machine."""
        from huggingface_hub import try_to_load_from_cache

        there = {name: try_to_load_from_cache(repo, name, revision=revision) for name in self.blobs}
        for name, path in there.items():
            if isinstance(path, str):
                directory = Path(path).parents[name.count("/")]
                if blobs_of(directory, self.blobs) == self.blobs:
                    return directory
        return fetched(hub_of_worker(self.endpoint), repo, revision, silent).path


def blobs_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The names of the contents of files in a directory of the cache of the Hub's client, which are their hashes; none
    where one of them is no such file."""
    targets = {name: Path(os.path.realpath(directory / name)) for name in names}
    there = all(target.parent.name == "blobs" and target.exists() for target in targets.values())
    return {name: target.name for name, target in targets.items()} if there else {}


class SentSources(NamedTuple):
    """`Sources` as plain data."""

    form: Format
    base: SentBase
    model: SentFiles
    lineage: Lineage
    shipped: str | None
    weights: SentBase | None

    def open(self) -> Sources:
        """Opens all of it. Raises Retry, Misconfigured, Damaged: whether the candidate is let in was asked where the
        fold began, and what is refused here is what this machine sees of its files or of the base's."""
        try:
            return self._opened()
        except Refuse as error:
            raise Retry(f"{error}, as this machine sees it and the driver did not; nothing was settled") from error

    def _opened(self) -> Sources:
        with ExitStack() as failed:
            base = self.base.open(self.form)
            failed.callback(base.checkpoint.close)
            if isinstance(self.model.place, Repo):
                self.model.place.whole = self.model.whole
            model = open_model(self.model.place)
            failed.callback(model.close)
            self.model.same(model.files)
            shipped = None if self.shipped is None else open_shipped(base, model, self.lineage, self.shipped)
            if shipped is not None:
                failed.callback(shipped.close)
            weights = None if self.weights is None else self.weights.open(self.form)
            failed.pop_all()
        return Sources(self.form, base, model, self.lineage, shipped, weights)
