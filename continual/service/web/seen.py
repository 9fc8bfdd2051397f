"""What the web asks of the daemon: the present and the past of its state."""

from __future__ import annotations

from typing import Protocol

from continual.service.web.recalled import (
    AboutFold,
    AboutModel,
    FoldList,
    KeptGeneration,
    LayerPicture,
    RecalledEvaluation,
    RefusalList,
    RowsWanted,
    SettingInForce,
)
from continual.service.web.view import Status, UnderWay
from continual.texts import Json


class PastView(Protocol):
    """What the pages ask of the past. Blocking; from any thread."""

    def folds(self, wanted: RowsWanted) -> FoldList:
        """The folds that are asked for."""
        ...

    def refusals(self, wanted: RowsWanted) -> RefusalList:
        """The refusals that are asked for."""
        ...

    def fold(self, seq: int, part: int = 0) -> AboutFold | None:
        """All that is told of a fold; None where record `seq` brought no such one."""
        ...

    def model(self, identity: str) -> AboutModel | None:
        """All that is told of a model; None where none has this id."""
        ...

    def picture(self, most: int) -> LayerPicture:
        """What each of the newest `most` folds that are in the merge changed, by groups of layers."""
        ...

    def evaluations(self) -> tuple[RecalledEvaluation, ...]:
        """What was measured of the merge at the newest folds, the oldest first."""
        ...

    def generations(self) -> tuple[KeptGeneration, ...]:
        """What is on the disk, the newest first."""
        ...

    def settings(self) -> tuple[SettingInForce, ...]:
        """Every setting in force; secrets are masked."""
        ...


class View(Protocol):
    """What the app asks of the daemon."""

    @property
    def directory(self) -> str:
        """Of the state."""
        ...

    @property
    def recalling(self) -> PastView:
        """Its past."""
        ...

    def is_ending(self) -> bool:
        """Whether the daemon stops: nobody may wait for it any more."""
        ...

    def stamp(self) -> str:
        """A word that is another one when there is something new to show. On the event loop."""
        ...

    def under_way(self) -> UnderWay | None:
        """What is done now, and how far it is. On the event loop."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes that are free on the disk of the state; None of one on an object store."""
        ...

    def status(self) -> Status:
        """Everything there is to show."""
        ...

    def healthy(self) -> tuple[bool, str]:
        """Whether the daemon is alive, and why not."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether it has opened its state and every source has looked once, and why not; where it is ready, whether it
        is degraded."""
        ...

    def log(self, limit: int, before: int | None) -> list[dict[str, Json]]:
        """The newest `limit` records, or those before the record `before`; oldest first."""
        ...
