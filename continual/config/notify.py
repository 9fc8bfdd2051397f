"""The settings of messages to people. ops/docs/operations.md shows the same; a test compares the two."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from continual.config.values import Seconds

Happening = Literal["folded", "refused", "released", "canary", "degraded", "halted"]


def _several(given: object) -> object:
    """One address is a list of one."""
    return [given] if isinstance(given, str) else given


class NotifySettings(BaseModel):
    """Who is told of what, in words; nobody is, where nothing is set. Times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    urls: Annotated[tuple[SecretStr, ...], BeforeValidator(_several)] = Field(
        default=(), description="addresses as Apprise has them, as slack://… or mailto://…, or env:NAME for one"
    )
    events: tuple[Happening, ...] = Field(
        default=("refused", "canary", "degraded", "halted"),
        description="what is told: folded, refused, released, canary, degraded, halted",
    )
    gather: Seconds = Field(default=60.0, description="what happens within so long goes out as one message")
    tries: Annotated[int, Field(ge=1)] = Field(default=3, description="how often a message is tried at each address")
