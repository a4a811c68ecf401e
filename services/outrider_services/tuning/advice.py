"""What the user is told of a decision: what was chosen, why it gains little, what would gain more.

Every figure is one that was measured on this machine, or the forecast that follows from those.
"""

from __future__ import annotations

from outrider.engines import processor
from outrider.engines.llama import library
from outrider_services.tuning import decisions, forecasts
from outrider_services.tuning.decisions import Decision, Trial, Variant

PAYS = 1.1  # a gain below is not worth the second model
LITTLE = 1.15  # after an answer that gained less, a text is named that gains more
WANTED = 1.2  # the gain of which is told what it would take
SHOWN_ROWS = 4  # of the pass whose cost is told
CODE = "code"  # the text, by its name in texts.toml, whose gain is told after an answer
QUESTION = "Write a Python function that merges two sorted lists, with docstring and type hints."


def described(decision: Decision) -> str:
    """What was chosen and what to expect; where that is little, what was measured, line by line."""
    if not decision.trials:
        return "Draft: used as given."
    trial, best = decision.chosen()
    return "\n".join([choice(trial, best), *explanation(trial, best)])


def choice(trial: Trial, best: Variant) -> str:
    """The choice in one sentence."""
    given = trial.variants[0]
    gain = f"expect {forecasts.gain(trial, best):.1f}x the target alone"
    by_text = {name: f"{of:.1f}x" for name, of in forecasts.gains(trial, best).items()}
    if len({*by_text.values()}) > 1:
        gain += f" ({', '.join(f'{name} {of}' for name, of in by_text.items())})"
    if best is given:
        return f"Draft: used as given, no other type is faster here; {gain}."
    return (
        f"Draft: re-quantised to {best.quant}, {1000 * best.draft_s:.1f} ms a token instead of "
        f"{1000 * given.draft_s:.1f}; {gain}, instead of {forecasts.gain(trial, given):.1f}x."
    )


def explanation(trial: Trial, best: Variant) -> list[str]:
    """Why little is to be expected, and what would change that; nothing where the draft pays."""
    if forecasts.gain(trial, best) >= PAYS:
        return []
    paying = [name for name, gain in forecasts.gains(trial, best).items() if gain >= PAYS]
    where = f"pays on {' and '.join(paying)} alone" if paying else "does not pay"
    if not paying:  # none of the drafts does: which of them came nearest says most
        best = max(trial.variants, key=lambda one: forecasts.gain_of_drafting(trial, one))
    return [
        f"A draft {where} on this processor. {costs(trial, best)}",
        *filter(None, (needs(trial, best), apart(trial, best), compiler())),
    ]


def costs(trial: Trial, best: Variant) -> str:
    """What was measured, and what it comes to."""
    step_s, rows = trial.curve_s[0], min(SHOWN_ROWS, len(trial.curve_s))
    drafting = f": drafting before every pass gives {forecasts.gain_of_drafting(trial, best):.2f}x"
    return (
        f"A plain step of the target takes {1000 * step_s:.0f} ms. In such steps, a pass over "
        f"{rows} rows costs {trial.curve_s[rows - 1] / step_s:.1f} and a token of the draft "
        f"({named(best)}) {best.draft_s / step_s:.2f}; {best.acceptance:.0%} of its tokens are "
        f"accepted{'' if trial.pipelined else drafting}."
    )


def needs(trial: Trial, best: Variant) -> str:
    """What each of the measured figures would have to be, were the others to stay."""
    step_s = trial.curve_s[0]
    row = (trial.curve_s[-1] / step_s - 1) / max(1, len(trial.curve_s) - 1)
    found = []
    if (needed := forecasts.acceptance_for(WANTED, trial, best)) is not None:
        found.append(f"{needed:.0%} accepted instead of {best.acceptance:.0%}")
    if (needed := forecasts.row_for(WANTED, trial, best)) is not None:
        found.append(f"a further row at {needed:.2f} steps instead of {row:.2f}")
    if (needed := forecasts.draft_for(WANTED, trial, best)) is not None:
        found.append(f"a drafted token at {needed:.2f} instead of {best.draft_s / step_s:.2f}")
    if not found:
        return f"No better draft, cheaper draft or cheaper row alone would make it {WANTED:g}x."
    any_ = "Any of these" if len(found) > 1 else "This"
    return f"{any_} alone would make it {WANTED:g}x: {', or '.join(found)}."


def named(one: Variant) -> str:
    """Its type, as a user is told it."""
    return "as given" if one.quant == "off" else one.quant


def apart(trial: Trial, best: Variant) -> str:
    """What a second device would bring, if that is enough."""
    gain = forecasts.gain_apart(trial, best)
    if trial.pipelined or gain < PAYS:
        return ""
    return f"With the draft on a device of its own, as fast as this one, expect {gain:.1f}x."


def compiler() -> str:
    """What another build of llama.cpp did elsewhere, where this one is such as was slow there."""
    instructions = processor.instructions()
    if "avx2" not in instructions or "amx_int8" in instructions or not library.built_by_gcc():
        return ""
    return (
        "llama.cpp was built by gcc here; built by clang with libomp, it verified 8 rows in half "
        "to 3/4 of the time on processors with AVX2: `outrider setup --again` chooses anew."
    )


def build() -> str:
    """Which llama.cpp it is that was measured."""
    found = "llama.cpp of llama-cpp-python " + (
        decisions.version("llama-cpp-python") or "(unknown)"
    )
    return f"{found}, built by {library.built_by() or 'an unknown compiler'}"


def turns(trial: Trial) -> str:
    """What taking turns makes of the costs."""
    if trial.pipelined:
        return "alone, as target and draft are here"
    passes, drafting = trial.turns
    return (
        f"alone; in turns with the draft a pass costs {passes:.2f} times as much, and a drafted "
        f"token {drafting:.2f} times, which is counted below"
    )


def headline(trial: Trial) -> str:
    """How a trial shares the cores."""
    where = "on the same cores"
    if trial.target_cores or trial.draft_cores:
        where = f"target on {trial.target_cores or 'all'}, draft on {trial.draft_cores or 'all'}"
    how = "at the same time" if trial.pipelined else "in turn"
    return f"{where}, {how}; the target alone: {trial.plain_rate:.1f} tokens/s"


def afterwards(
    decision: Decision, gained: float | None, command: str, *, explained: bool
) -> str | None:
    """The line behind an answer that `gained` little; None: there is nothing to say.

    `command` is how outrider can be called from here; `explained`: that drafts do not pay here was
    said before the answer.
    """
    if gained is None or gained >= LITTLE or not decision.trials:
        return None
    expected = forecasts.gains(*decision.chosen()).get(CODE)
    if expected is None:
        return None
    if expected < LITTLE:
        return (
            None
            if explained
            else (
                f"Little was gained on this text, and code would gain little more here (expect "
                f"{expected:.2f}x): `{command} tune` explains why."
            )
        )
    return (
        f'Little was gained on this text; code gains more here: {command} run --chat "{QUESTION}" '
        f"(expect about {expected:.1f}x)"
    )
