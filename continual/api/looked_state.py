"""A state that is only looked at: its records, its rule, how its merge is read. No base is opened and no engine made,
so that a status loads little."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Self

from continual.config import Settings
from continual.engine.agreeing import agree
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.rules import ReadOptions, rule_of
from continual.state import State, leasing, opening
from continual.state.ledger import Waiting

if TYPE_CHECKING:
    from continual.engine.fullness import Fullness


class LookedState:
    """An open state and its rule, to look at. A context manager."""

    def __init__(
        self, settings: Settings, *, write: bool = False, on_step: Callable[[str], None] | None = None
    ) -> None:
        """Opens the state that `settings` name; `on_step` is called before each step of the commit protocol. Raises
        Misconfigured, Busy and Damaged."""
        self.settings = settings
        with opening.way_out():
            self.state = State.open(settings.state, write=write, on_step=on_step)
        try:
            agree(self.state, settings)
        except Misconfigured:
            self.state.close()
            raise
        self.rule = rule_of(self.state.format.rule, self.state.format.options)
        self._fullness: tuple[str | None, Fullness | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the state."""
        self.state.close()

    @property
    def head(self) -> int:
        """The number of the newest record."""
        return self.state.ledger.head.seq

    @property
    def selects(self) -> Literal["none", "relevance", "frank-wolfe"]:
        """Who chooses what is folded: nobody (`none`), or rounds over the pool, and how they do."""
        return "frank-wolfe" if self.rule.laws.rounds else self.settings.select or "none"

    def pool(self) -> dict[str, Waiting]:
        """The candidates that wait for a round, by key."""
        return self.state.ledger.pool

    def fullness(self) -> Fullness | None:
        """How full a state of adapters is, and what was cut off of each by now; None for a merge of whole tensors. The
        small arrays of every layer are read once for a generation. Raises Misconfigured and Damaged."""
        if self.state.format.form is None:
            return None
        from continual.engine.fullness import fullness_of

        with leasing.newest(self.state):
            generation = self.state.ledger.head.generation
            if self._fullness is None or self._fullness[0] != generation:
                self._fullness = generation, fullness_of(self.state)
            return self._fullness[1]

    def scale(self, at: int | None = None, view: ReadView | None = None) -> ReadOptions:
        """How the merge is read: as the records up to `at` (default: the newest), the settings and `view` say."""
        ledger = self.state.ledger
        now = ReadOptions.from_mapping(ledger.read_options(ledger.head.seq if at is None else at))
        return (view or ReadView()).by(self.settings.reading).read_by(self.rule, now, self.state)[1]
