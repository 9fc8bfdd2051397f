"""Models in several folders that are put together in another way than the base."""

from __future__ import annotations

from pathlib import Path

import pytest

from continual.errors import Refuse
from continual.gates.assembly import AssemblyGate
from continual.gates.contract import Headers
from tests.helpers import parts
from tests.unit.gates.cases import Case, headers

POOLING = "1_Pooling/config.json"


def embedders(place: Path, **change: object) -> Headers:
    base = parts.embedder(place / "base")
    return headers(base, parts.embedder(place / "alice", 1, **change))  # type: ignore[arg-type]


def malformed(place: Path) -> Headers:
    base = parts.embedder(place / "base")
    alice = parts.embedder(place / "alice", 1)
    parts.put(alice, {POOLING: b"[]"})
    return headers(base, alice)


REFUSED = {
    "assembly": lambda place: Case(AssemblyGate(), embedders(place, mode="cls_token")),
    "config": lambda place: Case(AssemblyGate(), malformed(place)),
}


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode": "mean", "embedding_dimension": 8, "include_prompt": True},
        {"pooling_mode": ["mean"]},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 8},
    ],
)
def test_other_words_for_the_same_pooling_are_the_same(tmp_path: Path, settings: dict[str, object]) -> None:
    base = parts.embedder(tmp_path / "base")
    alice = parts.put(parts.embedder(tmp_path / "alice", 1), {POOLING: settings})
    AssemblyGate().judge(headers(base, alice))


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        (POOLING, {"pooling_mode": "lasttoken"}, "pooling_mode = lasttoken, the base's mean"),
        (POOLING, {"pooling_mode": ["mean", "max"]}, "pooling_mode = max, mean, the base's mean"),
        (POOLING, {"pooling_mode": "mean", "include_prompt": False}, "include_prompt = False, the base's True"),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.nn.modules.linear.Identity"},
            "activation_function = Identity, the base's Tanh",
        ),
    ],
)
def test_what_computes_something_else_is_refused(
    tmp_path: Path, file: str, settings: dict[str, object], said: str
) -> None:
    base = parts.embedder(tmp_path / "base")
    seen = headers(base, parts.put(parts.embedder(tmp_path / "alice", 1), {file: settings}))
    with pytest.raises(Refuse) as refused:
        AssemblyGate().judge(seen)
    assert said in str(refused.value)
    assert "gates.assembly.differ = base" in str(refused.value)
    AssemblyGate(differ="base").judge(seen)


def test_an_encoder_alone_and_an_embedder_of_an_encoder_are_let_in(tmp_path: Path) -> None:
    whole, bare = parts.embedder(tmp_path / "base", dense=False), parts.embedder(tmp_path / "alice", 1, dense=False)
    (bare / "modules.json").unlink()
    AssemblyGate().judge(headers(whole, bare))
    AssemblyGate().judge(headers(bare, whole))
