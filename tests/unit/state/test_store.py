"""The state through its interface: transactions, history, locking, retention, and other readers of its generations."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from continual.errors import Busy, Damaged, Halt, Misconfigured
from continual.records import SlotSpec, TensorSpec, Totals
from continual.state import Format, State, arrays, framing, names
from continual.state.backup import Wish, backup
from continual.state.durable import link_new
from continual.state.entries import FoldEntry
from continual.state.format import AdaptersForm, HeaderRecord
from continual.state.parts import FoldNumbers
from continual.state.verify import verify
from tests.helpers import stores
from tests.helpers.entries import candidate

GOLDEN = Path(__file__).parents[2] / "data" / "state-format-1"
GOLDEN_ADAPTERS = {2: GOLDEN.with_name("state-format-2"), 3: GOLDEN.with_name("state-format-3")}


def test_history_after_reopening(tmp_path: Path) -> None:
    stores.history(tmp_path / "s")
    with State.open(tmp_path / "s") as state:
        _check_history(state)


def _check_history(state: State) -> None:
    assert [c.entry.kind for c in state.ledger.log] == ["init", "fold", "fold", "refuse", "tag", "fold", "rollback"]
    assert [c.seq for c in state.ledger.folds()] == [1, 2]
    assert [c.seq for c in state.ledger.folds(at=5)] == [1, 2, 5]
    assert state.ledger.totals == Totals(count=2.0)
    assert state.ledger.totals_at(5) == Totals(count=3.0)
    assert state.ledger.tags == {"first": 1}
    fates = {
        key: commit.entry.fate
        for key in ("k1", "k3", "bad", "new")
        if (commit := state.ledger.fate(key)) or key != "new"
    }
    assert fates == {"k1": "folded", "k3": "rolled-back", "bad": "refused"}
    assert state.ledger.folded_digest("blake3:2") is not None
    assert state.ledger.folded_digest("blake3:3") is None
    assert verify(state) == []
    for name in stores.SHAPES:
        np.testing.assert_array_equal(state.read(name, "sum"), stores.value(name, 2))
        np.testing.assert_array_equal(state.read(name, "sum", at=1), stores.value(name, 1))


def test_golden_store_of_format_1_reads_as_it_was_written() -> None:
    with State.open(GOLDEN) as state:
        _check_history(state)


def _check_adapters(state: State, version: int) -> None:
    assert (state.format.version, state.format.form) == (version, AdaptersForm(stores.WIDTH))
    assert len(state.ledger.folds()) == 2
    assert state.format.base.headers == {name: HeaderRecord("F32", shape) for name, shape in stores.LAYERS.items()}
    assert [fold.entry.numbers.block for fold in state.ledger.folds()] == [1, 2]
    for at in (1, 2):
        for slot, size in (("u", 5), ("v", 3)):
            found = state.read("a.weight", slot, at=at)
            np.testing.assert_array_equal(found[: 10 * at], stores.rows(at, size))
            assert not found[10 * at :].any()
        np.testing.assert_array_equal(state.read("a.weight", "columns", at=at), stores.columns(at))
    assert not state.read("bias", "columns", at=1).any()
    np.testing.assert_array_equal(state.read("bias", "columns"), stores.columns(1))
    assert not state.read("never.weight", "u").any()
    assert verify(state) == []


@pytest.mark.parametrize("version", [2, 3])
def test_golden_stores_of_adapters_read_as_they_were_written(version: int, tmp_path: Path) -> None:
    """Of the first format of adapters, too, whose layers have an array each: it can still be folded into."""
    with State.open(GOLDEN_ADAPTERS[version]) as state:
        _check_adapters(state, version)
    stores.history_of_adapters(tmp_path / "s", version)
    with State.open(tmp_path / "s") as state:
        _check_adapters(state, version)


def test_layers_of_one_shape_share_an_array(tmp_path: Path) -> None:
    """By another reader of Zarr: a layer to each place along the first axis, and zeros where nothing is."""
    stores.history_of_adapters(tmp_path / "s")
    with State.open(tmp_path / "s") as state:
        generation = state.generation_of(state.ledger.head)
        assert generation is not None
        path = generation.directory / "columns/4"
        opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()
        by_zarr = state.group()["columns/4"]
        assert isinstance(by_zarr, zarr.Array)
        names_of = list(by_zarr.attrs["tensors"])  # type: ignore[arg-type]
        assert sorted(names_of) == sorted(stores.LAYERS)
        for number, name in enumerate(names_of):
            np.testing.assert_array_equal(opened[number].read().result(), state.read(name, "columns"))
        np.testing.assert_array_equal(by_zarr[...], opened.read().result())


@pytest.mark.parametrize(
    ("change", "what"),
    [({"rows": 8}, "differ in more than their names"), ({"shape": [16, 4]}, r"has the shape \[16, 4\], not 24 rows")],
)
def test_slots_that_cannot_share_an_array_are_damage(change: dict[str, object], what: str) -> None:
    path = GOLDEN_ADAPTERS[3] / "format.json"
    body, _ = framing.decode(path)
    tensors = body["tensors"]
    assert isinstance(tensors, list)
    twin = next(tensor for tensor in tensors if tensor["name"] == "bias")
    alike = {**twin, "name": "zz", "slots": {slot: dict(spec) for slot, spec in twin["slots"].items()}}
    alike["slots"]["u"] |= change
    assert Format.of({**body, "tensors": [*tensors, {**twin, "name": "zz"}]}, path).layout.together
    with pytest.raises(Damaged, match=what):
        Format.of({**body, "tensors": [*tensors, alike]}, path)


def test_uncommitted_transaction_leaves_nothing(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        with state.begin() as transaction:
            transaction.write("scalar", "sum", np.zeros((), np.float32))
        assert list((tmp_path / "s/generations").iterdir()) == []
        assert state.ledger.head.seq == 0


def test_orphans_are_shown_to_readers_and_removed_by_the_writer(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
    shutil.copytree(next((tmp_path / "s/generations").iterdir()), tmp_path / "s/generations/0123456789abcdef")
    with State.open(tmp_path / "s") as state:
        assert state.orphans == ("0123456789abcdef",)
    with State.open(tmp_path / "s", write=True) as state:
        assert state.generations() == [state.ledger.head.generation]
    assert len(list((tmp_path / "s/generations").iterdir())) == 1


def test_a_linked_record_above_head_is_adopted(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
        before = (tmp_path / "s/HEAD").read_bytes()
        stores.fold(state, 2)
    after = (tmp_path / "s/HEAD").read_bytes()
    (tmp_path / "s/HEAD").write_bytes(before)
    with State.open(tmp_path / "s") as state:
        assert state.ledger.head.seq == 2
    with State.open(tmp_path / "s", write=True):
        assert (tmp_path / "s/HEAD").read_bytes() == after


def test_another_process_that_writes_is_named(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        state.set_url("http://127.0.0.1:1")
        code = (
            "import sys\nfrom pathlib import Path\nfrom continual.state import "
            "State\nState.open(Path(sys.argv[1]), write=True)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True, check=False
        )
        assert "Busy" in done.stderr
        assert f"process {os.getpid()} on {socket.gethostname()} at http://127.0.0.1:1" in done.stderr
        with pytest.raises(Busy):
            State.open(tmp_path / "s", write=True)
    State.open(tmp_path / "s", write=True).close()


@pytest.mark.parametrize("inner", ["x", "generations/x", "generations/x/y"])
def test_no_state_is_made_within_another(tmp_path: Path, inner: str) -> None:
    """What no record of that one names it deletes."""
    stores.make(tmp_path / "s").close()
    (tmp_path / "link").symlink_to(tmp_path / "s")
    for path in (tmp_path / "s" / inner, tmp_path / "link" / inner):
        with pytest.raises(Misconfigured, match=r"lies in the state .+/s: name a directory outside of it"):
            stores.make(path)
        with pytest.raises(Misconfigured, match="lies in the state"):
            backup(tmp_path / "s", path, Wish(), lambda _what, _done, _all: None)


def test_only_one_of_two_commits_from_one_point_wins(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        stores.fold(state, 1)
        (tmp_path / "s/commits/00000002.json").write_text("taken")
        with pytest.raises(Halt, match=r"another writer was first; nothing was settled; another process writes to"):
            stores.fold(state, 2)
        assert state.ledger.head.seq == 1
        with pytest.raises(Halt, match="another writer"):  # what it knows of the ledger is old: it writes no more
            state.tag("x")


def test_a_lease_holds_a_generation_until_it_ends(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state, State.open(tmp_path / "s") as nothing_yet:
        assert nothing_yet.ledger.model is None
        stores.fold(state, 1)
        with State.open(tmp_path / "s") as reader, reader.lease():
            for number in (2, 3, 4):
                stores.fold(state, number)
            state.expire(1)
            np.testing.assert_array_equal(reader.read("wide", "sum"), stores.value("wide", 1))
        assert state.expire(1) == [state.ledger.get(1).generation]
        with pytest.raises(Misconfigured, match="expired"):
            state.read("wide", "sum", at=1)
        with pytest.raises(Misconfigured, match="expired"):
            state.rollback(1)


def test_no_state_and_no_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="continual init"):
        State.open(tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(Misconfigured, match="not empty"):
        stores.make(tmp_path / "full")
    stores.make(tmp_path / "s").close()
    with pytest.raises(Misconfigured, match="already is a state"):
        stores.make(tmp_path / "s")


def test_an_interrupted_creation_can_be_repeated(tmp_path: Path) -> None:
    stores.make(tmp_path / "s").close()
    (tmp_path / "s/format.json").unlink()
    with stores.make(tmp_path / "s") as state:
        assert stores.fold(state, 1) == 1


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    stores.make(tmp_path / "s").close()
    path = tmp_path / "s/format.json"
    body, _ = framing.decode(path)
    path.write_bytes(framing.encode(body | {"version": 4})[0])
    with pytest.raises(Damaged, match="format 4; this continual understands the formats 1 to 3"):
        State.open(tmp_path / "s")


@pytest.mark.parametrize(
    "spec",
    [
        SlotSpec(()),
        SlotSpec((0, 3)),
        SlotSpec((5,)),
        SlotSpec((3, 2, 2)),
        SlotSpec((7, 1 << 21)),
        SlotSpec((4, 6), "float64"),
        SlotSpec((9,), "uint16"),
    ],
)
def test_other_readers_see_the_same_values(tmp_path: Path, spec: SlotSpec) -> None:
    array = (np.arange(int(np.prod(spec.shape))) % 997).astype(spec.dtype).reshape(spec.shape)
    tensor = TensorSpec("t/é", spec.shape, "F32", "plain")
    form = Format.new(stores.BASE, [tensor], "mean", {}, {"t/é": {"x": spec}})
    made = State.create(tmp_path / "s", form, read={}, device="cpu")
    with made as state, state.begin() as transaction:
        transaction.write("t/é", "x", array)
        commit = state.commit(
            transaction,
            FoldEntry(candidate=candidate("t"), digest="d", totals=Totals(), numbers=FoldNumbers(tau_norm=1.0)),
        )
        by_zarr = state.group()["x"][names.encode("t/é")]
        assert isinstance(by_zarr, zarr.Array)
        np.testing.assert_array_equal(by_zarr[...], array)
        assert by_zarr.attrs["name"] == "t/é"
        path = tmp_path / "s/generations" / str(commit.generation) / "x" / names.encode("t/é")
        opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()
        np.testing.assert_array_equal(opened.read().result(), array)
        np.testing.assert_array_equal(state.read("t/é", "x"), array)


def test_chunks_are_equal_row_blocks_of_at_most_32_mib() -> None:
    for rows, columns in ((4096, 11008), (7, 1 << 21), (10_000_019, 1), (2, 1 << 24)):
        spec = SlotSpec((rows, columns))
        cut = arrays.grid(spec)
        assert cut.rows * columns * 4 <= max(arrays.CHUNK_BYTES, columns * 4)
        assert (cut.chunks - 1) * cut.rows < rows <= cut.chunks * cut.rows


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("model.layers.0.mlp.weight", "model.layers.0.mlp.weight"),
        ("a/b", "a%2Fb"),
        ("..", "%2E."),
        (".x", "%2Ex"),
        ("__x", "%5F_x"),
        ("zarr.json", "%7Aarr.json"),
        ("50%", "50%25"),
        ("é", "%C3%A9"),
    ],
)
def test_names_of_arrays(name: str, encoded: str) -> None:
    assert names.encode(name) == encoded
    assert names.decode(encoded) == name


def test_the_lock_file_is_json_for_those_who_ask(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s"):
        assert json.loads((tmp_path / "s/lock").read_text().partition("\n")[2])["pid"] == os.getpid()


def test_an_older_generation_is_opened_by_its_record(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s") as state:
        first, second = stores.fold(state, 1), stores.fold(state, 2)
        for at, number in ((first, 1), (second, 2), (None, 2)):
            found = state.group(at)["sum"][names.encode("wide")]
            assert isinstance(found, zarr.Array)
            np.testing.assert_array_equal(found[...], stores.value("wide", number))


def test_a_link_that_failed_is_told_as_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that was made although it was told to have failed, as NFS does, counts."""
    link = os.link

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def made_all_the_same(source: Path, target: Path) -> None:
        link(source, target)
        raise OSError(errno.EIO, "Input/output error")

    for name, how in (("a", full), ("b", made_all_the_same)):
        temporary = tmp_path / f".{name}.tmp"
        temporary.write_bytes(b"x")
        monkeypatch.setattr(os, "link", how)
        if how is full:
            with pytest.raises(OSError, match="No space left"):
                link_new(tmp_path / name, temporary)
        else:
            link_new(tmp_path / name, temporary)
        assert not temporary.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_generations_are_kept_by_the_bytes_that_they_take(tmp_path: Path) -> None:
    """The newest as far as they fit; the one in force always. Files that several share count once."""
    with stores.make(tmp_path / "s") as state:
        for number in range(1, 6):
            stores.fold(state, number)
        names = [str(c.generation) for c in state.ledger.log[1:]]

        def taken(*generations: str) -> int:
            files = {
                os.lstat(f) for g in generations for f in (state.path / "generations" / g).rglob("*") if f.is_file()
            }
            return sum(512 * told.st_blocks for told in {told.st_ino: told for told in files}.values())

        assert taken(*names[3:]) < taken(names[3]) + taken(names[4]), "they share files"
        assert state.expire(5, taken(*names[2:])) == sorted(names[:2])
        assert state.expire(5, taken(*names[3:])) == [names[2]]
        assert state.expire(2, 10**12) == []
        assert state.expire(5, 1) == [names[3]]
        assert state.generations() == [names[4]]
