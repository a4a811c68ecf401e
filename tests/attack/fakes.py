"""Workers that are none: they greet like a real one, and answer with nonsense once welcomed."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import outrider
from outrider.core.events import OpenDraft, Prefill
from outrider.core.values import Drafted, Proposal, Role, Verdict, Verify
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.errors import ProtocolError
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode

if TYPE_CHECKING:
    import zmq
    from tests.attack.attackers import Job

BEAT_S = 0.2
GREET_S = 0.02  # so often does it try again, while it is refused
WRONG = ord("!")


def fake_draft(job: Job) -> dict[str, Any]:
    """Greets as a draft worker until it is taken for one, and then stays."""
    return _Fake(job, "draft").run()


def fake_target(job: Job) -> dict[str, Any]:
    """Greets as a target worker until it is taken for one, and then stays."""
    return _Fake(job, "target").run()


class _Fake:
    def __init__(self, job: Job, role: Role) -> None:
        self._job, self._role = job, role
        self._engine = ToyEngine(ToySettings(role=role))
        self._socket: zmq.Socket[bytes] = job.dealer(job.addresses[1], RCVTIMEO=20)
        self._told: Counter[str] = Counter()
        self._incarnation = secrets.randbits(62)

    def run(self) -> dict[str, Any]:
        import zmq

        said = greeted = 0.0
        welcome = False
        while not self._job.is_over:
            now = time.monotonic()
            try:
                if not welcome and now - greeted > GREET_S:
                    self._send(self._hello())
                    greeted = now
                elif welcome and now - said > BEAT_S:
                    self._send(wire.Beat(int(now * 1000), False))
                    said = now
                message = decode(self._socket.recv_multipart()[-1])
            except (zmq.Again, ProtocolError):
                continue
            if isinstance(message, wire.Welcome):
                welcome = True
            self._handle(message)
        return dict(self._told)

    def _handle(self, message: wire.Message) -> None:
        match message:
            case wire.Welcome():
                self._told["welcomed"] += 1
            case wire.Refused():
                self._told["refused"] += 1
            case wire.Who():
                self._send(self._hello())
            case wire.Labels(call, start, count):
                size = self._engine.settings.vocabulary_size
                ids = range(start, min(start + count, size))
                self._send(wire.LabelTexts(call, tuple(map(self._engine.label, ids))))
            case wire.Tokenize(call) | wire.Chat(call):
                self._send(wire.Tokens(call, (WRONG,)))
            case wire.Do(request, order):
                self._work(request, order)

    def _work(self, request: int, order: Any) -> None:
        self._told["orders"] += 1
        match order:
            case OpenDraft(lineage, _, tokens):
                drafted = tuple(Drafted(WRONG, 1.0) for _ in range(8))
                done = Proposal(lineage, len(tokens), drafted, 0.001)
                self._send(wire.Done(request, done))
            case Prefill(tokens):
                self._send(wire.Done(request, self._verdict(0, len(tokens))))
            case Verify(number, base):
                self._send(wire.Done(request, self._verdict(number, base)))

    def _verdict(self, number: int, base: int) -> Verdict:
        return Verdict(0, (WRONG,), number, base, (bytes([WRONG]),), (9.0,), None, 0.001, 0.0)

    def _send(self, message: wire.Message) -> None:
        self._socket.send(encode(message))

    def _hello(self) -> wire.Hello:
        info = self._engine.info
        return wire.Hello(
            protocol=wire.PROTOCOL,
            version=outrider.__version__,
            role=self._role,
            incarnation=self._incarnation,
            model=info.name,
            vocabulary=info.vocabulary,
            context=info.context,
            slots=12,
            device=info.device,
            cores="",
            curve_s=(0.001,),
        )
