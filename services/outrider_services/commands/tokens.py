"""Committed tokens as a user sees them: each one's kind in colour, each drafted one's fate."""

from __future__ import annotations

import codecs
import json
from collections import deque

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

from outrider.client import AsyncClient
from outrider.core.values import Fragment, Kind

# not by colour alone: some see none, and NO_COLOR takes it away
STYLES: dict[Kind, Style] = {
    "drafted": Style(color="green", underline=True),
    "corrected": Style(color="yellow", reverse=True),
    "bonus": Style(color="cyan", bold=True),
    "plain": Style(),
}
MEANINGS: dict[Kind, str] = {
    "drafted": "drafted (accepted)",
    "corrected": "corrected",
    "bonus": "bonus (after a whole block)",
    "plain": "plain (no draft)",
}


class Colours:
    """Turns fragments of one answer into text in which each token shows its kind.

    Where `console` is no terminal, or one that can show nothing of it, the text stays as it is.
    """

    def __init__(self, console: Console) -> None:
        self.shown = console.is_terminal and not console.is_dumb_terminal
        self._without_colour = console.no_color
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._runs: deque[tuple[str, Kind]] = deque()  # text that no fragment has released yet
        self._kind: Kind = "plain"  # of the last token

    def __call__(self, fragment: Fragment) -> str:
        for token in fragment.tokens:
            self._kind = token.kind
            if text := self._decoder.decode(token.piece):
                self._runs.append((text, token.kind))
        if not self.shown:
            return fragment.text
        return "".join(self._styled(text, kind) for text, kind in self._take(fragment.text))

    def _take(self, text: str) -> list[tuple[str, Kind]]:
        """`text`, which is the first of what was not released yet, by kinds."""
        taken: list[tuple[str, Kind]] = []
        while text and self._runs:
            run, kind = self._runs.popleft()
            if len(run) > len(text):  # the rest may begin a stop string
                self._runs.appendleft((run[len(text) :], kind))
            taken.append((text[: len(run)], kind))
            text = text[len(run) :]
        return [*taken, (text, self._kind)]  # half a character that nothing completes any more

    def _styled(self, text: str, kind: Kind) -> str:
        style = STYLES[kind].without_color if self._without_colour else STYLES[kind]
        # each line for itself: a terminal would fill the next one, too
        lines = text.split("\n")
        return "\n".join(style.render(line, color_system=ColorSystem.STANDARD) for line in lines)


def legend() -> Text:
    """What the colours mean, in a line."""
    return Text("  ").join(Text(MEANINGS[kind], style) for kind, style in STYLES.items())


class Fates:
    """Tells each drafted token and what became of it, in lines such as `[ACCEPT] 12.0`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._texts: dict[int, str] = {}

    async def lines(self, fragment: Fragment) -> list[str]:
        """Those of one round."""
        lines, tokens, number = [], fragment.tokens, fragment.round
        drafted = [(d.token, await self._text(d.token), d.confidence) for d in fragment.drafted]
        lines += [f"[DRAFT] {number}.{i} {d} {t} p={p:.2f}" for i, (d, t, p) in enumerate(drafted)]
        for i, (id_, text, _) in enumerate(drafted):
            if i >= len(tokens):
                break  # behind the end of the answer, or of what was read
            own = tokens[i]
            shown = await self._text(own.id)
            lines.append(f"[VERIFY] {number}.{i} {id_} {text} target={own.id} {shown}")
            if own.kind == "corrected":
                lines.append(f"[REJECT] {number}.{i} target={own.id} {shown}")
                break
            lines.append(f"[ACCEPT] {number}.{i}")
        if tokens and tokens[-1].kind in ("bonus", "plain"):
            last = tokens[-1]
            lines.append(f"[{last.kind.upper()}] {number} {last.id} {await self._text(last.id)}")
        return lines

    async def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = json.dumps(
                await self._client.detokenize([token]), ensure_ascii=False
            )
        return self._texts[token]
