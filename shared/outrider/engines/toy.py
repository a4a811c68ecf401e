"""An engine without a model file: a deterministic little language, scored as a real model scores.

Its vocabulary is the 256 bytes, an end token and a few control tokens, so any text round-trips.
The scores depend on the seed and the prefix alone: a hash of the prefix picks the next word from a
short list, and the row favours that word's next byte over a few other plausible ones. A draft gives
the target's row wherever another hash of the prefix falls below `agreement`; elsewhere it favours a
different token, and is less sure of itself. Time is made up too: `extend` takes as long as
`ToyCosts` say, but leaves the processor free, like a device of its own.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from outrider.core.engine import Cancelled, Markers, ModelInfo, Part, tokens_of
from outrider.core.sampling import Scores
from outrider.core.values import TokenId
from outrider.engines.toy_text import (
    ASSISTANT,
    CONTROLS,
    END,
    FIM,
    ROLES,
    SAY,
    SMALLEST,
    TEMPLATE,
    labels,
    vocabulary,
)
from outrider.errors import BadRequest

MOST_SAID = 4096  # bytes

_TEXT = (
    "a after almost amber and anchor before behind beyond bright candle carries distant drift "
    "echo ember evening falls far finds gentle harbour hollow in into island lantern leaves "
    "light meadow morning never north of old over quiet rain remembers river road runs silver "
    "slow small so stone story, the the the through tide under until valley, wander water, "
    "where while wind winter with wonder. yellow café naïve Zürich señor über 中文 東京 🚀 🌊"
)
WORDS = tuple(word.encode() for word in _TEXT.split())
SPACE = ord(" ")
BREAKS = frozenset(b" \n\t")

LIKELY, UNLIKELY, CONTROL = 6.0, -12.0, -60.0  # logits: below temperature 1.6 noise spans less

WAKING_S = 1e-4, 5e-4  # how late a wait ends: the first guess, and the most


def _followers() -> dict[bytes, tuple[int, ...]]:
    """The bytes that may follow each beginning of a word; behind a whole word, a space."""
    found: dict[bytes, set[int]] = {}
    for word in WORDS:
        for cut, byte in enumerate((*word, SPACE)):
            found.setdefault(word[:cut], set()).add(byte)
    return {start: tuple(sorted(following)) for start, following in found.items()}


FOLLOWERS = _followers()
LONGEST = max(map(len, WORDS))


@dataclass(frozen=True, slots=True)
class ToyCosts:
    """Seconds that `extend` takes: for the rows asked for, and for each other token."""

    first_row_s: float = 0.0
    row_s: float = 0.0  # each further row
    prefill_row_s: float = 0.0
    curve_s: tuple[float, ...] = ()  # of 1, 2, 3 … rows, instead; beyond, each costs as the last

    def __post_init__(self) -> None:
        known = self.first_row_s, self.row_s, self.prefill_row_s, *self.curve_s
        _require(min(known) >= 0, "costs are below 0")

    def of(self, tokens: int, rows: int) -> float:
        """Seconds of a pass over `tokens` tokens that returns `rows` rows of logits."""
        return self._decoding(rows) + self.prefill_row_s * (tokens - rows)

    def _decoding(self, rows: int) -> float:
        if not rows:
            return 0.0
        if not self.curve_s:
            return self.first_row_s + self.row_s * (rows - 1)
        known = self.curve_s
        more_s = known[-1] - known[-2] if len(known) > 1 else 0.0
        return known[min(rows, len(known)) - 1] + more_s * max(0, rows - len(known))


@dataclass(frozen=True, slots=True)
class ToySettings:
    """The made-up language and device. Raises ValueError for a value out of range."""

    role: Literal["target", "draft"] = "target"
    seed: int = 0  # which language: the same for both of a pair
    agreement: float = 0.8  # probability, at each position, that a draft favours the target's token
    context: int = 2048
    slots: int = 4
    spare: int = 0  # see `ModelInfo`
    chunk: int = 512
    costs: ToyCosts = field(default_factory=ToyCosts)
    vocabulary_size: int = SMALLEST  # reserved control tokens fill it up
    vocabulary_variant: int = 0  # each gives the last id another label: such a pair does not fit
    end_probability: float = 0.0  # that the target ends where a word would begin

    def __post_init__(self) -> None:
        _require(
            self.role in ("target", "draft"), f"role {self.role!r} is neither target nor draft"
        )
        _require(0 <= self.agreement <= 1, "agreement is not from 0 to 1")
        _require(0 <= self.end_probability <= 1, "end_probability is not from 0 to 1")
        _require(
            min(self.context, self.slots, self.chunk) > 0, "context, slots or chunk is below 1"
        )
        _require(self.spare >= 0, "spare is below 0")
        _require(self.vocabulary_size >= SMALLEST, f"vocabulary_size is below {SMALLEST}")


class _State(NamedTuple):
    """All that the scores after a prefix depend on."""

    prefix: bytes  # rolling hash of the whole prefix
    word_from: bytes  # the same at the start of the current word
    word: bytes  # its bytes so far, at most one more than any word has
    to_say: bytes | None = None  # what the prompt has it say: all of it until `said`, see below
    said: int = -1  # how much of that the answer has; -1: the prompt is not at its end


class ToyEngine:
    """An `Engine` that needs no file, for tests, demonstrations and measurements of the rest."""

    def __init__(self, settings: ToySettings | None = None) -> None:
        self.settings = settings = settings or ToySettings()
        self._labels = labels(settings.vocabulary_size, settings.vocabulary_variant)
        self._controls = {label: 256 + n for n, label in enumerate(self._labels[256:])}
        self._control = re.compile("|".join(map(re.escape, self._controls)))
        root = _digest(b"toy", settings.seed.to_bytes(16, "little", signed=True))
        # per slot, the state after each token, so that `rewind` only has to drop some
        self._states = [[_State(root, root, b"")] for _ in range(settings.slots + settings.spare)]
        self._scores = np.zeros((settings.chunk, settings.vocabulary_size), np.float32)
        self._lock = threading.Lock()
        self._busy = False
        self._cut = threading.Event()
        self._waking_s = WAKING_S[0]
        self._closed = False
        self.info = ModelInfo(
            name=f"toy-{settings.role}",
            vocabulary=vocabulary(self._labels),
            context=settings.context,
            slots=settings.slots,
            spare=settings.spare,
            chunk=settings.chunk,
            device="toy",
            markers=Markers(*(256 + CONTROLS.index(name) for name in FIM)),
        )

    def extend(self, slot: int, tokens: Sequence[TokenId], rows: int) -> Scores:
        return self.extend_all([Part(slot, tokens, rows)])[0]

    def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
        begin = time.monotonic()
        before = self._checked(parts)
        with self._lock:
            self._busy = True
            self._cut.clear()
        try:
            self._scores.fill(np.nan)  # so that a view kept too long is noticed
            found: list[Scores] = []
            row = 0
            for slot, tokens, rows, forks in parts:
                first, states = row, self._states[slot]
                for token in tokens:
                    states.append(_advance(states[-1], token))
                scored = states[len(states) - rows :]
                for fork in forks:
                    beside = self._states[fork.slot]
                    beside[:] = states[: fork.length + 1]
                    for token in fork.tokens:
                        beside.append(_advance(beside[-1], token))
                    scored += beside[fork.length + 1 :]
                for state in scored:
                    self._score(state, self._scores[row])
                    row += 1
                found.append(self._scores[first:row])
            tokens_in_all = sum(map(tokens_of, parts))
            self._wait(begin + self.settings.costs.of(tokens_in_all, row))
        finally:
            with self._lock:
                self._busy = False
        if self._cut.is_set():
            for slot, length in before.items():
                del self._states[slot][length:]
            raise Cancelled
        return found

    def _wait(self, until: float) -> None:
        """Wait until this time or a `cancel`. Waits end late, so it learns by how much."""
        remaining = until - time.monotonic()
        if remaining > self._waking_s and not self._cut.wait(remaining - self._waking_s):
            late = min(max(time.monotonic() - until, -1e-4), 1e-4)
            self._waking_s = min(max(self._waking_s + late / 8, 0.0), WAKING_S[1])

    def _slot(self, slot: int) -> list[_State]:
        _require(not self._closed, "the engine is closed")
        _require(0 <= slot < len(self._states), f"no slot {slot}")
        return self._states[slot]

    def _checked(self, parts: Sequence[Part]) -> dict[int, int]:
        """How many states the slots of `parts` have. Raises ValueError if it cannot be one pass."""
        settings = self.settings
        total = sum(map(tokens_of, parts))
        _require(1 <= total <= settings.chunk, f"{total} tokens, not 1 to {settings.chunk}")
        before = {part.slot: len(self._slot(part.slot)) for part in parts}
        _require(len(before) == len(parts), "two parts have the same slot")
        for slot, tokens, rows, forks in parts:
            before |= {fork.slot: 1 for fork in forks}  # cut short, nothing is left of them
            count, held = len(tokens), before[slot] - 1
            _require(count > 0, "no tokens")
            _require(0 <= rows <= count, f"{rows} rows of {count} tokens")
            _require(
                held + count <= settings.context, f"{held} + {count} tokens overflow the context"
            )
            for fork in forks:
                _require(self.settings.slots <= fork.slot, f"slot {fork.slot} is not a spare one")
                self._slot(fork.slot)
                _require(held <= fork.length <= held + count, f"no fork at {fork.length}")
            for token in (*tokens, *(token for fork in forks for token in fork.tokens)):
                _require(0 <= token < settings.vocabulary_size, f"no token {token}")
        return before

    def _score(self, state: _State, row: Scores) -> None:
        """Write the logits that follow `state`."""
        noise = _digest(state.prefix, b"row", size=48)
        row[:256] = UNLIKELY
        row[256:] = CONTROL
        favourite = self._favourite(state)
        for byte, logit in _alternatives(state.word, noise):
            row[byte] = logit
        row[favourite] = LIKELY
        if self.settings.role == "draft" and not _below(state, b"agree", self.settings.agreement):
            row[favourite] = UNLIKELY
            other = int(row[:256].argmax())
            row[favourite] = row[other]
            row[other] += (LIKELY - row[other]) / 4  # leads by less than the favourite would

    def _favourite(self, state: _State) -> TokenId:
        """The token that the target finds likeliest."""
        if state.to_say is not None and state.said >= 0:
            return state.to_say[state.said] if state.said < len(state.to_say) else END
        if not state.word and _below(state, b"end", self.settings.end_probability):
            return END
        draw = int.from_bytes(state.word_from[:4], "little")
        word = WORDS[draw % len(WORDS)] + b" "
        if word.startswith(state.word) and word != state.word:
            return word[len(state.word)]
        following = FOLLOWERS.get(state.word, (SPACE,))  # the space: a word not on the list
        return following[draw % len(following)]

    def rewind(self, slot: int, length: int) -> None:
        states = self._slot(slot)
        _require(0 <= length < len(states), f"cannot keep {length} of {len(states) - 1} tokens")
        del states[length + 1 :]

    def copy(self, source: int, slot: int, length: int) -> None:
        states = self._slot(source)
        _require(0 <= length < len(states), f"cannot copy {length} of {len(states) - 1} tokens")
        self._slot(slot)[:] = states[: length + 1]

    def length(self, slot: int) -> int:
        return len(self._slot(slot)) - 1

    def cancel(self) -> None:
        with self._lock:
            if self._busy:
                self._cut.set()

    def tokenize(self, text: str, *, special: bool) -> list[TokenId]:
        if not special:
            return list(text.encode(errors="replace"))
        tokens: list[TokenId] = []
        done = 0
        for found in self._control.finditer(text):
            tokens += text[done : found.start()].encode(errors="replace")
            tokens.append(self._controls[found.group()])
            done = found.end()
        return tokens + list(text[done:].encode(errors="replace"))

    def piece(self, token: TokenId) -> bytes:
        _require(0 <= token < self.settings.vocabulary_size, f"no token {token}")
        return bytes((token,)) if token < 256 else b""

    def label(self, token: TokenId) -> str:
        _require(0 <= token < self.settings.vocabulary_size, f"no token {token}")
        return self._labels[token]

    def chat_template(self, name: str = "") -> str | None:
        return None if name else TEMPLATE

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        for role, _ in messages:
            if f"<|{role}|>" not in ROLES:
                raise BadRequest(f"the template has no role {role!r}", "messages")
        turns = [f"<|{role}|>{content}<|end|>" for role, content in messages]
        return "".join(turns) + "<|assistant|>"

    def close(self) -> None:
        self._closed = True


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _digest(*parts: bytes, size: int = 8) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=size).digest()


def _below(state: _State, purpose: bytes, probability: float) -> bool:
    """True with this `probability`; always the same for the same prefix and purpose."""
    return int.from_bytes(_digest(state.prefix, purpose), "little") < probability * 2**64


def _advance(state: _State, token: TokenId) -> _State:
    prefix = _digest(state.prefix, token.to_bytes(4, "little"))
    to_say = _to_say(state, token)
    if token in BREAKS or token >= 256:
        return _State(prefix, prefix, b"", *to_say)
    word = state.word if len(state.word) > LONGEST else state.word + bytes((token,))
    return _State(prefix, state.word_from, word, *to_say)


def _to_say(state: _State, token: TokenId) -> tuple[bytes | None, int]:
    """The last two fields of the state behind `token`."""
    if token == SAY:
        return b"", -1
    if state.to_say is None:
        return None, -1
    if token == ASSISTANT:
        return state.to_say, 0
    if state.said < 0:
        fits = token < 256 and len(state.to_say) < MOST_SAID
        return (state.to_say + bytes((token,)), -1) if fits else (None, -1)
    goes_on = state.said < len(state.to_say) and token == state.to_say[state.said]
    return (state.to_say, state.said + 1) if goes_on else (None, -1)


def _alternatives(word: bytes, noise: bytes) -> list[tuple[TokenId, float]]:
    """Other bytes and their logits: up to eight that go on with other words, and rarer slips."""
    following = FOLLOWERS.get(word, ())
    turn = noise[-1] % len(following) if following else 0
    others = (following[turn:] + following[:turn])[:8]
    slips: list[TokenId] = []
    if word and _is_text(word):  # never inside a character
        slips = [SPACE, *(ord("a") + draw % 26 for draw in noise[-4:-1])]
    rare = [
        (byte, LIKELY - 4.0 - 4.0 * draw / 256)
        for byte, draw in zip(slips, noise[8:], strict=False)
    ]
    return rare + [
        (byte, LIKELY - 0.2 - 7.0 * draw / 256) for byte, draw in zip(others, noise, strict=False)
    ]


def _is_text(word: bytes) -> bool:
    try:
        word.decode()
    except UnicodeDecodeError:
        return False
    return True
