"""What orders say of a candidate and a base, so that another process opens the same: places and the files that were
there, never a value of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from continual.engine.base import as_recorded, kept_headers
from continual.errors import Refuse, Retry
from continual.hub.repo import Repo
from continual.records import FileStat, Lineage
from continual.state.format import Format
from continual.tensors import BaseModel, Checkpoint, Model, Place, open_model, open_shipped
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

    def same(self, seen: Sequence[FileStat]) -> None:
        """Raises Retry naming a file that this process sees with another size or time. Inodes may differ: machines
        mount a shared folder each in its own way."""
        here = {file.name: (file.size, file.mtime_ns) for file in seen}
        for file in self.files:
            if here.get(file.name) != (file.size, file.mtime_ns):
                raise Retry(
                    f"{self.place.file(file.name)}: this machine sees another file than the one that the order is for: "
                    "it changed since, or is not in a folder that all machines share; nothing was settled"
                )


class SentBase(NamedTuple):
    """A base; without `files` it is the headers that the format of the state has."""

    files: SentFiles | None

    @classmethod
    def of(cls, base: BaseModel) -> SentBase:
        """Of an open base."""
        return cls(None if is_kept(base) else SentFiles(base.checkpoint.place, tuple(base.checkpoint.files)))

    def open(self, form: Format) -> BaseModel:
        """Opens it. Raises Misconfigured, Damaged, Retry."""
        if self.files is None:
            return kept_headers(form)
        found = as_recorded(form, self.files.place)
        self.files.same(found.checkpoint.files)
        return found


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
