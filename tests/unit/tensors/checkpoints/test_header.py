"""The header parser on good, bad and hostile bytes: it returns what the safetensors library wrote, or Refuse, and
nothing else."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from continual.errors import Refuse
from continual.tensors.checkpoints.header import IN_ONE, LONGEST, TensorInfo, metadata, parse


def parsed(data: bytes) -> dict[str, TensorInfo]:
    return parse(lambda length, offset: data[offset : offset + length], len(data), "model.safetensors")


def file_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = file_of(
    {"__metadata__": {"format": "pt"}, "a": entry(0, 8), "b": entry(8, 8, [0, 3]), "c": entry(8, 12, [])}, bytes(12)
)


def test_reads_what_the_library_writes() -> None:
    tensors = {
        "x": torch.zeros(2, 3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(5),
        "naïve.weight": torch.zeros(1),
    }
    data = save(tensors, metadata={"format": "pt"})
    found = parsed(data)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = found[name]
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.numel() * tensor.element_size())
        assert (
            data[info.offset : info.offset + info.nbytes] == bytes(tensor.reshape(-1).view(torch.uint8).numpy())
            if tensor.numel()
            else True
        )
    assert [found[n].dtype for n in ("x", "mask", "ids", "scalar")] == ["BF16", "BOOL", "I64", "F32"]


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (b"", "truncated", "0 bytes"),
        (b"1234567", "truncated", "7 bytes"),
        (file_of(b"{}", length=1 << 63), "header", str(1 << 63)),
        (file_of(b"{}", length=LONGEST + 1), "header", "at most"),
        (file_of(b"{}", length=100), "truncated", "cut off"),
        (GOOD[:-1], "truncated", "cut off"),
        (GOOD + b"x", "header", "belong to none"),
        (file_of(b""), "header", "JSON"),
        (file_of(b"[]"), "header", "no JSON object"),
        (file_of(b"{} {}"), "header", "JSON"),
        (file_of(b"{\xff}"), "header", "JSON"),
        (file_of(b"[" * 200_000), "header", "JSON"),
        (file_of(b'{"a":' * 100_000), "header", "JSON"),
        (file_of(b'{"a":NaN}'), "header", "NaN"),
        (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "header", "JSON"),
        (
            file_of(
                b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},'
                b'"a":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}',
                b"ab",
            ),
            "header",
            "a is there twice",
        ),
        (file_of({"__metadata__": {"a": 1}}), "header", "__metadata__"),
        (file_of({"__metadata__": []}), "header", "__metadata__"),
        (file_of({"a": []}), "header", "tensor a"),
        (file_of({"a": {"dtype": "F32", "shape": [1]}}), "header", "tensor a"),
        (file_of({"a": {**entry(0, 4), "more": 1}}, bytes(4)), "header", "nothing else"),
        (file_of({"a": entry(0, 4, [4], "F8_E4M3")}, bytes(4)), "quantised", "tensor a is F8_E4M3 (FP8)"),
        (file_of({"a": entry(0, 4, [1], "C64")}, bytes(4)), "dtype", "C64"),
        (file_of({"a": {**entry(0, 4), "dtype": ["F32"]}}, bytes(4)), "dtype", "tensor a"),
        (file_of({"a": entry(0, 4, [-1])}, bytes(4)), "header", "shape"),
        (file_of({"a": entry(0, 4, [1.0])}, bytes(4)), "header", "shape"),
        (file_of({"a": entry(0, 4, [True])}, bytes(4)), "header", "shape"),
        (file_of({"a": entry(0, 0, [1 << 61, 1 << 61, 0])}), "header", "shape"),
        (file_of({"a": entry(0, 4, [1 << 32, 1 << 32])}, bytes(4)), "header", "shape"),
        (file_of({"a": entry(0, 4, [2])}, bytes(4)), "header", "takes 8"),
        (file_of({"a": {**entry(0, 4), "data_offsets": [4, 0]}}, bytes(4)), "header", "no range"),
        (file_of({"a": {**entry(0, 4), "data_offsets": [-4, 0]}}, bytes(4)), "header", "no range"),
        (file_of({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, bytes(4)), "header", "no range"),
        (file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "header", "b overlaps"),
        (file_of({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "header", "overlaps"),
        (file_of({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "header", "4 bytes before tensor b"),
        (file_of({"a": entry(4, 8)}, bytes(8)), "header", "before tensor a"),
        (file_of({"a": entry(1 << 40, (1 << 40) + 4)}, bytes(4)), "header", "before tensor a"),
        (file_of({"a\nb": entry(0, 4)}, bytes(4)), "header", "printable"),
        (file_of({"\ud800": entry(0, 4)}, bytes(4)), "header", "surrogate"),
        (file_of({"": entry(0, 4)}, bytes(4)), "header", "empty"),
        (file_of({"x" * 5000: entry(0, 4)}, bytes(4)), "header", "longer"),
    ],
)
def test_refuses_by_name(data: bytes, reason: str, words: str) -> None:
    with pytest.raises(Refuse) as refusal:
        parsed(data)
    message = str(refusal.value)
    assert refusal.value.reason == reason
    assert words in message
    assert "model.safetensors" in message
    assert "\n" not in message
    assert len(message) < 400


def test_many_names_and_a_late_duplicate_take_linear_time() -> None:
    names = ",".join(f'"t{i}":[]' for i in range(40_000))
    begun = time.process_time()
    with pytest.raises(Refuse, match="t39999 is there twice"):
        parsed(file_of(f'{{{names},"t39999":[]}}'.encode()))
    assert time.process_time() - begun < 5, "a quadratic search takes hours here"


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":[' + b"1," * 400_000 + b"1]}",
        b"{" + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}",
        b'{"__metadata__":{' + b",".join(b'"k%d":"v"' % i for i in range(200_000)) + b"}}",
    ],
)
def test_more_values_than_tensors_have(text: bytes) -> None:
    with pytest.raises(Refuse, match="more values than its tensors can have") as refusal:
        parsed(file_of(text))
    assert refusal.value.reason == "header"


@pytest.mark.slow
def test_as_many_tensors_as_a_model_may_have_and_one_more() -> None:
    one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = [one % i for i in range(IN_ONE + 3)]
    assert len(parsed(file_of(b"{" + b",".join(names[:IN_ONE]) + b"}"))) == IN_ONE
    with pytest.raises(Refuse, match=f"more than {IN_ONE} tensors in one file; write the model in shards"):
        parsed(file_of(b"{" + b",".join(names) + b"}"))


def test_metadata_of_a_file_that_was_exchanged_since() -> None:
    def pread(length: int, offset: int) -> bytes:
        return (b"\xff" * 8 + b"{}")[offset : offset + length]

    with pytest.raises(Refuse, match="claims"):
        metadata(pread, "x.safetensors")


def only_refuse(data: bytes) -> None:
    reason = "read"
    try:
        covered = sum(info.nbytes for info in parsed(data).values())
    except Refuse as refusal:
        str(refusal).encode()
        reason = refusal.reason
    else:
        assert 8 + int.from_bytes(data[:8], "little") + covered == len(data)
    assert reason in ("read", "header", "truncated", "dtype", "quantised", "foreign", "pickle")


@given(st.binary(max_size=200))
def test_fuzz_bytes(data: bytes) -> None:
    only_refuse(data)


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(GOOD)),
)
@settings(max_examples=300)
def test_fuzz_flipped_and_cut(flips: list[tuple[int, int]], end: int) -> None:
    data = bytearray(GOOD)
    for at, value in flips:
        data[at] = value
    only_refuse(bytes(data))
    only_refuse(bytes(data[:end]))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
sizes = st.lists(st.integers(-1, 6) | st.integers(), max_size=4)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E5M2", "?"]),
        "shape": sizes | values,
        "data_offsets": sizes | values,
    }
)


@given(
    st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | values, max_size=4), st.binary(max_size=40)
)
@settings(max_examples=300)
def test_fuzz_json(header: dict[str, Any], data: bytes) -> None:
    only_refuse(file_of(header, data))
