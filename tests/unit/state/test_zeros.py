"""Arrays of zeros are written without their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from continual.records import SlotSpec
from continual.state import arrays


def test_zeros_of_any_shape_are_what_writing_them_gives(memory: Path) -> None:
    """And a large array of them has no blocks on the disk, where the file system has holes."""
    specs = {
        "long": SlotSpec((70000, 130)),
        "padded": SlotSpec((11, 900001)),
        "scalar": SlotSpec((), "float64"),
        "none": SlotSpec((0, 5)),
        "counts": SlotSpec((7,), "uint16"),
    }
    for name, spec in specs.items():
        holes, written = memory / f"{name}-holes", memory / f"{name}-written"
        holes.mkdir()
        written.mkdir()
        zeros = np.zeros(spec.shape, spec.dtype)
        assert arrays.write_zeros(f"{holes}/c", spec) == arrays.write(f"{written}/c", spec, zeros)
        files = sorted(file.name for file in written.iterdir())
        assert sorted(file.name for file in holes.iterdir()) == files
        assert all((holes / file).read_bytes() == (written / file).read_bytes() for file in files)
    assert sum(file.stat().st_blocks for file in (memory / "long-holes").iterdir()) * 512 < 1 << 20
