"""The token ids by which a model fills a gap in a file, with files that help it in front.

Repository marker and name, then for each file its marker, name and text; last the file itself:
prefix marker and prefix, suffix marker and suffix, middle marker, and the start of the answer.
What has to be left out leaves whole files or big steps, so that what stays is the same after the
next keystroke and need not be read again.
"""

from __future__ import annotations

from outrider.core.engine import Engine, Markers
from outrider.core.values import TokenId
from outrider.errors import BadRequest
from outrider.wire.messages import Infill

REPOSITORY, FILE = "myproject", "filename"  # llama.cpp's words for names that nobody tells
SNIPPET = "\n\n--- snippet ---\n\n"  # before a file, where a model has no marker for it
STEP = 64  # tokens by which a text that is too long is shortened


def token_ids(engine: Engine, asked: Infill) -> list[TokenId]:
    """The prompt for `asked`. Raises BadRequest if the model has no markers, or for no room."""
    markers = engine.info.markers
    if markers is None:
        raise BadRequest(f"the model {engine.info.name!r:.80} has no markers for filling gaps")
    room = engine.info.context - 1 - asked.room
    start = plain(engine, asked.start)
    if room < len(start) + STEP:
        raise BadRequest("the context leaves no room for the text around the gap", "prompt")
    room -= len(start) + 4  # the markers of this file, and perhaps a begin-of-text token
    suffix = plain(engine, asked.suffix)
    suffix = suffix[: fitting(len(suffix), room // 4)]
    prefix = plain(engine, asked.prefix)
    prefix = prefix[len(prefix) - fitting(len(prefix), room - len(suffix)) :]
    gap = [markers.prefix, *prefix, markers.suffix, *suffix, markers.middle, *start]
    head = files(engine, markers, asked.extra, room - len(prefix) - len(suffix))
    vocabulary = engine.info.vocabulary
    begin = [vocabulary.bos] if vocabulary.adds_bos and vocabulary.bos is not None else []
    return [*begin, *head, *gap]


def files(
    engine: Engine, markers: Markers, extra: tuple[tuple[str, str], ...], room: int
) -> list[TokenId]:
    """The files that fit, the last ones first, and the head of the file with the gap."""

    def headed(name: str) -> list[TokenId]:
        if markers.file is None:
            return plain(engine, SNIPPET)
        return [markers.file, *plain(engine, f"{name}\n")]

    start: list[TokenId] = []
    if markers.repository is not None:
        start = [markers.repository, *plain(engine, f"{REPOSITORY}\n")]
    end = headed(FILE) if markers.file is not None else []
    room -= len(start) + len(end)
    kept: list[list[TokenId]] = []
    for name, text in reversed(extra):
        one = [*headed(name), *plain(engine, text)]
        room -= len(one)
        if room < 0:
            break
        kept.append(one)
    if not kept:
        return []  # a head without files before it would say nothing
    return [*start, *(token for one in reversed(kept) for token in one), *end]


def fitting(length: int, room: int) -> int:
    """How much of a text to keep: all of it, or what fits after it was cut by whole steps."""
    excess = max(0, length - max(room, 0))
    return max(0, length - -(-excess // STEP) * STEP)


def plain(engine: Engine, text: str) -> list[TokenId]:
    """The ids of a part of a text: markers typed in it are text, and nothing is put around it."""
    tokens = engine.tokenize(text, special=False) if text else []
    vocabulary = engine.info.vocabulary
    return tokens[1:] if vocabulary.adds_bos and tokens[:1] == [vocabulary.bos] else tokens
