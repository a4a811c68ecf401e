"""The arguments of the Ray application: the settings, a file of them, and how many of what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError

pytest.importorskip("ray", reason="needs `--extra ray`")
pytestmark = pytest.mark.filterwarnings("ignore")  # ray's own, as it is imported


@pytest.fixture(scope="module")
def application() -> Any:
    from outrider_services.cluster import application

    return application


def test_settings_and_shape_are_told_apart(application: Any, tmp_path: Path) -> None:
    (tmp_path / "outrider.toml").write_text('[target]\nmodel = "big.gguf"\nthreads = 4\n')
    shape, settings = application.read(
        {
            "config": str(tmp_path / "outrider.toml"),
            "target.threads": 8,  # as a file in YAML has it
            "server.allow_host": ["a.example", "b.example"],
            "replicas": "1-4",
            "target": '{"CPU": 2, "GPU": 1}',
            "tokens_per_s": 20,
        }
    )
    assert (settings.target.model, settings.target.threads) == ("big.gguf", 8)
    assert settings.server.allow_host == ("a.example", "b.example")
    assert shape.least_most == (1, 4)
    assert application.bundle(shape.target) == {"CPU": 2.0, "GPU": 1.0}
    assert shape.tokens_per_s == "20"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"target.modle": "x"}, "unknown argument target.modle; did you mean target.model?"),
        ({"replica": "2"}, "unknown argument replica; did you mean replicas?"),
        ({"target.threads": "many"}, "target.threads must be a whole number"),
        ({"replicas": "0"}, "replicas and gateways must be 1 or more"),
        ({"replicas": "4-1"}, "replicas and gateways must be 1 or more"),
        ({"replicas": "some"}, "an argument of the application is wrong"),
        ({"draft": "[]"}, "is no table of resources"),
        ({"routing": "nearest"}, "routing must be prefix or default"),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    application: Any, arguments: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?").replace("[", r"\[")):
        application.read(arguments)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"pipeline.backend": "toy"}, 2),
        ({}, 2),  # the default pair
        ({"target.model": "big.gguf"}, 1),
        ({"target.hf": "somebody/big"}, 1),
        ({"target.model": "big.gguf", "draft.model": "small.gguf"}, 2),
        ({"target.model": "big.gguf", "draft.hf": "somebody/small"}, 2),
    ],
)
def test_a_draft_has_a_bundle_of_its_own(
    application: Any, arguments: dict[str, str], count: int
) -> None:
    from outrider_services.cluster.replica import has_draft

    assert 1 + has_draft(application.read(arguments)[1]) == count


def test_a_replica_listens_where_its_node_is_reached(application: Any) -> None:
    from outrider_services.cluster.replica import bound, placed
    from outrider_services.table import LinkOptions, Settings

    keyed = placed(Settings(), "192.0.2.7")
    assert keyed.coordinator.listen == ("tcp://192.0.2.7:0",)
    assert keyed.links.insecure == ()
    assert keyed.draft.place == "remote"
    is_open = placed(Settings(links=LinkOptions(insecure=("tcp://0.0.0.0:0",))), "192.0.2.7")
    assert is_open.links.insecure == ("tcp://192.0.2.7:0",)
    assert bound(is_open, "tcp://192.0.2.7:41").links.insecure == ("tcp://192.0.2.7:41",)
    assert bound(keyed, "tcp://192.0.2.7:41").links.insecure == ()
