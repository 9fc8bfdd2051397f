from pathlib import Path

import pytest
from pydantic import ValidationError

from continual.config import Settings, load, parse_bytes, settings_of
from continual.config.given import look
from continual.errors import Misconfigured


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "continual.toml"
    file.write_text('keep = 7\nsettle = 1.5\nmemory = "2GiB"\nwatch = ["in", "more"]\n')
    found = load(
        {"keep": 9, "port": None}, file=file, environ={"CONTINUAL_KEEP": "8", "CONTINUAL_SETTLE": "2.5", "HOME": "/"}
    )
    assert (found.keep, found.settle, found.memory) == (9, 2.5, 2 << 30)
    assert found.watch == (Path("in"), Path("more"))
    assert found.port == Settings().port


def test_file_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("keep = 4\n")
    assert load({}, environ={"CONTINUAL_CONFIG": str(file), "CONTINUAL_WATCH": "a,b"}).watch == (Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("toml", "environ", "words"),
    [
        ("kepe = 3", {}, ("kepe", "continual.toml")),
        ("keep = 0", {}, ("keep", "continual.toml")),
        ("keep = x", {}, ("continual.toml", "line 1")),
        ('[views.v]\nas_lora = "x"', {}, ("views.v.as_lora = 'x'", "write a rank, as 16, or own")),
        ("[views.v]\nas_lora = 0", {}, ("views.v.as_lora = 0", "write a rank")),
        ('watch = ["s3://b/x"]', {}, ("watch", "continual.toml", "on this machine, and no address")),
        ('[evaluation]\nrows = ["s3://b/x"]', {}, ("evaluation.rows", "on this machine, and no address")),
        ("", {"CONTINUAL_CURRENT": "gs://b/x"}, ("CONTINUAL_CURRENT", "on this machine, and no address")),
        ("", {"CONTINUAL_STATE": "s3a://b/x"}, ("CONTINUAL_STATE", "write a directory, or s3://BUCKET/PREFIX")),
        ("lease = inf", {}, ("lease", "less than or equal to 3600")),
        ("", {"CONTINUAL_KEPE": "3"}, ("CONTINUAL_KEPE", "environment")),
        ("", {"CONTINUAL_UPDATES": "merge"}, ("CONTINUAL_UPDATES", "merge", "refuse")),
        ("", {"CONTINUAL_MEMORY": "lots"}, ("CONTINUAL_MEMORY", "lots")),
        ("", {"CONTINUAL_DEVICE": "tpu"}, ("CONTINUAL_DEVICE", "tpu")),
    ],
)
def test_errors_name_the_setting_and_where_it_was_set(
    tmp_path: Path, toml: str, environ: dict[str, str], words: tuple[str, ...]
) -> None:
    file = tmp_path / "continual.toml"
    file.write_text(toml)
    with pytest.raises(Misconfigured) as raised:
        load({}, file=file, environ=environ)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (
            "[evaluation]\ncomand = []",
            "evaluation.comand: unknown; did you mean 'command'[?] known are chance, command, ",
        ),
        ("[hub]\nwach = true", "hub.wach: unknown; did you mean 'watch'[?] known are .*watch"),
        ("[views.v]\nsacle = 1", "views.v.sacle: unknown; did you mean 'scale'[?] known are .*scale"),
        (
            "[[hooks]]\nkind = 'command'\ncomand = ['x']",
            "hooks.*comand: unknown; did you mean 'command'[?]",
        ),
        ("[evaluation]\ncommand = 'x {model}'", r"evaluation.command = 'x {model}': write a list: \[...\]"),
        ("evaluation = 3", "evaluation = 3: write a table of its keys"),
    ],
)
def test_a_key_of_a_table_that_is_not_known_is_said_with_those_that_are(tmp_path: Path, toml: str, said: str) -> None:
    file = tmp_path / "continual.toml"
    file.write_text(toml)
    with pytest.raises(Misconfigured, match=said):
        load({}, file=file, environ={})


def test_a_scale_of_a_view_is_a_number_or_a_text(tmp_path: Path) -> None:
    file = tmp_path / "continual.toml"
    file.write_text('[views.v]\nscale = 0.3\nas_lora = 8\n[views.w]\nscale = "norm:2"\nas_lora = "own"\n')
    views = load({}, file=file, environ={}).views
    assert [(view.scale, view.as_lora) for view in views.values()] == [("0.3", 8), ("norm:2", "own")]


def test_settings_of_a_program_are_checked_as_those_of_a_user() -> None:
    assert settings_of({"state": "s", "rounds": {"sigmas": 4}}).rounds.sigmas == 4
    with pytest.raises(Misconfigured, match=r"unknown setting 'kepe'; did you mean 'keep'\? known are .*keep"):
        settings_of({"kepe": 3})
    with pytest.raises(Misconfigured, match=r"rounds\.sgmas"):
        settings_of({"rounds": {"sgmas": 4}})
    with pytest.raises(Misconfigured, match="keep = 0"):
        settings_of({"keep": 0})


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="No such file"):
        load({}, file=tmp_path / "no.toml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().keep = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"), [("4GB", 4_000_000_000), ("512 MiB", 512 << 20), ("1000", 1000), ("1.5k", 1500), ("x", "x")]
)
def test_sizes(text: str, value: object) -> None:
    assert parse_bytes(text) == value


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "continual.toml"
    file.write_text("kepe = 3\nkeep = 0\n[hub]\nwach = true\n")
    with pytest.raises(Misconfigured) as raised:
        load({"port": -1}, file=file, environ={"CONTINUAL_PORTT": "1"})
    lines = str(raised.value).splitlines()
    assert [line.partition(": ")[2][:21] for line in lines[:2]] == ["unknown setting 'kepe", "unknown setting 'CONT"]
    assert sorted(word for line in lines[2:] for word in ("hub.wach", "keep = 0", "port = -1") if word in line) == [
        "hub.wach",
        "keep = 0",
        "port = -1",
    ]


def test_where_each_setting_was_set(tmp_path: Path) -> None:
    """Of a table key by key; what replaces a table whole takes its places, too."""
    file = tmp_path / "continual.toml"
    file.write_text("keep = 2\n[hub]\nwatch = true\npoll = 10\n[gates.noise]\nact = 'warn'\n")
    found = look({"gates": ["copies.act=off"], "keep": 4}, file=file, environ={"CONTINUAL_HUB": "poll=5"})
    assert found.where == {
        "keep": "flag: keep",
        "hub.watch": f"{file}: hub",
        "hub.poll": "environment: CONTINUAL_HUB",
        "gates.noise.act": f"{file}: gates",
        "gates.copies.act": "flag: gates",
    }
    assert (found.settings.hub.watch, found.settings.hub.poll, found.settings.keep) == (True, 5.0, 4)


def test_a_table_that_replaces_one_takes_its_places() -> None:
    """A flag over a variable; over a file it changes some keys."""
    found = look({"hub": ["watch=true"]}, environ={"CONTINUAL_HUB": "poll=5"})
    assert found.where == {"hub.watch": "flag: hub"}
    assert (found.settings.hub.watch, found.settings.hub.poll) == (True, 300.0)


def test_a_secret_that_is_too_short_is_not_told(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('admin_token = "hunter2"\n')
    with pytest.raises(Misconfigured) as raised:
        load({}, file=file, environ={})
    assert "hunter2" not in str(raised.value)
    assert "at least 16 characters" in str(raised.value)
    assert load({}, environ={"CONTINUAL_ADMIN_TOKEN": ""}).admin_token is None
