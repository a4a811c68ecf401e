"""`outrider show`: each setting, its value and its source; and a file that means the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider_services import sources
from outrider_services.commands import show
from outrider_services.commands.cli import main
from outrider_services.options import OPTIONS, Option
from outrider_services.table import Settings
from outrider_services.tuning import search
from outrider_services.tuning.decisions import Decision


@pytest.fixture(autouse=True)
def nothing_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["show", *arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_each_source_is_named_and_the_nearest_one_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text("[target]\nctx = 512\nthreads = 2\n[draft]\nn_max = 3\n")
    monkeypatch.setenv("OUTRIDER_TARGET__THREADS", "3")
    monkeypatch.setenv("OUTRIDER_DRAFT__N_MAX", "4")
    flags = ("--config=mine.toml", "-n-draft", "5", "--json", "--stop=a", "--stop=b")
    found = json.loads(shown(capsys, *flags))
    assert list(found) == list(OPTIONS)
    assert found["target.ctx"] == {"value": 512, "source": "file", "name": "mine.toml"}
    environment = {"source": "environment", "name": "OUTRIDER_TARGET__THREADS"}
    assert found["target.threads"] == {"value": 3, **environment}
    assert found["draft.n_max"] == {"value": 5, "source": "flag", "name": "--spec-draft-n-max"}
    assert found["sampling.stop"]["value"] == ["a", "b"]
    assert found["log.format"] == {"value": "auto", "source": "default", "name": None}


def test_what_is_shown_is_a_file_that_means_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("-m", 'a "b"\\é.gguf', "-c", "512", "--stop=a", "--exact", "--temp=0.5")
    text = shown(capsys, *flags)
    (tmp_path / "outrider.toml").write_text(text)
    assert "target.ctx = 512                          # flag --ctx-size\n" in text
    assert "# draft.n_max                             # default\n" in text
    again = sources.settings({})
    assert again.target.model == 'a "b"\\é.gguf'
    assert (again.target.ctx, again.sampling.stop, again.pipeline.exact) == (512, ("a",), True)
    assert replace(again, target=Settings().target, sampling=Settings().sampling) == replace(
        Settings(), pipeline=replace(Settings().pipeline, exact=True)
    )


def test_what_tuning_found_is_shown_as_tuned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    decision = Decision("q4_0", "0", "1", "tiled", 2)
    monkeypatch.setattr(search, "kept", lambda _: decision)
    found = json.loads(shown(capsys, "-m", "a.gguf", "-md", "b.gguf", "--json"))
    tuned = {key: one["value"] for key, one in found.items() if one["source"] == "tuned"}
    assert "b.q4_0-" in tuned.pop("draft.model")
    assert tuned == {
        "target.cores": "0",
        "draft.cores": "1",
        "target.without": "tiled",
        "target.threads": 2,
    }
    assert not (tmp_path / "cache").exists()  # nothing was made


def test_a_model_of_the_hub_stays_as_it_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, "-hf", "some/repo", "--json"))
    assert found["target.hf"]["value"] == "some/repo"
    assert found["target.model"] == {"value": None, "source": "default", "name": None}
    assert found["pipeline.offline"]["value"] is False


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("api_key", "abc", "***"),
        ("api_keys", ("abc",), "***"),
        ("api_key", None, None),
        ("api_key_file", "path", "path"),
    ],
)
def test_a_key_is_never_shown(name: str, value: Any, seen: Any) -> None:
    option = Option(f"server.{name}", str | None, None, (f"--{name}",), "", None)
    line = show.Line(option, value, "flag", f"--{name}")
    assert line.shown == seen
    assert "abc" not in line.as_toml()


def test_a_wrong_setting_is_told_here_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["show", "--ctx", "1"])
    assert ended.value.code == 3
    assert "--ctx must be from 16" in capsys.readouterr().err
