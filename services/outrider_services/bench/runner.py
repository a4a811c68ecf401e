"""`outrider bench`: how much faster than the target alone, and than llama.cpp's own programs.

One pipeline answers for all arms of ours. In each repetition of a prompt every arm answers it once,
and each time another arm begins: a machine that grows slower does so for all of them alike.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from outrider.client import AsyncClient, Completion, connect
from outrider.core.values import Span
from outrider.engines import processor
from outrider.errors import ConfigError
from outrider_services.bench import peers
from outrider_services.bench.plan import Arm, Plan, Prompt
from outrider_services.bench.results import Results, Sample, geometric_mean
from outrider_services.options import cores, offload
from outrider_services.pipeline.launcher import Launcher
from outrider_services.table import DraftOptions, Settings, TargetOptions
from outrider_services.terminal import News, tell

FINALISTS = 4  # lengths of a peer that are tried on more than the first prompt of a category


class Bench:
    """One measurement, from the first process to the last sample."""

    def __init__(self, plan: Plan, settings: Settings, programs: dict[str, Path]) -> None:
        self._plan, self._settings = plan, settings
        self._setup = peers.Setup.of(settings) if programs else None
        self._programs = programs
        self._peers: dict[str, peers.Peer] = {}
        self._client: AsyncClient | None = None
        self._best: dict[tuple[str, str], int] = {}  # by category and peer: the fastest length
        self._texts: dict[Prompt, str] = {}
        self.lanes: dict[str, tuple[Span, ...]] = {}
        self.results = Results(header(settings), tuple(arm.name for arm in plan.arms), plan.peers)

    async def run(self) -> None:
        for restart in range(self._plan.restarts):
            await self._once(restart)

    async def _once(self, restart: int) -> None:
        """Start everything, and let every arm answer everything."""
        async with AsyncExitStack() as stack:
            name = f"bench-{secrets.token_hex(4)}"
            with News() as news:
                launcher = Launcher(self._settings, name, news.report, news.log)
                await stack.enter_async_context(launcher)
            self._client = await stack.enter_async_context(connect(name))
            for peer, program in self._programs.items():
                assert self._setup
                made = peers.PEERS[peer](program, self._setup)
                self._peers[peer] = await stack.enter_async_context(made)
            for prompt in self._prompts():
                self._texts[prompt] = await self._render(prompt)
            await self._measure(restart)

    def _prompts(self) -> Iterator[Prompt]:
        for category in self._plan.categories:
            for number, text in enumerate(category.prompts):
                yield Prompt(category.name, number, text)

    async def _render(self, prompt: Prompt) -> str:
        """The text that the model reads, the same for our arms and for the peers."""
        assert self._client
        category = next(c for c in self._plan.categories if c.name == prompt.category)
        if not category.chat:
            return prompt.text
        return await self._client.apply_template(category.messages(prompt.text))

    async def _measure(self, restart: int) -> None:
        plan, all_prompts = self._plan, list(self._prompts())
        if not restart:
            await self._sweep()
        arms = [*(arm.name for arm in plan.arms), *plan.peers]
        for number in range(plan.warmup):
            for arm in arms:
                sample = await self._sample(arm, all_prompts[0], -1)
                tell(f"[warm-up {number + 1}/{plan.warmup}] {_line(sample)}")
        questions = list(schedule(arms, all_prompts, plan.repetitions, restart))
        for number, (prompt, repetition, arm) in enumerate(questions):
            sample = await self._sample(arm, prompt, repetition)
            self.results.samples.append(replace(sample, restart=restart))
            tell(f"[{number + 1}/{len(questions)}] {_line(sample)}")
        for mode in ("pipelined", "sync") if plan.lanes else ():
            answer = await self._ask(Arm(mode, mode), all_prompts[0], trace=True)
            self.lanes[mode] = answer.trace or ()

    async def _sweep(self) -> None:
        """Find the draft length with which each peer is fastest, category by category.

        Every length answers the first prompt once; the best few answer the other prompts too.
        """
        for name in self._peers:
            every = list(self._plan.peer_n_max)
            lengths = dict.fromkeys(self._tried(name), every)
            await self._try(name, lengths, lambda prompt: prompt.number == 0)
            lengths = {c: finalists(tried) for c, tried in self._tried(name).items()}
            await self._try(name, lengths, lambda prompt: prompt.number > 0)
            for category, tried in self._tried(name).items():
                self._best[category, name] = finalists(tried)[0]

    def _tried(self, peer: str) -> dict[str, dict[int, list[float]]]:
        """By category and length: the tokens per second that `peer` has reached so far."""
        return {
            category.name: self.results.sweeps.setdefault(category.name, {}).setdefault(peer, {})
            for category in self._plan.categories
        }

    async def _try(
        self, name: str, lengths: dict[str, list[int]], wanted: Callable[[Prompt], bool]
    ) -> None:
        peer, found = self._peers[name], self._tried(name)
        for n_max in self._plan.peer_n_max:  # outside, for a server starts anew for each
            for prompt in filter(wanted, self._prompts()):
                if n_max in lengths[prompt.category]:
                    text = self._texts[prompt]
                    answer = await peer.generate(text, self._plan.count, n_max)
                    found[prompt.category].setdefault(n_max, []).append(answer.tokens_per_s)
                    speed = f"{answer.tokens_per_s:.2f} tokens/s"
                    where = f"{prompt.category} {prompt.number + 1}"
                    tell(f"[sweep] {where}: {name} with n_max {n_max}, {speed}")
        await peer.stop()

    async def _sample(self, arm: str, prompt: Prompt, repetition: int) -> Sample:
        where = (prompt.category, prompt.number, repetition, arm)
        if peer := self._peers.get(arm):
            n_max = self._best[prompt.category, arm]
            told = await peer.generate(self._texts[prompt], self._plan.count, n_max)
            speed, rate = told.tokens_per_s, told.acceptance_rate
            return Sample(*where, speed, told.tokens, rate, n_max=n_max)
        answer = await self._ask(next(a for a in self._plan.arms if a.name == arm), prompt)
        stats, ids = answer.stats, tuple(token.id for token in answer.tokens)
        if not stats.decode_s or len(ids) < 2:
            raise ConfigError(f"{prompt.category}: the answer is too short to have a speed")
        return Sample(
            *where,
            (len(ids) - 1) / stats.decode_s,
            len(ids),
            stats.acceptance_rate,
            stats.mean_accepted_length,
            stats.target_busy,
            token_ids=ids,
            margins=tuple(token.margin for token in answer.tokens),
        )

    async def _ask(self, arm: Arm, prompt: Prompt, *, trace: bool = False) -> Completion:
        assert self._client
        length = arm.length
        return await self._client.create_completion(
            self._texts[prompt],
            max_tokens=self._plan.count,
            temperature=0,
            seed=0,
            mode=arm.mode,
            trace=trace,
            n_draft=length,
            n_min=length,
            p_min=None if length is None else 0.0,
            cache_prompt=False,
        )


def finalists(tried: Mapping[int, Sequence[float]]) -> list[int]:
    """The fastest lengths, the best first, of those that were tried on the most prompts."""
    most = max(map(len, tried.values()))
    means = {n_max: geometric_mean(of) for n_max, of in tried.items() if len(of) == most}
    return sorted(means, key=lambda n_max: -means[n_max])[:FINALISTS]


def schedule(
    arms: Sequence[str], all_prompts: Sequence[Prompt], repetitions: int, first: int = 0
) -> Iterator[tuple[Prompt, int, str]]:
    """Who answers what, in this order: prompt, number of the repetition, arm.

    Every arm answers once in each repetition of a prompt; each time another arm begins, and the
    one numbered `first` at first.
    """
    begun = first
    for category in dict.fromkeys(prompt.category for prompt in all_prompts):
        for repetition in range(repetitions):
            for prompt in (p for p in all_prompts if p.category == category):
                at = begun % len(arms)
                begun += 1
                for arm in (*arms[at:], *arms[:at]):
                    yield prompt, repetition, arm


def _line(sample: Sample) -> str:
    where = f"{sample.category} {sample.prompt + 1}"
    return f"{where}: {sample.arm}, {sample.tokens_per_s:.2f} tokens/s"


def header(settings: Settings) -> dict[str, str]:
    """What is told above the results: where, when and with what they were measured."""
    toy = settings.pipeline.backend == "toy"
    allowed = os.sched_getaffinity(0)

    def told(worker: TargetOptions | DraftOptions) -> str:
        if toy:
            return "a made-up model (--backend toy)"
        name, on = Path(worker.model or "").name, sorted(cores(worker.cores) or allowed)
        threads = min(worker.threads, len(on))
        text = f"{name}, {threads} thread{'s' * (threads > 1)} on cores {','.join(map(str, on))}"
        asked = offload(worker)
        gpus = ",".join(asked.devices) or "every GPU"
        layers = "all" if asked.layers < 0 else str(asked.layers)
        return f"{text}, {layers} layers on {gpus}" if asked.layers else text

    return {
        "machine": f"{processor.name()}, {len(allowed)} of {os.cpu_count()} cores usable",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": ", ".join(versions()),
        "target": told(settings.target),
        "draft": told(settings.draft),
        "command": shlex.join(["outrider", *sys.argv[1:]]),
    }


def versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for package in ("llama-cpp-python", "outrider"):
        try:
            found.insert(0, f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
