"""continual keeps one merged model up to date: each new fine-tune of a base is folded in as it appears.

The names below are the public API; they load on first use, so that importing the package (or asking the command for
help) stays cheap.
"""

from __future__ import annotations

from typing import Any

_WHERE = {
    "init": "continual.making",
    "open": "continual.api",
    "survey": "continual.making",
    "Recipe": "continual.making",
    "Merge": "continual.api",
    "Plan": "continual.engine.outcomes",
    "Outcome": "continual.engine.outcomes",
    "Settings": "continual.config",
    "Target": "continual.publish.folder",
    "Tuning": "continual.tuning",
    "Tuned": "continual.tuning",
    "Command": "continual.tuning",
    "Rows": "continual.tuning",
    "ContinualError": "continual.errors",
    "Retry": "continual.errors",
    "Refuse": "continual.errors",
    "Halt": "continual.errors",
}
__all__ = [*_WHERE, "__version__"]  # noqa: PLE0604
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'continual' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
