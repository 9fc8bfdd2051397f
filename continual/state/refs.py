"""How people name a record: by its number, by a tag, or as HEAD."""

from __future__ import annotations

from continual.errors import Misconfigured
from continual.outside import shown
from continual.state.ledger import Ledger

HEAD = "HEAD"


def record_named(ledger: Ledger, word: str) -> int | None:
    """The number of the record that `word` means: a number, HEAD (the newest), or a tag; a number before a tag. None
    where it is none of these. Raises Misconfigured for the number of a record that there is not."""
    if word.isascii() and word.isdigit():
        return ledger.get(int(word) if len(word) < 20 else 1 << 62).seq
    if word == HEAD:
        return ledger.head.seq
    return ledger.tags.get(word)


def must_be_named(ledger: Ledger, word: str) -> int:
    """The same. Raises Misconfigured where no record is meant."""
    found = record_named(ledger, word)
    if found is None:
        raise Misconfigured(
            f"{shown(word)}: name a record by its number, by a tag ('continual tag' lists them) or HEAD"
        )
    return found
