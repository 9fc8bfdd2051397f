"""Messages to people: gathered, tried again, counted, and nothing secret in what is said of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from continual import Settings, making
from continual.config.notify import NotifySettings
from continual.errors import Misconfigured
from continual.service import notifying
from continual.service.failures import Failures
from continual.service.health import Health, Shortfall
from continual.service.metrics import Metrics
from continual.service.notifying import Address, Notifier
from tests.helpers import models, services
from tests.helpers.hooks import Served, serving_hooks

pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated")  # apprise imports it
pytest.importorskip("apprise", reason="apprise is not installed")


@pytest.fixture
def served() -> Iterator[Served]:
    with serving_hooks() as found:
        yield found


def settings(served: Served, **more: object) -> NotifySettings:
    url = served.url.replace("http://", "json://") + "/s3cret"
    return NotifySettings.model_validate({"urls": [url], "gather": 0.0, **more})


def notifier(asked: NotifySettings, health: Health | None = None) -> tuple[Notifier, Metrics]:
    metrics = Metrics()
    return Notifier(asked, Path("/srv/state"), Failures(metrics, health or Health())), metrics


async def runs(told: Notifier, metrics: Metrics) -> None:
    """Runs it until what it heard is sent or given up."""
    task = asyncio.create_task(told.run())
    while not count(metrics, "ok") + count(metrics, "failed"):
        await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def count(metrics: Metrics, result: str) -> float:
    return metrics.registry.get_sample_value("continual_notifications_total", {"result": result}) or 0.0


def test_what_happens_together_is_one_message_and_calls_on_nobody(served: Served) -> None:
    async def run() -> Metrics:
        told, metrics = notifier(settings(served, events=["refused", "halted"]))
        told.hear("folded", "nobody asked for this")
        for number in range(30):
            told.hear("refused", f"@everyone <!channel> model-{number}\x1b[31m was kept out")
        await runs(told, metrics)
        return metrics

    metrics = asyncio.run(run())
    ((_, body),) = served.asked
    assert body["title"].endswith(": state")
    lines = body["message"].split("\n")
    assert (len(lines), lines[0]) == (21, "and 10 more before these: see continual log")
    assert lines[-1] == r"＠everyone ‹!channel› model-29\x1b[31m was kept out"
    assert "nobody asked" not in body["message"]
    assert (count(metrics, "ok"), count(metrics, "failed")) == (1, 0)


def test_a_message_that_is_not_taken_is_tried_again_counted_and_given_up(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.reply = lambda _path, _body: (500, "no")
    monkeypatch.setattr(notifying, "retry_delay", lambda _attempt: 0.0)
    health = Health()

    async def run(asked: NotifySettings) -> Metrics:
        told, metrics = notifier(asked, health)
        told.hear("halted", "has stopped")
        await runs(told, metrics)
        return metrics

    metrics = asyncio.run(run(settings(served, tries=3)))
    assert (len(served.asked), count(metrics, "ok"), count(metrics, "failed")) == (3, 0, 1)
    (short,) = health.found([], [])
    assert short.reason == "notify"
    assert "tried 3 times" in short.message
    assert "s3cret" not in short.message
    answers = iter([500, 200])
    served.reply = lambda _path, _body: (next(answers), "")
    metrics = asyncio.run(run(settings(served, tries=3)))
    assert (count(metrics, "ok"), count(metrics, "failed"), health.found([], [])) == (1, 0, [])


def test_an_address_that_raises_is_one_that_does_not_take_it(served: Served) -> None:
    def broken(title: str, body: str) -> bool:  # noqa: ARG001
        raise RuntimeError("s3cret")

    async def run() -> Metrics:
        told, metrics = notifier(settings(served, tries=1))
        told._addresses.append(Address("broken", broken))
        told.hear("halted", "has stopped")
        await told.last()
        return metrics

    metrics = asyncio.run(run())
    assert (count(metrics, "ok"), count(metrics, "failed")) == (1, 1)


def test_that_it_is_degraded_is_told_once_and_that_it_is_well_again(served: Served) -> None:
    async def run() -> None:
        told, _ = notifier(settings(served))
        for shortfalls in ([Shortfall("disk", "full")], [Shortfall("disk", "fuller"), Shortfall("notify", "no")], []):
            told.degraded(shortfalls)
        await told.last()

    asyncio.run(run())
    ((_, body),) = served.asked
    assert body["message"].split("\n") == ["cannot do all of its work (disk): full", "is well again (disk)"]


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        (["json://127.0.0.1", "nothing://s3cret"], "number 2 is no address that Apprise knows"),
        (["s3cret"], "number 1 is no address"),
        (["env:NO_SUCH_S3CRET"], "env:NO_SUCH_S3CRET: there is no such variable"),
    ],
)
def test_what_check_refuses(urls: list[str], said: str) -> None:
    with pytest.raises(Misconfigured, match=said) as refused:
        notifying.check(NotifySettings(urls=tuple(SecretStr(url) for url in urls)))
    assert "s3cret" not in str(refused.value)


def test_an_address_may_lie_in_the_environment() -> None:
    asked = NotifySettings.model_validate({"urls": "env:CHAT"})
    (found,) = notifying.addresses(asked, {"CHAT": "json://127.0.0.1/s3cret"})
    assert found.name == "JSON (number 1)"
    assert "s3cret" not in repr(Settings(notify=asked).model_dump(mode="json"))


@pytest.mark.slow
def test_a_daemon_tells_of_a_refusal_and_goes_on_where_nobody_listens(tmp_path: Path, served: Served) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    models.fine_tune(base, tmp_path / "in/alice", 1)
    models.fine_tune(base, tmp_path / "in/bob", 1)
    file = tmp_path / "continual.toml"
    listens = served.url.replace("http://", "json://")
    file.write_text(
        f'[notify]\nurls = ["{listens}/s3cret", "json://127.0.0.1:9/s3cret"]\n'
        'events = ["folded", "refused"]\ngather = 0.2\ntries = 1\n'
    )
    with services.daemon(tmp_path / "state", tmp_path / "in", "--config", str(file)) as process:
        address = services.url(process, tmp_path / "state")

        def told() -> str:
            return "\n".join(body["message"] for _, body in served.asked)

        services.until(lambda: "(duplicate)" in told() and "was folded, as record 1" in told(), "it is told")
        shown = services.until(lambda: "not notified" in (tmp_path / "daemon.log").read_text(), "the other failed")
        assert shown
        metrics = services.get(f"{address}/metrics")[1]
        assert 'continual_notifications_total{result="failed"}' in metrics
        assert services.status(address)["folds"] == 1
        everything = services.get(f"{address}/api/status")[1] + metrics + (tmp_path / "daemon.log").read_text()
        assert "s3cret" not in everything
