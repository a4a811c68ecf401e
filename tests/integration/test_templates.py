"""The process in which chat templates run: bounded, restarted, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest
from tests.chat_templates import (
    CHATML,
    CHOOSING,
    GEMMA,
    HERMES,
    HOSTILE,
    LLAMA3,
    MISTRAL,
    XML_CALLS,
)

from outrider.engines import toy_text
from outrider.engines.toy import ToyEngine
from outrider.errors import BadRequest, InternalError
from outrider.wire.messages import Tools
from outrider_services.templates import sandbox
from outrider_services.templates.chat_template import (
    FUNCTION,
    WAIT_S,
    ChatTemplate,
    Sandbox,
    TemplateFailed,
)

HI = [{"role": "user", "content": "Hi"}]
TOOLS = Tools(json.dumps([FUNCTION]))


class Model(ToyEngine):
    """A toy with templates of other models."""

    def __init__(self, template: str | None, tool_use: str | None = None) -> None:
        super().__init__()
        self.templates = {"": template, "tool_use": tool_use}

    def chat_template(self, name: str = "") -> str | None:
        return self.templates[name]


Make = Callable[..., ChatTemplate]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[ChatTemplate] = []

    def template(*sources: str | None) -> ChatTemplate:
        made.append(ChatTemplate(Model(*sources)))
        return made[-1]

    yield template
    for one in made:
        one.close()


@pytest.fixture
def asked() -> Iterator[Sandbox]:
    box = Sandbox()
    yield box
    box.close()


def question(source: str) -> dict[str, object]:
    return {"source": source, "variables": {"messages": HI}, "most": 1000}


# why each of them fails; on a busy machine, the wait may end before the computing
LONG = f"computes for longer than it may|no text in {WAIT_S:.0f} s"
REASONS = {
    "an-endless-loop": LONG,
    "a-large-number": LONG,
    "a-large-constant": LONG,
    "a-long-text": "more than 1000 letters",
    "much-memory": "more than 64 MiB",
    "growing-memory": "more than 64 MiB",
    "recursion": "RecursionError",
    "nesting": "RecursionError",
    "an-attribute": "SecurityError",
    "a-function's-world": "SecurityError",
    "a-format": "SecurityError",
    "a-change": "SecurityError",
    "an-import": "no loader",
    "a-broken-one": "TemplateSyntaxError",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_fails_and_the_next_is_applied(asked: Sandbox, name: str) -> None:
    began = time.monotonic()
    with pytest.raises((TemplateFailed, InternalError), match=REASONS[name]) as caught:
        asked.ask(question(HOSTILE[name]))
    assert time.monotonic() - began < WAIT_S + 5
    assert len(str(caught.value)) < 400
    assert asked.ask(question("{{ messages[0].content }}")) == {"text": "Hi"}


def test_the_process_is_kept_and_started_anew_after_it_was_killed(asked: Sandbox) -> None:
    (pid,) = {process_of(asked) for _ in range(3) if asked.ask(question("a"))}
    os.kill(pid, signal.SIGKILL)
    assert asked.ask(question("b")) == {"text": "b"}
    assert process_of(asked) != pid


def test_it_takes_little_time_once_it_is_warm(asked: Sandbox) -> None:
    asked.ask(question(HERMES))
    began = time.process_time()
    for _ in range(50):
        asked.ask(question(HERMES))
    assert (time.process_time() - began) / 50 < 0.005


def test_one_that_is_stopped_is_given_up(asked: Sandbox) -> None:
    asked.ask(question("a"))
    assert asked._socket is not None
    asked._socket.settimeout(0.3)
    os.kill(process_of(asked), signal.SIGSTOP)
    with pytest.raises(InternalError, match="gave no text"):
        asked.ask({**question("a"), "source": "b" * 900_000})
    assert asked.ask(question("b")) == {"text": "b"}


def test_whoever_waits_is_told_that_it_was_closed(asked: Sandbox) -> None:
    outcome: list[BaseException] = []

    def ask() -> None:
        try:
            asked.ask(question(HOSTILE["an-endless-loop"]))
        except (TemplateFailed, InternalError) as exc:
            outcome.append(exc)

    waiting = threading.Thread(target=ask)
    waiting.start()
    time.sleep(0.4)
    asked.close()
    waiting.join(2)
    assert [type(exc) for exc in outcome] == [InternalError]
    with pytest.raises(InternalError):
        asked.ask(question("a"))


def test_it_imports_neither_the_model_nor_anything_of_ours() -> None:
    shown = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", shown, sandbox.__file__],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not {"llama_cpp", "numpy", "zmq", "outrider"} & set(done.stdout.split())


@pytest.mark.parametrize("template", ["a", HOSTILE["an-endless-loop"]], ids=["idle", "busy"])
def test_it_ends_with_whoever_asks(template: str) -> None:
    script = (
        "import sys, threading\n"
        "from outrider_services.templates.chat_template import Sandbox\n"
        "box = Sandbox()\n"
        "box.ask({'source': 'a', 'variables': {}, 'most': 9})\n"
        "print(box._process.pid, flush=True)\n"
        "box.ask({'source': sys.argv[1], 'variables': {}, 'most': 9})\n"
        "threading.Event().wait()\n"
    )
    asker = subprocess.Popen([sys.executable, "-c", script, template], stdout=subprocess.PIPE)
    assert asker.stdout is not None
    with asker.stdout:
        process = psutil.Process(int(asker.stdout.readline()))
        time.sleep(0.2)
        asker.kill()
        asker.wait()
    process.wait(3)


def process_of(box: Sandbox) -> int:
    assert box._process is not None
    return box._process.pid


# ---- what a template can do ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "sources",
    [(HERMES,), (toy_text.TEMPLATE,), (CHATML, HERMES), (CHATML + "{% if %}", HERMES)],
    ids=["hermes", "toy", "one-for-tools", "the-other-is-broken"],
)
def test_a_template_that_speaks_hermes_is_known_by_what_it_says(
    make: Make, sources: tuple[str, ...]
) -> None:
    template = make(*sources)
    template.check(TOOLS)
    assert '"outrider_probe"' in template.render(HI, [FUNCTION], "auto")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ((CHATML,), "has no place for tools"),
        ((GEMMA,), "has no place for tools"),
        ((None,), "has no place for tools"),
        ((LLAMA3,), "in another form than <tool_call>"),
        ((MISTRAL,), "in another form than <tool_call>"),
        ((XML_CALLS,), "in another form than <tool_call>"),
        ((HERMES, CHATML), "has no place for tools"),
    ],
)
def test_tools_of_another_form_are_refused(
    make: Make, sources: tuple[str | None, ...], words: str
) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        make(*sources).check(TOOLS)
    assert caught.value.param == "tools"


def test_a_template_is_told_that_a_tool_must_be_called(make: Make) -> None:
    must = TOOLS.changed(choice="required")
    make(HERMES).check(must)
    able = make(CHOOSING)
    able.check(must)
    assert able.render(HI, [FUNCTION], "required").endswith("(call one)")
    assert "(call one)" not in able.render(HI, [FUNCTION], "auto")


def test_calls_that_would_show_no_text_are_refused(make: Make) -> None:
    class Silent(Model):
        def piece(self, token: int) -> bytes:
            return b""

    template = ChatTemplate(Silent(HERMES))
    with pytest.raises(BadRequest, match="another form"):
        template.check(TOOLS)
    template.close()


@pytest.mark.parametrize("source", [None, "{% if %}", HOSTILE["nesting"]])
def test_without_a_template_that_works_llama_cpps_is_used(
    make: Make, source: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    template = make(source)
    template.prepare()
    assert "no chat template of the model's own" in caplog.text
    assert template.render(HI, [], "auto") == "<|user|>Hi<|end|><|assistant|>"
    called = [{**HI[0], "role": "assistant", "tool_calls": [{}]}]
    with pytest.raises(BadRequest, match="no place for tool calls"):
        template.render(called, [], "auto")


def test_the_models_own_marks_are_known_to_its_template() -> None:
    model = Model("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ tools }}|{{ documents }}")
    model.info = replace(model.info, vocabulary=model.info.vocabulary.changed(bos=257))
    template = ChatTemplate(model)
    assert template.render(HI, [], "auto") == "<|system|>|<|end|>||None|None"
    template.close()
