"""The container files: what they say is so, as far as it can be told without building an image."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from outrider_services import options, sources
from outrider_services.commands.cli import build_parser
from outrider_services.pipeline.launcher import STOP_S
from outrider_services.pipeline.places import share_cores
from outrider_services.table import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONTAINERS = DEPLOY / "containers"
DOCKERFILE = (CONTAINERS / "Dockerfile").read_text()
COMPOSE = sorted(CONTAINERS.glob("*.yml"), key=lambda path: path.name)
HADOLINT = Path(sys.executable).with_name("hadolint")
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(path.read_text())
    return found


def service(path: Path) -> dict[str, Any]:
    """The one service of a file, with what it extends: maps are merged, and lists but commands."""
    (own,) = load(path)["services"].values()
    base = own.pop("extends", None)
    whole: dict[str, Any] = merged(service(path.parent / base["file"]), own) if base else own
    return whole


def merged(base: Any, own: Any, key: str = "") -> Any:
    if isinstance(base, dict) and isinstance(own, dict):
        both = {name: merged(base[name], own[name], name) for name in base.keys() & own.keys()}
        return {**base, **own, **both}
    if isinstance(base, list) and isinstance(own, list) and key != "command":
        return base + own
    return own


def filled(text: str) -> str:
    """With the variables' defaults; one that must be given is a word."""
    return VARIABLE.sub(lambda found: found[3] if found[2] == "-" else "given", text)


def linted(dockerfile: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HADOLINT), "-"], input=dockerfile, capture_output=True, text=True)


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint has no package for this machine")
def test_hadolint_finds_nothing_wrong_and_would() -> None:
    found = linted(DOCKERFILE)
    assert (found.returncode, found.stdout) == (0, "")
    assert "DL3008" in linted(DOCKERFILE.replace("# hadolint", "#")).stdout


# ---- compose ------------------------------------------------------------------------------------


def checked(path: Path) -> subprocess.CompletedProcess[str]:
    """What the schema of the Compose specification says, as it comes with check-jsonschema."""
    tool = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*tool, str(path)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_the_schema_of_compose_finds_nothing_wrong(path: Path) -> None:
    found = checked(path)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_schema_would_find_what_is_wrong(tmp_path: Path) -> None:
    text = (CONTAINERS / "cpu.yml").read_text()
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(text.replace("cap_drop:", "drop_cap:"))
    found = checked(wrong)
    assert found.returncode == 1
    assert "drop_cap" in found.stdout


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_the_command_is_one_that_outrider_takes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = service(path)
    command = one["command"]
    mounted = dict(volume.split(":")[1::-1] for volume in one["volumes"])
    command = [str(path.parent / mounted[word]) if word in mounted else word for word in command]
    parser, verbs = build_parser()
    verbs["serve"].check_flags(command)
    parsed = parser.parse_args(command)
    for name, value in one["environment"].items():
        monkeypatch.setenv(name, filled(value))
    settings = sources.settings(options.given_flags(parsed), parsed.config)
    assert settings.server.host == "0.0.0.0"
    assert settings.server.api_key == ("given",)
    assert settings.server.port == Settings().server.port == int(one["ports"][0].split(":")[2])
    gpu = one["build"].get("args", {}).get("GPU", "cpu")
    asked = options.offload(settings.target)
    assert asked.layers == (0 if gpu == "cpu" else -1)
    assert all(name.lower().startswith(gpu) for name in asked.devices)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_there_is_time_for_a_stop_and_one_open_port_on_this_machine(path: Path) -> None:
    one = service(path)
    grace_s = float(one["stop_grace_period"].removesuffix("s"))
    assert grace_s > Settings().coordinator.drain_s + STOP_S
    assert [port.split(":")[0] for port in one["ports"]] == ["127.0.0.1"]
    assert "no-new-privileges:true" in one["security_opt"]
    assert (one["cap_drop"], one["read_only"]) == (["ALL"], True)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_volumes_and_directories_are_those_of_the_image(path: Path) -> None:
    one = service(path)
    named = {volume.split(":")[0] for volume in one["volumes"] if volume[0] not in "./"}
    assert named == load(path)["volumes"].keys()
    (runtime,) = re.findall(r"XDG_RUNTIME_DIR=(\S+)", DOCKERFILE)
    (uid,) = re.findall(r"--uid (\d+)", DOCKERFILE)
    assert f"{runtime}:mode=0700,uid={uid},gid={uid}" in one["tmpfs"]
    for volume in one["volumes"]:
        assert volume[0] not in "./" or (path.parent / volume.split(":")[0]).exists()


def test_without_compose_there_is_a_directory_to_run_in_too() -> None:
    """`docker run` mounts nothing: what the image names must be its user's own."""
    runtime = re.search(r"XDG_RUNTIME_DIR=(\S+)", DOCKERFILE)
    assert runtime
    assert f"install -d -o outrider -g outrider -m 0700 {runtime[1]}\n" in DOCKERFILE


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_an_image_is_built_from_arguments_that_it_has(path: Path) -> None:
    one = service(path)
    assert (path.parent / one["build"]["context"]).resolve() == ROOT
    assert (ROOT / one["build"]["dockerfile"]).read_text() == DOCKERFILE
    given = one["build"].get("args", {})
    assert given.keys() <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert given.get("GPU", "cpu") == one["image"].removeprefix("outrider:")
    for flag in shlex.split(filled(given.get("CMAKE_ARGS", ""))):
        assert re.fullmatch(r"-D\w+=[\w;-]+", flag)


def test_the_packages_for_vulkan_are_those_that_the_set_up_names() -> None:
    (named,) = re.findall(
        r"`sudo apt install (libvulkan.*?)`",
        (ROOT / "services/outrider_services/building/gpus.py").read_text(),
    )
    assert service(CONTAINERS / "vulkan.yml")["build"]["args"]["BUILD_PACKAGES"] == named


def test_what_is_copied_into_the_image_is_there_and_not_left_out() -> None:
    copied = [shlex.split(line)[:-1] for line in re.findall(r"^COPY ([^-].*)", DOCKERFILE, re.M)]
    assert copied
    ignored = (CONTAINERS / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert ignored[0] == "*"
    assert {name for names in copied for name in names} == kept
    assert [name for name in kept if not (ROOT / name).exists()] == []


# ---- two cards ----------------------------------------------------------------------------------


def with_file(path: Path) -> Settings:
    return sources.settings({}, str(path))


def test_two_cards_are_two_places(tmp_path: Path) -> None:
    text = (DEPLOY / "two-cards.toml").read_text()
    assert not share_cores(with_file(DEPLOY / "two-cards.toml"))
    head, _, rest = text.partition("# Three cards or more")
    assert head.count("[target]") == rest.count("[target]") == 1
    three = tmp_path / "three.toml"
    three.write_text(re.sub("^# ?", "", rest.partition("\n")[2], flags=re.MULTILINE))
    settings = with_file(three)
    assert options.offload(settings.target).split == (3.0, 1.0)
    assert not share_cores(settings)
