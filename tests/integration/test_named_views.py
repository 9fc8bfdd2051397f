"""Views of the settings: readings with names, exported and explained by name, and put out by the daemon."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import structlog

from continual import api, making
from continual.config import Settings
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.service import daemon, view_settings
from tests.helpers import adapters, models, services
from tests.helpers.command import machine, run
from tests.helpers.hooks import VLLM, serving_hooks
from tests.helpers.named_views import put, settings, told

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


@pytest.fixture
def state(tmp_path: Path, base: Path) -> Path:
    """Two adapters, a and b."""
    place = tmp_path / "state"
    making.init(base, place, making.Recipe(width=64))
    with api.Merge(Settings(state=place, max_base_ratio=100.0), write=True) as merge:
        for seed, name in enumerate("ab"):
            assert merge.fold(adapters.lora(tmp_path / name, base, seed)).fate == "folded"
    return place


def config(file: Path, state: Path, text: str) -> Path:
    file.write_text(f'state = "{state}"\nmax_base_ratio = 100.0\n{text}')
    return file


SALES = """
[views.sales]
only = ["a", "crm-*"]
rule = "task-arithmetic"
scale = "0.5"
"""


def test_a_view_is_read_by_its_name(tmp_path: Path, state: Path) -> None:
    file = config(tmp_path / "c.toml", state, SALES)
    assert run("export", tmp_path / "sales", "--view", "sales", "--config", file).returncode == 0
    flags = ("--only", "a", "--rule", "task-arithmetic", "--scale", "0.5")
    assert run("export", tmp_path / "flags", *flags, "--config", file).returncode == 0
    one, other = (tmp_path / name / "model.safetensors" for name in ("sales", "flags"))
    assert one.read_bytes() == other.read_bytes()
    assert told(tmp_path / "sales")["contents"] == told(tmp_path / "flags")["contents"]
    assert told(tmp_path / "sales")["view"]["name"] == "sales"
    assert [one["name"] for one in machine("explain", "sales", "--config", file)["models"]] == ["a"]
    changed = machine("explain", "sales", "--only", "b", "--rule", "mean", "--config", file)
    assert (changed["rule"], [one["name"] for one in changed["models"]]) == ("mean", ["b"])
    unknown = run("explain", "sails", "--config", file)
    assert unknown.returncode == 2
    assert "view sails: the settings name no such view; there are sales" in unknown.stderr


def test_a_glob_of_a_view_may_match_a_model_that_comes_later(tmp_path: Path, base: Path, state: Path) -> None:
    with api.Merge(settings(state, v={"only": ["crm-*"]}, w={"only": ["crm"]}), write=True) as merge:
        with pytest.raises(Misconfigured, match="no model is left"):
            merge.contents(merge.view("v"))
        with pytest.raises(Misconfigured, match="only = crm-"):
            merge.contents(ReadView(only=("crm-*",)))
        with pytest.raises(Misconfigured, match="only = crm: no model"):
            merge.contents(merge.view("w"))
        merge.fold(adapters.lora(tmp_path / "crm-1", base, 7))
        assert [one.name for one in merge.explain(merge.view("v")).models] == ["crm-1"]


def test_contents_change_with_what_is_read_and_with_nothing_else(tmp_path: Path, base: Path, state: Path) -> None:
    views: dict[str, dict[str, object]] = {"a": {"only": ["a"]}, "rest": {"without": ["a"]}, "all": {}}
    with api.Merge(settings(state, **views), write=True) as merge:
        before = {name: merge.contents(merge.view(name)) for name in views}
        assert len(set(before.values())) == 3
        merge.fold(adapters.lora(tmp_path / "c", base, 9))
        after = {name: merge.contents(merge.view(name)) for name in views}
        assert after["a"] == before["a"]
        assert after["rest"] != before["rest"]
        assert after["all"] != before["all"]
        merge.unfold(merge.look_unfold("c"))
        assert {name: merge.contents(merge.view(name)) for name in views} == before
        merge.rescale("norm:2")
        assert merge.contents(merge.view("a")) != before["a"]
        weighed = [merge.contents(ReadView(only=("a",), weights={"a": w})) for w in (1.0, 0.5)]
        assert weighed[0] == merge.contents(ReadView(only=("a",))) != weighed[1]


def test_what_is_cut_for_others_is_other_contents(tmp_path: Path, base: Path) -> None:
    making.init(base, tmp_path / "narrow", making.Recipe(width=4))
    with api.Merge(settings(tmp_path / "narrow", a={"only": ["a"]}), write=True) as merge:
        merge.fold(adapters.lora(tmp_path / "a", base, 1, rank=4))
        before = merge.contents(merge.view("a"))
        merge.fold(adapters.lora(tmp_path / "b", base, 2, rank=4))
        assert merge.contents(merge.view("a")) != before


def test_the_daemon_keeps_each_view_where_it_is_wanted(tmp_path: Path, base: Path) -> None:
    state, watch, out, heard = tmp_path / "state", tmp_path / "in", tmp_path / "out", tmp_path / "heard"
    watch.mkdir()
    making.init(base, state, making.Recipe(width=64, rule="mean"))
    crm = f"""
[views.crm]
only = ["crm-*"]
current = "{out}/crm"
"""
    rest = f"""
[views.rest]
without = ["crm-*"]
as_lora = "own"
current = "{out}/rest"
"""
    typo = f"""
[views.typo]
only = ["nobody"]
current = "{out}/typo"
"""
    with serving_hooks() as served, serving_hooks() as sglang:
        served.reply = vllm = VLLM()
        sglang.reply = lambda path, _body: (200, {"success": True}) if path == "/load_lora_adapter" else (400, {})
        hooks = f"""
[[hooks]]
kind = "vllm-lora"
url = "{served.url}"
view = "*"
rank = 2
[[hooks]]
kind = "sglang-lora"
url = "{sglang.url}"
view = "rest"
name = "of-{{view}}"
[[hooks]]
kind = "command"
command = ["sh", "-c", "echo $PUBLISHED_VIEW {{view}} $PUBLISHED_SEQ {{directory}} >> {heard}"]
view = "c*"
"""
        file = config(tmp_path / "c.toml", state, crm + rest + typo + hooks)
        with services.daemon(state, watch, "--config", str(file)) as process:
            address = services.url(process, state)
            adapters.lora(watch / "mail", base, 1)
            services.until(lambda: (out / "rest").is_symlink(), "the view that reads it is out")
            assert not (out / "crm").exists()
            adapters.lora(watch / "crm-1", base, 2)
            services.until(lambda: (out / "crm").is_symlink(), "the other view is out")
            assert [one["name"] for one in told(out / "crm")["shares"]] == ["crm-1"]
            assert (out / "rest" / "adapter_model.safetensors").is_file()
            services.until(lambda: vllm.loaded.keys() == {"crm", "rest"}, "each view is served by its name")
            assert Path(vllm.loaded["rest"]) == (out / "rest").resolve()
            assert json.loads((Path(vllm.loaded["crm"]) / "adapter_config.json").read_text())["r"] == 2
            loaded = {"lora_name": "of-rest", "lora_path": str((out / "rest").resolve())}
            assert sglang.asked == [("/unload_lora_adapter", {"lora_name": "of-rest"}), ("/load_lora_adapter", loaded)]
            adapters.lora(watch / "crm-2", base, 3)
            services.until(lambda: len(told(out / "crm")["shares"]) == 2, "it follows")
            second = told(out / "crm")["seq"]
            shown = {view["name"]: view for view in services.status(address)["views"]}
            assert (shown["crm"]["count"], shown["crm"]["models"]) == (2, "crm-1, crm-2")
            assert (shown["rest"]["count"], shown["rest"]["current_seq"]) == (1, 1), "nothing that it reads has changed"
            assert "only = nobody" in shown["typo"]["problem"]
            services.until(
                lambda: "view typo: only = nobody" in str(services.status(address)["degraded"]), "what is wrong is told"
            )
            services.until(lambda: len(heard.read_text().splitlines()) == 2, "the command is told")
            lines = [line.split() for line in heard.read_text().splitlines()]
            assert [line[:2] for line in lines] == [["crm", "crm"]] * 2, "and of no other view"
            assert (lines[1][2], Path(lines[1][3]).name) == (str(second), f"crm-{second:08d}")
            said = run("status", "--config", file).stdout
            assert f"crm: reads 2 by mean (crm-1, crm-2), a whole model; {out}/crm: record " in said
            assert ">Views</h2>" in services.get(address)[1]
            config(file, state, crm + 'rule = "no-such"\n' + rest + hooks)
            process.send_signal(signal.SIGHUP)
            log = tmp_path / "daemon.log"
            services.until(lambda: "view crm: unknown rule" in log.read_text(), "a view that cannot be changes nothing")
            narrow = rest.replace('"own"', "3")
            config(file, state, crm.replace("crm-*", "crm-1") + narrow + hooks)
            process.send_signal(signal.SIGHUP)
            services.until(lambda: len(told(out / "crm")["shares"]) == 1, "at once, and no fold is needed")
            services.until(lambda: told(out / "rest")["lora"]["rank"] == 3, "so is another form")
            assert run("unfold", "crm-2", "--yes", "--state", state).returncode == 0
            services.until(lambda: not services.status(address)["degraded"], "the view that is gone is no trouble")
    links = {path.name for path in out.iterdir() if path.is_symlink()}
    assert links == {"crm", "crm-lora", "rest"}
    there = {path for path in out.glob("[!.]*") if not path.is_symlink()}
    assert {(out / link).resolve() for link in links} <= there
    assert {path for path in there if path.name.startswith("crm-0")} == {(out / "crm").resolve()}, "no server reads it"
    for link in ("rest", "crm-lora"):
        assert len([path for path in there if re.fullmatch(rf"{link}-[0-9-]+", path.name)]) == 2, "and the one before"


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ({"v": {"rule": "no-such"}}, "view v: unknown rule"),
        ({"v": {"scale": "many"}}, "view v: scale"),
        ({"v": {"weights": {"a": -1.0}}}, "view v: a weight of -1"),
        ({"v": {"rule": "opcm", "weights": {"a": 2.0}}}, "view v: opcm reads every model with weight 1"),
        ({"v": {"scale": 1e40}}, "view v: scale = 1e.40: the number is at most"),
        (
            {"v": {"current": "x"}, "w": {"current": "no/../x"}},
            r"views.w.current = no/../x: views.v.current goes there",
        ),
        ({"v": {"current": "x"}, "w": {"current": "x"}}, r"views.w.current = x: views.v.current goes there already"),
        ({"v": {"repo": "me/merge"}}, r"views.v.repo = me/merge: release.repo goes there already"),
        ({"v": {"repo": "no repo"}}, r"views.v.repo = no repo: write ORG/NAME"),
        ({"v": {"format": "kohya"}}, r"views.v.format is the layout of an adapter: set as_lora"),
        ({"v": {"rule": "ties", "as_lora": "own"}}, r"views.v.as_lora = own: what is read has no rank of its own"),
    ],
)
def test_a_view_that_can_never_be_read_keeps_the_daemon_from_starting(
    tmp_path: Path, state: Path, views: dict[str, dict[str, object]], said: str
) -> None:
    (tmp_path / "in").mkdir()
    wanted = {"state": state, "views": views, "watch": [tmp_path / "in"], "port": 0, "release": {"repo": "me/merge"}}
    try:
        with pytest.raises(Misconfigured, match=said):
            daemon.run(Settings.model_validate(wanted))
    finally:
        structlog.reset_defaults()


def test_a_view_of_a_merge_of_whole_tensors_has_a_rule_alone(tmp_path: Path, base: Path) -> None:
    making.init(base, tmp_path / "dense", making.Recipe(rule="iso-c"))
    with api.Merge(settings(tmp_path / "dense", v={"only": ["a"]}, w={"rule": "mean"})) as merge:
        assert merge.contents(merge.view("w")) != merge.contents()
        with pytest.raises(Misconfigured, match="no models can be chosen"):
            view_settings.must_be_readable(merge)


def test_what_is_out_is_written_again_only_where_it_is_another(tmp_path: Path, base: Path, state: Path) -> None:
    link = tmp_path / "out/v"
    with api.Merge(settings(state, v={"only": ["a"], "current": link}), write=True) as merge:
        assert put(merge, "v", 2) == link.resolve()
        assert put(merge, "v", 2) is None
        merge.fold(adapters.lora(tmp_path / "c", base, 9))
        assert put(merge, "v", 3) is None
        merge.unfold(merge.look_unfold("a"))
        with pytest.raises(Misconfigured, match="only = a: no model"):
            put(merge, "v", merge.head)
        assert told(link)["seq"] == 2
    with api.Merge(settings(state, v={"only": ["b"], "current": link})) as merge:
        found = put(merge, "v", merge.head)
        assert found is not None
    with api.Merge(settings(state, v={"only": ["b"], "current": link, "rule": "mean"})) as merge:
        again = put(merge, "v", merge.head)
    assert again == found.with_name(f"{found.name}-1"), "of the same record, but read otherwise"
    assert [one["name"] for one in told(link)["shares"]] == ["b"]
