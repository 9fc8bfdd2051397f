"""Small model directories, as they are published into a watched folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

WEIGHTS = save({"a.weight": torch.zeros(4, 4)})


def publish(path: Path, files: Mapping[str, bytes], when: int | None = None) -> Path:
    """Makes a directory with these files, as old as `when`."""
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
        if when is not None:
            os.utime(path / name, (when, when))
    return path


def model(path: Path, when: int | None = None) -> Path:
    """A directory with one weight file."""
    return publish(path, {"model.safetensors": WEIGHTS, "config.json": b"{}"}, when)


def sharded(*names: str) -> bytes:
    """An index over these files."""
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


def open_files(directory: Path) -> list[str]:
    """The files of a directory that this process has open, gone ones too."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
    return [link for link in links if link.startswith(f"{directory}/")]
