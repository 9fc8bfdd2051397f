"""States of adapters with the Hub: of a base only headers and small files are fetched, once; adapters of repos fold; a
daemon that starts again asks nobody for its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.config import Settings
from continual.engine.views import ReadView
from continual.executors.contract import silent
from continual.hub import Hub as Client
from continual.publish.lora import LoraTarget
from tests.helpers import adapters, command, hubs, models, packing, running, services
from tests.helpers.hubs import BASE, publish
from tests.loopback import TOKEN, Hub, serving

pytestmark = pytest.mark.slow

SHAPES = {
    **models.SHAPES,
    "model.embed_tokens.weight": (3000, 64),
    "model.layers.0.mlp.up_proj.weight": (2048, 1024),
    "lm_head.weight": (3000, 64),
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


def client(hub: Hub) -> Client:
    return Client(endpoint=hub.endpoint, token=TOKEN)


def sharded(tmp_path: Path, base: Path) -> Path:
    made = hubs.sharded(base, tmp_path / f"{base.name}-sharded", 2)
    (made / "tokenizer.json").write_text("{}")
    return made


@pytest.mark.parametrize("form", [None, "nf4", "gptq", "fp8"])
def test_of_a_base_only_headers_and_small_files_are_fetched(
    tmp_path: Path, hub: Hub, form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    base = models.base(tmp_path / "base", shapes=SHAPES, dtype=torch.bfloat16)
    made = base if form is None else packing.packed(base, tmp_path / "packed", form)
    sha = publish(hub, BASE, sharded(tmp_path, made), hubs.card(None, license="mit"))
    size = (made / "model.safetensors").stat().st_size
    hub.journal.clear()
    making.init(BASE, tmp_path / "state", making.Recipe(width=16), client=client(hub))
    assert hub.journal.sent(origin="") < 400_000 < size  # the first look at a file fetches up to 128 KiB
    assert len(hub.journal) < 25
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    with api.Merge(Settings(state=tmp_path / "state")) as merge:
        record = merge.state.format.base
        assert (record.repo, record.revision, record.licence, record.path) == (BASE, sha, "mit", "")
        shapes = {spec.name: spec.shape for spec in merge.state.format.tensors if not spec.name.endswith(".bias")}
        assert shapes == SHAPES
    hub.journal.clear()
    adapter = adapters.lora(tmp_path / "lora", base, 1, base_model_name_or_path=f"mirror/base-{form}-4bit")
    with hubs.merge(tmp_path / "state", hub, lineage="shapes") as merge:
        assert merge.fold(adapter).fate == "folded"
        merge.export_lora(LoraTarget(tmp_path / "out", None))
    assert len(hub.journal) == 0  # neither opened nor folded nor exported over the network
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == BASE


def test_tied_tables_that_are_both_there_are_compared_at_a_few_places(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    base = models.base(tmp_path / "one", shapes={**SHAPES, "model.embed_tokens.weight": (20_000, 64)})
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    publish(hub, BASE, base, hubs.card(None))
    tensors["lm_head.weight"][-1] += 1
    save_file(tensors, base / "model.safetensors")
    publish(hub, "org/apart", base, hubs.card(None))
    hub.journal.clear()
    tied = making.survey(BASE, making.Recipe(width=16), client=client(hub))
    assert tied.aliases["lm_head.weight"] == "model.embed_tokens.weight"
    apart = making.survey("org/apart", making.Recipe(width=16), client=client(hub))
    assert "lm_head.weight" not in apart.aliases
    assert hub.journal.sent(origin="") < 1_000_000  # the four tables have 20 MB


def test_a_daemon_folds_adapters_of_repos_and_needs_no_base_when_it_starts_again(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    base = models.base(tmp_path / "base")
    publish(hub, BASE, base, hubs.card(None))
    state = tmp_path / "state"
    making.init(BASE, state, making.Recipe(width=32, rule="mean"), client=client(hub))
    publish(hub, "org/lora", hubs.adapter(base, tmp_path / "lora", 1))
    publish(hub, "org/full", models.fine_tune(base, tmp_path / "full", 1))
    polled = {"hub": {"watch": True, "settle": 0, "poll": 1}}
    watched = {"watch": (tmp_path / "watched",), "settle": 0.1}
    (tmp_path / "watched").mkdir()
    hub.delete(BASE)
    hub.journal.clear()

    def fates() -> dict[str, str | None]:
        with api.open(state) as now:
            log = now.state.ledger.log
            return {c.entry.candidate.name: c.entry.fate for c in log if c.entry.candidate is not None}

    first, second = {"org/lora": "folded", "org/full": "refused"}, {"second": "folded"}
    for settings, wanted in ((polled, first), (watched, second)):

        def visit(_: str, wanted: dict[str, str] = wanted) -> None:
            services.until(lambda: wanted.items() <= fates().items(), f"{wanted} in {fates()}")

        with hubs.merge(state, hub, **settings) as merge:
            running.until(running.made(merge), visit)
        if settings is polled:
            assert not [request for request in hub.journal if request.repo == BASE and "resolve" in request.path]
            hubs.adapter(base, tmp_path / "second", 2).rename(tmp_path / "watched/second")
            hub.journal.clear()
    assert len(hub.journal) == 0
    with api.open(state) as merge:
        assert [fold.entry.candidate.name for fold in merge.state.ledger.folds()] == ["org/lora", "second"]


def test_what_waits_on_the_hub_is_taken_at_once(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """`watch --once` on a state of a quantised copy: adapters over the copy and over the original."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("CONTINUAL_STATE", str(tmp_path / "state"))
    base = models.base(tmp_path / "base")
    copy = f"{BASE}-bnb-4bit"
    publish(hub, copy, packing.packed(base, tmp_path / "packed", "nf4"), hubs.card(BASE))
    asked = client(hub)
    assert command.machine("init", copy, "--adapters", "--width", "32", client=asked)["packed"] == "bitsandbytes"
    for number, of in enumerate((copy, BASE)):
        adapter = adapters.lora(tmp_path / f"lora-{number}", base, number, base_model_name_or_path=of)
        publish(hub, f"org/lora-{number}", adapter, hubs.card(of))
    both = ("--hub", f"bases={copy},{BASE}")
    taken = command.machine("watch", "--once", "--hub", "watch=true", "--hub", "settle=0", *both, client=asked)
    assert {row["model"]: row["fate"] for row in taken} == {"org/lora-0": "folded", "org/lora-1": "folded"}


def test_weights_of_a_base_on_the_hub_are_read_where_an_adapter_takes_them(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm, some rows of a table, DoRA: by ranges, and nothing else of the base."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    base = models.base(tmp_path / "base", shapes=SHAPES, dtype=torch.bfloat16)
    publish(hub, BASE, sharded(tmp_path, base), hubs.card(None))
    making.init(BASE, tmp_path / "state", making.Recipe(rule="mean", width=64), client=client(hub))
    head, before = "base_model.model.model", load_file(base / "model.safetensors")
    query = before["model.layers.0.self_attn.q_proj.weight"].float()
    weights = {
        f"{head}.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, query.shape[1]),
        f"{head}.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(query.shape[0], 2),
        f"{head}.layers.0.self_attn.q_proj.lora_magnitude_vector": query.norm(dim=1) * 1.1,
        f"{head}.norm.weight": torch.randn(SHAPES["model.norm.weight"]),
        f"{head}.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(3, 64),
    }
    rows = {"embed_tokens": [2999, 7, 8]}
    said = {"use_dora": True, "modules_to_save": ["norm"], "trainable_token_indices": rows}
    adapter = adapters.plain(tmp_path / "lora", weights, base_model_name_or_path=BASE, **said)
    expected = adapters.task_vectors(base, adapter)[0]
    hub.journal.clear()
    with hubs.merge(tmp_path / "state", hub, max_base_ratio=1e9) as merge:
        outcome = merge.fold(adapter)
        assert outcome.fate == "folded", outcome.message
        reading = merge.reading(view=ReadView(rule="task-arithmetic", scale="1"))
        reading.settle(merge.executor, silent)
        for spec in merge.base.specs:
            wanted = expected.get(spec.name, torch.zeros(spec.shape))
            torch.testing.assert_close(reading.vector(spec), wanted, rtol=1e-5, atol=1e-5, msg=spec.name)
    assert hub.journal.sent(origin="") < 400_000 < (base / "model.safetensors").stat().st_size
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
