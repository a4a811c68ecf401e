"""Pictures of a benchmark: bars of speed-ups, and both workers' lanes over time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from outrider.core.values import Span
from outrider.errors import ConfigError
from outrider_services.bench.results import PLAIN, Results, Summary, geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Fate = Literal["accepted", "rejected", "hit", "discarded"]

# the palette of Okabe and Ito: the colour-blind can tell these apart, and their brightness differs
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
TARGET = "#5b6770"
FATES: dict[Fate, tuple[str, str, str]] = {  # colour, hatching, meaning
    "accepted": ("#009e73", "", "accepted"),
    "hit": ("#56b4e9", "..", "hit: the target's own choice, too"),
    "rejected": ("#d55e00", "////", "rejected by the target"),
    "discarded": ("#bbbbbb", "xxxx", "discarded unseen"),
}


def check_path(path: str) -> None:
    """Raises ConfigError, before anything is measured, if no picture can be made there."""
    if Path(path).suffix not in (".svg", ".png"):
        raise ConfigError(f"a picture ends in .svg or .png, not {path!r}")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no such directory")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: scripts/setup --extra plot")


# ---- speed-ups ----------------------------------------------------------------------------------


def bars(path: str, results: Results) -> None:
    """Write a picture: a group of bars for each category, in it a bar for each arm, as high as the
    arm is fast compared with plain. Raises ConfigError if the file cannot be written.
    """
    arms = [arm for arm in (*results.arms, *results.peers) if arm != PLAIN]
    summaries = {(s.category, s.arm): s for s in results.summaries()}
    groups = [*results.categories, *(["geometric\nmean"] if len(results.categories) > 1 else [])]
    width = 0.8 / max(1, len(arms))
    figure, (axes,) = _figure(max(7.0, 1.6 + 0.27 * len(groups) * (len(arms) + 1)), 4.4, 1)
    for index, arm in enumerate(arms):
        of = [summaries[category, arm] for category in results.categories]
        heights = [s.ratio for s in of]
        heights += [geometric_mean(heights)] * (len(groups) - len(of))
        at = [group + (index - (len(arms) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(at, heights, width * 0.94, color=_colour(index), label=arm, zorder=2)
        _spread(axes, at, of)
        if len(arms) <= 6:
            for x, height, top in zip(at, heights, _tops(of, heights), strict=True):
                axes.annotate(f"{height:.2f}", (x, top), (0, 2), textcoords="offset points",
                              ha="center", va="bottom", fontsize=7)  # fmt: skip
    axes.axhline(1, color="black", linewidth=1, zorder=3)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(x=0.01)
    axes.set_ylabel("speed over the target alone")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)
    axes.grid(axis="y", color="#e5e5e5", zorder=0)
    axes.set_title(results.header.get("machine", ""), fontsize=9, loc="left", color="#444444")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    _save(figure, path)


def _spread(axes: Axes, at: Sequence[float], of: Sequence[Summary]) -> None:
    """Lines from the least to the greatest ratio of any repetition."""
    below, above = [s.ratio - s.low for s in of], [s.high - s.ratio for s in of]
    middles = [s.ratio for s in of]
    axes.errorbar(at[: len(of)], middles, [below, above], fmt="none", ecolor="#333333",
                  elinewidth=0.9, capsize=2, zorder=4)  # fmt: skip


def _tops(of: Sequence[Summary], heights: Sequence[float]) -> list[float]:
    return [s.high for s in of] + list(heights[len(of) :])


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


# ---- lanes --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A target pass, or one drafted token, in seconds from the end of prefill."""

    lane: str
    start: float
    end: float
    label: str
    fate: Fate | None


def lanes(path: str, traces: Mapping[str, Sequence[Span]], seconds: float) -> None:
    """Write a picture of the first `seconds` of each trace, by mode: when each worker computed, and
    what became of each drafted token. Raises ConfigError if the file cannot be written.
    """
    from matplotlib.patches import Patch

    figure, axes = _figure(11.0, 1.3 + 1.55 * len(traces), len(traces))
    drawn = {mode: blocks(trace) for mode, trace in traces.items()}
    longest = max((block.end for of in drawn.values() for block in of), default=seconds)
    seconds = min(seconds, longest)
    for one, (mode, of) in zip(axes, drawn.items(), strict=True):
        shown = [block for block in of if block.start < seconds]
        _draw(one, shown, seconds)
        computing = sum(min(b.end, seconds) - b.start for b in shown if b.lane == "target")
        span = min(seconds, max((b.end for b in shown), default=seconds))
        idle = 1 - computing / span
        one.set_title(f"{mode}: target idle {max(0.0, idle):.0%}", fontsize=10, loc="left")
    axes[-1].set_xlabel("seconds after prefill")
    handles = [Patch(facecolor=TARGET, edgecolor="white", label="target pass (its rows)")]
    for colour, hatch, text in FATES.values():
        patch = Patch(facecolor=colour, edgecolor="white", hatch=hatch, label=text, linewidth=0)
        handles.append(patch)
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    _save(figure, path)


def _draw(axes: Axes, shown: Sequence[Block], seconds: float) -> None:
    heights = {"target": 1.0, "draft": 0.0}
    for block in shown:
        y, length = heights[block.lane], block.end - block.start
        colour, hatch, _ = FATES[block.fate] if block.fate else (TARGET, "", "")
        gap = min(0.1 * length, 0.001 * seconds)  # neighbours are told apart
        axes.barh(y, length - gap, 0.78, block.start + gap / 2, color=colour, hatch=hatch,
                  edgecolor="white", linewidth=0)  # fmt: skip
        middle = block.start + length / 2
        if block.label and length > seconds / 90 and middle < seconds:
            axes.text(middle, y, block.label, ha="center", va="center", color="white",
                      fontsize=8)  # fmt: skip
    axes.set_yticks([0.0, 1.0], ["draft", "target"])
    axes.set_ylim(-0.5, 1.5)
    axes.set_xlim(0, seconds)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def blocks(trace: Sequence[Span]) -> list[Block]:
    """What is drawn of a trace: target passes after prefill, and single drafted tokens."""
    passes = [span for span in trace if span.lane == "target"]
    if not passes:
        return []
    zero = passes[0].end
    found = [
        Block("target", one.start - zero, one.end - zero, str(one.rows), None) for one in passes[1:]
    ]
    fates = list(fates_of(trace))
    drafts = [span for span in trace if span.lane == "draft"]
    for span, of in zip(drafts, fates, strict=True):
        each = (span.end - span.start) / max(1, span.rows)
        for at, fate in enumerate(of):
            began = span.start + at * each - zero
            if began + each > 0:  # some draft while the target still reads the prompt
                found.append(Block("draft", max(0.0, began), began + each, "", fate))
    return found


def fates_of(trace: Sequence[Span]) -> Iterator[list[Fate]]:
    """For each span of the draft's lane: what became of its tokens, one by one.

    In a lineage everything is right up to the first token that the text contradicts. From there on,
    tokens in the block that the target then verified were rejected; it never saw the others.
    """
    text: dict[int, int] = {}
    kept: dict[int, bool] = {}  # by position: whether the text has it because it was drafted
    seen: dict[int, int] = {}  # by position committed: where the block of that pass ended
    for span in trace:
        if span.lane == "target":
            for at, token in enumerate(span.tokens):
                where = span.base + at
                text[where], seen[where] = token, span.base + span.rows - 1
                kept[where] = at < len(span.tokens) - 1
    wrong: dict[int, int] = {}  # by lineage: the position of its first wrong token
    for span in trace:
        if span.lane != "draft":
            continue
        of: list[Fate] = []
        lineage = span.number
        for where, token in enumerate(span.tokens, span.base):
            if lineage not in wrong and text.get(where) != token:
                wrong[lineage] = where
            if lineage not in wrong:
                of.append("accepted" if kept[where] else "hit")
            else:
                refused = seen.get(wrong[lineage], -1)
                of.append(
                    "rejected" if wrong[lineage] < refused and where < refused else "discarded"
                )
        yield of


# ---- the canvas ---------------------------------------------------------------------------------


def _figure(width: float, height: float, rows: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots(rows, 1, sharex=True, squeeze=False)
    every: list[Axes] = list(axes[:, 0])
    for one in every:
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return figure, every


def _save(figure: Figure, path: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "hatch.linewidth": 0.6}):
        try:
            figure.savefig(path, dpi=150)
        except OSError as exc:
            raise ConfigError(f"cannot write {path}: {exc.strerror}") from None
