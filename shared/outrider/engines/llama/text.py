"""The text side of a llama.cpp model: tokens and text, the vocabulary's fingerprint, templates.

`lib` is the module of bindings, handed in by `outrider.engines.llama.engine`. Everything here may
be called from any thread: llama.cpp only reads the vocabulary, and each call has its own buffers.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from outrider.core.engine import Markers, Vocabulary
from outrider.core.values import TokenId
from outrider.errors import BadRequest

FIM = ("pre", "suf", "mid", "rep", "sep")  # llama.cpp's names of what `Markers` has
KINDS = {1: "spm", 2: "bpe", 3: "wpm", 4: "ugm", 5: "rwkv", 6: "plamo2"}  # enum llama_vocab_type


class TextModel:
    """The methods of `Engine` that are about text, of one model."""

    def __init__(self, lib: Any, model: Any) -> None:
        self._lib = lib
        self._vocab = lib.llama_model_get_vocab(model)
        template = lib.llama_model_chat_template(model, None)
        self._template: bytes | None = bytes(template) if template else None
        self._pieces: dict[TokenId, bytes] = {}
        self.vocabulary = read_vocabulary(lib, self._vocab)
        self.markers = read_markers(lib, self._vocab)

    def tokenize(self, text: str, special: bool) -> list[TokenId]:
        data = _encode(text)
        room = len(data) + 8  # every token has a byte at least, except those put around the text
        while True:
            buffer = (ctypes.c_int32 * room)()
            got: int = self._lib.llama_tokenize(
                self._vocab, data, len(data), buffer, room, True, special
            )
            if got >= 0:
                break
            room = -got
        tokens: list[TokenId] = buffer[:got]
        if self.vocabulary.adds_eos and tokens and tokens[-1] == self.vocabulary.eos:
            tokens.pop()  # the text is to be continued
        return tokens

    def piece(self, token: TokenId) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            self._check(token)
            known = self._pieces[token] = _grown(
                lambda buffer, room: self._lib.llama_token_to_piece(
                    self._vocab, token, buffer, room, 0, False
                ),
                64,
            )
        return known

    def label(self, token: TokenId) -> str:
        self._check(token)
        text: bytes = self._lib.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The chat as text, if llama.cpp's renderer knows the template. Raises BadRequest."""
        if self._template is None:
            raise BadRequest("this model has no chat template; send a plain prompt")
        chat = (self._lib.llama_chat_message * len(messages))()
        for entry, (role, content) in zip(chat, messages, strict=True):
            entry.role, entry.content = _c_string(role), _c_string(content)

        def apply(buffer: Any, room: int) -> int:
            got: int = self._lib.llama_chat_apply_template(
                self._template, chat, len(messages), True, buffer, room
            )
            if got < 0:
                raise BadRequest(
                    "this model's chat template is not one llama.cpp's built-in renderer knows; "
                    "send a plain prompt"
                )
            return got if got <= room else -got

        size = sum(len(content) for _, content in messages)
        return _grown(apply, 2 * size + 256).decode("utf-8", "replace")

    def _check(self, token: TokenId) -> None:
        if not 0 <= token < self.vocabulary.size:
            raise ValueError(f"token {token} is not in the vocabulary of {self.vocabulary.size}")


def read_vocabulary(lib: Any, vocab: Any) -> Vocabulary:
    """The fingerprint of a model's vocabulary."""
    size: int = lib.llama_vocab_n_tokens(vocab)
    digest = hashlib.sha256()
    ends = []
    for token in range(size):
        text: bytes = lib.llama_vocab_get_text(vocab, token)
        digest.update(len(text).to_bytes(4, "little") + text)
        if lib.llama_vocab_is_eog(vocab, token):
            ends.append(token)
    bos, eos = lib.llama_vocab_bos(vocab), lib.llama_vocab_eos(vocab)
    kind = lib.llama_vocab_type(vocab)
    return Vocabulary(
        kind=KINDS.get(kind, f"type {kind}"),
        size=size,
        bos=bos if bos >= 0 else None,
        eos=eos if eos >= 0 else None,
        adds_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
        adds_eos=bool(lib.llama_vocab_get_add_eos(vocab)),
        ends=tuple(ends),
        digest=digest.hexdigest(),
    )


def read_markers(lib: Any, vocab: Any) -> Markers | None:
    """The tokens by which the model fills gaps; None if it has not the three that this needs."""
    found = [getattr(lib, f"llama_vocab_fim_{name}")(vocab) for name in FIM]
    prefix, suffix, middle, repository, file = (token if token >= 0 else None for token in found)
    if prefix is None or suffix is None or middle is None:
        return None
    return Markers(prefix, suffix, middle, repository, file)


def _grown(call: Callable[[Any, int], int], room: int) -> bytes:
    """What `call` writes into a buffer; it returns the length, or minus the room that it needs."""
    while True:
        buffer = ctypes.create_string_buffer(room)
        got = call(buffer, room)
        if got >= 0:
            return buffer.raw[:got]
        room = -got


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise BadRequest(f"the text is not valid Unicode at character {exc.start}") from exc


def _c_string(text: str) -> bytes:
    if "\0" in text:  # C would silently drop the rest
        raise BadRequest("a chat message holds a NUL character")
    return _encode(text)
