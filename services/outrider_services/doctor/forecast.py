"""What each mode would reach with a pair's costs and texts: the real rules, in virtual time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from outrider.core.priced import PricedRule
from outrider.core.rules import MOST_DRAFTED, FixedRule, Rule
from outrider.core.values import Mode
from outrider_services.bench.replay import Replay, World
from outrider_services.bench.results import geometric_mean
from outrider_services.doctor.findings import Findings, Text, Worker

ANSWER = 96  # tokens of an answer at least, as in `bench`: a short one may not pay for reading
PLAYS = 2  # of each text: as in `bench`, what was learnt from it before counts
FAR_S = 0.0015  # a message that takes longer comes from elsewhere
NEAR_S = 0.0003  # what one takes on the same machine, if none was measured there
PLACED, DRAFT_NEAR, TARGET_NEAR, ALL_NEAR, DEVICE_EACH, CORES_EACH, HALF, RIGHT = (
    "as placed",
    "draft beside the coordinator",
    "target beside the coordinator",
    "all on one machine",
    "a device each, as fast as this one",
    "cores of their own, at worst",
    "a draft at half the cost",
    "a draft that is always right",
)

Drafting = Literal["sync", "pipelined"]
DRAFTING: tuple[Drafting, ...] = ("sync", "pipelined")


@dataclass(frozen=True, slots=True)
class Place:
    """What things take in each mode where target and draft are, or would be."""

    worlds: Mapping[Drafting, World]
    shares: bool  # one device, which both use in turns

    @property
    def auto(self) -> Drafting:
        """The mode that `auto` stands for there."""
        return "sync" if self.shares else "pipelined"

    def with_worlds(self, **changes: Any) -> Place:
        """The same with other figures in every world."""
        worlds = {mode: replace(world, **changes) for mode, world in self.worlds.items()}
        return replace(self, worlds=worlds)

    def scaled(self, target: float, draft: float) -> Place:
        """The same with passes and drafted tokens that take so many times as long."""
        return replace(
            self,
            worlds={
                mode: replace(
                    world,
                    verify_s=tuple(target * seconds for seconds in world.verify_s),
                    draft_s=draft * world.draft_s,
                    read_s=draft * world.read_s,
                    prefill_s=target * world.prefill_s,
                )
                for mode, world in self.worlds.items()
            },
        )


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a pair would reach in one place, as multiples of the target alone as it is placed."""

    plain: float
    sync: float
    pipelined: float
    auto: float

    @property
    def best(self) -> float:
        return max(self.plain, self.sync, self.pipelined)


def forecasts(found: Findings, n_max: int = MOST_DRAFTED) -> dict[str, Forecast]:
    """By name: the pair as it is placed, and what it would be otherwise placed or otherwise made.

    `n_max`: most drafted tokens in a block.
    """
    right = [replace(text, trace=all_right(text)) for text in found.texts]
    told = {name: (place, found.texts) for name, place in places(found).items()}
    placed = told[PLACED][0]
    alone = rate("plain", placed.worlds["sync"], found.texts, found.shares)
    told[HALF] = placed.scaled(1.0, 0.5), found.texts
    told[RIGHT] = placed, tuple(right)
    return {name: forecast(*what, alone, n_max) for name, what in told.items()}


def places(found: Findings) -> dict[str, Place]:
    """Where the pair is, and where else it could be; only what differs from that."""
    placed = Place({mode: found.world(mode) for mode in DRAFTING}, found.shares)
    near = min(found.target.link_s, found.draft.link_s, NEAR_S)
    told = {PLACED: placed}
    if is_far(found.draft):
        told[DRAFT_NEAR] = placed.with_worlds(draft_link_s=near)
    if is_far(found.target):
        told[TARGET_NEAR] = placed.with_worlds(link_s=near)
    if is_far(found.draft) and is_far(found.target):
        told[ALL_NEAR] = placed.with_worlds(link_s=near, draft_link_s=near)
    if found.shares:
        # alone is how each computes in turns
        apart = Place(dict.fromkeys(DRAFTING, placed.worlds["sync"]), False)
        told[DEVICE_EACH] = apart
        if counts := split(found):
            told[CORES_EACH] = apart.scaled(*(sum(counts) / own for own in counts))
    return told


def is_far(one: Worker) -> bool:
    """Whether messages take long because they come from elsewhere."""
    return one.link_s > FAR_S and not one.here


def split(found: Findings) -> tuple[int, int] | None:
    """How many cores the target and the draft would have, had each its own.

    None where they do not share processor cores, or have only one.
    """
    target, draft = (set(one.cores.split(",")) for one in (found.target, found.draft))
    cores = {one for one in target | draft if one.isdecimal()}
    if not found.shares or cores < target | draft or len(cores) < 2:
        return None
    fewer = max(1, len(cores) // 4)
    return len(cores) - fewer, fewer


def all_right(text: Text) -> dict[str, object]:
    """The trace of a draft that never errs and knows it."""
    count = len(text.trace["match"])
    return {"match": [1] * count, "confidence": [0.999] * count, "off_path_confidence": {}}


def forecast(place: Place, texts: Sequence[Text], alone: float, n_max: int) -> Forecast:
    """How many times as fast as `alone`, in tokens per second, the place is in each mode."""
    plain = rate("plain", place.worlds["sync"], texts, place.shares)
    found = {mode: rate(mode, place.worlds[mode], texts, place.shares, n_max) for mode in DRAFTING}
    figures = plain, found["sync"], found["pipelined"], found[place.auto]
    return Forecast(*(figure / alone for figure in figures))


def rate(
    mode: Mode, world: World, texts: Sequence[Text], shares: bool, n_max: int = MOST_DRAFTED
) -> float:
    """Tokens per second behind the prompt: of the categories, the geometric mean, as in `bench`."""
    experience = world.experience()
    found: dict[str, list[float]] = {}
    for text in texts:
        own, trace = replace(world, prompt=text.prompt_tokens), lengthened(text.trace)
        for play in range(PLAYS):
            rule: Rule = FixedRule("plain", 0)
            if mode != "plain":
                rule = PricedRule(mode, n_max, experience, shares)
            report = Replay(trace, rule, own).play().report()
            if play == PLAYS - 1 and report.decode_s:
                reached = (report.generated_tokens - 1) / report.decode_s
                found.setdefault(text.category, []).append(reached)
    return geometric_mean(geometric_mean(some) for some in found.values())


def lengthened(trace: Mapping[str, Any]) -> dict[str, Any]:
    """The trace of an answer that goes on as it went, if it was a short one."""
    count = len(trace["match"])
    times = -(-ANSWER // count)
    off_path = trace["off_path_confidence"].items()
    return {
        "match": (trace["match"] * times)[: max(ANSWER, count)],
        "confidence": (trace["confidence"] * times)[: max(ANSWER, count)],
        "off_path_confidence": {
            str(int(at) + count * time): some for time in range(times) for at, some in off_path
        },
    }


def mean_run(texts: Iterable[Text]) -> float:
    """Tokens that are drafted right one behind the other, on average, and the wrong one."""
    matches = [match for text in texts for match in text.trace["match"]]
    return len(matches) / max(1, matches.count(0))
