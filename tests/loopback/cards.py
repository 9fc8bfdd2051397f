"""What the Hub reads out of a repository's files: the model card, the tags, the parameter counts. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.loopback.repos import Blob


def card(files: Mapping[str, Blob]) -> dict[str, Any]:
    """The YAML front matter of README.md; empty if there is none or it is not a mapping."""
    readme = files.get("README.md")
    return front_matter(readme.data) if readme else {}


@lru_cache(maxsize=4096)  # every poll of a list asks for all of them
def front_matter(readme: bytes) -> dict[str, Any]:
    text = readme.decode(errors="replace").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return {}
    matter, fence, _ = text[4:].partition("\n---")
    try:
        found = yaml.safe_load(matter) if fence else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def bases(files: Mapping[str, Blob]) -> tuple[str, list[str]]:
    """The relation to the base models, and these. Without `base_model_relation` an adapter is known by its config, a
    merge by its several bases, and anything else is a fine-tune."""
    data = card(files)
    named = data.get("base_model") or []
    models = [str(m) for m in (named if isinstance(named, list) else [named])]
    guess = "adapter" if "adapter_config.json" in files else "merge" if len(models) > 1 else "finetune"
    return str(data.get("base_model_relation") or guess), models


def tags(files: Mapping[str, Blob]) -> list[str]:
    """The tags by which the Hub's list filters, in no particular order but without doubles."""
    data = card(files)
    relation, models = bases(files)
    own = data.get("tags") or []
    found = [str(tag) for tag in own] if isinstance(own, list) else [str(own)]
    found += [str(data[key]) for key in ("library_name", "pipeline_tag") if data.get(key)]
    found += ["safetensors"] if any(path.endswith(".safetensors") for path in files) else []
    for model in models:
        found += [f"base_model:{model}", f"base_model:{relation}:{model}"]
    found += [f"license:{data['license']}"] if data.get("license") else []
    return list(dict.fromkeys(found))


def parameters(files: Mapping[str, Blob]) -> dict[str, Any] | None:
    """Parameters per type and in all, from the headers of the safetensors files; None without a readable one."""
    counts: dict[str, int] = {}
    for path, blob in files.items():
        if not path.endswith(".safetensors"):
            continue
        try:
            header = json.loads(blob.data[8 : 8 + int.from_bytes(blob.data[:8], "little")])
            for name, tensor in header.items():
                if name != "__metadata__":
                    counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + prod(tensor["shape"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # somebody pushed rubbish; the Hub lists it all the same
    return {"parameters": counts, "total": sum(counts.values())} if counts else None
