"""The settings of rounds over the pool: how they choose, how rows are read, how Frank-Wolfe steps. What each means
stands in ops/docs/selection.md."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class StepSettings(BaseModel):
    """How Frank-Wolfe steps. `selection.steps` checks the values where a round needs them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str = Field(default="corrective", description="hard, pairwise, soft or corrective")
    rho: float = Field(default=4.0, description="what the weights of a layer may add up to")
    search: str = Field(default="line", description="line search, or decay for 2/(t+2)")
    best: int = Field(default=4, description="models a soft step takes at once")
    active: int = Field(
        default=16, description="frank-wolfe: models that are weighed at most; others in the merge can only shrink"
    )
    steps: int = Field(default=20, description="steps of a round at most")
    inner: int = Field(default=2, description="projected gradients of one soft or corrective step")
    tolerance: float = Field(default=1e-2, description="duality gap at which a round is done")


class CalibrationSettings(BaseModel):
    """How calibration rows are read and run. `objectives.calibration` checks the values where it needs them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int = Field(default=16, description="calibration rows at a time")
    seed: int = Field(default=0, description="deals the rows into those that drive and those that judge")
    held: float = Field(default=0.5, description="share of the rows that judge")
    dtype: str = Field(
        default="float32", description="of the matrix products on calibration rows: float32, bfloat16 or float16"
    )
    checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, more time"
    )
    unsupervised: bool = Field(default=False, description="entropy instead of labels: it diverged where it was tried")


class RoundSettings(StepSettings, CalibrationSettings):
    """How rounds over the pool choose. Times are seconds; what each means stands in ops/docs/selection.md."""

    size: int = Field(default=8, description="a round is due when so many new candidates wait")
    wait: float = Field(default=3600.0, description="or when one has waited so long")
    trial: float = Field(
        default=0.3, description="largest share of a task vector that is added to see what it does to held-out rows"
    )
    sigmas: float = Field(default=3.0, description="standard errors by which a trial has to lower their loss")
    stays: float = Field(
        default=0.0,
        description="standard errors by which held-out rows have to be worse without a model that was let in",
    )
    patience: int = Field(default=3, description="rounds that may judge a candidate irrelevant before it is refused")
    age: float = Field(default=30 * 86400.0, description="how long a candidate may wait before it expires")
    most: int = Field(default=1000, description="candidates that may wait; of more the oldest expire")
    layers: bool | None = Field(
        default=None, description="frank-wolfe: one weight for each layer of a model; default: with corrective"
    )
