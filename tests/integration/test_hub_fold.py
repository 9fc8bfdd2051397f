"""Reading from the Hub by the real client: what is fetched, what is refused and by how little, and that the bits are
those of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from continual import making
from continual.errors import Misconfigured, Refuse, Retry, Skip
from continual.hub import Hub as Client
from continual.records import Event
from tests.helpers import hubs, models, parts, pools, quadratic
from tests.helpers.hubs import BASE, equal, made, merge, publish, sums
from tests.loopback import TOKEN, Account, Hub, faults, serving
from tests.unit.gates.test_unmergeable import base as grouped
from tests.unit.gates.test_unmergeable import locked

__all__ = ["grouped"]

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


def seen(repo: str, sha: str | None, by: str = "hub") -> Event:
    return Event(by, f"hf://{repo}", (1, repo), None, sha)


@pytest.mark.parametrize("read", ["stream", "cache"])
@pytest.mark.parametrize("rule", ["task-arithmetic", "iso-c", "ties"])
def test_the_bits_are_those_of_a_folder(
    tmp_path: Path, hub: Hub, rule: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    base = made(tmp_path, hub, rule)
    making.init(base, tmp_path / "local", making.Recipe(rule=rule))
    tuned = [models.fine_tune(base, tmp_path / f"ft{i}", i) for i in range(2)]
    with merge(tmp_path / "state", hub, hub={"read": read}) as ours, merge(tmp_path / "local", hub) as local:
        for number, directory in enumerate(tuned):
            sha = publish(hub, f"org/ft{number}", directory, hubs.card(license="mit"))
            outcome = ours.fold(f"hf://org/ft{number}")
            assert outcome.fate == "folded", outcome.message
            candidate = outcome.commit.entry.candidate
            assert candidate is not None
            assert (candidate.key, candidate.origin) == (f"hub:org/ft{number}@{sha}", f"hf://org/ft{number}")
            assert (candidate.revision, candidate.licence, candidate.source) == (sha, "mit", "hand")
            there = local.fold(directory)
            assert outcome.commit.entry.digest == there.commit.entry.digest
        assert equal(sums(ours), sums(local))
        assert ours.fold("org/ft0").fate == "known"
        assert ours.fold(tuned[0]).fate == "duplicate"
    assert hub.journal.leaks() == []


def test_shards_and_adapters(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    making.init(base, tmp_path / "local", making.Recipe(rule="task-arithmetic"))
    with merge(tmp_path / "state", hub) as ours, merge(tmp_path / "local", hub) as local:
        shards = hubs.sharded(models.fine_tune(base, tmp_path / "whole", 1), tmp_path / "sharded")
        for repo, directory in (("org/shards", shards), ("org/adapter", hubs.adapter(base, tmp_path / "adapter", 2))):
            publish(hub, repo, directory)
            assert ours.plan(f"hf://{repo}").ok
            assert ours.fold(f"hf://{repo}").fate == "folded"
            assert local.fold(directory).fate == "folded"
        assert equal(sums(ours), sums(local))


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)


def test_what_headers_refuse_costs_next_to_nothing(tmp_path: Path, hub: Hub) -> None:
    shapes = {**models.SHAPES, "model.layers.0.mlp.up_proj.weight": (3000, 1000)}  # 12 MB
    base = made(tmp_path, hub, shapes=shapes)
    publish(hub, "org/other", models.fine_tune(base, tmp_path / "other", 1, change=wrong_shape))
    big = models.fine_tune(base, tmp_path / "big", 2)
    publish(hub, "org/adapter", hubs.adapter(base, tmp_path / "adapter", 3))
    hub.commit("org/adapter", {"model.safetensors": (big / "model.safetensors").read_bytes()})
    hub.create("org/pickle")
    hub.commit("org/pickle", {"pytorch_model.bin": bytes(5_000_000), "config.json": b"{}"})
    with merge(tmp_path / "state", hub) as ours:
        for repo, reason in (("org/other", "shape"), ("org/adapter", "adapter-kind"), ("org/pickle", "pickle")):
            before = hub.journal.sent(origin="")
            outcome = ours.fold(f"hf://{repo}")
            assert (outcome.fate, outcome.reason) == ("refused", reason), outcome.message
            assert f"hf://{repo}@" in outcome.message
            assert hub.journal.sent(origin="") - before < 1_000_000
        assert ours.places.hub.received < 1_000_000


def test_a_fold_reads_the_tensors_once_and_asks_seldom(tmp_path: Path, hub: Hub) -> None:
    shapes = {**models.SHAPES, "model.layers.0.mlp.up_proj.weight": (3000, 1000), "lm_head.weight": (2000, 1000)}
    base = made(tmp_path, hub, shapes=shapes)
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    with merge(tmp_path / "state", hub) as ours:
        hub.journal.clear()
        assert ours.fold("hf://org/ft").fate == "folded"
        size = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
        assert hub.journal.sent(origin="cdn") <= 1.05 * size + 200_000  # the header
        assert len(hub.journal) < 20
    assert not list((tmp_path / "state").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "policy",
    [
        lambda: faults.Times(faults.Drop(), 3, path="resolve|/cdn|models"),
        lambda: faults.Times(faults.Drop(5000), 3, origin="cdn"),
        lambda: faults.Times(faults.Truncate(9000), 2, origin="cdn"),
        lambda: faults.Times(faults.unavailable(), 2),
        lambda: faults.Times(faults.broken(), 2, origin="cdn"),
        lambda: faults.Times(faults.too_many(0), 2, origin="api"),
        lambda: faults.Times(faults.expired(), 1, origin="cdn", skip=1),
    ],
    ids=["no answer", "dropped body", "short body", "503", "500 of the cdn", "429", "expired link"],
)
def test_trouble_that_passes_is_not_noticed(tmp_path: Path, hub: Hub, policy: Callable[[], Any]) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    with merge(tmp_path / "state", hub) as ours:
        hub.faults = policy()
        assert ours.fold("hf://org/ft").fate == "folded"


def test_trouble_that_stays_settles_nothing(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    with merge(tmp_path / "state", hub, hub={"repos": ("org/ft",)}) as ours:
        hub.faults = faults.Times(faults.too_many(40), 1000, origin="api", path="models")
        with pytest.raises(Retry, match="rate limit") as trouble:
            ours.fold(seen("org/ft", sha))
        assert trouble.value.after == 40.0
        hub.faults = None
        assert ours.state.ledger.head.seq == 0
        assert ours.fold(seen("org/ft", sha)).fate == "folded"


def test_what_happens_to_a_repo_before_it_is_read(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    tuned = models.fine_tune(base, tmp_path / "ft", 1)
    shas = {name: publish(hub, f"org/{name}", tuned) for name in ("moved-on", "gone", "gated", "hidden")}
    newer = hub.commit("org/moved-on", {"README.md": hubs.card(license="mit")})
    hub.delete("org/gone")
    hub.gate("org/gated")
    hub.hide("org/hidden")
    hub.tokens["stranger"] = Account("stranger")
    with merge(tmp_path / "state", hub, token="stranger", hub={"repos": tuple(f"org/{name}" for name in shas)}) as ours:
        fates = {name: ours.fold(seen(f"org/{name}", sha)).reason for name, sha in shas.items()}
        assert fates == {"moved-on": "superseded", "gone": "gone", "gated": "gated", "hidden": "gone"}
        assert all(ours.fold(seen(f"org/{name}", sha)).fate == "known" for name, sha in shas.items())
        assert ours.fold(seen("org/moved-on", newer)).fate == "folded"
        again = hub.commit("org/moved-on", {"README.md": hubs.card(license="mit", tags=["x"])})
        assert ours.fold(seen("org/moved-on", again)).reason == "update"
        assert [c.entry.reason for c in ours.state.ledger.refusals] == ["superseded", "gone", "gated", "gone", "update"]


def test_a_repo_that_goes_while_it_is_read_is_refused(tmp_path: Path, hub: Hub) -> None:
    shapes = {**models.SHAPES, "model.layers.0.mlp.up_proj.weight": (4000, 1000)}
    base = made(tmp_path, hub, shapes=shapes)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    ranges = []

    def watch(request: Any) -> None:
        if (request.range and "org/ft" in request.path + str(request.repo)) or request.origin == "cdn":
            ranges.append(request)
            if len(ranges) == 3 and "org/ft" in hub.state():
                hub.delete("org/ft")
                hub.link_seconds = -1.0

    with merge(tmp_path / "state", hub, hub={"repos": ("org/ft",)}) as ours:
        hub.on_request = watch
        hub.faults = faults.Times(faults.expired(), 1, origin="cdn", skip=2)
        outcome = ours.fold(seen("org/ft", sha))
        assert (outcome.fate, outcome.reason) == ("refused", "gone"), outcome.message
        assert ours.state.ledger.folds() == []
        assert len(ours.state.generations()) == 0


def test_what_the_settings_leave_out_gets_no_record(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    with (
        merge(tmp_path / "state", hub, hub={"bases": (BASE,), "max_bytes": 1000}) as ours,
        pytest.raises(Skip, match="max_bytes"),
    ):
        ours.fold(seen("org/ft", sha))
    with merge(tmp_path / "state", hub, hub={"bases": ("org/another",)}) as ours:
        with pytest.raises(Skip, match="no fine-tune of the base"):
            ours.fold(seen("org/ft", sha))
        assert ours.state.ledger.head.seq == 0
    with merge(tmp_path / "state", hub, hub={"bases": (BASE,)}) as ours:
        assert ours.fold(seen("org/ft", sha)).fate == "folded"


def test_commits_of_repos_that_are_left_out_get_no_record_either(tmp_path: Path, hub: Hub) -> None:
    made(tmp_path, hub)
    first = hub.commit("org/other", {"README.md": hubs.card("x/y")})
    hub.commit("org/other", {"README.md": hubs.card("x/z")})
    with merge(tmp_path / "state", hub, hub={"bases": (BASE,)}) as ours:
        for repo, sha in (("org/other", first), ("org/none", None)):
            with pytest.raises(Skip):
                ours.fold(seen(repo, sha, "webhook"))
        assert ours.state.ledger.head.seq == 0


def test_our_own_release_is_known_wherever_it_is_found(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    with merge(tmp_path / "state", hub) as ours:
        ours.fold(models.fine_tune(base, tmp_path / "ft", 1))
        from continual.publish.folder import Target

        publish(hub, "thief/copy", ours.export(Target(tmp_path / "merged")))
        assert ours.fold("hf://thief/copy").reason == "own-release"


def test_a_base_from_the_hub_is_pinned_and_fetched_again(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    client = Client(endpoint=hub.endpoint, token=TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    base = models.base(tmp_path / "base")
    first = publish(hub, BASE, base, hubs.card(None, license="mit"))
    hub.commit(BASE, {"pytorch_model.bin": b"pickle", "tokenizer.json": b"{}", "onnx/model.onnx": b"o"})
    hub.tag(BASE, "v1")
    pinned = hub.head(BASE)
    assert making.survey(f"{BASE}@v1", client=client).base == f"hf://{BASE}@{pinned[:12]}"
    found = making.init(f"{BASE}@v1", tmp_path / "state", making.Recipe(rule="mean"), client=client)
    assert found.base == f"{BASE}@{pinned}"
    hub.commit(BASE, {"model.safetensors": b"another"})
    with merge(tmp_path / "state", hub) as ours:
        record = ours.state.format.base
        assert (record.repo, record.revision, record.licence) == (BASE, pinned, "mit")
        assert {p.name for p in Path(record.path).iterdir()} == {
            "config.json",
            "model.safetensors",
            "README.md",
            "tokenizer.json",
        }
        assert ours.fold(models.fine_tune(base, tmp_path / "ft", 1)).fate == "folded"
    shutil.rmtree(tmp_path / "cache")
    with merge(tmp_path / "state", hub) as ours:
        assert ours.fold(models.fine_tune(base, tmp_path / "ft2", 2)).fate == "folded"
        assert Path(record.path).exists()
    with pytest.raises(Misconfigured, match="not on the Hub"):
        making.init("org/none", tmp_path / "other", client=client)
    with pytest.raises(Misconfigured, match="not on the Hub"):
        making.init(f"{BASE}@{'0' * 40}", tmp_path / "other", client=client)
    assert first != pinned


def test_a_file_in_the_cache_that_was_altered_is_fetched_again_and_one_that_stays_wrong_refused(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    base = made(tmp_path, hub)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    with merge(tmp_path / "state", hub, hub={"read": "cache"}) as ours:
        place = ours.places.named("hf://org/ft")
        from continual.hub.repo import download

        file = place.info.files["model.safetensors"]  # type: ignore[attr-defined]
        cached = download(ours.places.hub, "org/ft", sha, file)
        cached.resolve().write_bytes(b"x" * file.size)
        assert ours.fold(place_again := "hf://org/ft").fate == "folded", place_again
        assert download(ours.places.hub, "org/ft", sha, file).read_bytes() == hub.read(
            "org/ft", sha, "model.safetensors"
        )
        with pytest.raises(Refuse, match="hash that the Hub says"):
            download(ours.places.hub, "org/ft", sha, file._replace(sha256="0" * 64))


@pytest.mark.parametrize("read", ["stream", "cache"])
def test_repos_wait_in_the_pool_and_come_out_again(
    tmp_path: Path, hub: Hub, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    base = quadratic.world(tmp_path)
    client = Client(endpoint=hub.endpoint, token=TOKEN)
    with pools.opened(tmp_path / "state", base, client=client, hub={"read": read}) as ours:
        for name, directory in (
            ("good", quadratic.good(base, 0)),
            ("noise", quadratic.noise(base, 0)),
            ("gone", quadratic.good(base, 1)),
        ):
            publish(hub, f"org/{name}", directory)
            assert ours.fold(f"hf://org/{name}").fate == "deferred"
        newer = hub.commit("org/good", {"README.md": b"# another card"})  # what waits is the commit that was seen
        hub.delete("org/gone")
        found = pools.rows(ours.round())
        assert {name: row.fate for name, row in found.items()} == {
            "org/good": "folded",
            "org/noise": "deferred",
            "org/gone": "expired",
        }
        (fold,) = ours.state.ledger.folds()
        assert fold.entry.candidate is not None
        assert fold.entry.candidate.revision != newer
        plan = ours.look_unfold("hf://org/good")
        assert plan.exact
        ours.unfold(plan)
        assert ours.state.ledger.folds() == []
        assert len(ours.retry("org/good")) == 1
        assert [c.origin for c in ours.state.ledger.retried()] == ["hf://org/good"]


def test_a_quantised_base_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    base = models.base(tmp_path / "base")
    config = {**models.CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(config))
    publish(hub, BASE, base)
    with pytest.raises(Refuse, match=r"quantization_config says that this model is quantised \(GPTQ\)"):
        making.init(BASE, tmp_path / "state", client=Client(endpoint=hub.endpoint, token=TOKEN))
    assert not list(tmp_path.rglob("cache/**/*.safetensors"))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("make", [parts.embedder, parts.pipeline])
def test_models_in_folders_and_only_what_is_read_of_them(
    tmp_path: Path, hub: Hub, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    base, tuned = make(tmp_path / "base"), make(tmp_path / "ft", 1)
    for file in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "onnx/model.safetensors"):
        parts.put(base, {file: {"unread": torch.zeros(3)}} if make is parts.pipeline else {})
    publish(hub, BASE, base)
    client = Client(endpoint=hub.endpoint, token=TOKEN)
    making.init(BASE, tmp_path / "state", making.Recipe(rule="mean"), client=client)
    making.init(base, tmp_path / "local", making.Recipe(rule="mean"))
    publish(hub, "org/ft", tuned)
    with merge(tmp_path / "state", hub) as ours, merge(tmp_path / "local", hub) as local:
        fetched = [path.name for path in Path(ours.state.format.base.path).rglob("*.safetensors")]
        assert len(fetched) == (2 if make is parts.embedder else 4)
        assert not any(name.endswith(("pruned.safetensors", "fp16.safetensors")) for name in fetched)
        assert ours.fold("hf://org/ft").fate == "folded"
        assert local.fold(tuned).fate == "folded"
        assert equal(sums(ours), sums(local))
        there, here = ours.export(tmp_path / "there"), local.export(tmp_path / "here")
    files = {path.relative_to(here): path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for name, content in files.items():
        assert name.name == "continual.json" or (there / name).read_bytes() == content


def test_experts_one_by_one_are_read_by_ranges_as_the_base_packs_them(tmp_path: Path, hub: Hub) -> None:
    """What is put together of many pieces is read in another order than it lies in the file."""
    head, experts = "model.layers.0.mlp.experts", 6
    shapes = {f"{head}.gate_up_proj": (experts, 512, 128), f"{head}.down_proj": (experts, 128, 256)}
    base = models.base(tmp_path / "packed", shapes=shapes)
    tuned = models.fine_tune(base, tmp_path / "tuned", 1)
    packed = load_file(tuned / "model.safetensors")
    apart = {}
    for number in range(experts):
        gate, up = packed[f"{head}.gate_up_proj"][number].chunk(2)
        apart |= {f"{head}.{number}.gate_proj.weight": gate, f"{head}.{number}.up_proj.weight": up}
        apart[f"{head}.{number}.down_proj.weight"] = packed[f"{head}.down_proj"][number]
    one_by_one = models.write(tmp_path / "apart", apart)
    for state in ("state", "local"):
        making.init(base, tmp_path / state, making.Recipe(rule="task-arithmetic"))
    publish(hub, "org/apart", one_by_one)
    with merge(tmp_path / "state", hub) as ours, merge(tmp_path / "local", hub) as local:
        found = ours.fold("hf://org/apart")
        assert found.fate == "folded", found.message
        assert local.fold(tuned).commit.entry.digest == found.commit.entry.digest
        assert equal(sums(ours), sums(local))


def test_of_one_that_was_made_unmergeable_some_is_fetched_once_more(tmp_path: Path, hub: Hub, grouped: Path) -> None:
    making.init(grouped, tmp_path / "state", making.Recipe(rule="task-arithmetic"))
    for name, change in (("bob", None), ("alice", locked)):
        publish(hub, f"org/{name}", models.fine_tune(grouped, tmp_path / name, 1, change=change))
    with merge(tmp_path / "state", hub) as merged:
        assert merged.fold("hf://org/bob").fate == "folded"
        assert merged.fold("hf://org/alice").reason == "locked"
        assert merged.fold("hf://org/alice").fate == "known"
    assert hub.journal.leaks() == []
