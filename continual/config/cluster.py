"""The settings of a Ray cluster that does the work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from continual.config.values import Bytes


def _whole_beyond_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("a share of one GPU is below 1; more than one are a whole number")
    return gpus


class RaySettings(BaseModel):
    """The Ray cluster that does the work, and what each order asks of it; ops/docs/many-machines.md says more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str = Field(
        default="auto", description="head of the cluster, as 10.0.0.1:6379; auto: that of this machine"
    )
    memory: Bytes | None = Field(
        default=None, description="bytes that an order reserves, as 8GB; default: what its largest tensor takes"
    )
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_whole_beyond_one)] = Field(
        default=0.0, description="GPUs that an order takes, or the share of one; 0: it computes on the CPU"
    )
    max_retries: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="how often an order is sent out again whose worker died, or that its machine could not do",
    )
    order_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="how long a machine may work on an order; default: half an hour, and ten times the slowest done",
    )
    exports: Literal["workers", "driver"] = Field(
        default="workers",
        description="who writes exports: the workers, where all of them see the folder, or the driver alone",
    )
