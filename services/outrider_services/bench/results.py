"""What a benchmark has measured, what follows from it, and how that is written.

In a *repetition* of a prompt every arm answers it once. Speeds are compared within a repetition
only: its answers are minutes apart at most, so the machine was about equally fast for all.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from outrider.core.sampling import NEAR

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. Its first token comes from prefill; `tokens_per_s` counts only those after it."""

    category: str
    prompt: int  # its number in the category
    repetition: int
    arm: str
    tokens_per_s: float
    tokens: int  # in the answer
    acceptance_rate: float | None = None
    mean_accepted_length: float | None = None
    target_busy: float | None = None
    n_max: int | None = None  # a peer's
    token_ids: tuple[int, ...] | None = None  # None: a peer tells only its speed
    margins: tuple[float, ...] = ()  # by how many logits each of them won
    restart: int = 0  # which start of the processes it is of

    @property
    def occasion(self) -> tuple[str, int, int, int]:
        """The repetition of the prompt of the category that it is of."""
        return self.category, self.prompt, self.restart, self.repetition


@dataclass(frozen=True, slots=True)
class Summary:
    """An arm in a category: medians over its samples; `ratio` is what `paired` finds."""

    category: str
    arm: str
    ratio: float  # of its speed to plain's in the same repetition
    low: float  # the least and the greatest such ratio
    high: float
    tokens_per_s: float
    acceptance_rate: float | None
    mean_accepted_length: float | None
    target_busy: float | None
    n_max: int | None
    samples: int


@dataclass(slots=True)
class Results:
    """Everything a benchmark found; `header` says where, when and with what."""

    header: dict[str, str]
    arms: tuple[str, ...]
    peers: tuple[str, ...] = ()
    samples: list[Sample] = field(default_factory=list)
    # by category, peer and most drafted tokens: the tokens per second on each prompt tried, when
    # the length was sought that suits the peer best
    sweeps: dict[str, dict[str, dict[int, list[float]]]] = field(default_factory=dict)

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(sample.category for sample in self.samples))

    def of(self, category: str, arm: str) -> list[Sample]:
        return [s for s in self.samples if (s.category, s.arm) == (category, arm)]

    def summaries(self) -> list[Summary]:
        return [
            summarize(of, self.of(category, PLAIN))
            for category in self.categories
            for arm in (*self.arms, *self.peers)
            if (of := self.of(category, arm))
        ]

    def means(self) -> dict[str, float]:
        """Each arm's geometric mean over the categories of its ratio to plain."""
        summaries = self.summaries()
        arms = dict.fromkeys(one.arm for one in summaries)
        return {arm: geometric_mean(s.ratio for s in summaries if s.arm == arm) for arm in arms}

    def by_restart(self) -> dict[str, list[float]]:
        """What `means` would be of each restart alone; nothing if there was only one."""
        restarts = sorted({sample.restart for sample in self.samples})
        alone = [
            replace(self, samples=[one for one in self.samples if one.restart == restart]).means()
            for restart in restarts
        ]
        return {arm: [of[arm] for of in alone] for arm in alone[0]} if len(restarts) > 1 else {}

    def against_peers(self) -> dict[str, dict[str, float]]:
        """By arm of ours and by category: how many times as fast it is as the best peer."""
        return {
            arm: {
                category: min(
                    paired(self.of(category, arm), self.of(category, peer)) for peer in self.peers
                )
                for category in self.categories
            }
            for arm in (self.arms if self.peers else ())
        }

    def differences(self) -> list[Difference]:
        """Where arms of ours first gave another token than plain; each place once."""
        plain: dict[tuple[str, int], Sample] = {}
        for sample in self.samples:
            if sample.arm == PLAIN:
                plain.setdefault((sample.category, sample.prompt), sample)
        found: dict[Difference, None] = {}
        for sample in self.samples:
            if difference := first_difference(sample, plain[sample.category, sample.prompt]):
                found[difference] = None
        return list(found)


@dataclass(frozen=True, slots=True)
class Difference:
    """An arm's first token that is not plain's. Where both were close, rounding may decide."""

    arm: str
    category: str
    prompt: int
    at: int  # which token of the answer, from 0
    margin: float | None  # by how many logits the closer choice won; None: one answer is shorter

    @property
    def is_near(self) -> bool:
        return self.margin is not None and self.margin < NEAR

    def __str__(self) -> str:
        closeness = "" if self.margin is None else f" (won by {self.margin:.3f} logits)"
        where = f"{self.arm} in {self.category}, prompt {self.prompt + 1}"
        return f"{where}, from token {self.at} on{closeness}"


def first_difference(sample: Sample, plain: Sample) -> Difference | None:
    ids, others = sample.token_ids, plain.token_ids
    if ids is None or others is None or ids == others:
        return None
    where = sample.arm, sample.category, sample.prompt
    for at, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return Difference(*where, at, min(sample.margins[at], plain.margins[at]))
    return Difference(*where, min(len(ids), len(others)), None)


def ratios(samples: Sequence[Sample], others: Sequence[Sample]) -> dict[int, list[float]]:
    """By prompt: how many times as fast each sample was as the other of the same repetition."""
    speed = {one.occasion: one.tokens_per_s for one in others}
    found: dict[int, list[float]] = {}
    for sample in samples:
        found.setdefault(sample.prompt, []).append(sample.tokens_per_s / speed[sample.occasion])
    return found


def paired(samples: Sequence[Sample], others: Sequence[Sample]) -> float:
    """How many times as fast `samples` are as `others`: the median over the repetitions of a
    prompt, and of those the geometric mean over the prompts.
    """
    return geometric_mean(map(median, ratios(samples, others).values()))


def summarize(samples: Sequence[Sample], plain: Sequence[Sample]) -> Summary:
    """What the samples of one arm in one category come to, against those of plain."""
    single = [ratio for of in ratios(samples, plain).values() for ratio in of]
    return Summary(
        samples[0].category,
        samples[0].arm,
        paired(samples, plain),
        min(single),
        max(single),
        median(s.tokens_per_s for s in samples),
        middle(s.acceptance_rate for s in samples),
        middle(s.mean_accepted_length for s in samples),
        middle(s.target_busy for s in samples),
        samples[0].n_max,
        len(samples),
    )


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


# ---- writing ------------------------------------------------------------------------------------


def as_json(results: Results) -> str:
    against = results.against_peers()
    found: dict[str, Any] = {
        "header": results.header,
        "geometric_means": results.means(),
        "geometric_means_by_restart": results.by_restart(),
        "results": [asdict(summary) for summary in results.summaries()],
        "against_best_peer": {
            arm: {"geometric_mean": geometric_mean(ratios.values()), "categories": ratios}
            for arm, ratios in against.items()
        },
        "identical": not results.differences(),
        "differences": [str(one) for one in results.differences()],
        "near_ties_only": all(one.is_near for one in results.differences()),
        "sweeps": results.sweeps,
        "samples": [asdict(sample) for sample in results.samples],
    }
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def as_csv(results: Results) -> str:
    text = io.StringIO()
    for name, value in results.header.items():
        text.write(f"# {name}: {value}\n")
    writer = csv.DictWriter(text, list(Summary.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(summary) for summary in results.summaries())
    return text.getvalue()


def as_markdown(results: Results) -> str:
    """Tables that can also be read as they are, without a Markdown viewer."""
    parts = ["# outrider bench\n"]
    parts += [f"- {name}: {value}" for name, value in results.header.items()]
    parts += ["\n## Speed over the target alone\n", _ratios(results)]
    if against := results.against_peers():
        rows = [
            [arm, *(f"{ratios[c]:.2f}" for c in results.categories), _mean(ratios.values())]
            for arm, ratios in against.items()
        ]
        parts += ["\n## Speed over the better peer\n"]
        parts += [table(["arm", *results.categories, "geometric mean"], rows)]
    if between := results.by_restart():
        head = ["arm", "restarts", "least", "median", "most"]
        rows = [
            [arm, str(len(of)), *(f"{x:.3f}" for x in (min(of), median(of), max(of)))]
            for arm, of in between.items()
        ]
        parts += ["\n## Geometric mean, restart by restart\n", table(head, rows)]
    parts += ["\n## Details\n", _details(results), "", _verdict(results)]
    return "\n".join(parts) + "\n"


def _ratios(results: Results) -> str:
    """A row for each arm, a column for each category: what everybody looks for first."""
    found = {(s.arm, s.category): s for s in results.summaries()}
    rows = [
        [arm, *(f"{found[arm, c].ratio:.2f}" for c in results.categories), f"{mean:.2f}"]
        for arm, mean in results.means().items()
    ]
    return table(["arm", *results.categories, "geometric mean"], rows)


def _details(results: Results) -> str:
    head = ["category", "arm", "speed-up", "least", "most", "tokens/s", "accepted", "mean length"]
    rows = []
    for s in results.summaries():
        arm = s.arm if s.n_max is None else f"{s.arm} (n_max {s.n_max})"
        speeds = [f"{x:.2f}" for x in (s.ratio, s.low, s.high, s.tokens_per_s)]
        figures = [_show(s.acceptance_rate, ".0%"), _show(s.mean_accepted_length, ".2f")]
        busy = _show(s.target_busy, ".0%")
        rows.append([s.category, arm, *speeds, *figures, busy])
    return table([*head, "target busy"], rows, left=2)


def _verdict(results: Results) -> str:
    found = results.differences()
    if not found:
        return "All arms of outrider gave the same token ids."
    places = "; ".join(map(str, found))
    if all(one.is_near for one in found):
        return f"Texts differ from plain, at near-ties that rounding decides: {places}."
    return f"Texts differ from plain: {places}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown, padded; the first `left` columns are words, the others figures."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if at < left else "-" * (width - 1) + ":" for at, width in enumerate(widths)
    ]
    return "\n".join(map(line, [head, rule, *rows]))


def _mean(values: Iterable[float]) -> str:
    return f"{geometric_mean(values):.2f}"


def _show(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)
