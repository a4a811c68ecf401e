"""A model's own chat templates, applied in a process that can be killed."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.client import hermes
from outrider.core.engine import Engine
from outrider.core.values import TokenId
from outrider.errors import BadRequest, InternalError
from outrider.wire.messages import Tools

log = logging.getLogger(__name__)

SANDBOX = Path(__file__).with_name("sandbox.py")  # not imported: no process but its own needs Jinja
WAIT_S = 10.0  # for an answer: where all processors are busy, a second of computing takes long
ROOM = 256 << 10  # letters that a text may have more than what it is made of
LONGEST = 64 << 20  # bytes of an answer

Message = Mapping[str, Any]
PROBE = "outrider_probe"
FUNCTION = {
    "type": "function",
    "function": {
        "name": PROBE,
        "description": "Does nothing.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": []},
    },
}
CALLED: tuple[Message, ...] = (
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "probe0001",
                "type": "function",
                "function": {"name": PROBE, "arguments": {"a": "b"}},
            }
        ],
    },
    {"role": "tool", "content": "c", "name": PROBE, "tool_call_id": "probe0001"},
)


class TemplateFailed(Exception):
    """The template gave no text; why not."""


class Sandbox:
    """One `sandbox` process: started when it is first asked, and anew after it was killed.

    Any thread may ask; one at a time is answered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._closed = False

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises TemplateFailed if it is an error, or the template ends the process;
        InternalError if none comes in time, which may be the machine's fault, or after `close`.
        """
        line = json.dumps(question).encode() + b"\n"
        with self._lock:
            found = self._asked(line) or self._asked(line)  # it may have been killed by others
        if found is None:
            raise TemplateFailed("it ends the process that it runs in")
        if "error" in found:
            raise TemplateFailed(found["error"])
        return found

    def _asked(self, line: bytes) -> dict[str, Any] | None:
        """The answer; None if the process has ended, and not by its own limit of time."""
        try:
            answer: dict[str, Any] = json.loads(self._exchange(self._connection(), line))
            return answer
        except TimeoutError:
            self._end()
            raise InternalError(f"the chat template gave no text in {WAIT_S:.0f} s") from None
        except (OSError, ValueError) as exc:
            if self._end() == -signal.SIGPROF:
                raise TemplateFailed("it computes for longer than it may") from None
            log.info("the process of the chat template ended: %s", exc)
            return None

    @staticmethod
    def _exchange(connection: socket.socket, line: bytes) -> bytes:
        connection.sendall(line)
        found = bytearray()
        while not found.endswith(b"\n"):
            piece = connection.recv(1 << 16)
            if not piece or len(found) > LONGEST:
                raise ValueError("its answer has no end")
            found += piece
        return bytes(found)

    def _connection(self) -> socket.socket:
        if self._closed:
            raise InternalError("the worker ends")
        if self._socket is None:
            self._socket, theirs = socket.socketpair()
            self._socket.settimeout(WAIT_S)
            with theirs:
                command = [sys.executable, "-P", str(SANDBOX)]
                end = theirs.fileno()
                self._process = subprocess.Popen(command, stdin=end, stdout=end)
        return self._socket

    def _end(self) -> int | None:
        """End the process, if there is one; its status."""
        if self._socket:
            self._socket.close()
        process, self._process, self._socket = self._process, None, None
        if process is None:
            return None
        with suppress(subprocess.TimeoutExpired):  # whose connection has ended does so by itself
            return process.wait(0.05)
        process.kill()
        return process.wait()

    def close(self) -> None:
        """End the process; whoever waits for it gets InternalError."""
        self._closed = True
        if process := self._process:
            process.kill()
        with self._lock:
            self._end()


@dataclass(frozen=True, slots=True)
class Kind:
    """A template, and what it can do."""

    source: str
    has_tools: bool  # it shows the model which there are
    speaks_hermes: bool  # and calls have the form that we read


class ChatTemplate:
    """What turns the messages for a model into text: its own template, else llama.cpp's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sandbox = Sandbox()
        self._lock = threading.Lock()
        self._known: dict[str, Kind] | None = None
        vocabulary = engine.info.vocabulary
        self._marks = {
            name: engine.label(token)
            for name, token in (("bos_token", vocabulary.bos), ("eos_token", vocabulary.eos))
            if token is not None
        }

    def prepare(self) -> None:
        """Find out about the templates now, so that the first conversation need not wait."""
        with suppress(InternalError):  # it was closed; or whoever asks next is told
            self._kinds()

    def render(self, messages: Sequence[Message], functions: Sequence[Any], choice: Any) -> str:
        """The text, up to where the answer begins. Raises BadRequest if the template fails."""
        kind = self._kind(bool(functions))
        if kind is None:
            if any(message.get("tool_calls") for message in messages):
                raise BadRequest("this model's chat template has no place for tool calls")
            return self._engine.render([(m["role"], m["content"]) for m in messages])
        try:
            return self._applied(kind.source, messages, functions, choice)
        except TemplateFailed as exc:
            raise BadRequest(
                f"the model's chat template cannot take this conversation: {exc}", "messages"
            ) from None

    def check(self, tools: Tools) -> None:
        """Raise BadRequest if an answer cannot call these tools.

        That it must call one is for its constraint to say, whether the template can or not.
        """
        kind = self._kind(True)
        if kind is None or not kind.has_tools:
            raise BadRequest("this model's chat template has no place for tools", "tools")
        if not kind.speaks_hermes:
            raise BadRequest(
                "this model's chat template has tools called in another form than "
                f"{hermes.OPENS}, which is the one that can be read",
                "tools",
            )

    def close(self) -> None:
        """End the process in which the templates run."""
        self._sandbox.close()

    def _kind(self, with_tools: bool) -> Kind | None:
        """The template that Hugging Face would take; None: the model has none of its own."""
        kinds = self._kinds()
        return (kinds.get("tool_use") if with_tools else None) or kinds.get("")

    def _kinds(self) -> dict[str, Kind]:
        with self._lock:
            if self._known is None:
                self._known = self._looked_into()
            return self._known

    def _looked_into(self) -> dict[str, Kind]:
        """The templates that compile, by their names."""
        found = {}
        for name in ("", "tool_use"):
            source = self._engine.chat_template(name)
            if source is None:
                continue
            try:
                found[name] = self._examined(source)
            except TemplateFailed as exc:
                which = name or "default"
                log.warning("the model's chat template (%s) is left alone: %s", which, exc)
        if not found:
            log.warning("no chat template of the model's own: conversations use llama.cpp's")
        return found

    def _examined(self, source: str) -> Kind:
        """Raises TemplateFailed if the template does not compile."""
        self._sandbox.ask({"source": source, "variables": None, "most": 0})
        shown = self._tried(source, CALLED[:1])
        _, calls = hermes.parse(self._tried(source, CALLED))
        is_read = self._engine.piece(self._last_token(hermes.OPENS)) != b""
        return Kind(
            source,
            has_tools=PROBE in shown,
            speaks_hermes=is_read and hermes.OPENS in shown and PROBE in [c.name for c in calls],
        )

    def _tried(self, source: str, messages: Sequence[Message]) -> str:
        with suppress(TemplateFailed):
            return self._applied(source, messages, [FUNCTION], "auto")
        return ""

    def _last_token(self, text: str) -> TokenId:
        return self._engine.tokenize(text, special=True)[-1]

    def _applied(
        self, source: str, messages: Sequence[Message], functions: Sequence[Any], choice: Any
    ) -> str:
        variables = {
            **self._marks,
            "messages": messages,
            "tools": functions or None,
            "documents": None,
            "add_generation_prompt": True,
        }
        if functions:
            variables["tool_choice"] = choice
        most = ROOM + len(json.dumps(variables, ensure_ascii=False))
        found = self._sandbox.ask({"source": source, "variables": variables, "most": most})
        text: str = found["text"]
        return text
