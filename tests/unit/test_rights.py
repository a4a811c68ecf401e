"""Who may send what: every message is somebody's, and a role has no more than it needs."""

from __future__ import annotations

from typing import get_args

import pytest

from outrider.core.engine import Vocabulary
from outrider.wire import messages as wire
from outrider.wire.rights import KEY_ROLES, MAY, is_allowed

KINDS: dict[str, type] = {kind.__name__: kind for kind in get_args(wire.Message)}
# what only a coordinator says; nobody may say it to one
COORDINATORS = {
    "Welcome", "Refused", "Who", "Ping", "Do", "Pass", "Close", "Labels", "Chat", "Constrain",
    "Started", "Progress", "Finished", "HealthReport", "MetricsReport",
}  # fmt: skip
CLIENTS = {
    "Submit", "Cancel", "Health", "Metrics", "Tokenize", "Detokenize", "Render", "Infill",
}  # fmt: skip
DRAFTS = {"Hello", "Beat", "Done", "Failed", "LabelTexts"}
TARGETS = {*DRAFTS, "Passed", "Tokens", "Rendered", "Constrainable"}
EXPECTED = {"client": CLIENTS, "admin": {*CLIENTS, "Stop"}, "draft": DRAFTS, "target": TARGETS}


def hello(role: str) -> wire.Hello:
    vocabulary = Vocabulary("bpe", 12, None, 1, False, False, (1,), "one")
    first = wire.PROTOCOL, "0", role, 1, role, vocabulary, 64, 2, "cpu", "h:0", (0.01,)
    return wire.Hello(*first)  # type: ignore[arg-type]


def test_every_message_is_somebodys() -> None:
    """Who adds one says here whose it is: what nobody may send, nobody beyond this machine can."""
    said = set().union(*EXPECTED.values())
    assert said | COORDINATORS == KINDS.keys()
    assert not said & COORDINATORS


@pytest.mark.parametrize("role", KEY_ROLES)
def test_a_role_may_say_what_it_needs_and_nothing_else(role: str) -> None:
    assert {kind.__name__ for kind in MAY[role]} == EXPECTED[role]


@pytest.mark.parametrize("role", KEY_ROLES)
@pytest.mark.parametrize("said", ["draft", "target"])
def test_a_worker_is_of_the_role_of_its_key_whatever_it_says(role: str, said: str) -> None:
    assert is_allowed(role, hello(said)) == (role == said)


@pytest.mark.parametrize("role", ["", "coordinator", "root", "client admin"])
def test_what_is_no_role_may_say_nothing(role: str) -> None:
    assert not is_allowed(role, wire.Health(1))
    assert not is_allowed(role, hello("draft"))
