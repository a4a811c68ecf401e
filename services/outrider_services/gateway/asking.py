"""What a request asks the pipeline for, whichever interface it came by; and asking for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.client import AsyncClient, CompletionSettings, Stream
from outrider.core.values import Fragment
from outrider.errors import RequestTimeout


@dataclass(frozen=True, slots=True)
class Gap:
    """A gap in a text, for a model that can fill it."""

    prefix: str
    suffix: str
    start: str
    extra: tuple[tuple[str, str], ...]
    room: int


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt, messages or a gap, and how to answer."""

    prompt: str | Sequence[int] | Gap = ""
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: Any = None
    settings: CompletionSettings = field(default_factory=CompletionSettings)
    reads_only: bool = False  # the prompt is to be known; the answer is not wanted
    predict_ms: float | None = None  # an answer that takes longer ends behind its first line

    async def begin(self, client: AsyncClient, cache_key: str = "") -> Stream:
        """Have it answered; what is read for it is used again with the same key alone.

        Raises OutriderError.
        """
        settings: CompletionSettings = {**self.settings, "cache_key": cache_key}
        if self.messages is not None:
            return await client.create_chat_completion(
                self.messages,
                tools=self.tools,
                tool_choice=self.tool_choice,
                stream=True,
                **settings,
            )
        prompt = self.prompt
        if isinstance(prompt, Gap):
            prompt = await client.infill_prompt(
                prompt.prefix,
                prompt.suffix,
                start=prompt.start,
                extra=prompt.extra,
                room=prompt.room,
            )
        return await client.create_completion(prompt, stream=True, **settings)


@dataclass(slots=True)
class Answer:
    """An answer while it comes: its name, and when it has to end by itself."""

    name: str
    ask: Ask
    stream: Stream
    created: int = field(default_factory=lambda: int(time.time()))
    text: str = ""
    is_late: bool = False  # the time for it is over
    _first: float | None = None  # when its first fragment came

    async def fragments(
        self, silence_s: float, timeout_s: float
    ) -> AsyncGenerator[Fragment | None]:
        """The fragments as they come; None after each `silence_s` without one, unless that is 0.

        Raises RequestTimeout after `timeout_s` without one.
        """
        wait_s = min(silence_s or timeout_s, timeout_s)
        heard = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    fragment = await anext(self.stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if time.monotonic() - heard >= timeout_s:
                    raise RequestTimeout(
                        f"nothing was generated for {timeout_s:.0f} s; see --timeout"
                    ) from None
                yield None
                continue
            heard = time.monotonic()
            self.text += fragment.text
            yield fragment
            if self._is_over(heard):
                self.is_late = True
                await self._give_up(timeout_s)
                return

    async def _give_up(self, timeout_s: float) -> None:
        """Stop it; what still comes is not part of the answer."""
        await self.stream.cancel()
        async with asyncio.timeout(timeout_s):
            async for _ in self.stream:
                pass

    def _is_over(self, now: float) -> bool:
        """Whether the time is over, and there is a line to show for it."""
        self._first = now if self._first is None else self._first
        limit_ms = self.ask.predict_ms
        if limit_ms is None or limit_ms <= 0 or "\n" not in self.text:
            return False
        return 1000 * (now - self._first) > limit_ms
