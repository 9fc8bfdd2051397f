"""Views that go out: to a repo, as a model or an adapter, again where the settings change, and who is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from continual import api, making
from continual.config import HookSettings
from continual.errors import Misconfigured
from continual.publish.published import Published
from continual.service import release as releasing
from continual.service import showing
from continual.service.failures import Failures
from continual.service.health import Health
from continual.service.metrics import Metrics
from continual.service.telling import Telling
from continual.state.entries import Entry, HookEntry
from continual.state.parts import HookCall
from tests.helpers import adapters, hubs, models
from tests.helpers.hooks import serving_hooks
from tests.helpers.named_views import is_out, put, settings, told
from tests.helpers.released import REPO
from tests.loopback import serving

pytestmark = pytest.mark.slow


async def aside(_entry: Entry) -> None:
    raise AssertionError("nothing is called")


def test_a_hook_is_called_again_where_something_else_is_out_and_only_there(tmp_path: Path) -> None:
    making.init(models.base(tmp_path / "base"), tmp_path / "state", making.Recipe(width=64))
    wanted = settings(tmp_path / "state", v={"current": tmp_path / "out/v"}).model_copy(
        update={"hooks": (HookSettings(kind="http", url="http://127.0.0.1:9/x?key=1", view="v"),)}
    )
    with api.Merge(wanted, write=True) as merge:
        telling = Telling(merge, Failures(Metrics(), Health()), aside)

        def waits(mark: str, view: str | None = "v") -> bool:
            return telling.waits(Published(merge.state.id, 0, view=view, mark=mark), "current")

        def called(**more: str) -> None:
            call = HookCall(
                number=1, kind="http", target="http://127.0.0.1:9/x", ok=False, attempts=1, seconds=0.0, message="no"
            )
            merge.record(HookEntry(of=0, hook=call, **more))

        assert waits("one")
        assert not waits("one", None), "the merge is for others"
        called(mark="one")
        assert waits("one"), "that call was of the merge"
        called(view="v", mark="one")
        assert not waits("one")
        assert waits("two")
        called(view="v")
        assert not waits("two"), "an earlier version wrote no marks"


def test_what_a_server_was_given_last_is_known_from_the_records(tmp_path: Path) -> None:
    making.init(models.base(tmp_path / "base"), tmp_path / "state", making.Recipe(width=64))
    wanted = settings(tmp_path / "state", v={"current": tmp_path / "v"}, w={"current": tmp_path / "w"}).model_copy(
        update={"hooks": (HookSettings(kind="vllm-lora", url="http://127.0.0.1:9", view="v"),)}
    )
    with api.Merge(wanted, write=True) as merge:
        telling = Telling(merge, Failures(Metrics(), Health()), aside)
        assert telling.served("v") == frozenset()
        for mark, number, ok in (("one", 1, True), ("two", 1, True), ("three", 1, False), ("four", 2, True)):
            call = HookCall(
                number=number, kind="", target="http://127.0.0.1:9", ok=ok, attempts=1, seconds=0.0, message=""
            )
            merge.record(HookEntry(of=0, hook=call, view="v", mark=mark))
        assert telling.served("v") == {"two"}, "the third failed, the fourth was another's"
        assert telling.served("w") is None, "nobody is given it"


@pytest.mark.parametrize("stays", [True, False])
def test_a_call_that_fails_once_its_view_is_gone_is_no_trouble(tmp_path: Path, stays: bool) -> None:
    """The settings change while a server is being told; nobody would call it again of that view."""
    making.init(models.base(tmp_path / "base"), tmp_path / "state", making.Recipe(width=64))
    wanted = settings(tmp_path / "state", v={"current": tmp_path / "out/v"})
    health = Health()
    with serving_hooks() as server, api.Merge(wanted, write=True) as merge:
        hook = HookSettings(kind="http", url=server.url, view="*", tries=1)
        merge.settings = wanted.model_copy(update={"hooks": (hook,)})
        recorded = asyncio.Event()

        async def record(_entry: Entry) -> None:
            recorded.set()

        telling = Telling(merge, Failures(Metrics(), health), record)

        def reply(_path: str, _body: object) -> tuple[int, str]:
            if not stays:
                merge.settings = merge.settings.model_copy(update={"views": {}})
                telling.forget("v")
            return 500, "no"

        server.reply = reply

        async def told_of() -> None:
            (calls,) = [asyncio.create_task(call) for call in telling.tasks()]
            telling.hand(Published(merge.state.id, 0, view="v", mark="one"), "current")
            await recorded.wait()
            calls.cancel()

        asyncio.run(told_of())
    assert len(server.asked) == 1
    assert bool(health.found((), ())) == stays


def test_a_view_is_released_to_a_repo_of_its_own(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        state = tmp_path / "adapters"
        making.init(base, state, making.Recipe(width=64))
        wanted = {"views": {"v": {"only": ["a", str(tmp_path / "x*")], "repo": REPO, "rule": "mean"}, "w": {}}}
        with hubs.merge(state, hub, max_base_ratio=100.0, **wanted) as merge:
            for seed, name in enumerate("ab"):
                merge.fold(adapters.lora(tmp_path / name, base, seed))
            assert not is_out(merge, "v", 2)
            look = releasing.look(merge, view="v")
            assert (look.out, look.seq) == (False, 2)
            first = releasing.release(merge, view="v")
            assert first.new
            assert showing.shares(merge) == (), "no record says yet that it is out"
            merge.record(releasing.entry(first, "v"))
            assert merge.state.ledger.head.entry.message == f"record 2 of the view v released as {first.url}"
            assert is_out(merge, "v", 2)
        with hubs.merge(state, hub, max_base_ratio=100.0, **wanted) as merge:
            (shares,) = showing.shares(merge)
            assert (shares.view, shares.seq, shares.place, shares.count) == ("v", 2, REPO, 1)
            assert [one.model for one in shares.models] == ["a"]
            again = releasing.release(merge, view="v")
            assert (again.new, again.shares) == (False, first.shares), "as after a kill before the record of it"
            merge.fold(adapters.lora(tmp_path / "c", base, 9))
            assert is_out(merge, "v", merge.head)
            second = releasing.release(merge, view="v")
            assert (second.new, second.seq, second.tag) == (False, 2, "record-2"), "it reads the same"
            with pytest.raises(Misconfigured, match=r"views\.w\.repo is not set"):
                releasing.release(merge, view="w")
        files = {name: file.data for name, file in hub.history(REPO)[0].files.items()}
        body = json.loads(files["continual.json"])
        assert body["view"] == {"name": "v", "only": ["a", "x*"], "rule": "mean"}
        card = files["README.md"].decode()
        assert "Folded models: 1" in card
        assert "by the rule mean" in card
        with (
            hubs.merge(state, hub, views={"w": {"repo": REPO}}) as merge,
            pytest.raises(Misconfigured, match="holds releases of the view v"),
        ):
            releasing.release(merge, view="w")
        with (
            hubs.merge(state, hub, release={"repo": REPO}) as merge,
            pytest.raises(Misconfigured, match="holds releases of the view v; one repo is for one view"),
        ):
            releasing.release(merge)


def test_a_view_goes_out_as_an_adapter_and_again_where_the_settings_say_otherwise(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        state = tmp_path / "adapters"
        making.init(base, state, making.Recipe(width=64))
        link = tmp_path / "out/v"

        def released(**said: object) -> tuple[dict[str, bytes], str | None]:
            """The files of the newest release of the view, with these settings, and its tag."""
            view = {"only": ["a", "b"], "repo": REPO, "current": link, **said}
            with hubs.merge(state, hub, max_base_ratio=100.0, views={"v": view}) as merge:
                if not merge.state.ledger.folds():
                    for seed, name in enumerate("abc"):
                        merge.fold(adapters.lora(tmp_path / name, base, seed))
                assert put(merge, "v", 3) is not None
                assert not is_out(merge, "v", 3)
                found = releasing.release(merge, view="v")
                assert found.new
                merge.record(releasing.entry(found, "v"))
                assert is_out(merge, "v", 3)
                assert put(merge, "v", 3) is None
                assert not releasing.release(merge, view="v").new
            assert told(link)["seq"] == 3
            return {name: file.data for name, file in hub.history(REPO)[0].files.items()}, found.tag

        whole, first = released()
        assert {"config.json", "model.safetensors"} <= whole.keys()
        lora, second = released(as_lora=4)
        assert "config.json" not in lora
        assert "model.safetensors" not in lora
        said = json.loads(lora["adapter_config.json"])
        assert (said["r"], said["base_model_name_or_path"]) == (4, base.name), "no folder of this machine"
        card = lora["README.md"].decode()
        assert "base_model_relation: adapter" in card
        assert "The view v: the merge of 2 of 3 fine-tunes" in card
        assert "continual export merged --as-lora 4" in card
        body = json.loads(lora["continual.json"])
        assert ({one["name"] for one in body["shares"]}, body["view"]["name"]) == ({"a", "b"}, "v")
        wider, third = released(as_lora="own")
        assert json.loads(wider["adapter_config.json"])["r"] == 8
        again, fourth = released()
        assert again.keys() >= whole.keys()
        assert "adapter_config.json" not in again, "transformers would load it, and not the model"
        assert (first, second, third, fourth) == ("record-3", "record-3-2", "record-3-3", "record-3-4")
        assert len({path.name for path in link.parent.iterdir()}) == 2, "the link, and what it points at"
