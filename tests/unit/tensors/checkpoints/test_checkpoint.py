"""Model directories as they come: good ones are read to the byte, bad ones refused with the file's name, and a bad
environment settles nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from continual.errors import Refuse, Retry
from continual.tensors import Checkpoint, candidate_of, open_model
from continual.tensors.checkpoints.checkpoint import weight_files
from continual.tensors.checkpoints.place import Folder

A, B = torch.arange(12.0).reshape(3, 4), torch.arange(5, dtype=torch.int64)
INDEX = "model.safetensors.index.json"


def write(path: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    if weight_map is not None:
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write(tmp_path / "m", {"model.safetensors": {"a": A, "b": B}})


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write(
        tmp_path / "m",
        {"x-1.safetensors": {"a": A}, "x-2.safetensors": {"b": B}},
        {"a": "x-1.safetensors", "b": "x-2.safetensors"},
    )


def refused(path: Path, root: Path | None = None) -> Refuse:
    with pytest.raises(Refuse) as refusal, open_model(path, root=root):
        pass
    assert path.name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    return refusal.value


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_every_dtype_to_the_byte(layout: str, request: pytest.FixtureRequest) -> None:
    with open_model(request.getfixturevalue(layout)) as model:
        assert isinstance(model, Checkpoint)
        assert torch.equal(model.read("a"), A)
        assert torch.equal(model.read("b"), B)
        assert torch.equal(model.read("a", torch.zeros(100, dtype=torch.uint8)), A)
        assert model.nbytes == 48 + 40
        model.check_unchanged()


def test_dtypes_scalars_and_empty(tmp_path: Path) -> None:
    kinds = (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
    tensors = {str(d): torch.tensor([0, 1, 1]).to(d) for d in kinds} | {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 7),
    }
    with open_model(write(tmp_path / "m", {"model.safetensors": tensors})) as model:
        assert isinstance(model, Checkpoint)
        for name, tensor in tensors.items():
            read = model.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read, tensor)


def test_a_file_by_hand_and_one_of_another_name(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    (single / "config.json").write_text('{"model_type": "bert"}')
    for path in (single, single / "weights.safetensors"):
        with open_model(path) as model:
            assert model.config == {"model_type": "bert"}
            assert [f.name for f in model.files] == ["weights.safetensors"]


def test_key_names_place_and_state_of_the_files(single: Path, tmp_path: Path) -> None:
    def key(path: Path) -> str:
        with open_model(path) as model:
            found = candidate_of(model, source="folder")
        assert (found.name, found.origin, found.form, found.nbytes) == (path.name, str(path), "full", 88)
        return found.key

    first = key(single)
    assert first == key(single)
    assert first.startswith("folder:")
    os.utime(single / "model.safetensors", ns=(1, 1))
    assert key(single) != first
    shutil.copytree(single, tmp_path / "copy")
    assert key(tmp_path / "copy") != key(single)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        ".x.safetensors",
        "x.bin",
        "a\0.safetensors",
        "\ud800.safetensors",
        "x" * 300 + ".safetensors",
        7,
        None,
    ],
)
def test_index_names_only_files_beside_it(sharded: Path, shard: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": shard, "b": "x-2.safetensors"}}))
    save_file({"a": A}, sharded.parent / "outside.safetensors")
    assert refused(sharded).reason == "index"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ("[]", "no JSON object"),
        ('{"weight_map"', "JSON"),
        ('{"a":' * 100_000, "JSON"),
        (
            '{"weight_map": {"a": "x-1.safetensors", "a": "x-2.safetensors", "b": "x-2.safetensors"}}',
            "a is there twice",
        ),
        ('{"weight_map": {"a": "x-2.safetensors", "b": "x-1.safetensors"}}', "where it is not"),
        (
            '{"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors", "c\\nd": "x-2.safetensors"}}',
            "where it is not",
        ),
    ],
)
def test_malformed_index(sharded: Path, text: str, words: str) -> None:
    (sharded / INDEX).write_text(text)
    refusal = refused(sharded)
    assert refusal.reason == "index"
    assert words in str(refusal)


def test_the_index_decides_over_unlisted_and_doubled_tensors_and_misses_a_shard(sharded: Path) -> None:
    save_file({"b": B, "more": A, "a": -A}, sharded / "x-2.safetensors")
    with open_model(sharded) as model:
        assert isinstance(model, Checkpoint)
        assert (sorted(model.tensors), model.unlisted) == (["a", "b"], ("more",))
        assert torch.equal(model.read("a"), A), "the index says in which of two shards"
    (sharded / "x-2.safetensors").unlink()
    refusal = refused(sharded)
    assert (refusal.reason, "x-2.safetensors" in str(refusal)) == ("missing-shard", True)


def test_truncated_shard(sharded: Path) -> None:
    os.truncate(sharded / "x-2.safetensors", os.path.getsize(sharded / "x-2.safetensors") - 1)
    refusal = refused(sharded)
    assert (refusal.reason, "x-2.safetensors" in str(refusal)) == ("truncated", True)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["pytorch_model.bin"], "pickle"),
        (["consolidated.00.pth"], "pickle"),
        (["adapter_config.json", "adapter_model.bin"], "pickle"),
        (["adapter_config.json"], "no-weights"),
        (["README.md"], "no-weights"),
        ([], "no-weights"),
        (["a.safetensors", "b.safetensors"], "index"),
        (["adapter_config.json", "adapter_model.safetensors", "model.safetensors"], "adapter-kind"),
    ],
)
def test_what_holds_no_model(tmp_path: Path, names: list[str], reason: str) -> None:
    (tmp_path / "m").mkdir()
    for name in names:
        (tmp_path / "m" / name).write_bytes(b"x")
    assert refused(tmp_path / "m").reason == reason


def test_no_tensor_at_all(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(save({}))
    assert refused(tmp_path / "m").reason == "no-weights"


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1, "a": 2}', '{"x": NaN}'])
def test_config_must_be_an_object(single: Path, text: str) -> None:
    (single / "config.json").write_text(text)
    assert refused(single).reason == "config"


def test_config_of_a_mamba_model_has_no_upper_limit_in_it(single: Path) -> None:
    (single / "config.json").write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    with open_model(single) as model:
        assert isinstance(model, Checkpoint)
        assert model.config["time_step_limit"] == [0.0, float("inf")]


def test_config_of_absurd_size(single: Path) -> None:
    with open(single / "config.json", "wb") as config:
        config.truncate(1 << 33)
    assert refused(single).reason == "config"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_watched_folder(single: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (single / "config.json").write_text("{}")
    shutil.move(single / name, outside / name)
    (single / name).symlink_to(outside / name)
    refusal = refused(single, root=single.parent / "m")
    assert (refusal.reason, str(outside) in str(refusal)) == ("outside", True)
    with open_model(single):  # given by hand: the Hub's cache is symlinks
        pass
    with open_model(single, root=tmp_path):  # a link that stays inside
        pass


def test_a_linked_directory_leads_out_too(single: Path, tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    (watched / "m").symlink_to(single)
    assert refused(watched / "m", root=watched).reason == "outside"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink(p, p)])
def test_fifo_directory_and_circle_of_links_neither_hang_nor_crash(
    single: Path, name: str, make: Callable[[Path], None]
) -> None:
    (single / name).unlink(missing_ok=True)
    make(single / name)
    if name == "config.json" and (single / name).is_symlink():
        with open_model(single) as model:  # a config that is not there
            assert model.config == {}
    else:
        assert refused(single).reason in ("no-file", "missing-shard")


def rewrite(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data)
    os.utime(file, ns=(5, 5))


def replace(file: Path) -> None:
    shutil.copy2(file, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


@pytest.mark.parametrize(
    "change", [Path.unlink, rewrite, replace, lambda f: os.truncate(f, 10), lambda f: shutil.rmtree(f.parent)]
)
def test_changed_or_deleted_while_it_is_read(single: Path, change: Callable[[Path], None]) -> None:
    with open_model(single) as model:
        model.check_unchanged()
        change(single / "model.safetensors")
        with pytest.raises(Retry, match=r"model\.safetensors"):
            model.check_unchanged()


def test_cut_while_it_is_read_is_no_crash(single: Path) -> None:
    with open_model(single) as model:
        assert isinstance(model, Checkpoint)
        os.truncate(single / "model.safetensors", 100)
        with pytest.raises(Retry, match="shorter"):
            model.read("a")


def test_a_model_that_is_gone_is_for_later(tmp_path: Path) -> None:
    with pytest.raises(Retry, match="gone"):
        open_model(tmp_path / "none")


def test_refusals_leave_no_descriptor_open(sharded: Path) -> None:
    os.truncate(sharded / "x-2.safetensors", 9)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        refused(sharded)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_place_is_is_asked_once(tmp_path: Path) -> None:
    """A file that cannot be looked at the second time is still the one file of its place."""
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    answers = iter(["a.safetensors", None])

    class Fleeting(Folder):
        @property
        def only(self) -> str | None:
            return next(answers)

    assert weight_files(Fleeting(tmp_path / "a.safetensors")) == ("a.safetensors",)
