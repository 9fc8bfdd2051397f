"""How the merged model is read, chosen by evaluating candidates: the search (pure), X in a scratch file, evaluation by
a command or on rows, the record."""

from typing import TYPE_CHECKING

from continual.lazily import from_homes

if TYPE_CHECKING:
    from continual.objectives.builtin import Rows
    from continual.tuning.choosing import Evaluation, Told, Tuned, Tuning, tune
    from continual.tuning.command import Command
    from continual.tuning.inputs import FoundInputs, TaskRows, read_inputs
    from continual.tuning.learning import Learning, learn
    from continual.tuning.record import chosen, in_force, newest
    from continual.tuning.rescaling import rescale
    from continual.tuning.weighing import Weighing, weigh

__all__ = [
    "Command",
    "Evaluation",
    "FoundInputs",
    "Learning",
    "Rows",
    "TaskRows",
    "Told",
    "Tuned",
    "Tuning",
    "Weighing",
    "chosen",
    "in_force",
    "learn",
    "newest",
    "read_inputs",
    "rescale",
    "tune",
    "weigh",
]

if not TYPE_CHECKING:  # else a checker would take any name for one of ours
    __getattr__ = from_homes(
        __name__,
        {
            "continual.objectives.builtin": ("Rows",),
            "choosing": ("Evaluation", "Told", "Tuned", "Tuning", "tune"),
            "command": ("Command",),
            "inputs": ("FoundInputs", "TaskRows", "read_inputs"),
            "learning": ("Learning", "learn"),
            "record": ("chosen", "in_force", "newest"),
            "rescaling": ("rescale",),
            "weighing": ("Weighing", "weigh"),
        },
    )
