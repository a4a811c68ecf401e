"""`scripts/setup` makes .venv ready with what was asked for, and once."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from outrider_services.building import library
from outrider_services.building.library import Environment
from outrider_services.building.toolchain import NoCompiler

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


def load(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"scripts_{name}", str(SCRIPTS / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    path = [*sys.path]
    loader.exec_module(module)
    sys.path[:] = path
    return module


class Built:
    """What stands for the library: it notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, bool]] = []
        self.gpu = ""  # that it is built for; "": it is not built
        self.fails: BaseException | None = None

    def is_current(self, gpu: str | None = None) -> bool:
        return bool(self.gpu) and gpu in (None, self.gpu)

    def set_up(self, gpu: str | None = None, again: bool = False) -> None:
        if self.fails:
            raise self.fails
        self.asked.append((gpu, again))
        self.gpu = gpu or self.gpu or "cpu"


class Project:
    """The set-up script, working in a directory of ours, its pip calls only noted down."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module, self.library = module, Built()
        self.calls: list[tuple[str, ...]] = []
        self._patch = monkeypatch

    def set_up(self, *arguments: str) -> None:
        self._patch.setattr(sys, "argv", ["setup", *arguments])
        self.module.main()

    @property
    def extras(self) -> set[str]:
        """Of each time that outrider was installed, the last."""
        return set(self.calls[-1][-1].removeprefix(str(ROOT)).strip("[]").split(",")) - {""}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    without_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    module: Any = load("setup")
    sys.dont_write_bytecode = without_bytecode
    found = Project(module, monkeypatch)
    monkeypatch.setattr(library, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(module, "make_venv", lambda environment: None)
    monkeypatch.setattr(module, "say", lambda text: None)
    monkeypatch.setattr(module, "Library", lambda *args: found.library)

    def pip(self: Environment, *args: str, env: object = None) -> None:
        found.calls.append(args)

    monkeypatch.setattr(Environment, "pip", pip)
    return found


@pytest.mark.parametrize(
    ("arguments", "extras", "builds"),
    [
        ([], set(), 1),
        (["--extra", "test"], {"test"}, 1),
        (["--without-llama"], set(), 0),
        (["--without-llama", "--extra", "test"], {"test"}, 0),
    ],
    ids=str,
)
def test_what_is_asked_for_is_set_up_once(
    project: Project, arguments: list[str], extras: set[str], builds: int
) -> None:
    for _ in range(2):
        project.set_up(*arguments)
        assert len(project.calls) == 1
        assert project.calls[0][:3] == ("install", "--quiet", "--editable")
        assert project.extras == extras
        assert len(project.library.asked) == builds


def test_a_set_up_adds_to_the_one_before(project: Project) -> None:
    project.set_up("--without-llama", "--extra", "test")
    project.set_up()  # outrider is not installed a second time
    assert (len(project.calls), len(project.library.asked)) == (1, 1)
    project.set_up("--extra", "plot")
    assert (len(project.calls), project.extras) == (2, {"plot", "test"})


def test_another_clone_or_python_begins_anew(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.set_up()
    monkeypatch.setattr(project.module, "ROOT", ROOT / "scripts" / "..")
    project.set_up()
    assert len(project.calls) == 2


def test_an_interrupted_set_up_is_not_taken_for_a_whole_one(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    project.set_up("--extra", "test")
    with monkeypatch.context() as patch:
        patch.setattr(Environment, "pip", interrupted)
        with pytest.raises(SystemExit, match="130"):
            project.set_up("--extra", "plot")
    project.set_up("--extra", "test")
    assert len(project.calls) == 2


def test_again_and_a_gpu_are_handed_on(project: Project) -> None:
    for arguments in ([], ["--gpu", "vulkan"], ["--gpu", "vulkan"], [], ["--again"]):
        project.set_up(*arguments)
    assert project.library.asked == [(None, False), ("vulkan", False), (None, True)]
    assert len(project.calls) == 1


def test_what_cannot_be_built_is_one_sentence(project: Project) -> None:
    project.library.fails = NoCompiler("no C++ compiler found")
    with pytest.raises(SystemExit, match=r"^setup: no C\+\+ compiler found$"):
        project.set_up()
    project.library.fails = None
    project.set_up()
    assert len(project.calls) == 1  # what did work is not done again


def test_what_another_set_up_does_meanwhile_is_taken(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.set_up()
    stamp = project.module.STAMP.read_text()
    project.module.STAMP.unlink()

    @contextmanager
    def alone(say: Callable[[str], None]) -> Iterator[None]:
        project.module.STAMP.write_text(stamp)
        yield

    monkeypatch.setattr(project.module, "alone", alone)
    project.set_up()
    assert len(project.calls) == 1


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "nonsense", '{"key": 1, "extras": null}'])
def test_a_damaged_stamp_means_setting_up_again(project: Project, damage: str) -> None:
    project.module.STAMP.write_text(damage)
    assert project.module.installed() is None


@pytest.mark.parametrize("script", ["run", "test", "check", "matrix", "setup", "../.ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(SCRIPTS / script, os.X_OK)
    if script != "setup":
        subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)
