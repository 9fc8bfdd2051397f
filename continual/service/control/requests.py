"""What a command can ask of a running daemon: one frozen record for each command, which travels as one line of JSON.

A name or a path is passed as it was typed, but made absolute where the daemon could understand it otherwise.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Word = Annotated[str, Field(min_length=1, max_length=4096)]
Seq = Annotated[int, Field(ge=-(2**53), le=2**53)]
"""The number of a record; whether there is one is for the ledger to say."""


Record = Seq | Word
"""A record by its number or, where it was typed so, by its tag or HEAD: what that names is for the ledger to say."""


class Asking(BaseModel):
    """What all requests have. `writes`: whether the state has to be open for writing. `title`: what is done, as the
    status page says it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dry_run: bool = False
    title: ClassVar[str]

    @property
    def writes(self) -> bool:
        """Whether the state is changed."""
        return not self.dry_run


class TagRequest(Asking):
    """Name a record; `force`: also where the name is another record's."""

    command: Literal["tag"] = "tag"
    title = "tag"
    name: Word
    at: Record | None = None
    force: bool = False


class RetryRequest(Asking):
    """Have settled candidates looked at again. `here`: the path that `model` is where it was typed; `because`: why they
    are to be folded in spite of doubts, and `by`: who says so."""

    command: Literal["retry"] = "retry"
    title = "retry"
    model: Word
    here: Word | None = None
    because: Word | None = None
    by: Word | None = None


class DropRequest(Asking):
    """Take candidates that are kept out off the list of them. `here`: as of a retry; `because`: why, and `by`: who says
    so."""

    command: Literal["drop"] = "drop"
    title = "drop"
    model: Word
    here: Word | None = None
    because: Word | None = None
    by: Word | None = None


class RollbackRequest(Asking):
    """Go back to a record. `expected`: how many folds a person agreed to have undone; None: however many."""

    command: Literal["rollback"] = "rollback"
    title = "rollback"
    seq: Record
    expected: int | None = None


class UnfoldRequest(Asking):
    """Take a model out. `here`: the path that `model` is where it was typed; `at`: where the model is now; `expected`:
    how many models a person agreed to have folded again."""

    command: Literal["unfold"] = "unfold"
    title = "unfold"
    model: Word
    here: Word | None = None
    at: Word | None = None
    expected: int | None = None


class ScaleRequest(Asking):
    """Change how the merge is read."""

    command: Literal["scale"] = "scale"
    title = "scale"
    value: Word | None = None
    lines: Word | None = None
    rule: Word | None = None


class RoundRequest(Asking):
    """Run a round over the pool."""

    command: Literal["round"] = "round"
    title = "pool round"


class ReleaseRequest(Asking):
    """Release a record on the Hub, of the merge or of a view."""

    command: Literal["release"] = "release"
    title = "release"
    at: Record | None = None
    view: Word | None = None


class PromoteRequest(Asking):
    """Promote the canary of the merge, or of a view; `at`: the record that it has to be."""

    command: Literal["promote"] = "promote"
    title = "promote"
    at: Record | None = None
    view: Word | None = None


class PauseRequest(Asking):
    """Fold nothing until `resume`."""

    command: Literal["pause"] = "pause"
    title = "pause"


class ResumeRequest(Asking):
    """Fold again after `pause`."""

    command: Literal["resume"] = "resume"
    title = "resume"


class DrainRequest(Asking):
    """Stop after the fold under way, however long that takes."""

    command: Literal["drain"] = "drain"
    title = "drain"


Request = (
    TagRequest
    | RetryRequest
    | DropRequest
    | RollbackRequest
    | UnfoldRequest
    | ScaleRequest
    | RoundRequest
    | ReleaseRequest
    | PromoteRequest
    | PauseRequest
    | ResumeRequest
    | DrainRequest
)
_ANY: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="command")])


def parse(line: bytes) -> Request:
    """The request in a line. Raises ValueError for what is none."""
    return _ANY.validate_json(line)
