"""When which worker computed for a request, in pieces that a message can carry."""

from __future__ import annotations

from outrider.core.values import Proposal, Role, Span, Verdict, ids_of


class Trace:
    """The spans of one request, if they are `wanted`; whoever takes them keeps them."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._spans: list[Span] = []
        self._ends: dict[Role, float] = {}

    def add(self, done: Proposal | Verdict, rows: int, now: float, number: int) -> None:
        """A worker has told at `now` what it has `done`; `rows` are those of its pass.

        `number` is its lineage or, of a verdict, that of its round.
        """
        if not self._wanted:
            return
        lane: Role = "target" if isinstance(done, Verdict) else "draft"
        # spans of a lane never overlap, even if the report before this one was delayed
        began = max(now - done.elapsed_s, self._ends.get(lane, 0.0))
        self._ends[lane] = now
        self._spans.append(span_of(done, rows, began, now, number))

    def take(self) -> tuple[Span, ...]:
        """Those that were added since the last call."""
        spans, self._spans = tuple(self._spans), []
        return spans


def span_of(done: Proposal | Verdict, rows: int, start: float, end: float, number: int) -> Span:
    """The span in which a worker has `done` this; `rows` are those of the pass, if it was one."""
    if isinstance(done, Verdict):
        return Span(
            lane="target",
            start=start,
            end=end,
            rows=rows,
            number=number,
            base=done.base,
            tokens=done.tokens,
            beside=done.beside,
        )
    ids = ids_of(done.drafted)
    return Span(
        lane="draft",
        start=start,
        end=end,
        rows=len(ids),
        number=number,
        base=done.position,
        tokens=ids,
        confidences=tuple(one.confidence for one in done.drafted),
        free=sum(one.free for one in done.drafted),
        foreseen=done.foreseen,
    )
