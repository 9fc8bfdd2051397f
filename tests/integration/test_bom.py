"""The bill of materials of an export: valid by CycloneDX's own validator, and true."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from continual import api, making
from continual.config import Settings
from continual.service import release as releasing
from tests.helpers import adapters, hubs, models
from tests.helpers.released import REPO
from tests.loopback import serving

pytestmark = pytest.mark.slow
schema = pytest.importorskip("cyclonedx.schema", reason="continual[bom] is not installed")
pytest.importorskip("jsonschema", reason="cyclonedx-python-lib[json-validation] is not installed")


@functools.cache
def validator() -> Any:
    """The library's own; to make one takes longer than all the rest."""
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(schema.SchemaVersion.V1_6)


def read(file: Path) -> dict[str, Any]:
    """A bill, once the library says that it is valid."""
    text = file.read_text("utf-8")
    assert validator().validate_str(text) is None
    body: dict[str, Any] = json.loads(text)
    return body


def said(component: dict[str, Any]) -> dict[str, str]:
    return {row["name"].removeprefix("continual:"): row["value"] for row in component.get("properties", ())}


def test_a_bill_names_the_base_each_model_with_hash_and_weight_and_the_rule(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    wanted = Settings(state=tmp_path / "state", bom=True)
    odd = os.fsdecode(b"b\xffb <x>")
    (tmp_path / "again").mkdir()
    with api.Merge(wanted, write=True) as merge:
        for seed, name in enumerate(("alice", odd)):
            merge.fold(models.fine_tune(base, tmp_path / name, seed))
        bill = read(merge.export(tmp_path / "merged") / "bom.cdx.json")
        again = read(merge.export(tmp_path / "again/merged") / "bom.cdx.json")
        folds = merge.state.ledger.folds()
        state = merge.state.id
    assert again == bill, "the same record, the same bill"
    merged = bill["metadata"]["component"]
    assert (merged["type"], merged["name"], merged["version"]) == ("machine-learning-model", "merged", "2")
    assert (said(merged)["state"], said(merged)["record"], said(merged)["rule"]) == (state, "2", "tsv-flow")
    parts = {part["bom-ref"]: part for part in bill["components"]}
    assert {part["name"] for part in parts.values()} == {"base", "alice", "b\\udcffb <x>", "continual"}
    for number, fold in enumerate(folds, 1):
        part = parts[f"model-{fold.seq}-{number}"]
        assert part["hashes"] == [{"alg": "BLAKE3", "content": fold.entry.digest.removeprefix("blake3:")}]
        assert said(part)["weight"] == "1.0"
    (needs,) = [row for row in bill["dependencies"] if row["ref"] == "merge"]
    assert set(needs["dependsOn"]) == set(parts)
    assert str(tmp_path) not in json.dumps(bill)


def test_a_release_has_it_with_commits_licences_and_only_the_models_that_a_view_reads(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        hubs.publish(hub, "org/one", adapters.lora(tmp_path / "one", base, 1), hubs.card(license="mit"))
        hubs.publish(hub, "org/two", adapters.lora(tmp_path / "two", base, 2), hubs.card(license="own terms"))
        state = tmp_path / "adapters"
        making.init(base, state, making.Recipe(width=64))
        views = {"v": {"only": ["org/two"], "repo": REPO, "as_lora": "own"}}
        with hubs.merge(state, hub, bom=True, views=views, max_base_ratio=100.0) as merge:
            assert [merge.fold(f"hf://org/{name}").fate for name in ("one", "two")] == ["folded", "folded"]
            releasing.release(merge, view="v")
            whole = read(merge.export(tmp_path / "merged") / "bom.cdx.json")
        (tmp_path / "view.json").write_bytes(hub.read(REPO, "main", "bom.cdx.json"))
        view = read(tmp_path / "view.json")
        parts = {part["name"]: part for part in whole["components"]}
        one, two = parts["org/one"], parts["org/two"]
        assert (one["version"], one["licenses"]) == (hub.head("org/one"), [{"license": {"id": "MIT"}}])
        assert one["purl"] == f"pkg:huggingface/org/one@{hub.head('org/one')}"
        assert two["licenses"] == [{"license": {"name": "own terms"}}]
        assert {part["name"] for part in view["components"]} == {"base", "org/two", "continual"}
        assert said(view["metadata"]["component"])["view"] == "v"
