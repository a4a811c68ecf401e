"""What people install: the wheel alone, in an empty home, without a compiler."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import outrider
from outrider.wire.messages import PROTOCOL

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {
    "share/bash-completion/completions/outrider",
    "share/doc/outrider/CHANGELOG.md",
    "share/doc/outrider/VERSIONS.md",
    "share/fish/vendor_completions.d/outrider.fish",
    "share/man/man1/outrider.1",
    "share/zsh/site-functions/_outrider",
}
INSTALL_S, FIRST_S = 300.0, 20.0
REACH = re.compile(r"^(PIP|UV|SSL|REQUESTS)_|_proxy$", re.IGNORECASE)  # of the package index
EPOCH = "1700000000"  # of the commit, as a release has it


def built(kind: str, source: Path, to: Path) -> Path:
    """What hatchling makes of `source`: a wheel or an sdist."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(to)]
    env = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
    subprocess.run(command, cwd=source, env=env, check=True, capture_output=True)
    (found,) = (one for one in to.iterdir() if one.suffix == (".whl" if kind == "wheel" else ".gz"))
    return found


def copied(to: Path) -> Path:
    """The files that are under version control, as another clone has them, at another time."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", ROOT, tmp_path_factory.mktemp("dist"))


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_two_builds_are_the_same_to_the_last_byte(tmp_path: Path, kind: str) -> None:
    sums = set()
    for place in ("one", "another place"):
        source = copied(tmp_path / place)
        found = built(kind, source, tmp_path / f"dist of {place}")
        sums.add((found.name, hashlib.sha256(found.read_bytes()).hexdigest()))
    assert len(sums) == 1


def test_the_wheel_has_what_shells_and_people_look_for(wheel: Path) -> None:
    version = outrider.__version__
    assert wheel.name == f"outrider-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        data = f"outrider-{version}.data/data/"
        assert {name.removeprefix(data) for name in names if name.startswith(data)} == SHIPPED
        metadata = archive.read(f"outrider-{version}.dist-info/METADATA").decode()
        told = archive.read(f"{data}share/doc/outrider/VERSIONS.md").decode()
    assert f"\nVersion: {version}\n" in metadata
    assert f"its number is **{PROTOCOL}**" in told
    assert not [name for name in names if "test" in name.split("/")[0] or name.endswith(".pyc")]


def test_what_is_shipped_for_shells_is_what_the_parser_says(tmp_path: Path) -> None:
    """Else run `scripts/make-shell-files`."""
    script = ROOT / "scripts" / "make-shell-files"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    shipped = ROOT / "services" / "outrider_services" / "shell"
    assert {one.name for one in tmp_path.iterdir()} == {one.name for one in shipped.iterdir()}
    for made in tmp_path.iterdir():
        assert made.read_text() == (shipped / made.name).read_text()


def bare(home: Path) -> dict[str, str]:
    """The environment of a user with an empty home, on whose machine nothing can be compiled."""
    tools = home / "tools"
    tools.mkdir(parents=True)
    for name in ("sh", "env", "uname"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    kept = {name: value for name, value in os.environ.items() if REACH.search(name)}
    return {**kept, "HOME": str(home), "PATH": str(tools), "LANG": "C.UTF-8"}


def said(command: Sequence[str | Path], env: dict[str, str], within_s: float) -> str:
    done = subprocess.run(
        list(map(str, command)), env=env, capture_output=True, text=True, timeout=within_s
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.timeout(INSTALL_S + 60)
def test_a_toy_answers_within_seconds_of_installing(wheel: Path, tmp_path: Path) -> None:
    env = bare(tmp_path / "home")
    venv = tmp_path / "venv"
    said([sys.executable, "-m", "venv", venv], {**os.environ}, INSTALL_S)
    python, command = venv / "bin" / "python", venv / "bin" / "outrider"
    said([python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", wheel], env, INSTALL_S)
    began = time.monotonic()
    answer = said([command, "run", "--backend", "toy", "-n", "40", "Hello"], env, FIRST_S)
    assert time.monotonic() - began < FIRST_S
    assert re.search(r"Total tokens generated: 40\b", answer)
    assert said([command, "--version"], env, FIRST_S).strip() == f"outrider {outrider.__version__}"
    for shell, mark in (("bash", "complete "), ("zsh", "#compdef outrider"), ("fish", "complete ")):
        assert mark in said([command, "completion", shell], env, FIRST_S)
    assert {one for one in SHIPPED if (venv / one).is_file()} == SHIPPED
    done = subprocess.run(
        [command, "run", "-m", tmp_path / "absent.gguf", "x"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "outrider setup" in done.stderr or "absent.gguf" in done.stderr
