"""The settings of what is asked about the merge before a fold is committed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from continual.config.values import File, Paths, Texts

_Fall = Annotated[float, Field(ge=0)]
_ByMetric = dict[str, float]


class EvaluationSettings(BaseModel):
    """What is asked about the merge before a fold is committed: a command, calibration rows, or tasks of lm-eval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: tuple[str, ...] = Field(
        default=(),
        description="program and arguments, no shell; {model} stands for the directory of the merged model, {rows} for "
        "how many rows of each task are wanted. The last line it prints is a JSON object of metrics: numbers, or lists "
        "with a number for each row",
    )
    rows: Paths = Field(default=(), description="in place of a command: calibration rows, one JSONL file for each task")
    objective: str | None = Field(
        default=None, description="what is good on these: causal-lm, classification, heads, or module:function"
    )
    heads: Paths = Field(
        default=(), description="prompts of the labels, one JSON file for each of rows, for the objective heads"
    )
    lm_eval: Texts = Field(default=(), description="in place of a command: tasks of lm-eval")
    lm_eval_args: tuple[str, ...] = Field(default=(), description="further arguments of lm-eval, as --num_fewshot 0")
    max_drop: _Fall | dict[str, _Fall] = Field(
        default=0.01,
        description="by how much each metric may be worse than that of the merge in force: a number, or a table of "
        "numbers by metric or glob; what is not in it may fall by 0.01",
    )
    max_drop_base: _Fall | dict[str, _Fall] | None = Field(
        default=None, description="the same beside the base; what is not in the table may fall as it likes"
    )
    max_drop_best: _Fall | dict[str, _Fall] | None = Field(
        default=None,
        description="how far each metric may be below the best of the merges before it, by what the records say that "
        "each fold did; what is not in the table may fall as it likes",
    )
    min: float | _ByMetric | None = Field(
        default=None, description="what each metric has to be at least (at most where less is better), or a table"
    )
    chance: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=0.05,
        description="how often chance may refuse a model that makes nothing worse, over all metrics and looks",
    )
    miss: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=0.15, description="how often chance may hide that a metric fell by twice max_drop"
    )
    first_rows: Annotated[int, Field(ge=2)] = Field(
        default=100, description="rows of each task that are asked first, where the command has {rows}"
    )
    max_rows: Annotated[int, Field(ge=2)] = Field(
        default=400, description="rows of each task that are asked at most, twice as many each time"
    )
    inconclusive: Literal["hold", "refuse", "fold"] = Field(
        default="hold",
        description="what becomes of a model of which that many rows do not tell: hold keeps it out, for a person to "
        "decide",
    )
    lower: Texts = Field(default=(), description="metrics of which less is better, as a loss; globs")
    timeout: Annotated[float, Field(gt=0)] = Field(default=3600.0, description="seconds the command may take")
    directory: File | None = Field(
        default=None, description="where models are written for the command; default: the system's for temporary files"
    )

    @property
    def wanted(self) -> bool:
        """Whether anything is asked."""
        return bool(self.command or self.objective or self.lm_eval)

    @property
    def values(self) -> dict[str, object]:
        """The settings that a verdict goes by, by their whole names, as JSON holds them. Where nothing is asked there
        are none: then a refusal that was made by them does not stand."""
        left_out = {"timeout", "directory"}
        found = self.model_dump(mode="json", exclude=left_out) if self.wanted else {}
        return {f"evaluation.{key}": value for key, value in found.items()}

    @model_validator(mode="after")
    def _agree(self) -> EvaluationSettings:
        ways = [name for name in ("command", "objective", "lm_eval") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)}: name one of them")
        if (self.rows or self.heads) and not self.objective:
            raise ValueError("rows and heads: name an objective, which says what is good on them")
        if self.lm_eval_args and not self.lm_eval:
            raise ValueError("lm_eval_args: name tasks in lm_eval")
        return self
