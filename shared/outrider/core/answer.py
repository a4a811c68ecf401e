"""A request's text: its prompt, then the answer as far as it is committed, and where that ends."""

from __future__ import annotations

from collections.abc import Iterable

from outrider.core.events import Task
from outrider.core.text import TextStream
from outrider.core.values import Reason, Token, TokenId


class Answer:
    """`tokens` has the whole text. What the client has received before is there at once, unsaid.

    So an answer that another process has begun goes on with the very next token, and the very next
    character.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.tokens: list[TokenId] = list(task.prompt)
        self.ended: Reason | None = None  # why it has ended, if it has
        self._text = TextStream(task.stop)
        for one in task.received:
            if self.ended is None:
                self._append(one.id, one.piece)
        self.resumed = len(self.tokens) - len(task.prompt)  # tokens that were received before

    def take(self, said: Iterable[Token]) -> tuple[str, list[Token]]:
        """Append what the target has said, up to the end of the answer: the text, the tokens."""
        text, done = "", list[Token]()
        for token in said:
            done.append(token)
            text += self._append(token.id, token.piece)
            if self.ended:
                break
        return text, done

    def rest(self) -> str:
        """The text that was held back, when nothing more will come."""
        return self._text.end()

    @property
    def room(self) -> int:
        """How many tokens may still be generated."""
        task = self.task
        room = task.context - len(self.tokens)
        if task.n_predict is not None:
            room = min(room, task.n_predict - (len(self.tokens) - len(task.prompt)))
        return room

    def _append(self, token: TokenId, piece: bytes) -> str:
        self.tokens.append(token)
        if token in self.task.ends:
            self.ended = "stop"
            return self._text.end()
        text, stopped = self._text.feed(piece)
        self.ended = "stop" if stopped else "length" if self.room <= 0 else None
        return text + self._text.end() if self.ended else text
