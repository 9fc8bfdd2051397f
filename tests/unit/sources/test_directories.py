"""What one directory is: a model or not, whole or not, with which key; and that nothing in it is waited for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from continual.errors import Refuse
from continual.sources import directories
from continual.sources.directories import (
    ADAPTER,
    INDEX,
    Listing,
    forbidden,
    keys,
    listed,
    look,
    loose,
    searched,
    shown,
    signature,
    why_none,
)
from continual.tensors import candidate_of, open_model, unreadable
from continual.tensors.checkpoints.place import Folder
from tests.helpers import parts
from tests.helpers.diffusion import written
from tests.helpers.folders import WEIGHTS, model, publish, sharded

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def whole(path: Path) -> bool:
    found = look(str(path))
    assert found is not None
    return found.whole


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        ({"model.safetensors": WEIGHTS}, True),
        ({"model.safetensors": WEIGHTS, "._model.safetensors": b"\0\5\x16\7"}, True),  # as macOS leaves it
        ({"model.safetensors": WEIGHTS, ".model.safetensors.Ab12Cd": b""}, False),
        ({"model.safetensors": WEIGHTS[:-1]}, False),
        ({"model.safetensors": WEIGHTS[:5]}, False),
        (
            {"model.safetensors": (1 << 63).to_bytes(8, "little") + WEIGHTS},
            True,
        ),  # malformed: to be refused, not waited for
        ({"model.safetensors": b"\x04\0\0\0\0\0\0\0nope"}, True),
        ({"model.safetensors": WEIGHTS, ".model.safetensors.Xy12": b""}, False),
        ({"model.safetensors": WEIGHTS, "model.safetensors.part": b""}, False),
        ({INDEX: sharded("1.safetensors", "2.safetensors"), "1.safetensors": WEIGHTS}, False),
        (
            {INDEX: sharded("1.safetensors", "2.safetensors"), "1.safetensors": WEIGHTS, "2.safetensors": WEIGHTS[:-4]},
            False,
        ),
        ({INDEX: sharded("1.safetensors", "2.safetensors"), "1.safetensors": WEIGHTS, "2.safetensors": WEIGHTS}, True),
        ({INDEX: b"no json", "1.safetensors": WEIGHTS}, True),
        ({INDEX: b'{"weight_map":' * 100_000, "1.safetensors": WEIGHTS}, True),
        ({INDEX: sharded("../1.safetensors"), "1.safetensors": WEIGHTS}, True),
        ({ONE: WEIGHTS}, False),  # the index comes last
        ({ONE: WEIGHTS, TWO: WEIGHTS}, False),
        ({ONE: WEIGHTS, TWO: WEIGHTS, INDEX: sharded(ONE, TWO)}, True),
        ({"model-00001-of-00001.safetensors": WEIGHTS}, True),
        ({"adapter_config.json": b"{}"}, False),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS[:-1]}, False),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}, True),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, True),
        ({"pytorch_model.bin": b"x"}, True),
        ({"weights.pkl": b"x"}, True),
    ],
)
def test_whole_is_all_files_at_full_length(tmp_path: Path, files: dict[str, bytes], complete: bool) -> None:
    assert whole(publish(tmp_path / "m", files)) is complete


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_circle(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("special", [make_pipe, make_socket, make_device, make_circle])
@pytest.mark.parametrize("name", ["model.safetensors", "1.safetensors", INDEX, ADAPTER, "adapter_model.safetensors"])
def test_what_is_no_regular_file_is_not_waited_for_and_refused(
    tmp_path: Path, special: Callable[[Path], None], name: str
) -> None:
    path = tmp_path / "m"
    path.mkdir()
    if name == "adapter_model.safetensors":
        (path / ADAPTER).write_bytes(b"{}")
    if name in (INDEX, ADAPTER):
        (path / "1.safetensors").write_bytes(WEIGHTS)
        (path / "adapter_model.safetensors").write_bytes(WEIGHTS)
    special(path / name)
    assert whole(path)
    with pytest.raises(Refuse):
        open_model(path)
    found = look(str(path))
    assert found is not None
    assert unreadable(Folder(path)).key in list(keys(found, listed(str(path))))


@pytest.mark.parametrize("special", [make_pipe, make_socket, make_device])
def test_what_is_no_regular_file_is_not_even_opened(
    tmp_path: Path, special: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a device may do something: a tape is wound back, a timer starts that reboots the machine."""
    special(tmp_path / "model.safetensors")
    opened = list[object]()
    monkeypatch.setattr(directories, "Files", lambda paths, _root: opened.extend(paths))
    assert whole(tmp_path)
    assert opened == []


def test_a_folder_that_is_called_like_weights_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert look(str(tmp_path)) is None


def test_a_link_that_leads_nowhere_makes_no_whole_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    assert not whole(tmp_path)


def test_names_are_told_apart_and_none_hides_another(tmp_path: Path) -> None:
    for name in ("b", ".hidden", "x.tmp", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "a").symlink_to("a")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "linked").symlink_to("b")
    (tmp_path / "README").write_text("x")
    (tmp_path / ".model.safetensors.Ab").write_text("x")
    assert listed(str(tmp_path)) == Listing(
        ("README", "a", "nowhere"),
        (".model.safetensors.Ab",),
        ("b", "linked", "model"),
        frozenset({"linked"}),
        frozenset({"a", "nowhere"}),
    )


def test_too_many_names_are_an_error_of_that_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MOST", 3)
    for number in range(4):
        (tmp_path / str(number)).touch()
    with pytest.raises(OSError, match="more than 3 names"):
        listed(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "below"),
    [
        ((), ("a", "ref")),
        (("README.md", "tokenizer.json", "model.gguf"), ("a", "ref")),
        (("model.safetensors",), ()),
        (("pytorch_model.bin",), ()),
        (("config.json",), ()),
        (("adapter_config.json",), ()),
        (("modules.json",), ()),
        (("trainer_state.json",), ()),
        ((".model.safetensors.Xy12",), ()),
    ],
)
def test_a_model_is_not_searched_below_nor_is_one_that_is_about_to_be(
    files: tuple[str, ...], below: tuple[str, ...]
) -> None:
    hidden = tuple(name for name in files if name.startswith("."))
    found = Listing(tuple(name for name in files if name not in hidden), hidden, ("a", "checkpoint-500", "ref"))
    assert searched(found, depth=1, link=False, nested=False) == below
    assert searched(found, depth=1, link=False, nested=True) == ("a", "checkpoint-500", "ref")
    assert searched(found, depth=0, link=False, nested=False) == ("a", "ref"), "the watched folder is no model"
    assert searched(found, depth=3, link=False, nested=True) == ()
    assert searched(found, depth=1, link=True, nested=True) == ()


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": WEIGHTS},
        {"model.safetensors": WEIGHTS, "1.safetensors": WEIGHTS, "config.json": b"{}"},
        {"weights.safetensors": WEIGHTS},
        {ONE: WEIGHTS, TWO: WEIGHTS.replace(b"a.weight", b"b.weight"), INDEX: b""},
        {
            "x.safetensors": WEIGHTS,
            "fisher.safetensors": WEIGHTS,
            INDEX: b'{"weight_map": {"a.weight": "x.safetensors"}}',
        },
        {
            "adapter_config.json": b'{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["a"]}',
            "adapter_model.safetensors": WEIGHTS.replace(b"a.weight", b"a.lora_A"),
        },
        {"pytorch_model.bin": b"x", "config.json": b"{}", ".hidden": b"x"},
        {"model.safetensors": b"no header"},
        {"1.safetensors": WEIGHTS, "2.safetensors": WEIGHTS},
        {INDEX: b"no json", "1.safetensors": WEIGHTS},
    ],
)
def test_the_key_is_known_from_the_files_alone(tmp_path: Path, files: dict[str, bytes]) -> None:
    """Whatever the engine makes of the model, one of the keys is that of its record."""
    path = publish(tmp_path / "m", files)
    if files.get(INDEX) == b"":
        (path / INDEX).write_text(f'{{"weight_map": {{"a.weight": "{ONE}", "b.weight": "{TWO}"}}}}')
    try:
        with open_model(path, root=tmp_path) as opened:
            key = candidate_of(opened).key
    except Refuse:
        key = unreadable(Folder(path, tmp_path)).key
    found = look(str(path))
    assert found is not None
    assert key in list(keys(found, listed(str(path))))


def test_the_signature_is_that_of_the_files(tmp_path: Path) -> None:
    found = look(str(model(tmp_path / "m")))
    assert found is not None
    names = [file.name for file in found.files]
    assert signature(found.path, names) == hash(found.files)
    os.utime(tmp_path / "m/model.safetensors", (1, 1))
    assert signature(found.path, names) != hash(found.files)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Listing(), "is empty"),
        (Listing(("README.md",)), "holds no weights"),
        (Listing(("a.gguf", "config.json")), "a.gguf is of a kind that is not read"),
        (Listing(("model.tar.gz",)), "model.tar.gz is an archive: unpack it"),
        (Listing(("config.json",)), "has config.json and no weights beside it"),
        (Listing(("config.json",), folders=("a",)), "what lies in its folders is not looked at"),
        (Listing((), ("model.safetensors.part",)), "holds model.safetensors.part, which is not finished"),
        (Listing(folders=("a",)), "folders that are not looked at"),
    ],
)
def test_why_there_is_no_model_is_said(found: Listing, said: str) -> None:
    assert said in why_none(found)


def test_what_lies_loose_is_said_and_what_means_nothing_is_not() -> None:
    found = Listing(("LICENSE", "README.md", "a.safetensors", "b.gguf", "gone"), broken=frozenset({"gone"}))
    assert [said.split()[0] for said in loose(found)] == ["a.safetensors", "b.gguf", "gone"]


def test_bytes_that_are_no_text_are_shown() -> None:
    assert shown(os.fsdecode(b"caf\xe9/x")) == "caf\\xe9/x"


def test_a_state_inside_or_around_is_found(tmp_path: Path) -> None:
    publish(tmp_path / "w/deep/state", {"format.json": b"{}"})
    (tmp_path / "w/deep/state/commits").mkdir()
    (tmp_path / "w/a").symlink_to("a")
    assert forbidden(tmp_path / "w") == tmp_path / "w/deep/state"
    assert forbidden(tmp_path / "w/deep/state/commits") == (tmp_path / "w/deep/state").resolve()
    assert forbidden(tmp_path / "w/deep/state/../..") is not None
    (tmp_path / "w/deep/state/format.json").unlink()
    assert forbidden(tmp_path / "w") is None


@pytest.mark.parametrize("form", ["embedder", "below", "pipeline", "shards", "adapter"])
def test_a_model_in_folders_is_one_model_with_the_key_of_its_parts(tmp_path: Path, form: str) -> None:
    path = tmp_path / "ft"
    if form in ("pipeline", "shards"):
        parts.pipeline(path, 1, form="shards" if form == "shards" else "one")
    else:
        parts.embedder(path, 1, root="0_Transformer" if form == "below" else "")
    if form == "adapter":
        (path / "model.safetensors").unlink()
        module = "base_model.model.encoder.layer.0.output.dense"
        factors = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
        parts.put(
            path,
            {
                "adapter_model.safetensors": factors,
                "adapter_config.json": {"peft_type": "LORA", "r": 2, "lora_alpha": 2},
            },
        )
    found = look(str(path))
    assert found is not None
    assert found.whole
    names = listed(str(path))
    assert searched(names, depth=1, link=False, nested=False) == ()
    with open_model(path) as opened:
        assert candidate_of(opened).key == next(keys(found, names))
    part = "unet/config.json" if form in ("pipeline", "shards") else "2_Dense/model.safetensors"
    before = signature(str(path), [file.name for file in found.files])
    os.utime(path / part, ns=(1, 1))
    again = look(str(path))
    assert again is not None
    assert again.files != found.files
    assert signature(str(path), [file.name for file in found.files]) != before
    if part.startswith("2_Dense"):
        assert next(keys(again, names)) != next(keys(found, names))


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ("2_Dense/model.safetensors", False),
        ("1_Pooling/config.json", False),
        ("model.safetensors", False),
        ("sentence_bert_config.json", True),
    ],
)
def test_an_embedder_is_waited_for_until_its_parts_are_there(tmp_path: Path, gone: str, *, left: bool) -> None:
    path = parts.embedder(tmp_path / "ft", 1)
    (path / gone).unlink()
    assert whole(path) is left


@pytest.mark.parametrize(
    "gone",
    [
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_pipeline_is_waited_for_until_its_parts_are_there(tmp_path: Path, gone: str) -> None:
    path = parts.pipeline(tmp_path / "ft", 1, form="shards")
    assert whole(path)
    content = (path / gone).read_bytes()
    (path / gone).unlink()
    assert not whole(path)
    (path / gone).with_name(f".{Path(gone).name}.part").write_bytes(content)
    assert not whole(path)
    if gone.endswith(".safetensors"):
        (path / gone).write_bytes(content[:-1])
        assert not whole(path)


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize("beside", [(), ("words.safetensors",)])
def test_a_lora_file_is_a_model_and_its_key_is_known(tmp_path: Path, beside: tuple[str, ...], config: bool) -> None:
    directory = tmp_path / "alice"
    head = "lora_unet_mid_block_attentions_0_proj_in"
    file = {f"{head}.lora_down.weight": torch.zeros(2, 4), f"{head}.lora_up.weight": torch.zeros(4, 2)}
    if config:
        file = {"q.lora_A.weight": torch.zeros(2, 4), "q.lora_B.weight": torch.zeros(4, 2)}
        beside = ()
    written(directory, file, "pytorch_lora_weights.safetensors")
    for name in beside:
        written(directory, {"emb_params": torch.zeros(2)}, name)
    if config:
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    found = look(str(directory))
    assert found is not None
    assert found.whole
    with open_model(directory) as opened:
        assert candidate_of(opened).key in list(keys(found, listed(str(directory))))
