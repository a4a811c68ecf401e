"""`outrider run` on a terminal, without a prompt: a conversation."""

from __future__ import annotations

import re
import secrets
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from outrider.client import AsyncClient, ChatMessage, Completion, Stream
from outrider.core.stats import Report
from outrider.errors import BadRequest, ConnectionFailed, OutriderError
from outrider_services.commands.editor import Interrupted, Reader, unechoed
from outrider_services.commands.interrupts import Interrupts
from outrider_services.commands.printing import Printer, figures, statistics
from outrider_services.options import nearest
from outrider_services.outlet import put
from outrider_services.terminal import note, tell

HELP = """\
  /clear          forget what was said
  /system TEXT    tell the model how to answer; without TEXT, no longer
  /regenerate     answer the last message again, with another seed
  /stats          all figures of the last answer
  /bye            leave, as Ctrl-D does

Enter sends; Alt-Enter, or a \\ before Enter, begins a new line. Up and Down bring
back what you said. Ctrl-C stops an answer: what was said so far stays. A message
that begins with / needs a space before it."""
COMMAND = re.compile(r"(/\w*)(?:\s+(.*))?", re.DOTALL)  # paths have another slash


@dataclass(slots=True)
class Transcript:
    """What was said. Each exchange is whole, for some templates insist on turns."""

    system: str = ""
    exchanges: list[tuple[str, str]] = field(default_factory=list)  # of the user, of the model

    def messages(self, said: str) -> list[ChatMessage]:
        """All of it, and behind it what the user says now."""
        found: list[ChatMessage] = []
        if self.system:
            found.append({"role": "system", "content": self.system})
        for question, answer in self.exchanges:
            found.append({"role": "user", "content": question})
            found.append({"role": "assistant", "content": answer})
        return [*found, {"role": "user", "content": said}]


class Chat:
    """A conversation through `client`; each answer is asked for with the settings in `request`."""

    def __init__(
        self,
        client: AsyncClient,
        request: dict[str, Any],
        new_printer: Callable[[], Printer],
        interrupts: Interrupts,
        *,
        stats: bool,
    ) -> None:
        self.transcript = Transcript()
        self._client, self._request = client, request
        self._new_printer, self._interrupts, self._stats = new_printer, interrupts, stats
        self._last: Report | None = None
        self._unsent = ""  # what the next line begins with: it was said, and not answered
        self._commands: dict[str, Callable[[str], Awaitable[None]]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/system": self._system,
            "/regenerate": self._regenerate,
            "/stats": self._figures,
            "/bye": self._bye,
        }

    @property
    def commands(self) -> list[str]:
        return list(self._commands)

    async def run(self, read: Reader) -> None:
        """Answer line after line until the user leaves. Raises ConnectionFailed."""
        self._interrupts.end()
        tell(await self._greeting())
        self._new_printer().legend()
        is_leaving = False
        while True:
            begun, self._unsent = self._unsent, ""
            try:
                await self._on(await read(begun))
                is_leaving = False
            except EOFError:
                return
            except Interrupted:
                if is_leaving:
                    self._interrupts.status = 128 + signal.SIGINT
                    return
                is_leaving = True
                tell("Ctrl-C again, or Ctrl-D, leaves.")

    async def _greeting(self) -> str:
        workers = (await self._client.health())["workers"]
        models = dict.fromkeys(
            worker["model"]
            for role in ("target", "draft")
            for worker in workers.values()
            if worker["role"] == role
        )
        return f"{' with '.join(models)}\n/help tells what can be done; Ctrl-D leaves."

    async def _on(self, line: str) -> None:
        """Do what the line says, or answer it."""
        command = COMMAND.fullmatch(line.rstrip())
        if command is None:
            if said := line.strip():
                await self._answer(said)
            return
        name, text = command[1], command[2] or ""
        if call := self._commands.get(name):
            await call(text.strip())
            return
        self._unsent = line
        tell(f"there is no {name}{nearest(name, self._commands) or '; /help tells what there is'}")

    # ---- commands -------------------------------------------------------------------------------

    async def _help(self, _: str) -> None:
        tell(HELP)

    async def _clear(self, _: str) -> None:
        self.transcript.exchanges.clear()
        tell("Forgotten.")

    async def _system(self, text: str) -> None:
        self.transcript.system = text
        tell("The model will be told so." if text else "The model is told nothing beforehand.")

    async def _regenerate(self, _: str) -> None:
        if not self.transcript.exchanges:
            tell("There is no answer yet.")
            return
        said, answer = self.transcript.exchanges.pop()
        if not await self._answer(said, secrets.randbits(31)):
            self.transcript.exchanges.append((said, answer))
            self._unsent = ""

    async def _figures(self, _: str) -> None:
        tell(statistics(self._last) if self._last else "There is no answer yet.")

    async def _bye(self, _: str) -> None:
        raise EOFError

    # ---- answers --------------------------------------------------------------------------------

    async def _answer(self, said: str, seed: int | None = None) -> bool:
        """Show the answer and keep both; False if there is none: the user may say it again."""
        request = self._request if seed is None else {**self._request, "seed": seed}
        try:
            with unechoed():
                result = await self._streamed(said, request)
        except ConnectionFailed:
            raise
        except OutriderError as exc:
            self._interrupts.end()
            self._unsent = said
            is_for_length = isinstance(exc, BadRequest) and self.transcript.exchanges
            tell(f"outrider: {exc}{' (/clear begins anew)' if is_for_length else ''}")
            return False
        self._interrupts.end()
        self._last = result.stats
        if self._stats:
            note(Text(f"[{figures(result.stats)}{self._remark(result)}]", "dim"))
        if not result.text.strip():
            self._unsent = said
            return False
        self.transcript.exchanges.append((said, result.text))
        return True

    async def _streamed(self, said: str, request: dict[str, Any]) -> Completion:
        stream: Stream = await self._client.create_chat_completion(
            self.transcript.messages(said), stream=True, **request
        )
        printer = self._new_printer()
        self._interrupts.begin(stream, printer)
        try:
            async for fragment in stream:
                await printer.fragment(fragment)
        finally:
            if stream.fragments:
                await put("\n")
        return await stream.result()

    def _remark(self, result: Completion) -> str:
        """Why the answer has ended, if not by itself."""
        match result.choices[0].finish_reason:
            case "cancelled":
                return "; stopped"
            case "length" if result.usage.completion_tokens == self._request["max_tokens"]:
                return "; cut by -n"
            case "length":
                return "; the context is full: /clear begins anew, and --ctx makes room for more"
        return ""
