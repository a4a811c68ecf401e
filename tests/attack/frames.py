"""Frames that no peer should send: noise, halves, nests, lies about lengths, and wrong roles."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import msgpack

from outrider.core.events import Commit, Prefill
from outrider.core.sampling import Sampling
from outrider.core.stats import Stats
from outrider.core.values import Drafted, Fragment, Proposal, Token, Verdict, Verify
from outrider.wire import messages as wire
from outrider.wire.codec import encode

BIG = (1 << 63) - 1


def wrong_roles() -> list[bytes]:
    """Well-formed frames that a stranger has no business to send. `Submit` and `Stop` are not among
    them: these any client may send.
    """
    verdict = Verdict(1, (65, 66), 3, 9, (b"A", b"B"), (0.5, 0.5))
    proposal = Proposal(2, 7, (Drafted(65, 0.9),), 0.01)
    fragment = Fragment(1, "A", (Token(65, b"A", 0, "plain", 0.5),), ())
    report = Stats().report()
    found: list[wire.Message] = [
        wire.Welcome(), wire.Refused("busy", "no"), wire.Who(), wire.Ping(),
        wire.Beat(1, False), wire.Beat(BIG, True),
        wire.Do(1, Prefill((65,), Sampling(), False)), wire.Do(1, Verify(1, 1, (65,))),
        wire.Do(BIG, Commit(1, (65,), 9)),
        wire.Done(1, verdict), wire.Done(BIG, verdict), wire.Done(1, proposal),
        wire.Close(1), wire.Failed(1, "internal_error", "no"), wire.Failed(BIG, "x", "y"),
        wire.Tokens(1, (65,)), wire.Rendered(1, "A"), wire.LabelTexts(1, ("A",)),
        wire.Labels(1, 0, 4096), wire.Chat(1, (wire.Turn("user", "A"),), wire.Tools("[]")),
        wire.Cancel(1), wire.Cancel(BIG),
        wire.Started(1, "m", "plain", (65,)), wire.Progress(1, fragment, report),
        wire.Finished(1, "stop", report, ()), wire.HealthReport(1, {}), wire.MetricsReport(1, {}),
        wire.Ping(BIG >> 32), wire.Beat(1, True, 1e9, 1),
    ]  # fmt: skip
    return [encode(message) for message in found]


ROLES = wrong_roles()


def noise(rng: random.Random) -> list[bytes]:
    return [rng.randbytes(rng.choice((0, 1, 7, 100, 5000)))]


def half(rng: random.Random) -> list[bytes]:
    frame = rng.choice(ROLES)
    return [frame[: rng.randrange(len(frame))]]


def flipped(rng: random.Random) -> list[bytes]:
    frame = bytearray(rng.choice(ROLES))
    for _ in range(rng.randint(1, 4)):
        frame[rng.randrange(len(frame))] = rng.randrange(256)
    return [bytes(frame)]


def nested(rng: random.Random) -> list[bytes]:
    """Arrays in arrays, or a long row of empty maps: small frames that decode to much."""
    if rng.random() < 0.5:
        return [b"\x91" * rng.choice((10, 900, 1100, 60_000)) + b"\x01"]
    return [b"\xdc\xff\xff" + b"\x80" * 65_535]


def huge_counts(rng: random.Random) -> list[bytes]:
    """Announces 2³² things and brings few."""
    kind = rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"))
    return [b"\x92\xa8tokenize" + kind + struct.pack(">I", 0xFFFFFFFF) + rng.randbytes(20)]


def wrong_types(rng: random.Random) -> list[bytes]:
    strange: tuple[object, ...]
    strange = (None, True, -1, (1 << 64) - 1, 0.5, float("nan"), "x", b"\xff", [], [[]], {"a": 1})
    name = rng.choice(("hello", "submit", "tokenize", "health", "done", "beat", "cancel", 7, None))
    fields: list[object] = [rng.choice(strange) for _ in range(rng.randrange(20))]
    return [msgpack.packb([name, *fields])]


def other_role(rng: random.Random) -> list[bytes]:
    return [rng.choice(ROLES)]


def many_parts(rng: random.Random) -> list[bytes]:
    return [rng.choice(ROLES)] * rng.choice((2, 10, 300))


KINDS: tuple[Callable[[random.Random], list[bytes]], ...] = (
    noise, half, flipped, nested, huge_counts, wrong_types, other_role, many_parts,
)  # fmt: skip


def malformed(rng: random.Random) -> list[bytes]:
    """The parts of one message."""
    return rng.choice(KINDS)(rng)
