"""Requests whose target worker is lost: they are kept, and the next one goes on where each stood.

What a request needs for that is its text as token ids: the next token depends on nothing else. The
new target reads it, and chooses the token that the lost one would have chosen.
"""

from __future__ import annotations

import logging

from outrider.core.session import Phase
from outrider.errors import RequestPoisoned, WorkerLost
from outrider_services.pipeline.absence import Absence
from outrider_services.pipeline.member import Member
from outrider_services.pipeline.metrics import Metrics
from outrider_services.pipeline.requests import Request, Requests, alike
from outrider_services.pipeline.roster import MOST
from outrider_services.pipeline.sessions import Sessions

log = logging.getLogger(__name__)

# a request's blame for a target worker that died in its pass, and that with which it is set aside
CRASHED, KILLED = 10, 3  # whoever kills a process may be the kernel, out of memory
TRUSTED, MOST_BLAME = 3 * KILLED, 15


class Recovery:
    """Who was in the pass with which a target died may have killed it.

    Of these suspects one at a time goes on, until it is past all that this pass may have computed;
    the other requests need not wait for that. If the target dies again meanwhile, it was that one.
    With whom targets were killed up to three times in a row is no suspect yet: mostly it was
    somebody's doing.
    """

    def __init__(
        self, requests: Requests, sessions: Sessions, absence: Absence, metrics: Metrics
    ) -> None:
        self._requests, self._sessions, self._absence = requests, sessions, absence
        self._metrics = metrics
        self._suspect: Request | None = None  # the one that has gone on
        self._trusted: list[Request] = []  # who has gone on and is no suspect, but may become one
        # by targets that were lost: who was in the last pass of each
        self._exposed: dict[int, list[Request]] = {}
        self._why = ""  # the last one was lost

    def lost(self, target: Member, why: str) -> None:
        """The target is gone; its requests go on with another, or wait for the next one."""
        exposed: list[Request] = []
        for request in self._requests.of(target):
            if (session := request.session) and session.phase is Phase.VERIFYING:
                request.blame += CRASHED
                request.reach = session.reach
                exposed.append(request)
            if request is self._suspect:
                self._suspect = None
            self._sessions.lost_target(request)
        self._exposed[target.hello.incarnation] = exposed
        if len(self._exposed) > MOST:
            del self._exposed[next(iter(self._exposed))]
        self._why = why
        self._absence.begin()
        self.look()

    def joined(self, target: Member) -> None:
        """A target is there, perhaps the same as before over a new connection."""
        self._absence.end()
        for request in self._exposed.pop(target.hello.incarnation, ()):  # it had not died
            request.blame = max(0, request.blame - CRASHED)
        if target.hello.follows_killed and self._exposed:
            for request in self._exposed.popitem()[1]:
                request.blame = max(0, request.blame - CRASHED + KILLED)
                if request.session and request.blame <= TRUSTED:
                    request.reach = len(request.session.tokens)  # whatever comes of it clears it
        for request in self._kept():
            if request.blame >= MOST_BLAME:
                self._set_aside(request)
            elif request.prepared and not alike(request.prepared, target.hello):
                reason = "another model is served now than the one that the request was made for"
                self._sessions.fail(request, WorkerLost(reason, "target"))
        self.go_on()

    def settle(self) -> None:
        """Something has been committed, or is over: perhaps the next suspect may go on."""
        if self._trusted:
            self._trusted = [one for one in self._trusted if not self._is_past(one)]
        if self._suspect and self._is_past(self._suspect):
            self._suspect = None
            self.go_on()

    def _is_past(self, request: Request) -> bool:
        """Whether it is over, or has got past the place, and with that is to blame for nothing."""
        if request not in self._requests or not request.session:
            return True
        if len(request.session.tokens) <= request.reach:
            return False
        request.blame = 0
        return True

    def look(self) -> None:
        """Who can go on does so; who has waited too long comes to nothing."""
        if not self._absence.look():
            self.go_on()
            return
        limit = f"no other came within {self._absence.limit_s:g} s" if self._why else "none came"
        for request in self._kept():
            why = self._why or "there is no target worker"
            self._sessions.fail(request, WorkerLost(f"{why}, and {limit}", "target"))

    def _kept(self) -> list[Request]:
        """Those that wait for a target, the last to come first."""
        waiting = set(map(id, self._requests.waiting))
        return [one for one in self._requests if id(one) in waiting or _is_lost(one)]

    def go_on(self) -> None:
        """Let those whose target was lost go on, as far as there are targets with a place."""
        for request in list(self._requests.running.values()):
            # to go on with one may end it, and so let another go on
            if request not in self._requests or not _is_lost(request):
                continue
            target = self._sessions.pairs.target_for(request)
            if target is None:
                return
            if request.blame >= MOST_BLAME:
                # it may yet turn out that what it was in was killed, or had not died
                if self._absence.is_long_ago:
                    self._set_aside(request)
                continue
            if request.blame > TRUSTED and self._suspect:
                continue
            if request.blame > TRUSTED:
                self._suspect = request
            elif request.blame:
                self._trusted.append(request)
            log.info("request %d goes on", request.number, extra=request.marks())
            self._metrics.resumed["target"] += 1
            self._sessions.resume(request, target)

    def _set_aside(self, request: Request) -> None:
        log.warning("request %d is set aside", request.number, extra=request.marks())
        reason = (
            "the target worker died again and again with this request in its pass; it is not "
            "tried any more"
        )
        self._sessions.fail(request, RequestPoisoned(reason))


def _is_lost(request: Request) -> bool:
    return request.session is not None and request.session.phase is Phase.LOST
