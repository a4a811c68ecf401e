"""The Helm chart: three files of values are rendered by Helm itself, and fit Kubernetes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

import outrider
from outrider_services import sources
from outrider_services.commands.cli import build_parser
from outrider_services.options import given_flags

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "outrider"
EXAMPLES = sorted(path.stem for path in (CHART / "examples").iterdir())
VERSIONS = ("1.28", kubernetes_validate.latest_version())
# Helm's library is Go, which takes signals for itself: it has a process of its own
RENDER = """
import json, sys
import helm_python as helm
chart, values = sys.argv[1:]
try:
    found = helm.Chart.load(chart).render(
        json.loads(values), name="models", namespace="llm"
    )
except helm.HelmError as exc:
    sys.exit(str(exc))
print(json.dumps(found))
"""


def run(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RENDER, str(CHART), json.dumps(values)]
    return subprocess.run(command, capture_output=True, text=True)


def values_of(example: str) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(CHART / "examples" / f"{example}.yaml")
    return found


def rendered(values: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """The resources, by kind and name."""
    done = run(values)
    assert done.returncode == 0, done.stderr
    texts = [text for name, text in json.loads(done.stdout).items() if name.endswith(".yaml")]
    found = [one for text in texts for one in YAML(typ="safe").load_all(text) if one]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


@pytest.fixture(scope="module", params=EXAMPLES)
def resources(request: pytest.FixtureRequest) -> dict[tuple[str, str], Any]:
    return rendered(values_of(request.param))


def pods(resources: dict[tuple[str, str], Any]) -> list[dict[str, Any]]:
    return [
        one["spec"]["template"] for (kind, _), one in resources.items() if kind == "StatefulSet"
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_fits_the_schema(
    resources: dict[tuple[str, str], Any], version: str
) -> None:
    for one in resources.values():
        kubernetes_validate.validate(one, version, strict=True)


def test_a_resource_with_a_wrong_field_would_be_noticed() -> None:
    one = rendered(values_of("shared"))["StatefulSet", "models-outrider-target"]
    one["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, VERSIONS[1], strict=True)


def test_what_pods_are_told_is_what_the_command_takes(
    resources: dict[tuple[str, str], Any], tmp_path: Path
) -> None:
    parser, parsers = build_parser()
    told = [
        data["data"]["outrider.toml"]
        for (kind, _), data in resources.items()
        if kind == "ConfigMap"
    ]
    for text in told:
        (tmp_path / "outrider.toml").write_text(text)
        sources.settings({}, str(tmp_path / "outrider.toml"))
    for pod in pods(resources):
        (container,) = pod["spec"]["containers"]
        arguments = [one.replace("$(NUMBER)", "0") for one in container["args"]]
        verb = " ".join(arguments[:2]) if arguments[0] == "worker" else arguments[0]
        parsers[verb].check_flags(arguments)
        sources.settings(given_flags(parser.parse_args(parsers[verb].with_values(arguments))))


def test_no_pod_may_do_more_than_it_must(resources: dict[tuple[str, str], Any]) -> None:
    for pod in pods(resources):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


def test_selectors_choose_the_pods_that_they_mean(resources: dict[tuple[str, str], Any]) -> None:
    labels = [pod["metadata"]["labels"] for pod in pods(resources)]
    for (kind, name), one in resources.items():
        if kind not in ("Service", "NetworkPolicy", "PodDisruptionBudget"):
            continue
        chosen = one["spec"].get("selector") or one["spec"]["podSelector"]
        chosen = chosen.get("matchLabels", chosen)
        found = [of for of in labels if chosen.items() <= of.items()]
        component = "draft" if name.endswith("-draft") else "target"
        assert [of["app.kubernetes.io/component"] for of in found] == [component]


def test_draft_and_target_meet_where_both_look() -> None:
    found = rendered(values_of("two-pods"))
    (draft,) = found["StatefulSet", "models-outrider-draft"]["spec"]["template"]["spec"][
        "containers"
    ]
    target = found["StatefulSet", "models-outrider-target"]["spec"]
    (container,) = target["template"]["spec"]["containers"]
    address = "tcp://models-outrider-target-$(NUMBER).models-outrider-link:5701"
    assert f"--connect={address}" in draft["args"]
    assert target["serviceName"] == "models-outrider-link"
    assert found["Service", "models-outrider-link"]["spec"]["clusterIP"] == "None"
    assert "--listen=tcp://0.0.0.0:5701" in container["args"]
    assert {"name": "link", "containerPort": 5701} in container["ports"]


def test_drafts_and_targets_are_scaled_alike() -> None:
    found = rendered(values_of("scaled"))
    scalers = [one["spec"] for (kind, _), one in found.items() if kind == "HorizontalPodAutoscaler"]
    names = [one.pop("scaleTargetRef")["name"] for one in scalers]
    assert sorted(names) == ["models-outrider-draft", "models-outrider-target"]
    assert scalers[0] == scalers[1]
    for name in names:
        assert "replicas" not in found["StatefulSet", name]["spec"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "secrets.apiKeys must name a Secret"),
        ({"secrets": {"apiKeys": "a"}}, "needs secrets.targetKeys and secrets.draftKeys"),
        ({"secrets": {"apiKeys": "a"}, "draft": {"place": "here"}}, "own, shared or none"),
    ],
)
def test_what_would_be_refused_later_is_not_rendered(values: dict[str, Any], told: str) -> None:
    done = run(values)
    assert done.returncode != 0
    assert told in done.stderr


def test_the_chart_is_of_this_version() -> None:
    chart = YAML(typ="safe").load(CHART / "Chart.yaml")
    assert chart["appVersion"] == outrider.__version__
