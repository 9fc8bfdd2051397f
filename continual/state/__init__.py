"""The durable state: every fold one transaction in a Zarr store, every candidate's fate in a ledger. FORMAT.md
specifies it."""

from continual.state.format import Commit, Format
from continual.state.store import State
from continual.state.transaction import Transaction

__all__ = ["Commit", "Format", "State", "Transaction"]
