"""A machine of systemd's for a campaign: a copy-on-write view of this one, changed, booted in a container of
systemd-nspawn (Debian: systemd-container), and gone afterwards. Needs root.

The program to run inside is a file beside this one, run by this Python with this checkout and its packages; it writes
`/campaign/report.json`, rows of what, whether it is as expected, and what was found. `main` prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[3]
PREFIX = "/opt/campaign"
"""Where this checkout, its packages and its Python are inside."""
PYTHON = f"{PREFIX}/python/bin/python3"
_ROOM = 8 << 30
"""Bytes that may be written inside at most; they lie in a sparse file."""
_RUNNER = """[Unit]
Requires=basic.target
After=basic.target
[Service]
Type=oneshot
Environment=LD_LIBRARY_PATH={prefix}/python/lib PYTHONPATH={prefix}/src:{prefix}/packages
ExecStart={python} {script}
ExecStopPost=/bin/systemctl exit --force
TimeoutStartSec=15min
StandardOutput=append:/campaign/out
StandardError=append:/campaign/out
"""
_NOISE = ("apt-daily.timer", "apt-daily-upgrade.timer", "systemd-networkd.service", "getty.target")
Change = Callable[[Path], None]
"""Changes the view of the machine before it is booted, given its root."""


def main(inside: Path, change: Change, about: str | None) -> int:
    """A campaign's command line: boots, prints what came of it; 1 where something differs."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--keep", type=Path, help="where the journal is kept")
    parser.add_argument("--boot", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.boot is not None:
        _boot(asked.boot, inside, change)
        return 0
    if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
        print("this needs root and systemd-nspawn (Debian: apt-get install systemd-container)", file=sys.stderr)
        return 2
    module = f"tests.campaigns.packages.{Path(sys.argv[0]).stem}"
    with tempfile.TemporaryDirectory(prefix="continual-campaign-") as found:
        shared = Path(found)
        again = ["unshare", "--mount", sys.executable, "-m", module, "--boot", found]
        booted = subprocess.run(again, check=False, cwd=ROOT).returncode
        if asked.keep is not None and (shared / "journal").exists():
            shutil.copy(shared / "journal", asked.keep)
        report = shared / "report.json"
        if not report.exists():
            print(f"no report came out of the container (exit code {booted})", file=sys.stderr)
            for name in ("boot", "out"):
                if (shared / name).exists():
                    print(f"--- {name}\n{(shared / name).read_text(errors='replace')[-4000:]}", file=sys.stderr)
            return 1
        rows = json.loads(report.read_text())
    for what, good, said in rows:
        print(f"{'ok  ' if good else 'DIFFERS'} {what}: {said}")
    print(f"{sum(good for _, good, _ in rows)} of {len(rows)} as expected")
    return 0 if all(good for _, good, _ in rows) else 1


def _boot(shared: Path, inside: Path, change: Change) -> None:
    """In a mount namespace of its own: lays the view over the machine, changes and boots it."""
    over = shared / "over"
    over.mkdir()
    with (shared / "disk").open("wb") as file:
        file.truncate(_ROOM)
    _must("mkfs.ext4", "-q", str(shared / "disk"))
    _must("mount", "-o", "loop", str(shared / "disk"), str(over))
    for name in ("up", "work", "root"):
        (over / name).mkdir()
    root = over / "root"
    layers = f"lowerdir=/,upperdir={over / 'up'},workdir={over / 'work'}"
    _must("mount", "-t", "overlay", "overlay", "-o", layers, str(root))
    try:
        units = root / "etc/systemd/system"
        script = f"{PREFIX}/src/{inside.relative_to(ROOT)}"
        (units / "campaign.service").write_text(_RUNNER.format(prefix=PREFIX, python=PYTHON, script=script))
        for name in _NOISE:
            (units / name).unlink(missing_ok=True)
            (units / name).symlink_to("/dev/null")
        change(root)
        _nspawn(root, shared)
    finally:
        subprocess.run(["umount", str(root)], check=False)
        subprocess.run(["umount", "-d", str(over)], check=False)


def _nspawn(root: Path, shared: Path) -> None:
    binds = {ROOT: "src", Path(sysconfig.get_paths()["purelib"]): "packages", Path(sys.base_prefix): "python"}
    command = ["systemd-nspawn", "-q", "-D", str(root), "--register=no", "--keep-unit", "--private-network"]
    command += ["--capability=all", "--system-call-filter=bpf", f"--bind={shared}:/campaign"]
    command += [f"--bind-ro={here}:{PREFIX}/{there}" for here, there in binds.items()]
    command += ["-b", "systemd.unit=campaign.service", "systemd.show_status=no"]
    unified = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
    with (shared / "boot").open("w") as log:
        subprocess.run(command, env=unified, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False, timeout=900)


def _must(*command: str) -> None:
    subprocess.run(command, check=True)
