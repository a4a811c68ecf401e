"""Who may send what: the role of a key decides, never what a message says of itself.

Whoever comes through a local socket has no key, and every right: the socket's directory is what
keeps others out. `MAY` names all that a coordinator takes; what is not in it nobody may send.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from outrider.wire import messages as wire

KeyRole: TypeAlias = Literal["client", "admin", "draft", "target"]
KEY_ROLES: tuple[KeyRole, ...] = get_args(KeyRole)

_CLIENT = (
    wire.Submit, wire.Cancel, wire.Health, wire.Metrics,
    wire.Tokenize, wire.Detokenize, wire.Render, wire.Infill,
)  # fmt: skip
_WORKER = (wire.Hello, wire.Beat, wire.Done, wire.Failed, wire.LabelTexts)
_ANSWERS = (wire.Passed, wire.Tokens, wire.Rendered, wire.Constrainable)

MAY: Mapping[str, frozenset[type]] = {
    "client": frozenset(_CLIENT),
    "admin": frozenset((*_CLIENT, wire.Stop)),
    "draft": frozenset(_WORKER),
    "target": frozenset((*_WORKER, *_ANSWERS)),
}


def is_allowed(role: str, message: wire.Message) -> bool:
    """Whether a peer whose key is of this role may send `message`."""
    if isinstance(message, wire.Hello) and message.role != role:
        return False
    return type(message) in MAY.get(role, ())


def forbidden(role: str, message: wire.Message) -> str:
    """Why it may not, in one sentence."""
    what = type(message).__name__
    if isinstance(message, wire.Hello):
        what = f"Hello as a {message.role} worker"
    return f"a key of the role {role} may not send {what}"
