"""What a source of candidates is: the contract that the daemon and `continual watch --once` work with.

A new source is one module beside this one, and one row in `roster.py`. What it finds is judged by the gates, not by
the source.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ValidationError

from continual.config import Settings
from continual.errors import Misconfigured
from continual.records import Candidate, Event
from continual.stores import Where

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from continual.hub.locate import Opener, Places

T = TypeVar("T", bound=BaseModel)


class Sight(NamedTuple):
    """A model that a source can see, for `continual watch --once --dry-run`.

    `key` is the candidate's key, where it is known without opening a file. `left_out` says why the settings do not let
    it in, `waits` why it is not looked at yet; both are sentences for people.
    """

    event: Event
    key: str | None = None
    left_out: str | None = None
    waits: str | None = None


REPORTING = ("hub",)
"""The kinds of sources that say in the status how they are, as their rows in the roster do: a status of a state at rest
loads no source."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What a source says of itself on the status page and in `continual status`.

    `bases`: what it looks for; `polled`: when it last asked with success (RFC 3339, UTC); `problem`: why it could not
    the last time; `seen`: how many models it has seen that are not settled; `title`: how people call its kind, which
    who shows it fills in.
    """

    bases: tuple[str, ...] = ()
    polled: str | None = None
    problem: str | None = None
    seen: int = 0
    title: str = ""


class Source(Protocol):
    """A source of candidates. Inherit from it: a method that has a body here is optional.

    All methods but `events` are called from one thread at a time, and never while another one runs, except `settled`,
    which may come at any time.
    """

    name: str
    """The row of the roster that made it."""
    scanned: asyncio.Event
    """Set at the end of the first look. Nothing is folded before, so that what was there comes in its order."""
    problem: str | None
    """Why the environment (a disk, a server) kept it from looking the last time; None if it did not."""
    denied: bool = False
    """Whether `problem` is that a token of ours is not accepted."""
    parks: bool
    """Whether a candidate that failed very often comes again only once an hour: where there can be thousands."""

    def events(self, stop: asyncio.Event) -> AsyncIterator[Event]:
        """Gives models as they appear, until `stop` is set; of several, the one with the smallest order first.

        The same model may be given again. Trouble in the environment sets `problem` and ends nothing. Raises Halt where
        the state is damaged. Any other exception, and an end before `stop`, is logged and counted, and the source is
        started again after a delay that grows.
        """
        ...

    def ready(self) -> list[Event]:
        """Looks once, and returns what can be taken now, in any order. Raises Retry, Halt."""
        ...

    def survey(self) -> Iterator[Sight]:
        """Looks once at everything, whether it can be taken or not; changes nothing. Raises Retry, Halt."""
        return iter([Sight(event) for event in self.ready()])

    def settled(self, event: Event, key: str | None) -> None:  # noqa: ARG002
        """Hears that a candidate it gave is settled under `key`, or that the settings leave it out (None)."""
        return None

    def finish(self) -> None:
        """Ends one look: called after `ready`, when all that it returned was tried. Raises Retry."""
        return None

    def key(self, event: Event) -> str | None:  # noqa: ARG002
        """The candidate's key, where it is known without opening a file: one that is settled is not queued then."""
        return None

    def again(self, candidates: Sequence[Candidate]) -> None:  # noqa: ARG002
        """Hears, on the event loop while `events` runs, that a person wants these candidates looked at again: it gives
        those of them that are its own once more, though nothing of them has changed."""
        return None

    def reopen(self, candidates: Sequence[Candidate]) -> None:
        """Hears, as `again`, of candidates that were refused by settings which have other values now: it gives those of
        them that are its own and that it would still give. The same as `again`, unless the source says otherwise."""
        self.again(candidates)

    def is_gone(self, event: Event) -> bool:  # noqa: ARG002
        """Whether the model of an event is there no more, so that nothing has to be said of it."""
        return False

    def report(self) -> SourceReport:
        """What it says of itself; of several sources of one kind, the first is shown."""
        return SourceReport(problem=self.problem)

    def notes(self) -> Sequence[str]:
        """What it sees that is no model and that a person should know of: a sentence each. From any thread."""
        return ()

    def series(self) -> Mapping[str, float]:
        """What it measured, by the name of the series in `service/metrics.py`; a counter counts from the start."""
        return {}


@runtime_checkable
class Listening(Protocol):
    """A source that is told of new models over HTTP, too."""

    def routes(self) -> Sequence[BaseRoute]:
        """What the service answers on its behalf; it guards each route itself."""
        ...


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a source is made from.

    `state`: the directory of the state; `known` says whether a candidate's key is settled; `retried`: the candidates
    that a person wants looked at again; `reopened`: those that were refused by settings which have other values now.
    """

    settings: Settings
    places: Places
    state: Where
    known: Callable[[str], bool]
    retried: Sequence[Candidate]
    reopened: Sequence[Candidate] = ()


def _fine(_settings: Settings) -> None:
    """Nothing to say against the settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceKind:
    """A row of the roster.

    `name`: of the table `[sources.NAME]` in the settings, and of what it says in the status; `title`: how the status
    page calls what is watched. `table`: the record of its settings. `wanted` says whether the settings ask for it, by
    default whether its table is there. `check` raises Misconfigured for settings that cannot work, before anything is
    opened; `make` raises it, too, and makes the sources, one or several.

    `scheme` and `opener` are for models that are neither in a folder nor on the Hub: `opener` makes a function that
    opens an origin of the form `scheme://…`. `reports`: whether the status shows what its sources say of themselves.
    """

    name: str
    title: str
    make: Callable[[Wiring], Sequence[Source]]
    table: type[BaseModel] | None = None
    wanted: Callable[[Settings], bool] | None = None
    check: Callable[[Settings], None] = _fine
    reports: bool = True
    scheme: str | None = None
    opener: Callable[[Settings], Opener] | None = None

    def is_wanted(self, settings: Settings) -> bool:
        """Whether the settings ask for such a source."""
        return self.name in settings.sources if self.wanted is None else self.wanted(settings)


def table_of(settings: Settings, name: str, model: type[T]) -> T:
    """The settings of the table `[sources.NAME]`. Raises Misconfigured naming the one that is wrong."""
    try:
        return model.model_validate(settings.sources.get(name, {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["sources", name, *(str(part) for part in first["loc"])])
        raise Misconfigured(f"{where} = {first['input']!r}: {first['msg']}") from None
