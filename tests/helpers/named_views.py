"""What tests of views share: settings with views, putting one out, and what is said beside an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from continual import api
from continual.config import Settings
from continual.service import publishing
from continual.service import release as releasing
from continual.service.outgoing import outgoing
from tests.helpers.released import REPO


def settings(place: Path, **views: dict[str, object]) -> Settings:
    return Settings.model_validate({"state": place, "views": views, "max_base_ratio": 100.0})


def put(merge: api.Merge, name: str, seq: int) -> Path | None:
    """Where a view was put just now; None where it was out."""
    found = publishing.put(merge, outgoing(merge.settings, name), seq)
    return found.directory if found is not None and found.new else None


def is_out(merge: api.Merge, name: str, seq: int) -> bool:
    return releasing.is_out(merge, outgoing(merge.settings, name), seq, merge.state.publications.release(REPO, "main"))


def told(directory: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((directory / "continual.json").read_text())
    return body
