"""What the target makes of the rows of a pass: verdicts on blocks, and on the sides of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from outrider.core import decoding
from outrider.core.constraints import decide
from outrider.core.engine import Engine, EngineFault
from outrider.core.logprobs import likelihoods
from outrider.core.penalties import Breakers
from outrider.core.sampling import Scores
from outrider.core.values import TokenId, Verdict, ids_of
from outrider.engines.breakers import KnownBreakers
from outrider.errors import OutriderError
from outrider_services.pipeline.passes import Sequence, Share

Outcome: TypeAlias = Verdict | Exception | None  # None: there is more to evaluate


class Verifying:
    """All of it is called on the owner thread of the model."""

    def __init__(self, model: Engine) -> None:
        self._model, self._breakers = model, KnownBreakers(model)

    @staticmethod
    def legal(share: Share) -> Share:
        """Without the drafted tokens that the constraint forbids: they are not evaluated."""
        sequence, tokens, rows, forks = share
        drafted, matcher = sequence.drafted, sequence.matcher
        if not (drafted and rows and matcher):
            return share
        try:
            legal = matcher.legal(sequence.tokens[sequence.begins :], drafted)
        except OutriderError:
            legal = 0  # the choice behind the text will fail for the same reason
        cut = len(drafted) - legal
        sequence.forbidden += cut
        sequence.drafted = drafted[:legal]
        if cut:  # those may begin behind the end of what is left
            sequence.sides = forks = ()
        return Share(sequence, tokens[: len(tokens) - cut], rows - cut, forks)

    def judged(self, share: Share, rows: Scores) -> Outcome:
        """The verdict on the block of a sequence, if it had one."""
        sequence = share.sequence
        if not share.rows:
            return None
        margins: list[float] = []
        try:
            verdict, chosen_from = self._verified(share, rows, margins)
            logprobs = tops = None
            if sequence.logprobs:
                most, piece = sequence.top_logprobs, self._model.piece
                logprobs, tops = likelihoods(chosen_from, verdict.tokens, most, piece)
            self._keep(share, verdict)
        except (EngineFault, OutriderError, ValueError) as exc:
            self._model.rewind(sequence.slot, 0)
            return exc
        return verdict.changed(
            round=sequence.orders.round,
            base=len(sequence.tokens),
            beside=share.all_rows - share.rows,
            pieces=tuple(map(self._model.piece, verdict.tokens)),
            margins=tuple(margins),
            logprobs=logprobs,
            top_logprobs=tops,
            waited_s=sequence.waited_s,
            cached=0 if sequence.orders.round else sequence.cached,
            forbidden=sequence.forbidden,
        )

    def _verified(
        self, share: Share, rows: Scores, margins: list[float]
    ) -> tuple[Verdict, Iterable[Scores]]:
        """The verdict on a block and its sides, and the rows that its tokens were chosen from."""
        sequence, ends = share.sequence, self._model.info.vocabulary.ends
        base, drafted = len(sequence.tokens), tuple(sequence.drafted or ())
        breakers = self._breakers.of(sequence.sampling)
        choices = self._choices(sequence, (), drafted, rows[: share.rows], margins, breakers)
        verdict = decoding.verify(drafted, choices, ends)
        sides = sequence.sides[: len(share.forks)]
        number = decoding.leads_to(verdict, base, drafted, sides)
        if not number or verdict.tokens[-1] in ends:
            return verdict, rows
        lengths = [len(fork.tokens) for fork in share.forks]
        begins = share.rows + sum(lengths[: number - 1])
        beside = rows[begins : begins + lengths[number - 1]]
        behind = ids_of(sides[number - 1].drafted[1:])
        choices = self._choices(sequence, verdict.tokens, behind, beside, margins, breakers)
        both = decoding.joined(verdict, decoding.verify(behind, choices, ends), number)
        return both, [*rows[: len(verdict.tokens)], *beside]

    def _keep(self, share: Share, verdict: Verdict) -> None:
        """Let the slot hold what was accepted of the block.

        What was accepted of a side is evaluated again with the next block, where it costs little:
        taken over from its own slot it would lie out of order in the cache, and round otherwise.
        """
        sequence = share.sequence
        held = len(sequence.tokens) + verdict.accepted
        if verdict.side:
            held = sequence.sides[verdict.side - 1].place
        elif verdict.accepted == len(sequence.drafted or ()):
            return
        self._model.rewind(sequence.slot, held)

    @staticmethod
    def _choices(
        sequence: Sequence,
        chosen: tuple[TokenId, ...],
        drafted: tuple[TokenId, ...],
        rows: Scores,
        margins: list[float],
        breakers: Breakers,
    ) -> Iterator[TokenId]:
        """The target's choice at each row, given the prefix that this row was evaluated with.

        That is the text, what was `chosen` behind it in this pass, and more and more of `drafted`.
        The margin of each choice is appended to `margins`.
        """
        history = [*sequence.tokens, *chosen]
        for at, row in enumerate(rows):
            token, margin = decide(
                row, sequence.sampling, history, sequence.matcher, sequence.begins, breakers
            )
            margins.append(margin)
            yield token
            history.extend(drafted[at : at + 1])

    def free(self, shares: list[Share]) -> None:
        """Empty the spare slots of a pass: they hold cells that texts need."""
        for share in shares:
            for fork in share.forks:
                self._model.rewind(fork.slot, 0)
