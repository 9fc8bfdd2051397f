"""What `tests.campaigns.packages.unit` runs inside the container, as root: an operator's morning with the unit."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import struct
from pathlib import Path

from tests.campaigns.packages.inside import journal, reported, row, run, shown, status, until
from tests.helpers import models

CONTINUAL = "/opt/continual/.venv/bin/continual"
UNIT = Path("/etc/systemd/system/continual.service")
CONFIG = Path("/etc/continual/continual.toml")
SRV = Path("/srv/continual")
SETTINGS = """state = "/var/lib/continual/state"
watch = ["/srv/continual/in"]
current = "/srv/continual/out/current"
settle = 0.2
drain = 20
keep = {keep}
"""
PROBE = """
import ctypes, json, os, resource, socket

def write(path):
    with open(path, "w") as file:
        file.write("x")

def unshare():
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) != 0:
        raise OSError(ctypes.get_errno(), "")

def send(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (address, 9))

def tried(call, what):
    try:
        call(what) if what else call()
    except OSError as error:
        return os.strerror(error.errno)
    return "done"

def own(key):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key))

asked = {
    "write /etc": (write, "/etc/x"),
    "write /opt": (write, "/opt/continual/x"),
    "write /var/lib/continual": (write, "/var/lib/continual/probe"),
    "write the link's folder": (write, "/srv/continual/out/probe"),
    "write the watched folder": (write, "/srv/continual/in/probe"),
    "list /root": (os.listdir, "/root"),
    "list /home": (os.listdir, "/home"),
    "write /dev/null": (write, "/dev/null"),
    "open a device of a class that is not allowed": (open, "/dev/probe"),
    "make a user namespace": (unshare, None),
    "send to this machine": (send, "127.0.0.1"),
    "send to another": (send, "10.99.0.2"),
}
found = {what: tried(*how) for what, how in asked.items()}
found["descriptors"] = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
found["capabilities"], found["no new privileges"] = own("CapEff"), own("NoNewPrivs")
print(json.dumps(found))
"""


def install() -> None:
    """As ops/docs/install.md says."""
    run("useradd", "--system", "--home-dir", "/var/lib/continual", "--shell", "/usr/sbin/nologin", "continual")
    for folder in (SRV / "in", SRV / "out", CONFIG.parent, Path("/var/lib/continual")):
        folder.mkdir(parents=True)
    for folder in (SRV / "out", Path("/var/lib/continual")):
        run("chown", "continual:continual", str(folder))

    models.base(SRV / "base")
    run("chmod", "-R", "a+rX", str(SRV / "base"))  # safetensors writes files for their owner alone
    CONFIG.write_text(SETTINGS.format(keep=3))
    made = run(CONTINUAL, "init", str(SRV / "base"), "--config", str(CONFIG), user="continual")
    row("a state is made by the user of the service", (made.returncode, made.stderr[-500:]), (0, ""))
    printed = run(CONTINUAL, "config", "unit", "--config", str(CONFIG))
    folder = UNIT.with_name("continual.service.d")
    folder.mkdir()
    (folder / "settings.conf").write_text(printed.stdout)
    # of this container: its Python lies elsewhere than it was built for
    (folder / "python.conf").write_text("[Service]\nEnvironment=LD_LIBRARY_PATH=/opt/campaign/python/lib\n")
    row("systemd finds nothing wrong", run("systemd-analyze", "verify", str(UNIT)).stderr, "")
    run("systemctl", "daemon-reload")


def use() -> None:

    began = run("systemctl", "start", "continual")
    row("it starts, and systemd says so when the page answers", (began.returncode, began.stderr), (0, ""))
    row("the page answers at once", status()["health"], "ok")
    row("state", shown("ActiveState"), "active")
    row("watchdog, microseconds", shown("WatchdogUSec"), "1min")
    row("TimeoutStopUSec by the settings", shown("TimeoutStopUSec"), "1min 20s")
    models.fine_tune(SRV / "base", SRV / "in/.alice", 1)
    run("chmod", "-R", "a+rX", str(SRV / "in/.alice"))
    (SRV / "in/.alice").rename(SRV / "in/alice")
    until("a model that is published is folded", lambda: status()["folds"] == 1)
    until("the link is put, outside of /var", lambda: (SRV / "out/current/continual.json").is_file())
    until("systemctl status says what it does", lambda: "waits for models; record" in shown("StatusText"))
    asked = run(CONTINUAL, "pause", "--config", str(CONFIG))
    row("root's commands reach it", (asked.returncode, asked.stderr), (0, ""))
    run(CONTINUAL, "resume", "--config", str(CONFIG))
    CONFIG.write_text(SETTINGS.format(keep=5))
    row("it reloads", run("systemctl", "reload", "continual").returncode, 0)
    until("the log says what changed", lambda: '"changed": ["keep"]' in journal())
    until("and it is active again", lambda: shown("ActiveState") == "active", 10)


def other_address(address: str) -> None:
    """Gives the loopback device a second address, by SIOCSIFADDR on an alias of it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        where = struct.pack("<HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
        fcntl.ioctl(sock, 0x8916, struct.pack("16s16s", b"lo:1", where))


def look_inside() -> None:
    """A program in the place of the daemon, under the same directives."""
    run("mknod", "/dev/probe", "c", "10", "200")  # net/tun of misc: a device of no class that is allowed
    run("chmod", "0666", "/dev/probe")
    other_address("10.99.0.2")
    Path("/opt/continual/probe.py").write_text(PROBE)
    text = UNIT.read_text().replace("Type=notify", "Type=oneshot").replace("WatchdogSec=60", "")
    start = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    text = text.replace(start, "ExecStart=/opt/campaign/python/bin/python3 /opt/continual/probe.py")
    text = text.replace("Restart=on-failure", "Restart=no")
    probe = UNIT.with_name("probe.service")
    probe.write_text(text)
    folder = UNIT.with_name("probe.service.d")
    folder.mkdir()
    for file in UNIT.with_name("continual.service.d").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "probe")
    told = journal("probe")
    found = json.loads(next((line for line in told.splitlines() if line.startswith("{")), "{}"))
    no, denied = os.strerror(1), os.strerror(13)
    expected = {
        "write /etc": os.strerror(30),
        "write /opt": os.strerror(30),
        "write /var/lib/continual": "done",
        "write the link's folder": "done",
        "write the watched folder": os.strerror(30),
        "list /root": denied,
        "list /home": denied,
        "write /dev/null": "done",
        "open a device of a class that is not allowed": no,
        "make a user namespace": no,
        "send to this machine": "done",
        "send to another": no,
        "descriptors": min(65536, resource.prlimit(1, resource.RLIMIT_NOFILE)[1]),
        "capabilities": "0000000000000000",
        "no new privileges": "1",
    }
    row("the probe ran", bool(found) or told[-500:], True)
    for what, wanted in expected.items():
        row(f"inside: {what}", found.get(what), wanted)


def hang_and_stop() -> None:
    folder = UNIT.with_name("continual.service.d")
    (folder / "quick.conf").write_text("[Service]\nWatchdogSec=4\nRestartSec=0\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", "continual")
    before = shown("MainPID")
    os.kill(int(before), signal.SIGSTOP)
    until("one that stands still is killed and started again", lambda: shown("NRestarts") == "1", 30)
    until("and is ready", lambda: shown("ActiveState") == "active" and status()["folds"] == 1, 60)
    row("by the watchdog", "Watchdog timeout" in run("journalctl", "-u", "continual", "--no-pager").stdout, True)
    drained = run(CONTINUAL, "drain", "--config", str(CONFIG))
    row("drain ends it", (drained.returncode, drained.stderr), (0, ""))
    until("and it stays down, as a success", lambda: (shown("ActiveState"), shown("Result")) == ("inactive", "success"))
    CONFIG.write_text("keep = 0\n")
    row("wrong settings fail", run("systemctl", "start", "continual").returncode, 1)
    until("once, with exit code 2", lambda: (shown("ActiveState"), shown("ExecMainStatus")) == ("failed", "2"))
    row("and are not tried again", shown("NRestarts"), "0")
    CONFIG.write_text(SETTINGS.format(keep=3))
    run("systemctl", "reset-failed", "continual")
    run("systemctl", "start", "continual")
    row("it stops by systemctl", run("systemctl", "stop", "continual").returncode, 0)
    row("as a success", (shown("Result"), '"clean": true' in journal()), ("success", True))
    exposure = run("systemd-analyze", "security", "continual", "--no-pager").stdout.splitlines()
    worth = next((line.split(":")[1].split()[0] for line in exposure if "Overall exposure" in line), "9")
    row("exposure below 2.0", float(worth) < 2.0 or worth, True)
    row("exposure", worth, worth)


if __name__ == "__main__":
    reported(install, use, look_inside, hang_and_stop)
