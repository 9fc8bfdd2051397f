"""ops/docs/install.md, typed line by line by a new operator, on a machine that has nothing yet.

    sudo python -m tests.campaigns.packages.operator

Takes the blocks of the page, in their order: installs from what is committed (which needs a package index: some hundred
megabytes), writes the settings, makes the state, starts the unit, publishes a model and sees it; then, by the page's
words, has the service watch a Hub on loopback, and a real Prometheus scrape it by ops/prometheus. What is not on the
page is not done. Prints a line for each step, with the seconds that it took; exit code 1 where one failed.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tests.campaigns.packages import machine
from tests.helpers import models, pages

INSIDE = Path(__file__).with_name("inside_operator.py")


def arrived(root: Path) -> None:
    """A checkout, a base and a fine-tune are there; what the page says to install is."""
    checkout = root / "opt/continual"
    checkout.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=machine.ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        found.extractall(checkout, filter="tar")
    models.base(root / "srv/base")
    models.fine_tune(root / "srv/base", checkout / "my-fine-tune", 1)
    models.fine_tune(root / "srv/base", root / "srv/of-the-hub", 2)
    subprocess.run(["chmod", "-R", "a+rX", str(root / "srv/base")], check=True)
    install = next(block for block in pages.blocks(pages.DOCS / "install.md", "") if "venv" in block)
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    bare["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    began = time.monotonic()
    # before the container is booted, since that has no network
    done = subprocess.run(
        ["chroot", str(root), "bash", "-exc", install], env=bare, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"the page's first block failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    (checkout / "installed").write_text(f"{time.monotonic() - began:.0f}")


if __name__ == "__main__":
    sys.exit(machine.main(INSIDE, arrived, __doc__))
