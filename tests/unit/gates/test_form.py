"""What a state that keeps adapters refuses; tests/integration/test_adapter_states.py has the kinds of adapters."""

from __future__ import annotations

from pathlib import Path

from continual.gates.form import FormGate
from continual.tensors.bases.kept import kept_base
from tests.helpers import adapters, models
from tests.unit.gates import cases
from tests.unit.gates.cases import Case


def _kept(place: Path) -> Case:
    seen = cases.fine_tune(place)
    headers = {name: (info.dtype, info.shape) for name, info in seen.base.checkpoint.tensors.items()}
    return Case(FormGate(), seen._replace(base=kept_base("base", headers, None, seen.base.specs, seen.base.aliases)))


REFUSED = {"form": _kept}


def test_a_state_of_whole_tensors_takes_full_fine_tunes_and_adapters(tmp_path: Path) -> None:
    FormGate().judge(cases.fine_tune(tmp_path))
    base = models.base(tmp_path / "other")
    FormGate().judge(cases.headers(base, adapters.lora(tmp_path / "lora", base, 1)))
