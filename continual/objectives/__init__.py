"""What a model in memory is worth on calibration rows, as a score and as a loss with a gradient. The names here are for
objectives of one's own."""

from continual.objectives.classes import fitted, shares_of_right
from continual.objectives.function import CalibrationTask, FittedTask, Given, ValuedTask
from continual.objectives.keeping import PromptedTask
from continual.objectives.taught import Said, TellingTask

__all__ = [
    "CalibrationTask",
    "FittedTask",
    "Given",
    "PromptedTask",
    "Said",
    "TellingTask",
    "ValuedTask",
    "fitted",
    "shares_of_right",
]
