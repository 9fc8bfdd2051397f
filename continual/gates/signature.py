"""Keeps out models that nobody has signed who is trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from continual.errors import Refuse
from continual.gates.contract import AtFold, Headers
from continual.signing.trust import Trusted, verify


@dataclass(frozen=True)
class SignatureGate(AtFold):
    """Refuses a model without a valid signature, in `model.sig`, of all its files.

    `act`: `refuse`, or `off`, the default: then nobody looks. `keys`: files of public keys; `certificates`: of roots;
    `identity`, `issuer`: of who signs by Sigstore. Any of them will do.
    """

    name = "signature"
    reasons = ("signature",)

    act: Literal["refuse", "off"] = "off"
    keys: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    identity: str = ""
    issuer: str = ""

    @property
    def trusted(self) -> Trusted:
        """Who is trusted."""
        return Trusted(self.keys, self.certificates, self.identity, self.issuer)

    def check(self) -> None:
        """Raises Misconfigured where it is to refuse and nobody is trusted, or cannot be."""
        if self.act == "refuse":
            self.trusted.check("gates.signature")

    def judge(self, seen: Headers) -> None:
        """Raises Refuse (`signature`), Retry, and Misconfigured as `check`."""
        if self.act == "off":
            return
        try:
            verify(seen.model.place, self.trusted)
        except Refuse as error:
            if error.reason != "signature":
                raise
            by = ("act", "keys", "certificates", "identity", "issuer")
            raise Refuse(
                "signature",
                f"{error}; gates.signature.act = off lets it in, and so does one of gates.signature.keys, "
                "gates.signature.certificates, or gates.signature.identity with gates.signature.issuer that signed it",
                by=by,
            ) from None
