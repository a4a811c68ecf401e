"""The public face: its names, its types, and that both clients have the same."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, get_overloads

import pytest

import outrider
from outrider import AsyncClient, Client, OutriderError, Stream, SyncStream

SHARED = Path(outrider.__file__).parents[1]
SCRIPT = Path(__file__).parent / "user_script.py"
# what the twin of a name is called; between them, the same words mean the same
TWINS = {
    "AsyncClient": "Client",
    "Stream": "SyncStream",
    "AsyncIterator": "Iterator",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees the library alone, as a user's would."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SHARED), "MYPYPATH": str(SHARED), "PATH": ""},
        check=False,
    )


# ---- names --------------------------------------------------------------------------------------


def test_the_public_names_are_exactly_those_promised() -> None:
    outrider.connect()  # the client's names are there from the first use of one
    public = {
        name
        for name, value in vars(outrider).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    } - {"TYPE_CHECKING", "import_module"}
    assert sorted(outrider.__all__) == sorted(public) == dir(outrider)
    assert list(outrider.__all__) == sorted(outrider.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="conect"):
        getattr(outrider, "conect")  # noqa: B009  # mypy knows that it is not there


def test_every_error_has_a_code_and_a_status() -> None:
    errors = [
        value
        for value in (getattr(outrider, name) for name in outrider.__all__)
        if isinstance(value, type) and issubclass(value, OutriderError)
    ]
    assert len(errors) > 10
    for error in errors:
        assert error is OutriderError or error.code
        assert 1 <= error.exit_code <= 8


def test_the_core_is_had_without_sockets() -> None:
    report = "import sys, outrider.core.reference; print(*sys.modules)"
    core = python("-c", report)
    assert core.returncode == 0, core.stderr
    assert "outrider.core.reference" in core.stdout.split()
    assert not {"zmq", "msgpack", "outrider.client"} & set(core.stdout.split())
    client = python("-c", report.replace("; print", "; outrider.connect; print"))
    assert {"zmq", "msgpack", "outrider.client"} <= set(client.stdout.split()), client.stderr


# ---- types --------------------------------------------------------------------------------------


@pytest.mark.timeout(180)
def test_mypy_knows_what_a_users_program_gets(tmp_path: Path) -> None:
    names = tmp_path / "names.py"
    names.write_text(f"from outrider import {', '.join(outrider.__all__)}\n")
    arguments = ("--strict", "--config-file=", f"--cache-dir={tmp_path}", str(SCRIPT), str(names))
    checked = python("-m", "mypy", *arguments)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# ---- the twins ----------------------------------------------------------------------------------


def face(kind: type, made: object) -> dict[str, list[Any]]:
    """What can be called and read, and how, in the synchronous client's words."""
    names = {name for name in dir(made) if not name.startswith("_")}
    names |= {name for name in vars(kind) if name in TWINS or name in TWINS.values()}
    found = {}
    for name in names:
        method = getattr(kind, name, None)
        forms = [*get_overloads(method), method] if inspect.isfunction(method) else []
        found[TWINS.get(name, name)] = [_shape(form) for form in forms]
    return found


def _shape(form: Any) -> tuple[Any, ...]:
    signature = inspect.signature(form)
    returned = re.sub(r"\w+", lambda word: TWINS.get(word[0], word[0]), signature.return_annotation)
    parameters = [(p.name, p.kind, p.default, p.annotation) for p in signature.parameters.values()]
    return (parameters, returned)


def test_both_clients_have_the_same_methods_and_keywords() -> None:
    twin = Client.__new__(Client)  # without a thread or a connection
    twin._client = AsyncClient()
    ours, theirs = face(AsyncClient, twin._client), face(Client, twin)
    assert ours == theirs
    assert len(ours["create_completion"]) == len(ours["create_chat_completion"]) == 4
    documented = "create_completion create_chat_completion tokenize detokenize apply_template"
    assert ours.keys() >= {*documented.split(), "health", "stop", "close", "__enter__", "__exit__"}


def test_both_streams_have_the_same_methods_and_attributes() -> None:
    stream = Stream(AsyncClient(), 1)
    twin = SyncStream(Client.__new__(Client), stream)
    ours, theirs = face(Stream, stream), face(SyncStream, twin)
    assert ours == theirs
    assert ours.keys() >= {"stats", "trace", "finish_reason", "cancel", "result", "__next__"}


@pytest.mark.parametrize("kind", [AsyncClient, Client, Stream, SyncStream])
def test_every_public_method_says_what_it_does(kind: type) -> None:
    for name, value in vars(kind).items():
        assert name.startswith("_") or inspect.getdoc(value), name
