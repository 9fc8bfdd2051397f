"""Releases on the Hub: one commit each, found again whatever happened in between, and loaded by transformers."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import continual
from continual import making
from continual.errors import Misconfigured, Retry
from continual.service import release as releasing
from continual.service.outgoing import outgoing
from tests.helpers import calls, hubs, models, services
from tests.helpers.hubs import made, merge, publish
from tests.helpers.released import REPO, count, published_records, releases
from tests.loopback import TOKEN, Hub, environment, faults, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


def test_a_release_is_one_commit_and_made_once(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    (base / "tokenizer.json").write_text("{}")
    shas = [
        publish(hub, f"org/ft{i}", models.fine_tune(base, tmp_path / f"ft{i}", i), hubs.card(license="apache-2.0"))
        for i in range(2)
    ]
    with merge(tmp_path / "state", hub, release={"repo": REPO}) as ours:
        ours.fold("hf://org/ft0")
        first = releasing.release(ours)
        assert (first.new, first.tag, first.seq) == (True, "record-1", 1)
        assert releasing.release(ours) == first.__class__(**{**vars_of(first), "new": False, "uploaded": 0, "files": 0})
        assert count(hub) == 1
        ours.state.record(releasing.entry(first))
        ours.fold("hf://org/ft1")
        hub.journal.clear()
        second = releasing.release(ours)
        assert [seq for seq, _ in releases(hub)] == [1, 3]
    commits = {c.sha: c for c in hub.history(REPO)}
    assert commits[second.commit].parent == first.commit
    assert hub.repo(REPO).private
    assert hub.repo(REPO).tags == {"record-1": first.commit, "record-3": second.commit}
    asked = [r.path.split("/")[-3] for r in hub.journal if r.method == "POST" and "/xorbs/" in r.path]
    assert asked == [
        "xorbs"
    ]  # by xet, which is installed, and the weights alone: tokenizer and configuration are there
    assert second.files == 3  # weights, continual.json, card
    files = commits[second.commit].files
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "continual.json"} <= files.keys()
    card = files["README.md"].data.decode()
    assert "| weight | share |" in card, "as continual.json has it"
    assert "base_model_relation: merge" in card
    assert "license: apache-2.0" in card
    for sha in shas:
        assert sha in card
    assert f"continual fold hf://org/ft1@{shas[1]}" in card
    assert "previous release" in card.lower() or first.commit in card
    assert {"merge", "continual", "base_model:org/ft0", "base_model:org/ft1"} <= set(_tags(hub))
    assert hub.journal.leaks() == []


def _tags(hub: Hub) -> tuple[str, ...]:
    from continual.hub import Hub as Client

    return Client(endpoint=hub.endpoint, token=TOKEN).info(REPO).tags


def vars_of(released: Any) -> dict[str, Any]:
    return {name: getattr(released, name) for name in released.__slots__}


def folded(tmp_path: Path, hub: Hub, **settings: Any) -> Any:
    base = made(tmp_path, hub)
    with continual.open(tmp_path / "state", write=True) as ours:
        ours.fold(models.fine_tune(base, tmp_path / "ft", 1))
    return merge(tmp_path / "state", hub, release={"repo": REPO, **settings})


@pytest.mark.parametrize("call", ["scandir", "open to read"])
def test_a_model_that_cannot_be_read_is_not_released(tmp_path: Path, hub: Hub, call: str) -> None:
    """A list of files that is cut short would delete the others from the branch."""
    staging = tmp_path / "state" / "staging"
    failing: list[str] = []

    def act(called: calls.Called) -> Any:
        if called.what == call and "/release-" in called.path and not failing:
            failing.append(called.path)
            return calls.fail(errno.EIO)(called)
        return called.do()

    with folded(tmp_path, hub) as ours:
        with calls.watched(staging, act), pytest.raises(Retry, match=r"cannot be read \(Input/output error\)"):
            releasing.release(ours)
        assert failing
        assert count(hub) == 0
        assert releasing.release(ours).new
        assert count(hub) == 1


def test_a_record_is_released_again_where_the_settings_say_otherwise(tmp_path: Path, hub: Hub) -> None:
    with folded(tmp_path, hub) as ours:
        first = releasing.release(ours)
        ours.state.record(releasing.entry(first))
    halved = ours.settings.release.model_copy(update={"dtype": "float16"})
    with merge(tmp_path / "state", hub, release=halved) as ours:
        out = outgoing(ours.settings)
        assert not releasing.is_out(ours, out, first.seq, ours.state.publications.release(REPO, "main"))
        second = releasing.release(ours)
        assert (second.new, second.seq, second.tag) == (True, first.seq, f"{first.tag}-2")
        ours.state.record(releasing.entry(second))
        assert releasing.is_out(ours, out, first.seq, ours.state.publications.release(REPO, "main"))
        assert not releasing.release(ours).new
    assert hub.repo(REPO).tags == {"record-1": first.commit, "record-1-2": second.commit}


def test_another_branch_another_dtype_no_tag(tmp_path: Path, hub: Hub) -> None:
    with folded(tmp_path, hub, branch="nightly", dtype="bfloat16", tag="", private=False) as ours:
        found = releasing.release(ours)
        assert found.tag is None
        assert hub.head(REPO, "nightly") == found.commit
        assert "continual.json" not in hub.repo(REPO).find("main").files  # type: ignore[union-attr]
        assert not hub.repo(REPO).private
        assert hub.read(REPO, "nightly", "model.safetensors")[8:200].count(b"BF16") > 0


def test_what_is_there_is_not_overwritten(tmp_path: Path, hub: Hub) -> None:
    with folded(tmp_path, hub) as ours:
        publish(hub, REPO, models.base(tmp_path / "other", seed=3))
        with pytest.raises(Misconfigured, match="a model that continual did not make"):
            releasing.release(ours)
        hub.delete(REPO)
        hub.create(REPO)
        hub.commit(REPO, {"continual.json": json.dumps({"state": "f" * 32, "seq": 3}).encode()})
        with pytest.raises(Misconfigured, match="releases of another state"):
            releasing.release(ours)
        hub.commit(REPO, {"continual.json": json.dumps({"state": ours.state.id, "seq": 99}).encode()})
        with pytest.raises(Misconfigured, match="restored from a backup"):
            releasing.look(ours)
        assert count(hub) == 2


def test_somebody_commits_in_between(tmp_path: Path, hub: Hub) -> None:
    with folded(tmp_path, hub) as ours:
        releasing.release(ours)
        ours.fold(models.fine_tune(tmp_path / "base", tmp_path / "ft2", 2))
        done: list[str] = []

        def meddle(request: Any) -> None:
            if request.method == "POST" and "/commit/" in request.path and not done:
                done.append(hub.commit(REPO, {"notes.md": b"mine"}))

        hub.on_request = meddle
        found = releasing.release(ours)
        assert hub.history(REPO)[0].sha == found.commit
        assert hub.history(REPO)[1].sha == done[0]  # on top of theirs, and not instead of it
        assert hub.read(REPO, "main", "notes.md") == b"mine"


def test_a_release_is_not_disturbed_by_another_beside_it(tmp_path: Path, hub: Hub) -> None:
    """A command's, while one of the daemon's is uploaded."""
    with folded(tmp_path, hub) as ours:
        errors: list[str] = []

        def meddle(request: Any) -> None:
            if request.method == "POST" and "/preupload/" in request.path and not errors:
                with pytest.raises(Retry) as caught:
                    releasing.release(ours)
                errors.append(str(caught.value))

        hub.on_request = meddle
        found = releasing.release(ours)
        assert found.new
        assert ["on its way" in error for error in errors] == [True]
        assert not releasing.release(ours, wait=True).new
    assert count(hub) == 1


def test_the_answer_to_a_commit_is_lost(tmp_path: Path, hub: Hub) -> None:
    with folded(tmp_path, hub) as ours:
        hub.faults = faults.Times(faults.Drop(), 1, method="POST", path="/commit/")
        found = releasing.release(ours)
        assert count(hub) == 1
        assert hub.repo(REPO).tags == {"record-1": found.commit}


def test_a_token_that_may_not_write_and_a_hub_that_is_down(tmp_path: Path, hub: Hub) -> None:
    hub.create(REPO)
    with folded(tmp_path, hub) as ours:
        hub.faults = faults.Times(faults.Status(403), 99, method="POST")
        with pytest.raises(Retry, match="HF_TOKEN"):
            releasing.release(ours)
        hub.faults = faults.Times(faults.too_many(60), 99)
        with pytest.raises(Retry, match="rate limit"):
            releasing.release(ours)
        hub.faults = None
        assert releasing.release(ours).new
    assert not (tmp_path / "state" / "staging").exists()


def test_licences_that_differ_are_told_or_refused(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    for number, licence in enumerate(("mit", "llama3")):
        publish(
            hub, f"org/ft{number}", models.fine_tune(base, tmp_path / f"ft{number}", number), hubs.card(license=licence)
        )
    with merge(tmp_path / "state", hub, release={"repo": REPO, "licences": "refuse"}) as ours:
        ours.fold("hf://org/ft0")
        assert releasing.release(ours).new
        ours.fold("hf://org/ft1")
        with pytest.raises(Misconfigured, match="licences differ"):
            releasing.release(ours)
        assert releasing.look(ours).licences.conflict
    with merge(tmp_path / "state", hub, release={"repo": REPO}) as ours:
        assert releasing.release(ours).new
        assert b"license: other" in hub.read(REPO, "main", "README.md")


def test_transformers_loads_a_release(tmp_path: Path, hub: Hub) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).save_pretrained(tmp_path / "base")
    making.init(tmp_path / "base", tmp_path / "state", making.Recipe(rule="mean"))
    with merge(tmp_path / "state", hub, release={"repo": REPO}) as ours:
        ours.fold(models.fine_tune(tmp_path / "base", tmp_path / "ft", 1))
        releasing.release(ours)
        from huggingface_hub import snapshot_download

        path = snapshot_download(
            REPO, endpoint=hub.endpoint, token=TOKEN, cache_dir=tmp_path / "cache", revision="record-1"
        )
        loaded = AutoModelForCausalLM.from_pretrained(path)
        name = "model.layers.0.mlp.up_proj.weight"
        merged = loaded.state_dict()[name]
        origin = LlamaForCausalLM.from_pretrained(tmp_path / "base").state_dict()[name]
        torch.testing.assert_close(merged - origin, ours.read(name), rtol=0, atol=1e-7)


def test_a_state_restored_from_a_backup_does_not_take_the_other_ones_release_for_its_own(
    tmp_path: Path, hub: Hub
) -> None:
    import shutil

    base = made(tmp_path, hub)
    shutil.copytree(tmp_path / "state", tmp_path / "backup")
    with merge(tmp_path / "state", hub, release={"repo": REPO}) as ours:
        ours.fold(models.fine_tune(base, tmp_path / "a", 1))
        releasing.release(ours)
    with merge(tmp_path / "backup", hub, release={"repo": REPO}) as ours:
        ours.fold(models.fine_tune(base, tmp_path / "b", 2))
        with pytest.raises(Misconfigured, match="restored from a backup"):
            releasing.release(ours)
        ours.fold(models.fine_tune(base, tmp_path / "c", 3))
        with pytest.raises(Misconfigured, match="restored from a backup"):
            releasing.release(ours)
    assert count(hub) == 1


def test_what_is_public_has_no_folder_of_this_machine_in_it(tmp_path: Path, hub: Hub) -> None:
    with folded(tmp_path, hub) as ours:
        releasing.release(ours)
    for name in ("continual.json", "README.md"):
        assert str(tmp_path).encode() not in hub.read(REPO, "main", name)
    body = json.loads(hub.read(REPO, "main", "continual.json"))
    assert (body["base"]["path"], body["folded"][0]["origin"]) == ("base", "ft")


@pytest.mark.parametrize("files", [{"pytorch_model.bin": b"x"}, {"model.gguf": b"x"}, {"config.json": b"{}"}])
def test_a_model_of_another_format_is_left_alone(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    hub.create(REPO)
    hub.commit(REPO, files)
    with folded(tmp_path, hub) as ours, pytest.raises(Misconfigured, match="a model that continual did not make"):
        releasing.release(ours)


def test_tags_and_older_records(tmp_path: Path, hub: Hub) -> None:
    with folded(tmp_path, hub) as ours:
        releasing.release(ours)
        ours.fold(models.fine_tune(tmp_path / "base", tmp_path / "ft2", 2))
        hub.tag(REPO, "record-2")
        with pytest.raises(Misconfigured, match="tag record-2 of me/merge: is of another commit"):
            releasing.release(ours)
        with pytest.raises(Misconfigured, match="releases go forward"):
            releasing.release(ours, at=1)
    for tag in ("latest", "a b {seq}", "{seq}/x"):
        with (
            merge(tmp_path / "state", hub, release={"repo": REPO, "tag": tag}) as ours,
            pytest.raises(Misconfigured, match=r"release\.tag"),
        ):
            releasing.release(ours)


def test_records_with_nothing_in_them_are_passed_over(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    with merge(tmp_path / "state", hub, release={"repo": REPO, "every": True}) as ours:
        ours.fold(models.fine_tune(base, tmp_path / "a", 1))
        ours.state.rollback(0)
        ours.fold(models.fine_tune(base, tmp_path / "b", 2))
        assert [releasing.next_record(ours, after) for after in (-1, 1, 2)] == [1, 3, 3]


def test_an_upload_that_fails_is_trouble(tmp_path: Path, hub: Hub) -> None:
    """The client says it by a RuntimeError where xet is off."""
    state, env = tmp_path / "state", environment(hub, tmp_path) | {"HF_HUB_DISABLE_XET": "1"}
    base = made(tmp_path, hub)
    (tmp_path / "in").mkdir()
    hub.faults = faults.Times(faults.Status(400), 1, method="PUT")
    with services.daemon(state, tmp_path / "in", "--release", f"repo={REPO}", environment=env) as process:
        models.fine_tune(base, tmp_path / "in/alice", 1)
        services.until(lambda: published_records(state) == [1] or None, "the release")
        process.terminate()
        assert process.wait(30) == 0
    log = (tmp_path / "daemon.log").read_text()
    assert "sig=" not in log
    assert "Traceback" not in log
