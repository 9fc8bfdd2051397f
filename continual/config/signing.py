"""The settings of what is signed before it goes out. ops/docs/signatures.md shows the same; a test compares the two."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from continual.config.values import File, Paths


class SigningSettings(BaseModel):
    """How exports and releases are signed; nothing is, where nothing is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: File | None = Field(default=None, description="file with the private key, of an elliptic curve (PEM)")
    certificate: File | None = Field(default=None, description="file with the certificate of that key (PEM)")
    chain: Paths = Field(default=(), description="files with the certificates that it leads to, the root the last")
    sigstore: bool = Field(
        default=False, description="sign by Sigstore, as whom the environment says (a workload identity)"
    )
