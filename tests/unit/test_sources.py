"""Settings from the environment: ours are read, misspelt ones told, others' left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider_services.sources import from_environment, from_file, settings

KUBERNETES = {
    "OUTRIDER_SERVICE_HOST": "10.0.0.7",
    "OUTRIDER_SERVICE_PORT": "5700",
    "OUTRIDER_SERVICE_PORT_HTTP": "5700",
    "OUTRIDER_PORT": "tcp://10.0.0.7:5700",
    "OUTRIDER_PORT_5700_TCP": "tcp://10.0.0.7:5700",
    "OUTRIDER_PORT_5700_TCP_ADDR": "10.0.0.7",
    "OUTRIDER_PORT_5700_TCP_PROTO": "tcp",
    # a service named outrider-draft: `draft` is a section of ours
    "OUTRIDER_DRAFT_SERVICE_HOST": "10.0.0.8",
    "OUTRIDER_DRAFT_PORT_5701_TCP_PORT": "5701",
}


def test_what_kubernetes_tells_of_a_service_is_not_ours() -> None:
    assert from_environment(KUBERNETES) == {}
    assert from_environment({"OUTRIDER_HOME": "/opt/outrider"}) == {}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("OUTRIDER_TARGET__MODLE", "OUTRIDER_TARGET__MODEL"),
        ("OUTRIDER_TARGET_MODEL", "OUTRIDER_TARGET__MODEL"),
        ("OUTRIDER_TARGTE__MODEL", "OUTRIDER_TARGET__MODEL"),
    ],
)
def test_a_misspelt_variable_is_told_with_what_it_may_mean(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown variable {name}; did you mean {meant}"):
        from_environment({name: "x"})


def test_an_empty_variable_is_unset() -> None:
    assert from_environment({"OUTRIDER_TARGET__MODEL": "", "OUTRIDER_SAMPLING__STOP": ""}) == {}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a,b", ("a", "b")),
        ("a, b", ("a", " b")),
        ('["a, b", "c"]', ("a, b", "c")),
        ('["["]', ("[",)),
    ],
)
def test_a_list_is_split_at_commas_or_a_json_array(text: str, values: tuple[str, ...]) -> None:
    assert from_environment({"OUTRIDER_SAMPLING__STOP": text}) == {"sampling.stop": values}


@pytest.mark.parametrize("text", ["[", "[1]", '["a", 2]'])
def test_what_begins_like_an_array_has_to_be_one(text: str) -> None:
    with pytest.raises(ConfigError, match="OUTRIDER_SAMPLING__STOP must be a list such as a,b"):
        from_environment({"OUTRIDER_SAMPLING__STOP": text})


@pytest.mark.parametrize("seed", [1 << 63, -(1 << 63) - 1])
def test_a_seed_that_no_worker_would_take_is_refused_at_once(seed: int) -> None:
    with pytest.raises(ConfigError, match="--seed must be from"):
        settings({"sampling.seed": seed})
    assert settings({"sampling.seed": (1 << 63) - 1}).sampling.seed == (1 << 63) - 1


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000], ids=["digits", "nest"])
def test_a_file_with_something_endless_in_it_is_one_sentence(tmp_path: Path, value: str) -> None:
    path = tmp_path / "outrider.toml"
    path.write_text(f"[target]\nctx = {value}\n")
    with pytest.raises(ConfigError, match="is not TOML"):
        from_file(path)


@pytest.mark.parametrize("value", ["[]", '["a", "b"]'])
def test_a_list_where_one_value_belongs_is_told(value: str, tmp_path: Path) -> None:
    path = tmp_path / "outrider.toml"
    path.write_text(f"[target]\nmodel = {value}\n[sampling]\nstop = []\n")
    with pytest.raises(ConfigError, match=r"target\.model must be one value"):
        from_file(path)
