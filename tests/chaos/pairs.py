"""What a campaign runs on: made-up devices, or the default pair of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.attack.questions import Question, answer_to

from outrider.core.race import NEAR
from outrider.core.values import Role, Token

CTX = 512  # tokens of each request to the default pair


@dataclass(frozen=True, slots=True)
class Device:
    """Flags for `serve`, and for a worker that is started elsewhere."""

    is_real: bool
    flags: tuple[str, ...]

    def worker(self, role: Role) -> tuple[str, ...]:
        if not self.is_real:
            return self.flags
        model = _pair()[ROLES.index(role)]
        return (*self.flags, "-m", model, "--target-cores", str(ROLES.index(role)), "-t", "1")

    def here(self, remote: Role) -> tuple[str, ...]:
        """For `serve`, which starts the other worker on a core of its own."""
        if not self.is_real:
            return ()
        target, draft = _pair()
        if remote == "draft":
            return ("-m", target, "--target-cores", "0", "-t", "1")
        return ("-md", draft, "--draft-cores", "1", "-td", "1")


ROLES: tuple[Role, ...] = ("target", "draft")


def devices(pair: bool, step_ms: float = 20.0, parallel: int = 2) -> Device:
    if pair:
        return Device(True, ("--backend=llama", f"--ctx={CTX}", f"--parallel={parallel}"))
    costs = f"--toy-step-ms={step_ms:g}", "--toy-row-ms=0.2", "--toy-draft-ms=2"
    return Device(False, ("--backend=toy", *costs, f"--parallel={parallel}"))


def _pair() -> tuple[str, str]:
    from outrider_services.models.catalogue import default_pair

    target, draft = default_pair(fetch=False, offline=True)
    return str(target), str(draft)


class Remembered:
    """Judges answers by the reference, or on real models by the longest one before.

    There a near-tie may be tipped by the size of a pass: it is counted, and what is behind it is
    another text.
    """

    def __init__(self, is_real: bool) -> None:
        self.near_ties = 0
        self.is_real = is_real
        self._known: dict[Question, tuple[Token, ...]] = {}

    def fault(self, question: Question, said: Sequence[Token]) -> str | None:
        """What is wrong with these tokens."""
        if not self.is_real:
            ids = tuple(token.id for token in said)
            return None if ids == answer_to(question)[: len(ids)] else "a token is wrong"
        known = self._known.get(question, ())
        if len(said) > len(known):
            self._known[question] = tuple(said)
        for mine, other in zip(said, known, strict=False):
            if mine.id == other.id:
                continue
            if min(mine.margin, other.margin) < NEAR:
                self.near_ties += 1
                return None
            return f"token {mine.position} is another one than before, and no near-tie"
        return None

    def judge(
        self, question: Question, said: Sequence[Token], text: str, reason: str | None
    ) -> str | None:
        """As `tests.attack.clients` wants it."""
        return self.fault(question, said)
