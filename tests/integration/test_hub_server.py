"""The stand-in Hub of tests/loopback, driven by the real client.

ops/check sets HF_HUB_OFFLINE=1, which the client reads as it is imported and enforces in a hook of its HTTP session.
Most tests here run in this process under `online`, which gives the client another session in its public way; one runs a
subprocess in `environment`.
"""

from __future__ import annotations

import http.client
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save

from tests.loopback import TOKEN, Account, Deliveries, Hub, environment, online, serving
from tests.loopback.faults import Drop, Random, Slow, Stale, Stall, Status, Times, Truncate, either, expired, too_many

pytestmark = pytest.mark.slow

REPO = "org/tuned"
CARD = b"---\nbase_model: org/base\nlicense: mit\ntags: [math]\n---\n# Tuned\n"
WEIGHTS = save({"w": torch.randn(300, 200, generator=torch.Generator().manual_seed(0)), "zeros": torch.zeros(9000)})


@pytest.fixture(autouse=True, scope="module")
def _client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, online():
        patch.setenv("HF_XET_CACHE", str(tmp_path_factory.mktemp("xet")))
        yield


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as served:
        yield served


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


def reader(hub: Hub, token: str | bool = "hf_reader") -> HfApi:
    """A client of somebody who owns nothing; or of nobody, with False."""
    hub.tokens.setdefault("hf_reader", Account("reader"))
    return HfApi(endpoint=hub.endpoint, token=token)


def fetch(url: str, **headers: str) -> httpx2.Response:
    return get_session().get(url, headers=headers, timeout=5, follow_redirects=False)


def test_published_and_read_back(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    assert api.create_repo(REPO) == api.create_repo(REPO, exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    operations = [CommitOperationAdd("model.safetensors", WEIGHTS), CommitOperationAdd("README.md", CARD)]
    made = api.create_commit(REPO, operations, commit_message="one", parent_commit=hub.head(REPO))
    assert made.oid == hub.head(REPO)
    assert hub.read(REPO, "main", "model.safetensors") == WEIGHTS

    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == made.oid
    assert info.gated is False
    assert info.private is False
    assert info.card_data.license == "mit"
    assert {"base_model:org/base", "base_model:finetune:org/base", "license:mit", "math", "safetensors"} <= set(
        info.tags
    )
    (weights,) = [s for s in info.siblings if s.lfs]
    assert (weights.rfilename, weights.size, weights.lfs.sha256) == (
        "model.safetensors",
        len(WEIGHTS),
        hub.history(REPO)[0].files["model.safetensors"].sha256,
    )

    hub.journal.clear()
    folder = Path(api.snapshot_download(REPO, cache_dir=tmp_path))
    assert folder.name == made.oid
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "model.safetensors").resolve().name == weights.lfs.sha256  # the cache is by etag
    assert (folder / "README.md").resolve().name == hub.history(REPO)[0].files["README.md"].oid
    assert hub.journal.sent(repo=REPO) == len(WEIGHTS)
    assert not hub.journal.leaks()
    assert api.hf_hub_download(REPO, "README.md", cache_dir=tmp_path / "two", revision=made.oid[:8])
    assert ModelCard.load(folder / "README.md").data.base_model == "org/base"
    assert api.get_safetensors_metadata(REPO).parameter_count == {"F32": 69000}
    assert api.model_info(REPO, expand=["safetensors", "sha"]).safetensors.total == 69000
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "no", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="no")


def test_commits_are_guarded_and_atomic(hub: Hub, api: HfApi) -> None:
    first = hub.commit(REPO, {"a": b"1", "dir/b": b"2", "dir/c": b"3"})
    second = api.create_commit(REPO, [CommitOperationAdd("a", b"new")], commit_message="two", parent_commit=first).oid
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(REPO, [CommitOperationAdd("a", b"x")], commit_message="late", parent_commit=first)
    assert error.value.response.status_code == 412
    with pytest.raises(HfHubHTTPError):
        api.create_commit(REPO, [CommitOperationAdd("a", b"x"), CommitOperationDelete("none")], commit_message="half")
    assert hub.head(REPO) == second
    api.create_commit(REPO, [CommitOperationDelete("dir/", is_folder=True)], commit_message="three\n\nand why")
    assert set(hub.history(REPO)[0].files) == {"a"}
    assert [c.title for c in api.list_repo_commits(REPO)] == ["three", "two", "Upload"]


def test_equal_content_travels_once(hub: Hub, api: HfApi) -> None:
    hub.commit(REPO, {"model.safetensors": WEIGHTS})
    hub.journal.clear()
    # a file object takes the LFS protocol, in which the Hub says what it has
    api.create_commit(REPO, [CommitOperationAdd("copy.safetensors", io.BytesIO(WEIGHTS))], commit_message="a copy")
    assert not hub.journal.find(method="PUT")
    assert hub.read(REPO, "main", "copy.safetensors") == WEIGHTS
    head = hub.head(REPO)
    assert (
        api.create_commit(REPO, [CommitOperationAdd("model.safetensors", WEIGHTS)], commit_message="again").oid == head
    )


@pytest.mark.parametrize("disable", ["0", "1"])
def test_from_a_subprocess(hub: Hub, tmp_path: Path, disable: str) -> None:
    """With and without Xet, in an environment of its own."""
    script = f"""
import huggingface_hub as h, sys
h.create_repo({REPO!r})
with open("weights", "rb") as file: data = file.read()
h.HfApi().create_commit({REPO!r}, [h.CommitOperationAdd("model.safetensors", "weights")], commit_message="x")
assert open(h.hf_hub_download({REPO!r}, "model.safetensors"), "rb").read() == data
"""
    (tmp_path / "weights").write_bytes(WEIGHTS)
    own = environment(hub, tmp_path) | {"HF_HUB_DISABLE_XET": disable}
    subprocess.run([sys.executable, "-c", script], check=True, env=own, cwd=tmp_path)
    assert hub.read(REPO, "main", "model.safetensors") == WEIGHTS
    assert bool(hub.journal.find("/v1/xorbs/")) == (disable == "0")
    assert [r.received for r in hub.journal.find("^/lfs/", method="PUT")] == ([] if disable == "0" else [len(WEIGHTS)])
    assert not hub.journal.leaks()


def test_lists(hub: Hub, api: HfApi) -> None:
    clock = iter([10.0, 11.0, 12.0, 12.0, 12.0, 13.5])
    hub.page_size, hub.clock = 2, lambda: now
    for number, now in enumerate(clock):  # noqa: B007 - the clock reads it
        hub.commit(
            f"org/m{number}", {"README.md": CARD, "adapter_config.json" if number == 5 else "config.json": b"{}"}
        )
    hub.hide("org/m0")
    expand = ["sha", "lastModified", "tags", "gated"]
    found = list(api.list_models(filter=["base_model:finetune:org/base", "math"], sort="last_modified", expand=expand))
    assert [m.id for m in found[-2:]] == ["org/m1", "org/m0"]
    assert {m.id for m in found[:3]} == {"org/m2", "org/m3", "org/m4"}
    assert found[0].sha == hub.head(found[0].id)
    assert found[0].last_modified.timestamp() == 12.0
    assert len(hub.journal.find("^/api/models$")) == 3
    assert [m.id for m in api.list_models(filter="base_model:adapter:org/base")] == ["org/m5"]
    assert [m.id for m in api.list_models(search="M3", author="org", full=True)] == ["org/m3"]
    assert len(list(reader(hub).list_models())) == 5  # without the private one
    assert list(api.list_models(author="nobody")) == []


def test_trees_and_refs(hub: Hub, api: HfApi) -> None:
    first = hub.commit(REPO, {"a": b"1", "dir/b": b"2", "dir/in/c": b"3", "dir/in/d": b"4"}, "first")
    hub.commit(REPO, {"dir/b": b"20"}, "second")
    hub.page_size = 2
    assert [e.path for e in api.list_repo_tree(REPO, recursive=True)] == [
        "a",
        "dir",
        "dir/b",
        "dir/in",
        "dir/in/c",
        "dir/in/d",
    ]
    entries = {e.path: e for e in api.list_repo_tree(REPO, "dir", expand=True)}
    assert {p: e.last_commit.title for p, e in entries.items()} == {"dir/b": "second", "dir/in": "first"}
    assert [e.path for e in api.get_paths_info(REPO, ["a", "dir", "none"])] == ["a", "dir"]
    api.create_tag(REPO, tag="v1", revision=first)
    api.create_branch(REPO, branch="feat/x", revision="v1")
    api.create_tag(REPO, tag="v1", exist_ok=True)
    refs = api.list_repo_refs(REPO)
    assert {r.name: r.target_commit for r in [*refs.branches, *refs.tags]} == {
        "main": hub.head(REPO),
        "feat/x": first,
        "v1": first,
    }
    api.create_commit(REPO, [CommitOperationAdd("a", b"branched")], commit_message="x", revision="feat/x")
    assert (hub.read(REPO, "feat/x", "a"), hub.read(REPO, "main", "a")) == (b"branched", b"1")
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="feat/x")
    assert not api.list_repo_refs(REPO).tags


def test_gated_private_gone_and_moved(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    hub.commit(REPO, {"a": b"1"})
    api.update_repo_settings(REPO, gated="manual")
    for who in (reader(hub), reader(hub, False)):
        assert who.model_info(REPO).gated == "manual"
        assert [m.id for m in who.list_models()] == [REPO]
        with pytest.raises(GatedRepoError):
            who.hf_hub_download(REPO, "a", cache_dir=tmp_path)
    hub.admit("hf_reader", REPO)
    assert reader(hub).hf_hub_download(REPO, "a", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="403"):
        reader(hub).create_commit(REPO, [CommitOperationAdd("a", b"mine")], commit_message="x")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.endpoint, token="hf_wrong").model_info(REPO)
    api.move_repo(REPO, "org/renamed")
    assert api.model_info(REPO).id == "org/renamed"
    api.update_repo_settings("org/renamed", private=True)
    with pytest.raises(RepositoryNotFoundError):
        reader(hub).model_info("org/renamed")
    api.delete_repo("org/renamed")
    for who in (api, reader(hub, False)):
        with pytest.raises(RepositoryNotFoundError):
            who.model_info("org/renamed")
    assert api.whoami()["name"] == "tester"


def test_ranges_and_links(hub: Hub) -> None:
    hub.commit(REPO, {"model.safetensors": WEIGHTS, "small": b"0123456789"})
    url = hf_hub_url(REPO, "model.safetensors", endpoint=hub.endpoint)
    found = fetch(url, authorization=f"Bearer {TOKEN}", range="bytes=8-99")
    assert found.status_code == 302
    assert found.headers["x-linked-size"] == str(len(WEIGHTS))
    assert found.headers["x-repo-commit"] == hub.head(REPO)
    link = found.headers["location"]
    assert urlsplit(link).hostname == "localhost"
    part = fetch(link, range="bytes=8-99")
    assert (part.status_code, part.content, part.headers["content-range"]) == (
        206,
        WEIGHTS[8:100],
        f"bytes 8-99/{len(WEIGHTS)}",
    )
    assert fetch(link, range="bytes=-5").content == WEIGHTS[-5:]
    assert fetch(link, range="bytes=999999-").status_code == 416
    assert fetch(link.partition("?")[0]).status_code == 403
    small = fetch(hf_hub_url(REPO, "small", endpoint=hub.endpoint), range="bytes=2-4")
    assert (small.status_code, small.content) == (206, b"234")
    hub.link_seconds = -1
    assert fetch(fetch(url).headers["location"]).status_code == 403
    assert not hub.journal.leaks()
    fetch(link, authorization="Bearer x")
    assert len(hub.journal.leaks()) == 1


def test_a_rate_limit_is_waited_out(hub: Hub, api: HfApi) -> None:
    hub.commit(REPO, {"a": b"1"})
    hub.faults = Times(too_many(0), path="^/api/models$")
    assert [m.id for m in api.list_models()] == [REPO]
    assert [r.status for r in hub.journal] == [429, 200]


def test_faults(hub: Hub) -> None:
    hub.commit(REPO, {"model.safetensors": WEIGHTS})
    hub.commit("org/new", {"a": b"1"})
    cdn = fetch(hf_hub_url(REPO, "model.safetensors", endpoint=hub.endpoint)).headers["location"]

    def broken(fault: Times) -> str:
        hub.journal.clear()
        hub.faults = fault
        with pytest.raises(httpx2.RemoteProtocolError) as error:
            fetch(cdn)
        assert fetch(cdn).content == WEIGHTS  # once only
        return str(error.value)

    assert "without sending" in broken(Times(Drop()))
    assert "peer closed" in broken(Times(Drop(100_000), origin="cdn"))
    assert next(iter(hub.journal)).sent == 100_000
    hub.faults = either(Times(Truncate(7)), Times(expired(), skip=1), Times(Status(500), skip=2))
    assert [(r.status_code, len(r.content)) for r in (fetch(cdn), fetch(cdn), fetch(cdn))][:2] == [
        (200, 7),
        (403, len(expired().body)),
    ]
    hub.faults = Times(Stale(2))  # a repository and its first commit are two changes
    assert [len(fetch(f"{hub.endpoint}/api/models").json()) for _ in "ab"] == [1, 2]
    for slow in (Stall(0.1), Stall(0.1, 1000), Slow(len(WEIGHTS) * 10)):
        hub.faults, start = Times(slow), time.monotonic()
        assert fetch(cdn).content == WEIGHTS
        assert time.monotonic() - start > 0.08
    hub.faults = None
    hub.on_request = lambda request: hub.delete(REPO) if request.path.endswith("/gone") else None
    assert fetch(f"{hub.endpoint}/{REPO}/resolve/main/gone").headers["x-error-code"] == "RepoNotFound"


def test_random_faults_repeat_and_relent(hub: Hub) -> None:
    def statuses() -> list[int | str]:
        hub.faults = Random(seed=3, rate=0.7, cap=2)
        seen: list[int | str] = []
        for number in range(40):
            try:
                seen.append(fetch(f"{hub.endpoint}/api/models/org/{number % 2}").status_code)
            except httpx2.TransportError:
                seen.append("dropped")
        return seen

    hub.commit("org/0", {"a": b"1"})
    hub.commit("org/1", {"a": b"1"})
    first = statuses()
    assert first == statuses()
    assert len(set(first)) > 2
    assert all(200 in first[start : start + 6 : 2] for start in range(34))


def test_a_commit_whose_answer_was_lost_has_happened(hub: Hub, api: HfApi) -> None:
    before = hub.commit(REPO, {"a": b"1"})
    hub.faults = Times(Drop(), path="/commit/")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.create_commit(REPO, [CommitOperationAdd("a", b"2")], commit_message="x", parent_commit=before)
    assert hub.history(REPO)[0].parent == before
    assert hub.read(REPO, "main", "a") == b"2"


def test_webhooks(hub: Hub) -> None:
    got: list[tuple[str | None, dict[str, object]]] = []
    answers = iter([500, *[202] * 9])

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(
                (self.headers["X-Webhook-Secret"], json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )
            self.send_response(next(answers))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        hub.webhooks.append((f"http://127.0.0.1:{server.server_port}/webhook", "secret"))
        first = hub.commit(REPO, {"a": b"1"})
        with Deliveries(hub, duplicate=1.0, shuffle=True) as deliveries:
            second = hub.commit(REPO, {"a": b"2"})
            deliveries.settle()
        assert [status for _, _, status in deliveries.sent] == [500, 202, 202]
        hub.delete(REPO)
        assert hub.deliver() == [202]
        server.shutdown()
    secret, body = got[0]
    assert secret == "secret"
    assert got[1] == got[0] == got[2]
    assert body["event"] == {"action": "update", "scope": "repo.content"}
    assert body["repo"]["headSha"] == second
    assert body["updatedRefs"] == [{"ref": "refs/heads/main", "oldSha": first, "newSha": second}]
    assert body["webhook"]["version"] == 3
    assert got[3][1]["event"] == {"action": "delete", "scope": "repo"}
    assert hub.deliver() == [None]  # nobody listens any more


def test_it_stops_at_once_whatever_is_open(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(Hub(faults=Times(Stall(60.0)))) as hub:
        address = urlsplit(hub.endpoint)
        waiting, idle = (http.client.HTTPConnection(address.hostname or "", address.port, timeout=5) for _ in "ab")
        waiting.request("GET", "/api/models")
        idle.connect()
        while not len(hub.journal):
            time.sleep(0.005)
        start = time.monotonic()
    assert time.monotonic() - start < 0.3
    waiting.close()
    idle.close()
    assert capfd.readouterr().err == ""


def test_for_people() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.loopback"], stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().split()[0].removeprefix("HF_ENDPOINT=")
        assert fetch(f"{endpoint}/api/models").json() == []
        process.terminate()
