"""What befell others cannot happen here: the table in SECURITY.md, and what no other test looks at.

Each rule has a control: what it must find, or it would find nothing.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest

from outrider.wire import messages as wire

ROOT = Path(__file__).parents[2]
POLICY = (ROOT / ".github" / "SECURITY.md").read_text()
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "marshal",
    "dill",
    "cloudpickle",
    "shelve",
    "yaml",
    "jsonpickle",
}
FORBIDDEN_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj", "compile_command", "execfile"}
# what reads what peers and clients say
FACING = ("shared/outrider/wire", "services/outrider_services/gateway")


def sources(*rooms: str) -> Iterator[Path]:
    for room in rooms or ("shared", "services"):
        yield from sorted((ROOT / room).rglob("*.py"))


# ---- the table ----------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    table = POLICY.partition("## What befell others")[2]
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][
        2:
    ]


def test_each_kind_of_hole_has_an_answer_and_its_tests_are_there() -> None:
    assert len(rows()) >= 15
    for what, where, answer in rows():
        assert len(answer) > 20, what
        assert re.search(r"\d{4}-\d{4,}", where) or "CURVE" in where, what
    named = TEST.findall(POLICY)
    assert len(named) > 20
    missing = [f"{path}::{name}" for path, name in named if not is_test(path, name)]
    assert missing == []


def is_test(path: str, name: str) -> bool:
    file = ROOT / path
    if not name.startswith("test_") or not file.is_file():
        return False
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return any(isinstance(n, kinds) and n.name == name for n in ast.parse(file.read_text()).body)


def test_a_test_that_there_is_not_would_be_noticed() -> None:
    assert is_test("tests/unit/test_security.py", "test_ggmls_rpc_is_not_built")
    assert not is_test("tests/unit/test_security.py", "test_that_was_renamed")
    assert not is_test("tests/unit/test_nowhere.py", "test_ggmls_rpc_is_not_built")


def test_rows_without_a_test_are_few_and_say_why() -> None:
    bare = [row for row in rows() if "::" not in row[2]]
    assert [row[0] for row in bare] == ["a template that takes all time or memory"]


# ---- what arrives is not executed ---------------------------------------------------------------


def executed(code: str) -> list[str]:
    """What in `code` would run, or build, what somebody else has written."""
    found = []
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import(names):
                found += [one.name for one in names if one.name.split(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(module)
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                found.append(name)
            case ast.Call(func=ast.Attribute(attr=name)) if name in FORBIDDEN_CALLS:
                found.append(name)
            case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                found.append("shell")
    return found


def test_nothing_that_arrives_is_executed() -> None:
    found = {str(path.relative_to(ROOT)): executed(path.read_text()) for path in sources()}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "import dill.source",
        "socket.recv_pyobj()",
        "eval(text)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_what_would_execute_it_is_noticed(code: str) -> None:
    assert executed(code)


# ---- what messages cannot say -------------------------------------------------------------------

PLACES = {"address", "url", "uri", "host", "port", "path", "file", "files", "endpoint", "socket"}


def test_no_message_names_an_address_or_a_file() -> None:
    fields = {
        f"{kind.__name__}.{name}"
        for kind in get_args(wire.Message)
        for name in kind.__struct_fields__
    }
    assert len(fields) > 50
    assert [one for one in fields if PLACES & set(one.partition(".")[2].split("_"))] == []
    assert PLACES & {"peer", "address"}


# ---- versions -----------------------------------------------------------------------------------

LEAST = {"msgpack": (1, 2, 1), "jinja2": (3, 1, 6), "h11": (0, 16), "pyzmq": (26, 2)}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in re.findall(r"\d+", text))


def test_versions_with_known_holes_are_not_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {}
    for one in project["dependencies"]:
        name, _, least = one.partition(">=")
        asked[name] = numbers(least)
    for name, least in LEAST.items():
        assert asked[name] >= least, name
        assert numbers(version(name)) >= least, name
    (pinned,) = project["optional-dependencies"]["llama"]
    assert "==" in pinned


def test_ggmls_rpc_is_not_built() -> None:
    built = [
        ROOT / "scripts" / "setup",
        *(ROOT / "services/outrider_services/building").glob("*.py"),
    ]
    assert any("CMAKE_ARGS" in path.read_text() for path in built)
    for path in built:
        assert not re.search(r"GGML_RPC\W*(ON|1|TRUE)", path.read_text(), re.IGNORECASE), path


# ---- secrets, and what -O removes ---------------------------------------------------------------


def test_secrets_are_compared_in_constant_time() -> None:
    for path in ("gateway/access.py", "pipeline/roster.py"):
        text = (ROOT / "services/outrider_services" / path).read_text()
        assert "hmac.compare_digest" in text
        compared = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Compare)]
        for node in compared:
            words = set(re.findall(r"\w+", ast.unparse(node)))
            equal = any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
            assert not (equal and words & {"token", "hashed", "digest"}), ast.unparse(node)


def assertions(path: Path) -> list[str]:
    """What `path` asserts of what it was told; that something of ours is there is no such."""
    found = [
        node.test for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)
    ]
    return [ast.unparse(test) for test in found if not is_our_own(test)]


def is_our_own(test: ast.expr) -> bool:
    """Whether it only tells a type checker that something of ours is set, or what an error is."""
    names = isinstance(test, ast.Attribute | ast.Name)
    return names or (
        isinstance(test, ast.Call) and ast.unparse(test).startswith("isinstance(exc, ")
    )


def test_no_check_of_what_a_peer_says_is_an_assertion(tmp_path: Path) -> None:
    assert {path.name: assertions(path) for path in sources(*FACING) if assertions(path)} == {}
    planted = tmp_path / "planted.py"
    planted.write_text("assert 0 <= message.token < size\nassert self.link\n")
    assert assertions(planted) == ["0 <= message.token < size"]
