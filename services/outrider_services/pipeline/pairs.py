"""Who serves which request: a target, and a draft that rides ahead of it.

Of several targets the least loaded one serves; if their loads are about equal, the one that has
read most of the prompt already. Of several drafts the one serves with which the target is expected
to be fastest (`outrider.core.choosing`); the others stand by. What a target and a draft have shown
together is kept for each pair and mode.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from outrider.core.choosing import Candidate, Chooser
from outrider.core.estimates import CostModel
from outrider.core.experience import Experience
from outrider.core.reading import UNKNOWN, Held
from outrider.core.values import Mode, TokenId
from outrider_services.pipeline.member import Member
from outrider_services.pipeline.places import shared
from outrider_services.pipeline.requests import Defaults, Request, Requests, alike
from outrider_services.pipeline.roster import Roster
from outrider_services.pipeline.slots import WORTH, shared_beginning

ENDED = 64  # requests that are remembered for what their workers have read


class Ended(NamedTuple):
    """A request that is over, and who has read how much of its text."""

    cache: str | None
    target: Member
    tokens: Sequence[TokenId]
    draft: Member | None
    held: Held  # by the draft


class Pairs:
    """The members of the roster that serve the requests, and what is known of them."""

    def __init__(self, roster: Roster, requests: Requests, defaults: Defaults) -> None:
        self._roster, self._requests, self._defaults = roster, requests, defaults
        self._experience: dict[tuple[Member, Member, Mode], Experience] = {}
        self._chooser = Chooser[Member]()
        self._ended: deque[Ended] = deque(maxlen=ENDED)

    # ---- who serves -----------------------------------------------------------------------------

    def target_for(self, request: Request) -> Member | None:
        """The target that is to serve it; None if none of its model has a sequence free."""
        loads = Counter(one.target for one in self._requests.running.values())
        made_for = request.prepared
        free = [
            one
            for one in self._roster.of("target")
            if loads[one] < one.hello.slots and (made_for is None or alike(made_for, one.hello))
        ]
        places = sum(one.hello.slots - loads[one] for one in free)
        if request.id not in self._requests.running and places <= loads[None]:
            return None  # those whose target was lost come first
        if len(free) < 2:
            return next(iter(free), None)
        shares = {one: loads[one] / one.hello.slots for one in free}
        least = min(shares.values())
        about_equal = [one for one in free if shares[one] <= least + 1 / one.hello.slots]
        known = {one: self._known(one, request) for one in about_equal}
        return max(about_equal, key=lambda one: (known[one], -shares[one]))

    def draft_for(self, request: Request, *, begins: bool = False) -> Member | None:
        """The draft that is to ride ahead of it; None if none is free that has not failed it."""
        target = request.target
        failed = request.failed_drafts
        drafts = [one for one in self._roster.drafts if one.hello.incarnation not in failed]
        riders = Counter(one.draft for one in self._requests.running.values())
        free = [one for one in drafts if riders[one] < one.hello.slots]
        if target is None:
            return None
        of = partial(self._candidate, request, target)
        return self._chooser.choose(free, lambda one: of(one, riders[one] + 1), begins=begins)

    def _candidate(self, request: Request, target: Member, draft: Member, riders: int) -> Candidate:
        mode = self.mode(request.submit.mode, target, draft)
        is_pipelined = mode == "pipelined"
        experience = self.experience(target, draft, "pipelined" if is_pipelined else "sync")
        return Candidate(
            costs=experience.costs.shared_by(max(1, experience.costs.crowd), riders),
            acceptance=experience.acceptance.average,
            pipelined=is_pipelined,
            link_s=draft.link_s or 0.0,
            known=self.held(request, draft).end,
            rests=experience.guard.resting,
        )

    def worth(self, draft: Member) -> float | None:
        """Tokens per second that are expected with it for one request; None without a target."""
        for target in self._roster.of("target"):
            mode: Mode = self.mode(None, target, draft)
            mode = "sync" if mode == "plain" else mode
            experience = self.experience(target, draft, mode)
            costs, acceptance = experience.costs.shared_by(1), experience.acceptance.average
            link_s = draft.link_s or 0.0
            return Candidate(costs, acceptance, mode == "pipelined", link_s).rate()
        return None

    # ---- what is known of them ------------------------------------------------------------------

    def experience(self, target: Member, draft: Member, mode: Mode) -> Experience:
        """What both have shown in this mode: at first, what they have measured at load."""
        key = target, draft, mode
        if key not in self._experience:
            one, other = target.hello, draft.hello
            curves = one.curve_s, other.curve_s, one.crowd_s, other.crowd_s
            in_turns = mode == "sync"
            costs = CostModel.measured(*curves, in_turns=in_turns, rollback_s=one.rollback_s)
            found = self._experience[key] = Experience(costs)
            for (_, same, known_mode), known in list(self._experience.items()):
                if same is draft and known_mode == mode:  # all targets are the same model
                    found.acceptance, found.spread = known.acceptance, known.spread
                    break
            self.count()
        return self._experience[key]

    def count(self) -> None:
        """What a step costs each request depends on how many run."""
        running = self._requests.running.values()
        crowds = Counter(one.target for one in running)
        riders = Counter(one.draft for one in running)
        for (target, draft, _), experience in self._experience.items():
            experience.costs.crowd = max(1, crowds[target])
            experience.costs.riders = max(1, riders[draft])

    def mode(self, asked: str | None, target: Member | None, draft: Member | None) -> Mode:
        """The mode to use. `auto` is pipelined if the two share no device, else sync."""
        match asked or self._defaults.mode:
            case "plain" | "sync" | "pipelined" as chosen:
                return chosen
        return "sync" if self.share_device(target, draft) else "pipelined"

    @staticmethod
    def share_device(target: Member | None, draft: Member | None) -> bool:
        """Whether both are there and share a device; a later draft is from elsewhere."""
        return bool(target and draft and shared(target.hello.cores, draft.hello.cores))

    # ---- what they have read --------------------------------------------------------------------

    def held(self, request: Request, draft: Member | None) -> Held:
        """What this draft probably knows of the prompt; it is the draft worker who looks."""
        best, text = UNKNOWN, request.tokens[:-1]
        for one in self._of_cache(request):
            if draft and one.draft is draft and one.held.end > one.held.skip:
                skip, end = one.held
                common = shared_beginning(one.tokens[:end], text)
                best = Held(skip, common) if common > max(best.end, skip) else best
        return best

    def _known(self, target: Member, request: Request) -> int:
        """How much of the prompt the target need probably not read; 0 if that is not worth much."""
        texts = [one.tokens for one in self._of_cache(request) if one.target is target]
        common = max((shared_beginning(one, request.tokens) for one in texts), default=0)
        return common if common >= WORTH else 0

    def _of_cache(self, request: Request) -> list[Ended]:
        cache = request.submit.cache
        return [one for one in self._ended if cache is not None and one.cache == cache]

    def ended(self, request: Request) -> None:
        """It is over; what its workers have read may be of use to a later one."""
        session = request.session
        if session and request.target:
            held = session.draft.held if request.draft else UNKNOWN
            tokens, cache = session.tokens, session.task.cache
            if held.end > held.skip or len(self._roster.of("target")) > 1:
                self._ended.append(Ended(cache, request.target, tokens, request.draft, held))
        self.count()

    def forget(self, member: Member) -> None:
        """It has gone, and what it knew with it."""
        for key in [key for key in self._experience if member in key[:2]]:
            del self._experience[key]
        self._chooser.forget(member)
        kept = [one for one in self._ended if one.target is not member]
        known = [one._replace(draft=None) if one.draft is member else one for one in kept]
        self._ended = deque(known, maxlen=ENDED)
