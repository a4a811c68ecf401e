"""The arms of an attack: who attacks, how much, and which errors a client may then see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["none", "attacker", "kill", "stop", "fake"]
FIVE_STARTS_S = 24.0  # so long does a launcher need to give a worker up
LOST = frozenset({"worker_unavailable"})  # of requests that wait when no target comes back in time


@dataclass(frozen=True)
class Arm:
    """One attack on a fresh pipeline."""

    name: str
    help: str
    action: Action
    job: str = ""  # the attacker's, see `attackers.py`
    role: str = ""  # which process is struck
    count: int = 30  # times share: how often, how many
    least: int = 3
    within_s: float = 60.0  # times share, but not below `least_s`: how long at most
    least_s: float = 2.5
    attackers: int = 1
    streams: int = 2
    timed: bool = True  # whether an answer must take its usual time
    polite: bool = False  # the usual time is that beside the same clients, reading
    unread: bool = False  # nobody reads the service's log
    descriptors: int | None = None  # its limit of open files

    def times(self, share: float) -> int:
        return max(self.least, round(self.count * share))

    def seconds(self, share: float) -> float:
        return max(self.least_s, self.within_s * share)


def _struck(role: str, action: Action, help: str) -> Arm:
    return Arm(
        f"{action}-{role}",
        help,
        action,
        role=role,
        streams=8,
        timed=False,
    )


ARMS = (
    Arm("none", "nobody attacks: what the machine alone does to an answer", "none"),
    Arm(
        "frames",
        "malformed frames: noise, halves, nests, lies about lengths, wrong types and roles, many "
        "parts; some connections are kept, some made anew",
        "attacker",
        "frames",
        count=50_000,
        attackers=2,
    ),
    Arm(
        "unread-log",
        "the same, while the log is a pipe that nobody reads",
        "attacker",
        "frames",
        count=20_000,
        unread=True,
    ),
    Arm(
        "questions",
        "1,000 small questions at once, and texts of 300,000 letters",
        "attacker",
        "questions",
        count=1000,
        least=300,
    ),
    Arm("churn", "400 idle clients and 1,000 quick ones", "attacker", "churn", count=1000),
    Arm(
        "few-descriptors",
        "more connections than files may be open: 400 against a limit of 300",
        "attacker",
        "churn",
        count=1000,
        least=500,
        within_s=30,
        descriptors=300,
    ),
    Arm(
        "slow-readers",
        "clients that ask large questions or have answers streamed, and never read",
        "attacker",
        "slow",
        count=240,
        polite=True,
    ),
    Arm(
        "parts", "one message of 1,500 parts of 1 MiB", "attacker", "parts", count=1500, within_s=20
    ),
    Arm(
        "raw",
        "sockets that say nothing, half a greeting or something else",
        "attacker",
        "raw",
        count=1000,
    ),
    Arm(
        "fake-draft",
        "the draft is killed while another process greets as one, and stays",
        "fake",
        "fake_draft",
        "draft",
        within_s=30,
        least_s=FIVE_STARTS_S,
        timed=False,
    ),
    Arm(
        "fake-target",
        "the target is killed while another process greets as one, and stays",
        "fake",
        "fake_target",
        "target",
        within_s=30,
        least_s=FIVE_STARTS_S,
        timed=False,
    ),
    _struck("draft", "kill", "the draft dies at random moments"),
    _struck("draft", "stop", "the draft is stopped for 0.1 to 3 s at random moments"),
    _struck("target", "kill", "the target dies"),
    _struck("target", "stop", "the target is stopped"),
    _struck("coordinator", "stop", "the coordinator is stopped"),
    _struck("launcher", "stop", "the launcher is stopped"),
    Arm(
        "stop-client",
        "a process of eight clients is stopped; those of another one are not",
        "stop",
        "clients",
        "client",
        within_s=300,
        least_s=60,
        timed=False,
    ),
)
BY_NAME = {arm.name: arm for arm in ARMS}
