"""llama.cpp's own requests, and what they ask for."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, Field

from outrider.errors import BadRequest
from outrider_services.gateway.asking import Ask, Gap
from outrider_services.gateway.fields import Asked, Flag, Id, Ids, Length, Milliseconds, Sampled
from outrider_services.gateway.forms import Constrained, WithTools
from outrider_services.gateway.openai_requests import Messages

ROOM = 128  # most tokens of an answer in a gap, where it is not told
ROOM_LIMIT = 1024  # most tokens of the context that are kept free for it

Text: TypeAlias = Annotated[str, Field(max_length=1 << 20)]
Mixed: TypeAlias = Annotated[list[Id | str], Field(max_length=1024)]


class Extra(BaseModel):
    """A part of another file."""

    text: Text = ""
    filename: Annotated[str, Field(max_length=256)] = "tmp"


class Native(Sampled, Constrained):
    """What llama.cpp's two requests for answers have in common."""

    n_predict: Length | None = None
    max_tokens: Length | None = None  # llama-server takes both names
    t_max_predict_ms: Milliseconds | None = None
    response_fields: Annotated[list[str], Field(max_length=64)] | None = None
    n_probs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    # how long the prompt may take is told by editors, and kept to by nobody
    t_max_prompt_ms: Milliseconds | None = None
    n_indent: Annotated[int, Field(strict=True, ge=0)] | None = None
    id_slot: Annotated[int, Field(strict=True, ge=-1)] | None = None

    def most(self) -> int | None:
        """How many tokens are asked for; 0: only to read the prompt."""
        return self.max_tokens if self.n_predict is None else self.n_predict

    def asked(self, prompt: str | list[int] | Gap) -> Ask:
        """The request to answer after `prompt`. Raises BadRequest."""
        most, tops = self.most(), self.n_probs or None
        return Ask(
            prompt=prompt,
            settings=self.settings(
                1 if most == 0 else most, self.form(), logprobs=bool(tops), tops=tops
            ),
            reads_only=most == 0,
            predict_ms=self.t_max_predict_ms,
        )


class NativeRequest(Native):
    """The body of /completion."""

    prompt: str | Ids | Mixed

    def ask(self) -> Ask:
        if isinstance(self.prompt, list) and any(isinstance(one, str) for one in self.prompt):
            if len(self.prompt) == 1:  # the one prompt of a list
                return self.asked(str(self.prompt[0]))
            raise BadRequest("prompt must be one text or one list of token ids", "prompt")
        return self.asked(self.prompt)  # type: ignore[arg-type]  # ids alone are left


class InfillRequest(Native):
    """The body of /infill: the text around a gap, and parts of other files."""

    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: Annotated[list[Extra], Field(max_length=256)] | None = None
    prompt: Text = ""

    def most(self) -> int | None:
        most = super().most()
        return ROOM if most is None else most

    def ignored(self) -> list[str]:
        """Also a list of samplers with llama.cpp's own for gaps, which is not offered here."""
        return [*super().ignored(), *(["samplers"] if self.names_infill() else [])]

    def names_infill(self) -> bool:
        return ("i" if isinstance(self.samplers, str) else "infill") in (self.samplers or ())

    def ask(self) -> Ask:
        if self.names_infill():
            return self.model_copy(update={"samplers": None}).ask()
        most = self.most()
        extra = tuple((one.filename, one.text) for one in self.input_extra or ())
        room = ROOM if most is None or most < 1 else min(most, ROOM_LIMIT)
        return self.asked(Gap(self.input_prefix, self.input_suffix, self.prompt, extra, room))


class TokenizeRequest(Asked):
    content: Text
    add_special: Flag = False
    parse_special: Flag = True
    with_pieces: Flag = False

    def check(self) -> None:
        """Raise BadRequest for what cannot be told."""
        if self.with_pieces:
            raise BadRequest("with_pieces is not supported: detokenize the ids", "with_pieces")


class DetokenizeRequest(Asked):
    tokens: Ids


class TemplateRequest(Asked, WithTools):
    messages: Messages

    def said(self) -> list[dict[str, Any]]:
        """The messages as the client library takes them."""
        return [one.plain() for one in self.messages]
