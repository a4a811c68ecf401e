"""What to change about a pair, each with the figures that say so; where nothing pays, that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from outrider_services.doctor.findings import Findings
from outrider_services.doctor.forecast import (
    CORES_EACH,
    DEVICE_EACH,
    DRAFT_NEAR,
    FAR_S,
    HALF,
    PLACED,
    RIGHT,
    TARGET_NEAR,
    Forecast,
    mean_run,
    split,
)

PAYS = 1.05  # a draft that is expected to gain less does not pay
WORTH = 1.05  # a change must make it so many times as fast
SMALLER = 1.1  # … and another draft or device, which has to be found first
DEAR = 0.1  # a drafted token that costs less, in passes, is cheap enough
UNSURE = 0.6  # a draft of which less is accepted is not of the target's kind
ROWS = 4  # of the pass whose cost is told

Forecasts = Mapping[str, Forecast]


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to do, and what was measured or is expected that supports it."""

    what: str  # the change in a few words
    because: str
    now: float  # how many times as fast as the target alone, as it is placed
    then: float | None  # … and after the change; None: there is none that helps


def advise(found: Findings, told: Forecasts) -> list[Advice]:
    """That the draft does not pay, if so; then what is worth changing, what gains most first."""
    checks: tuple[Callable[[Findings, Forecasts], Advice | None], ...] = (
        nearer_draft,
        nearer_target,
        cores,
        device,
        mode,
        smaller,
        closer,
    )
    advice = [one for check in checks if (one := check(found, told))]
    advice.sort(key=lambda one: -(one.then or 0.0))
    return [*filter(None, [busy(found, told), hopeless(found, told)]), *advice]


def nearer_draft(found: Findings, told: Forecasts) -> Advice | None:
    now, there = told[PLACED], told.get(DRAFT_NEAR)
    if there is None or there.auto < WORTH * now.auto:
        return None
    trip_s, token_s = 2 * found.draft.link_s, found.world("pipelined").draft_s
    run = mean_run(found.texts)
    is_longer = trip_s > run * token_s
    why = (
        f"longer than a block takes to draft ({run:.1f} tokens of {ms(token_s)})"
        if is_longer
        else "added whenever it has to begin anew"
    )
    because = f"the round trip to the draft, {ms(trip_s)}, is {why}"
    return Advice("co-locate the draft with the coordinator", because, now.auto, there.auto)


def nearer_target(found: Findings, told: Forecasts) -> Advice | None:
    now, there = told[PLACED], told.get(TARGET_NEAR)
    if there is None or there.auto < WORTH * now.auto:
        return None
    because = (
        f"the round trip to the target, {ms(2 * found.target.link_s)}, stands beside a pass of "
        f"{ms(found.pass_s)}"
    )
    return Advice("co-locate the coordinator with the target", because, now.auto, there.auto)


def cores(found: Findings, told: Forecasts) -> Advice | None:
    now, there, counts = told[PLACED], told.get(CORES_EACH), split(found)
    if counts is None or there is None or there.auto < WORTH * now.auto:
        return None
    what = "a core each" if sum(counts) == 2 else f"{counts[1]} cores for the draft alone"
    because = (
        "draft and target take turns on the same cores; even were each as much slower as it has "
        f"fewer of them, overlap gains more ({counts[0]} for the target, {counts[1]} for the "
        "draft: --target-cores, --draft-cores; `outrider tune` measures it)"
    )
    return Advice(what, because, now.auto, there.auto)


def device(found: Findings, told: Forecasts) -> Advice | None:
    now, there = told[PLACED], told.get(DEVICE_EACH)
    if there is None or there.auto < SMALLER * now.auto:
        return None
    token = found.world("sync").draft_s / found.pass_s
    because = (
        "draft and target take turns on one device, so that each waits for the other; a drafted "
        f"token costs {token:.2f} of a pass"
    )
    return Advice("a device of its own for the draft", because, now.auto, there.auto)


def mode(found: Findings, told: Forecasts) -> Advice | None:
    now = told[PLACED]
    if now.best < WORTH * now.auto:
        return None
    by_mode = {"plain": now.plain, "sync": now.sync, "pipelined": now.pipelined}
    name = max(by_mode, key=lambda one: by_mode[one])
    because = f"auto is {'sync' if found.shares else 'pipelined'} here, and that is slower"
    return Advice(f"--mode {name}", because, now.auto, now.best)


def smaller(found: Findings, told: Forecasts) -> Advice | None:
    now, there = told[PLACED], told[HALF]
    token = found.world("sync").draft_s / found.pass_s
    if token < DEAR or there.auto < max(SMALLER * now.auto, SMALLER):
        return None
    because = (
        f"a drafted token costs {token:.2f} of a pass; the gain is for one of half the cost "
        "that is right as often"
    )
    return Advice("a smaller draft", because, now.auto, there.auto)


def closer(found: Findings, told: Forecasts) -> Advice | None:
    now, there = told[PLACED], told[RIGHT]
    if found.accepted >= UNSURE or there.auto < max(SMALLER * now.auto, SMALLER):
        return None
    because = f"{found.accepted:.0%} of its tokens are right; the gain is for one that never errs"
    return Advice("a draft of the target's own family", because, now.auto, there.auto)


def hopeless(found: Findings, told: Forecasts) -> Advice | None:
    """That this draft does not pay here, if it does not; and whether any could."""
    now, right = told[PLACED], told[RIGHT]
    if now.best >= PAYS:
        return None
    world, pass_s = found.world("sync"), found.pass_s
    far = 2 * max(found.target.link_s, found.draft.link_s) / pass_s
    because = (
        f"a pass over {ROWS} rows costs {world.verify_s[ROWS - 1] / pass_s:.2f} passes over one, a "
        f"drafted token {world.draft_s / pass_s:.2f}, a round trip {far:.2f}; "
        f"{found.accepted:.0%} of its tokens are right, and with all of them right it would be "
        f"{right.best:.2f}x (--n-draft 0 does without)"
    )
    cannot = "cannot" if right.best < PAYS else "does not"
    return Advice(f"this draft {cannot} pay here", because, now.auto, None)


def busy(found: Findings, told: Forecasts) -> Advice | None:
    """That messages on one machine take too long for anything but other work there."""
    slow = [2 * one.link_s for one in (found.target, found.draft) if one.here]
    if not slow or max(slow) <= 2 * FAR_S:
        return None
    because = (
        f"messages on this machine take {ms(max(slow))} there and back, so others keep it busy, "
        "and all figures are those of a busy machine"
    )
    return Advice("measure again while it is quiet", because, told[PLACED].auto, None)


def ms(seconds: float) -> str:
    """Milliseconds, as exactly as anybody needs them."""
    return f"{1000 * seconds:.{2 if seconds < 0.001 else 1 if seconds < 0.1 else 0}f} ms"
