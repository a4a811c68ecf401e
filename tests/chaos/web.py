"""Clients over HTTP that have answers streamed, and compare what they read with the reference."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tests.attack.questions import answer_to, steady, text_of

COUNT, AGAIN_S, SILENT_S = 60, 0.1, 20.0


class Browser:
    """`async with Browser(url, 2)`: so many clients ask again and again."""

    def __init__(self, url: str, clients: int) -> None:
        parts = urlsplit(url)
        self._place = str(parts.hostname), int(parts.port or 80)
        self.right = self.broken = 0
        self.wrong: list[str] = []
        self._clients = clients
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Browser:
        self._tasks = [asyncio.ensure_future(self._ask_on(n)) for n in range(self._clients)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if exc is None and not self.right:
            self.wrong.append("no answer has come whole")

    async def _ask_on(self, number: int) -> None:
        question = steady(50 + number, COUNT)
        whole, _ = text_of(answer_to(question), (), True)
        while True:
            text, is_whole = "", False
            with suppress(OSError, EOFError, TimeoutError):
                text, is_whole = await self._answer(question.prompt)
            if is_whole and text == whole:
                self.right += 1
            elif is_whole or not whole.startswith(text):
                self.wrong.append(f"{text!r} instead of {whole!r}")
            else:
                self.broken += 1
                await asyncio.sleep(AGAIN_S)

    async def _answer(self, prompt: str) -> tuple[str, bool]:
        """As much of the text as comes, and whether that is all. Raises OSError, TimeoutError."""
        async with asyncio.timeout(SILENT_S):
            reader, writer = await asyncio.open_connection(*self._place)
        text = ""
        try:
            writer.write(self._request(prompt))
            while True:
                async with asyncio.timeout(SILENT_S):
                    line = await reader.readline()
                if not line:
                    return text, False
                if line.startswith(b"data: [DONE]"):
                    return text, True
                if line.startswith(b"data: "):
                    part: Any = json.loads(line[6:])
                    if "error" in part:
                        return text, False
                    text += "".join(one["text"] for one in part["choices"])
        except ConnectionError:
            return text, False
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _request(self, prompt: str) -> bytes:
        asked = {"prompt": prompt, "max_tokens": COUNT, "temperature": 0, "stream": True}
        body = json.dumps(asked).encode()
        host, port = self._place
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body
