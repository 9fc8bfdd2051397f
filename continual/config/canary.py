"""The settings of a canary: where it goes out, and what is watched before it is promoted. Whether they
fit together and to the rest is asked in `service/canary/checking.py`.

ops/docs/hub.md shows the same names, defaults and meanings; a test compares the two.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from continual.config.values import Seconds


class CanarySettings(BaseModel):
    """What goes out as a canary first, and is watched. Times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    branch: str = Field(
        default="candidate", description="branch of the repo that has the canary; made if it is not there"
    )
    request: bool = Field(
        default=False, description="propose the canary by a pull request to main, in place of a branch of its own"
    )
    query: str | None = Field(
        default=None, description="what is asked of Prometheus (PromQL); each of its values has to keep to the limits"
    )
    max: float | None = Field(default=None, description="largest value that is no alarm")
    min: float | None = Field(default=None, description="smallest value that is no alarm")
    prometheus: str = Field(default="http://127.0.0.1:9090", description="where Prometheus listens")
    evaluate: bool = Field(
        default=False,
        description="ask the evaluation, too (command, rows or lm-eval), about the canary and about what it is to "
        "replace",
    )
    interval: Annotated[float, Field(gt=0)] = Field(default=60.0, description="seconds between two measurements")
    count: Annotated[int, Field(ge=1)] = Field(default=5, description="so many of the newest measurements count")
    failure_limit: Annotated[int, Field(ge=1)] = Field(
        default=2, description="so many of these have to be alarms for the canary to be taken back"
    )
    after: Seconds | None = Field(
        default=None,
        description="seconds without an alarm after which it is promoted; default: it waits for a person",
    )
    timeout: Annotated[float, Field(gt=0)] = Field(default=10.0, description="seconds Prometheus may take to answer")
