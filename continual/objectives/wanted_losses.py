"""What is wanted of calibration: which losses on which rows, and what a record keeps of that. No row is read here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from blake3 import blake3

from continual.config import CalibrationSettings
from continual.errors import Misconfigured
from continual.lazily import Dtypes
from continual.objectives import function
from continual.objectives.builtin import OBJECTIVES
from continual.objectives.causal_lm import CausalLM
from continual.objectives.rows import file_digest, must_be_readable
from continual.records import FileDigest, ObjectiveRecord

DTYPES = Dtypes({word: word for word in ("float32", "bfloat16", "float16")})


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which losses, on which rows. `objective` is causal-lm, classification, heads, or module:function; `rows` is a
    JSONL file for each task, and `heads` a JSON file of prompts for each, for the objective heads alone. `taught`: what
    is right a teacher of each task says, and no label is looked at. `keep`: a JSONL file of texts of which what the
    model predicts must stay, for causal-lm alone; by default these are the prompts of the rows, where there are any.

    Raises Misconfigured naming what is missing or cannot be used.
    """

    objective: str
    rows: tuple[Path, ...] = ()
    heads: tuple[Path, ...] = ()
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)
    taught: bool = False
    keep: Path | None = None

    def __post_init__(self) -> None:
        s = self.settings
        if self.objective not in OBJECTIVES and not self.by_function:
            raise Misconfigured(
                f"objective = {self.objective!r}: use one of {', '.join(OBJECTIVES)}, or module:function"
            )
        if s.batch < 1:
            raise Misconfigured(f"batch = {s.batch}: at least 1")
        if not 0 < s.held < 1:
            raise Misconfigured(f"held = {s.held}: the share of the rows that judge has to be over 0 and under 1")
        if s.dtype not in DTYPES:
            raise Misconfigured(f"dtype = {s.dtype!r}: use one of {', '.join(DTYPES)}")
        if self.taught and s.unsupervised:
            raise Misconfigured(
                "unsupervised says that entropy says what is good, and teachers say it: name one of them"
            )
        if self.keep is not None and self.objective != CausalLM.name:
            raise Misconfigured(
                f"keep = {self.keep}: texts that must stay are for the objective causal-lm; a function's tasks have a "
                "method `prompts`, and what other objectives learn predicts no text"
            )
        if self.by_function:
            named = (
                ("rows", self.rows),
                ("heads", self.heads),
                ("checkpointing", s.checkpointing),
                ("unsupervised", s.unsupervised),
            )
            if given := next((name for name, value in named if value), None):
                raise Misconfigured(
                    f"{given} is for the built-in objectives; with {self.objective} it is the function's own business"
                )
            return
        kind = OBJECTIVES[self.objective]
        if not self.rows:
            raise Misconfigured(f"rows: the objective {self.objective} needs a JSONL file of rows for each task")
        if kind.prompted and len(self.heads) != len(self.rows):
            raise Misconfigured(
                "heads: one JSON file of prompts for each file of rows; "
                f"there are {len(self.heads)} for {len(self.rows)}"
            )
        if self.heads and not kind.prompted:
            raise Misconfigured(f"heads are for the objective heads; {self.objective} takes none")
        if s.unsupervised and not kind.labelled:
            raise Misconfigured(f"unsupervised is for objectives with classes; {self.objective} needs no labels anyway")

    @property
    def by_function(self) -> bool:
        """Whether the objective is a function of the user's."""
        return function.is_function(self.objective)

    def check(self) -> None:
        """Raises Misconfigured for a file that is not there or cannot be opened, and for a function that cannot be
        imported. What is in the files is seen when they are loaded."""
        if self.by_function:
            function.code_digest(self.objective)
        for file in (*self.rows, *self.heads, *([] if self.keep is None else [self.keep])):
            must_be_readable(file)

    def told(self, teachers: Sequence[FileDigest] = ()) -> ObjectiveRecord:
        """What a record keeps: names and digests of the files, or of the function's module, and all else that the
        losses depend on: `teachers` by their names, each with a digest of what it said. `digest` is over all the rest.
        Raises Misconfigured for a file that cannot be read, and for a
        function that cannot be imported."""
        found = ObjectiveRecord(
            kind="function" if self.by_function else "rows",
            objective=self.objective,
            seed=self.settings.seed,
            held=self.settings.held,
            batch=self.settings.batch,
            dtype=self.settings.dtype,
            unsupervised=self.settings.unsupervised,
            code=function.code_digest(self.objective) if self.by_function else None,
            rows=None if self.by_function else tuple(file_digest(file) for file in self.rows),
            heads=tuple(file_digest(file) for file in self.heads) or None,
            teachers=tuple(teachers) or None,
            keep=None if self.keep is None else file_digest(self.keep),
            digest="",
        )
        rest = {key: value for key, value in asdict(found).items() if value is not None and key != "digest"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return replace(found, digest=f"blake3:{blake3(text.encode()).hexdigest()}")
