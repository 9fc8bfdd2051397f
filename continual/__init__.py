"""continual keeps one merged model up to date: each new fine-tune of a base is folded in as it appears.

The names below are the public API. They load when they are first used, so that importing the package, or asking the
command for help, stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from continual.api import Merge, Verified, backup, look_repair, open, repair, verify
    from continual.config import Settings
    from continual.engine.outcomes import Outcome, Plan
    from continual.engine.views import ReadView
    from continual.errors import ContinualError, Halt, Refuse, Retry
    from continual.making import Recipe, Survey, init, survey
    from continual.publish.folder import Target
    from continual.publish.lora import LoraTarget
    from continual.state.backup import BackupReport, Wish
    from continual.state.damage import RepairPlan
    from continual.tuning import Command, Learning, Rows, TaskRows, Tuned, Tuning, Weighing

__all__ = [
    "BackupReport",
    "Command",
    "ContinualError",
    "Halt",
    "Learning",
    "LoraTarget",
    "Merge",
    "Outcome",
    "Plan",
    "ReadView",
    "Recipe",
    "Refuse",
    "RepairPlan",
    "Retry",
    "Rows",
    "Settings",
    "Survey",
    "Target",
    "TaskRows",
    "Tuned",
    "Tuning",
    "Verified",
    "Weighing",
    "Wish",
    "__version__",
    "backup",
    "init",
    "look_repair",
    "open",
    "repair",
    "survey",
    "verify",
]
__version__ = "0.1.0"

_HOMES = {
    "continual.api": ("Merge", "Verified", "backup", "look_repair", "open", "repair", "verify"),
    "continual.config": ("Settings",),
    "continual.engine.outcomes": ("Outcome", "Plan"),
    "continual.engine.views": ("ReadView",),
    "continual.errors": ("ContinualError", "Halt", "Refuse", "Retry"),
    "continual.making": ("Recipe", "Survey", "init", "survey"),
    "continual.publish.folder": ("Target",),
    "continual.publish.lora": ("LoraTarget",),
    "continual.state.backup": ("BackupReport", "Wish"),
    "continual.state.damage": ("RepairPlan",),
    "continual.tuning": ("Command", "Learning", "Rows", "TaskRows", "Tuned", "Tuning", "Weighing"),
}
"""The module that each name is loaded from: the same as above, which only type checkers read."""


if not TYPE_CHECKING:  # else a checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for module, names in _HOMES.items():
            if name in names:
                return getattr(import_module(module), name)
        raise AttributeError(f"module 'continual' has no attribute {name!r}")
