"""The figures of the package's plan: `python -m tests.campaigns.house [FOLDER]`, by default of this checkout. Another
commit's: `git worktree add ../before COMMIT`, and `../before/continual` as FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.helpers import house


def main() -> None:
    """Prints how many modules, rooms, arrows, floors and circles the tree has."""
    known = house.modules(Path(sys.argv[1]) if len(sys.argv) > 1 else house.ROOT)
    rooms = house.arrows(known)
    print(f"modules {len(known)}, loose at the root {len(house.loose(known))}")
    print(f"rooms {len(rooms)}, arrows between them {sum(map(len, rooms.values()))}")
    print(f"circles of modules {house.circles(house.module_imports(known))}, of rooms {house.circles(rooms)}")
    if not house.circles(rooms):
        print(f"floors {max(house.floors(rooms).values())}")


if __name__ == "__main__":
    main()
