"""The unit of ops/systemd under a real systemd: started, used, reloaded, hung, stopped, and looked at from inside.

    sudo python -m tests.campaigns.packages.unit

Boots systemd over a copy-on-write view of this machine (`machine.py`). In it: the unit as it is committed, the drop-in
that `continual config unit` writes, a user continual, a state. What systemd and the daemon then do is compared with
what is expected, a line each; exit code 1 if one differs. `--keep FILE` keeps the journal. Needs root; takes about a
minute.

Not shown by it: MemoryMax (the container has no memory controller where the machine has one of the old kind), and the
devices of a GPU: that others are shut and /dev/null is open is.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.campaigns.packages import machine

INSIDE = Path(__file__).with_name("inside_unit.py")
STARTER = f"""#!{machine.PYTHON}
import site, sys
sys.path.insert(0, "{machine.PREFIX}/src")
site.addsitedir("{machine.PREFIX}/packages")
from continual.cli.main import main
main()
"""


def installed(root: Path) -> None:
    """The program where the unit looks for it, from this checkout, and the unit."""
    starter = root / "opt/continual/.venv/bin/continual"
    starter.parent.mkdir(parents=True)
    starter.write_text(STARTER)
    starter.chmod(0o755)
    shutil.copy(machine.ROOT / "ops/systemd/continual.service", root / "etc/systemd/system")


if __name__ == "__main__":
    sys.exit(machine.main(INSIDE, installed, __doc__))
