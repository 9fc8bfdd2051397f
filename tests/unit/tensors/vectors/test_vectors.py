"""Task vectors of full checkpoints: their values against whole-tensor arithmetic, what counts as the same content, and
what memory they take."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from continual.gates.lineage import LineageGate, trace
from continual.tensors import BaseModel, Checkpoint, TaskVector, TaskVectors, describe, open_model
from continual.tensors.vectors.vectors import RUN

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 16}


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: t.clone() for name, t in tensors.items()}, path / "model.safetensors")
    return path


def based(path: Path) -> BaseModel:
    checkpoint = open_model(path)
    assert isinstance(checkpoint, Checkpoint)
    return describe(checkpoint)


def pieces(base: Path, fine_tune: Path) -> tuple[dict[str, TaskVector], str]:
    origin = based(base)
    with origin.checkpoint, open_model(fine_tune) as model:
        vectors = TaskVectors(origin, model, trace(origin, model, LineageGate()))
        found = {spec.name: vectors.vector(spec.name) for spec in origin.specs}
        return found, vectors.digest({name: piece.digest for name, piece in found.items()})


@given(
    ours=st.sampled_from(FLOATS),
    theirs=st.sampled_from(FLOATS),
    shape=st.sampled_from([(), (0, 3), (1,), (3, 5), (2, 3, 2, 2), (3, RUN // 2 + 1)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_are_those_of_whole_tensors(
    tmp_path: Path, ours: torch.dtype, theirs: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    origin = torch.randn(shape, generator=random).to(ours)
    tuned = (origin.float() + torch.randn(shape, generator=random) * 0.1).to(theirs)
    found, _ = pieces(save(tmp_path / "base", {"a.weight": origin}), save(tmp_path / "ft", {"a.weight": tuned}))
    piece = found["a.weight"]
    cast = origin if theirs in (ours, torch.float32) else origin.to(theirs)
    assert piece.tau.dtype == torch.float32
    assert torch.equal(piece.tau, tuned.float() - cast.float())
    assert piece.nbytes_read == origin.numel() * (BITS[ours] + BITS[theirs]) // 8


@pytest.mark.parametrize("theirs", FLOATS)
@pytest.mark.parametrize("ours", FLOATS)
def test_an_untouched_weight_gives_exactly_zero(tmp_path: Path, ours: torch.dtype, theirs: torch.dtype) -> None:
    origin = torch.randn(50, 50).to(ours)
    found, _ = pieces(
        save(tmp_path / "base", {"a.weight": origin}), save(tmp_path / "ft", {"a.weight": origin.to(theirs)})
    )
    assert not found["a.weight"].tau.any()


def test_digest_is_of_the_content_under_the_base_s_names(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4)}
    base = save(tmp_path / "base", {name: torch.zeros_like(t) for name, t in tensors.items()})
    _, first = pieces(base, save(tmp_path / "one", tensors))
    assert first.startswith("blake3:")
    assert pieces(base, save(tmp_path / "renamed", tensors | {"head.bias": torch.zeros(2)}))[1] == first
    assert pieces(base, save(tmp_path / "prefixed", {f"model.{n}": t for n, t in tensors.items()}))[1] == first
    others = (
        {"a.weight": tensors["a.weight"].nextafter(torch.tensor(9.0)), "b.weight": tensors["b.weight"]},
        {"a.weight": tensors["a.weight"].bfloat16(), "b.weight": tensors["b.weight"]},
    )
    assert len({first, *(pieces(base, save(tmp_path / f"other-{i}", t))[1] for i, t in enumerate(others))}) == 3


def test_threads_read_the_same(tmp_path: Path) -> None:
    tensors = {f"l.{i}.weight": torch.randn(300, 300) for i in range(12)}
    base = save(tmp_path / "base", {n: torch.randn(300, 300).bfloat16() for n in tensors})
    alone, _ = pieces(base, save(tmp_path / "ft", tensors))
    origin = based(base)
    with origin.checkpoint, open_model(tmp_path / "ft") as model, ThreadPoolExecutor(4) as pool:
        vectors = TaskVectors(origin, model, trace(origin, model, LineageGate()))
        for name in tensors:
            vectors.prefetch(name)
        for name, piece in zip(tensors, pool.map(vectors.vector, tensors), strict=True):
            assert torch.equal(piece.tau, alone[name].tau)
            assert piece[1:] == alone[name][1:]


def resident_peak() -> int:
    """The process's peak resident memory in bytes since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def test_beside_the_task_vector_hardly_anything_is_in_memory(tmp_path: Path) -> None:
    shape = (4096, 4096)
    base = save(
        tmp_path / "base", {"a.weight": torch.zeros(shape, dtype=torch.bfloat16), "b.weight": torch.zeros(8, 8)}
    )
    tuned = save(tmp_path / "ft", {"a.weight": torch.ones(shape, dtype=torch.bfloat16), "b.weight": torch.ones(8, 8)})
    origin = based(base)
    with origin.checkpoint, open_model(tuned) as model:
        vectors = TaskVectors(origin, model, trace(origin, model, LineageGate()))
        vectors.vector("b.weight")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident_peak()
        tau = vectors.vector("a.weight").tau
        grown = resident_peak() - before
        assert 4 * tau.numel() <= vectors.nbytes("a.weight") < 4 * tau.numel() + (16 << 20)
        assert grown <= vectors.nbytes("a.weight") + (4 << 20), "both raw tensors as well would be 128 MB"
