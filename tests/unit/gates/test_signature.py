"""Models that nobody has signed. Real signatures are in tests/integration/test_signatures.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from continual.config import Settings
from continual.errors import Misconfigured
from continual.gates import SignatureGate, make
from tests.unit.gates.cases import Case, fine_tune

REFUSED = {"signature": lambda place: Case(SignatureGate(act="refuse", keys=("key.pub",)), fine_tune(place))}


def test_nobody_looks_unless_it_is_asked_for(tmp_path: Path) -> None:
    SignatureGate().judge(fine_tune(tmp_path))
    SignatureGate().check()


def test_it_refuses_only_where_somebody_is_trusted(tmp_path: Path) -> None:
    def check(**said: object) -> None:
        make(Settings(gates={"signature": {"act": "refuse", **said}})).the(SignatureGate).check()

    with pytest.raises(Misconfigured, match=r"^gates\.signature: nobody is trusted"):
        check()
    with pytest.raises(Misconfigured, match="an identity and its issuer go together"):
        check(identity="a@b")
    with pytest.raises(Misconfigured, match=r"key\.pub: no such file"):
        check(keys=[str(tmp_path / "key.pub")])
