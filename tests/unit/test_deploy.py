"""The files that others run outrider with: systemd, Prometheus and Grafana can take them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from outrider_services.pipeline.exposition import exposition
from outrider_services.pipeline.families import FAMILIES
from outrider_services.pipeline.launcher import STOP_S
from outrider_services.pipeline.metrics import Metrics
from outrider_services.pipeline.requests import Requests
from outrider_services.pipeline.roster import Roster
from outrider_services.table import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "outrider.json").read_text())
NAME = re.compile(r"\boutrider_\w+")


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"needs {program}")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def verify(unit: Path) -> subprocess.CompletedProcess[str]:
    """What systemd says of a user unit; its manager wants a runtime directory."""
    return run("systemd-analyze", "verify", "--user", unit, XDG_RUNTIME_DIR=str(unit.parent))


# ---- Grafana ------------------------------------------------------------------------------------


def expressions() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def told() -> dict[str, set[str]]:
    """By name, the labels of what a coordinator exposes."""
    roster = Roster(lambda *_: None, lambda *_: None, lambda *_: None, lambda *_: None)
    metrics = Metrics(Requests(1), roster, lambda: 0.0)
    found: dict[str, set[str]] = {}
    snapshot: dict[str, Any] = metrics.snapshot()
    for family in text_string_to_metric_families(exposition(snapshot)):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    for name, one in FAMILIES.items():  # those without a sample yet
        found.setdefault(f"outrider_{name}", set(one.labels))
    return found


def test_the_board_names_metrics_that_there_are_and_leaves_none_out() -> None:
    names = {name for expr in expressions() for name in NAME.findall(expr)}
    exposed = told()
    assert names - exposed.keys() == set()
    shown = {name.removeprefix("outrider_").removesuffix("_bucket") for name in names}
    assert FAMILIES.keys() - shown == set()


def test_the_board_tells_metrics_apart_by_labels_that_they_have() -> None:
    exposed = told()
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            names = NAME.findall(target["expr"])
            labels = set().union(*(exposed[name] for name in names))
            by = {one.strip() for found in re.findall(r"by \(([^)]*)\)", target["expr"])
                  for one in found.split(",")}  # fmt: skip
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert by | legend <= labels, target["expr"]
            assert legend <= by, target["expr"]  # else it would be empty


def test_the_panels_of_the_board_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))


@needs("promtool")
def test_prometheus_understands_every_expression_of_the_board(tmp_path: Path) -> None:
    rules = [
        {"record": f"board:{at}", "expr": as_prometheus_gets_it(expr)}
        for at, expr in enumerate(expressions())
    ]
    path = tmp_path / "rules.json"  # JSON is YAML, too
    path.write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    checked = run("promtool", "check", "rules", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def as_prometheus_gets_it(expr: str) -> str:
    """With Grafana's variables filled in."""
    return expr.replace("$__rate_interval", "1m").replace("$instance", ".*")


# ---- Prometheus ---------------------------------------------------------------------------------


@needs("promtool")
def test_the_scrape_configuration_is_one() -> None:
    checked = run("promtool", "check", "config", DEPLOY / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


# ---- systemd ------------------------------------------------------------------------------------


def unit_here(tmp_path: Path) -> Path:
    """The unit with the paths of this machine."""
    text = (DEPLOY / "outrider.service").read_text()
    program = "%h/outrider/.venv/bin/outrider"
    assert program in text
    command = f"{sys.executable} -m outrider_services"
    path = tmp_path / "outrider.service"
    path.write_text(text.replace(program, command).replace("%h/outrider/deploy", str(DEPLOY)))
    return path


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", ["outrider.service", "outrider.socket"])
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path, unit: str) -> None:
    unit_here(tmp_path)
    shutil.copy(DEPLOY / "outrider.socket", tmp_path)
    checked = verify(tmp_path / unit)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@needs("systemd-analyze")
def test_systemd_would_find_what_is_wrong_with_a_unit(tmp_path: Path) -> None:
    path = unit_here(tmp_path)
    path.write_text(path.read_text().replace("KillMode=", "KilMode="))
    checked = verify(path)
    assert "KilMode" in checked.stderr


def test_the_unit_leaves_time_for_what_the_defaults_allow() -> None:
    text = (DEPLOY / "outrider.service").read_text()
    unit = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    settings = Settings()
    assert float(unit["TimeoutStartSec"]) > settings.pipeline.ready_timeout_s
    assert float(unit["TimeoutStopSec"]) > settings.coordinator.drain_s + STOP_S
    assert {int(one) for one in unit["SuccessExitStatus"].split()} == {128 + 2, 128 + 15}
