"""Measures a pair by having it answer: alone, in turns and at once, on a few texts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from outrider.client import AsyncClient, Completion
from outrider.core.values import Mode, Role
from outrider.errors import ConfigError
from outrider_services.bench.prompts import Category
from outrider_services.bench.results import Results, Sample
from outrider_services.doctor.findings import (
    Curve,
    Findings,
    Text,
    Timing,
    Worker,
    agreement,
    usual,
)

BLOCKS = (3, 5, 7)  # drafted tokens, from text to text: so passes of 4, 6 and 8 rows are seen
FEW = 16  # tokens of an answer that shows only what things take
UNSEEN_S = 0.0003  # a message, where no way could be seen
LEAST = 24  # tokens of one that shows how often the draft agrees
DRAFTING: tuple[Mode, ...] = ("sync", "pipelined")
MODES: tuple[Mode, ...] = ("plain", *DRAFTING)

Tell = Callable[[str], None]


@dataclass
class Examination:
    """One examination of the pair behind `client`; `tell` hears how far it is."""

    client: AsyncClient
    categories: tuple[Category, ...]
    count: int  # most tokens of an answer
    limit_s: float
    tell: Tell
    clock: Callable[[], float] = time.monotonic
    timings: dict[Mode, Timing] = field(default_factory=lambda: {mode: Timing() for mode in MODES})
    texts: list[Text] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)  # seconds of a token of the prompt
    results: Results = field(default_factory=lambda: Results({}, MODES))
    tokens: int = 0
    near_ties: int = 0

    async def run(self) -> Findings:
        """Ask until every text is answered or the time is over, one text at least.

        Raises ConfigError if there is no pair to examine.
        """
        health = await self.client.health()
        target, draft = (worker(health, role) for role in ("target", "draft"))
        shares = health["auto"] == "sync"
        if health["requests"]["running"]:
            self.tell("Others use the pipeline: what is measured is slower for them.")
        began, cache = self.clock(), secrets.token_hex(8)
        questions = [(one, prompt) for one in self.categories for prompt in one.prompts]
        for number, (category, prompt) in enumerate(questions):
            left_s = self.limit_s - (self.clock() - began)
            if self.texts and left_s <= 0:
                self.tell(f"The time is over: {len(questions) - number} texts were left out.")
                break
            text = await self._rendered(category, prompt)
            blocks = BLOCKS[number % len(BLOCKS)]
            share_s = left_s / (len(questions) - number)
            main: Mode = "sync" if shares else "pipelined"
            # no text may know what was read for another: it shows what reading costs
            question = Question(category.name, number, text, f"{cache}-{number}", blocks)
            await self._one(question, main, share_s)
            self.tell(f"[{number + 1}/{len(questions)}] {category.name}: {self._last()}")
        return self._findings(health, target, draft, shares)

    async def _rendered(self, category: Category, prompt: str) -> str:
        if not category.chat:
            return prompt
        return await self.client.apply_template(category.messages(prompt))

    async def _one(self, question: Question, main: Mode, share_s: float) -> None:
        """Have one text answered in every mode: at length in the one that `auto` would choose."""
        began = self.clock()
        first = await self._ask(question, "plain", FEW)
        unread = len(first.prompt_token_ids) - first.stats.cached_tokens
        if first.stats.prefill_s and unread > 0:
            self.reading.append(first.stats.prefill_s / unread)
        asked = FEW
        for mode in DRAFTING:
            count = FEW
            if mode == main:
                spent_s = max(self.clock() - began, 1e-3)
                room = int((share_s - spent_s) * asked / spent_s)
                count = min(self.count, max(LEAST, room))
            asked += count
            # in turns the draft reads undisturbed
            answer = await self._ask(question, mode, count, is_first=mode == DRAFTING[0])
            if mode == main:
                self._keep(question, answer)

    def _keep(self, question: Question, answer: Completion) -> None:
        """Keep what an answer at length shows of the draft and the text."""
        start, ids = len(answer.prompt_token_ids), [token.id for token in answer.tokens]
        trace = agreement(start, ids, answer.trace or ())
        if len(trace["match"]) > 1:
            self.texts.append(Text(question.category, start, trace))
        self.tokens += len(ids)
        self.near_ties += answer.stats.near_ties

    async def _ask(
        self, question: Question, mode: Mode, count: int, *, is_first: bool = False
    ) -> Completion:
        """Have it answered with so many tokens; the draft reads the text if it `is_first`."""
        length = None if mode == "plain" else question.blocks
        answer = await self.client.create_completion(
            question.text,
            max_tokens=count,
            temperature=0,
            seed=0,
            mode=mode,
            n_draft=length,
            n_min=length,
            p_min=None if length is None else 0.0,
            trace=True,
            cache_key=question.cache,
        )
        self.timings[mode].add(answer.trace or (), len(answer.prompt_token_ids) if is_first else 0)
        self.results.samples.append(
            Sample(
                question.category,
                question.number,
                0,
                mode,
                0.0,
                len(answer.tokens),
                token_ids=tuple(token.id for token in answer.tokens),
                margins=tuple(token.margin for token in answer.tokens),
            )
        )
        return answer

    def _last(self) -> str:
        if not self.texts:
            return "the draft said nothing"
        return f"{self.texts[-1].accepted:.0%} of its tokens drafted right"

    def _findings(
        self, health: Mapping[str, Any], target: Worker, draft: Worker, shares: bool
    ) -> Findings:
        plain, turns = self.timings["plain"], self.timings["sync"]
        if not (self.texts and plain.passes[1] and all(self.timings[m].drafted for m in DRAFTING)):
            raise ConfigError("the answers were too short, or the draft too slow, to measure")
        # in turns every message is waited for
        ways = [some or [2 * UNSEEN_S] for some in (turns.to_target, turns.to_draft)]
        link_s, draft_link_s = (max(1e-6, usual(some) / 2) for some in ways)
        read = [seconds for mode in DRAFTING for seconds in self.timings[mode].read]
        return Findings(
            target=replace(target, link_s=link_s),
            draft=replace(draft, link_s=draft_link_s),
            shares=shares,
            curve_s=curve(health, "target"),
            prefill_s=usual(self.reading) if self.reading else 0.0,
            read_s=usual(read) if read else curve(health, "draft")[-1],
            timings=self.timings,
            texts=tuple(self.texts),
            tokens=self.tokens,
            near_ties=self.near_ties,
            differences=tuple(map(str, self._differences())),
            differ_near=all(one.is_near for one in self._differences()),
        )

    def _differences(self) -> list[Any]:
        """Where two modes differ, as far as both have answered."""
        return [one for one in self.results.differences() if one.margin is not None]


@dataclass(frozen=True, slots=True)
class Question:
    """A text to go on from."""

    category: str
    number: int
    text: str
    cache: str  # which texts may share what was read
    blocks: int  # drafted tokens in each


def worker(health: Mapping[str, Any], role: Role) -> Worker:
    """The worker of this role, as the coordinator knows it. Raises ConfigError."""
    workers = health["workers"].items()
    name, told = next(((n, one) for n, one in workers if one.get("role", n) == role), (role, None))
    if told is None:
        why = health["refused"].get(role, "")
        raise ConfigError(f"there is no {role} worker to examine{why and ': '}{why}")
    names = "model", "device", "build", "cores", "here", "memory", "rollback_s"
    more: dict[str, Any] = {name: told[name] for name in names}
    return Worker(**more, crowd_s=curve(health, f"{name}_crowd"))


def curve(health: Mapping[str, Any], name: str) -> Curve:
    """What the worker has measured when it was loaded, by number: see `wire.Hello`."""
    told = health["costs"][name]
    return tuple(told[str(n)] for n in range(1, len(told) + 1))
