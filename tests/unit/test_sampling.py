"""`choose`: its filters against plain re-tellings, its shortcuts against the full computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.core import noise as noises
from outrider.core import race
from outrider.core import sampling as under_test
from outrider.core.logprobs import logprob
from outrider.core.noise import HIGHEST_NOISE, LOWEST_NOISE, mix
from outrider.core.sampling import (
    FAR,
    NEAR,
    BadScores,
    Noise,
    Sampling,
    Scores,
    choose,
    decide,
    gumbel,
    propose,
)
from outrider.core.values import TokenId
from outrider.errors import BadRequest

quiet = settings(derandomize=True, database=None, deadline=None)
seeds = st.integers(0, 2**63 - 1)
positions = st.integers(0, 2**31)


def scores(*values: float) -> Scores:
    return np.array(values, np.float32)


def bell(size: int, seed: int, spread: float, leaders: int = 0) -> Scores:
    """A row like a language model's: many unlikely ids and `leaders` above them."""
    random = np.random.default_rng(seed)
    row = (random.standard_normal(size) * spread).astype(np.float32)
    if leaders:
        row[random.integers(0, size, leaders)] = np.linspace(3, 6, leaders) * spread
    return row


# --- the full computation, told plainly -----------------------------------------------------------


def penalised(row: Scores, given: Sampling, history: Sequence[TokenId]) -> Scores:
    """As `common_sampler` and `llama_sampler_penalties_apply` do it, one id at a time."""
    row = row.copy()
    for token, bias in given.logit_bias:
        if token < row.size:
            row[token] += np.float32(bias)
    last_n = len(history) if given.repeat_last_n == -1 else given.repeat_last_n
    recent = list(history)[max(0, len(history) - last_n) :]
    for token in set(recent):
        if token >= row.size:
            continue
        logit, repeat = row[token], np.float32(given.repeat_penalty)
        logit = logit * repeat if logit <= 0 else logit / repeat
        logit -= np.float32(recent.count(token)) * np.float32(given.frequency_penalty)
        row[token] = logit - np.float32(given.presence_penalty)
    return row


def kept_ids(row: Scores, given: Sampling, position: int) -> tuple[list[TokenId], float]:
    """The ids that survive, and the temperature: sort once, then let each filter shorten the list.

    In llama.cpp what top-n-sigma leaves out stays in the list with a logit of -inf.
    """
    logits = row.astype(np.float64)
    ranked = np.lexsort((np.arange(row.size), -logits))
    if given.top_n_sigma > 0:
        bar = np.float32(logits.max() - given.top_n_sigma * logits[logits > -math.inf].std())
        logits = np.where(logits >= bar, logits, -math.inf)
    if given.top_k:
        ranked = ranked[: given.top_k]
    if given.typical_p < 1:
        law = law_of(logits[ranked])
        strange = np.abs(-np.log(law, where=law > 0, out=np.full_like(law, -1e9)) - entropy(law))
        order = np.argsort(strange, kind="stable")
        count = int(np.searchsorted(np.cumsum(law[order]), given.typical_p, side="right")) + 1
        ranked = ranked[np.sort(order[:count])]
    if given.top_p < 1:
        held = np.cumsum(law_of(logits[ranked]))
        ranked = ranked[: int(np.searchsorted(held, given.top_p * held[-1])) + 1]
    if given.min_p > 0:
        floor = np.float32(logits[ranked[0]] + math.log(given.min_p))
        ranked = ranked[logits[ranked] >= floor]
    drawn = given.xtc_probability >= noises.chance(noises.key_of(given.seed, position))
    if drawn and given.xtc_threshold <= 0.5:
        likely = int((law_of(logits[ranked]) >= given.xtc_threshold).sum())
        ranked = ranked[max(0, likely - 1) :]
    temperature, spread = given.temperature, given.dynatemp_range
    if spread > 0 and len(ranked) > 1:
        share = entropy(law_of(logits[ranked])) / math.log(len(ranked))
        low = max(0, temperature - spread)
        temperature = low + (temperature + spread - low) * share**given.dynatemp_exponent
    return sorted(ranked[logits[ranked] > -math.inf].tolist()), temperature


def law_of(logits: Noise) -> Noise:
    weights = np.exp(logits - logits.max())
    law: Noise = weights / weights.sum()
    return law


def entropy(law: Noise) -> float:
    return -math.fsum(p * math.log(p) for p in law[law > 0])


def full_choice(
    row: Scores, given: Sampling, history: Sequence[TokenId], position: int
) -> tuple[TokenId, Noise, float]:
    """The choice with noise for every surviving id, its distribution, and by how much it won."""
    row = penalised(row, given, history)
    kept, temperature = kept_ids(row, given, position)
    has_xtc = given.xtc_probability > 0 and given.xtc_threshold <= 0.5
    if given.temperature == given.dynatemp_range == 0 and given.typical_p == 1 and not has_xtc:
        kept = list(range(row.size))  # no filter leaves out the likeliest
    ids = np.array(kept)
    if temperature == 0:
        scaled = noisy = row[ids].astype(np.float64) - float(row[ids].max())
    else:
        scaled = (row[ids].astype(np.float64) - float(row[ids].max())) / temperature
        noisy = scaled + gumbel(given.seed, position, ids.astype(np.uint64))
    winner = int(np.argmax(noisy))
    law = np.exp(scaled) / np.exp(scaled).sum()
    rivals = np.delete(noisy, winner)
    lead = noisy[winner] - rivals.max() if rivals.size else math.inf
    return int(ids[winner]), law, float(lead) * (temperature or 1.0)


def check(row: Scores, given: Sampling, history: Sequence[TokenId] = (), position: int = 0) -> None:
    before = row.copy()
    chosen = choose(row, given, history, position)
    expected, _, margin = full_choice(row, given, history, position)
    assert chosen == expected
    decided, by = decide(row, given, history, position)
    assert decided == expected
    if margin < NEAR:
        assert by == pytest.approx(margin, rel=1e-6, abs=1e-5 * (given.temperature or 1.0))
    else:
        assert NEAR <= by <= FAR
    assert propose(row, given, history, position).token == expected
    assert row.tobytes() == before.tobytes()


# --- noise ----------------------------------------------------------------------------------------


def test_mix_gives_the_published_splitmix64_sequence() -> None:
    state = np.array([1234567], np.uint64) + np.arange(5, dtype=np.uint64) * noises._GOLDEN
    assert mix(state).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert int(mix(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF


GOLDEN = [  # seed, position, id, noise: written down once; a change breaks every recorded text
    (0, 0, 0, -0.6807578025137786),
    (0, 0, 1, -0.5252187692498729),
    (0, 1, 0, -0.27197909140562093),
    (1, 0, 0, 1.0051587347812545),
    (42, 1000, 151935, -0.5272382669577786),
    (9223372036854775807, 2147483647, 2147483647, 0.25072210159492314),
]


@pytest.mark.parametrize(("seed", "position", "token", "noise"), GOLDEN)
def test_the_noise_never_changes(seed: int, position: int, token: TokenId, noise: float) -> None:
    assert gumbel(seed, position, np.array([token], np.uint64))[0] == pytest.approx(
        noise, rel=1e-12
    )


@pytest.mark.parametrize(("seed", "position", "token", "noise"), GOLDEN)
def test_the_noise_is_that_of_plain_integers(
    seed: int, position: int, token: TokenId, noise: float
) -> None:
    def plain_mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    uniform = ((plain_mix(plain_mix(plain_mix(seed) ^ position) ^ token) >> 12) + 0.5) / 2**52
    assert -math.log(-math.log(uniform)) == pytest.approx(noise, rel=1e-12)


def test_the_noise_of_an_id_does_not_depend_on_its_company() -> None:
    everyone = gumbel(5, 7, np.arange(1000, dtype=np.uint64))
    some = np.array([3, 500, 999], np.uint64)
    assert gumbel(5, 7, some).tolist() == everyone[[3, 500, 999]].tolist()


def test_the_extreme_uniforms_give_finite_noise_within_the_bounds() -> None:
    lowest, highest = 0.5 * 2.0**-52, ((2**52 - 1) + 0.5) * 2.0**-52
    assert 0 < lowest < highest < 1
    assert -math.log(-math.log(lowest)) == pytest.approx(LOWEST_NOISE)
    assert -math.log(-math.log(highest)) == pytest.approx(HIGHEST_NOISE)


# --- exact shortcuts ------------------------------------------------------------------------------

filters = st.builds(
    Sampling,
    temperature=st.sampled_from([0, 0.05, 0.1, 0.5, 0.7, 1.0, 2.0, 10.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 40]),
    top_p=st.sampled_from([1.0, 1.0, 0.0, 0.3, 0.9, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    seed=seeds,
)
penalties = st.builds(
    Sampling,
    temperature=st.sampled_from([0, 0.1, 1.0]),
    repeat_penalty=st.sampled_from([1.0, 1.1, 0.8, 2.0]),
    repeat_last_n=st.sampled_from([-1, 0, 1, 4, 64]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
    logit_bias=st.lists(st.tuples(st.integers(0, 12), st.floats(-50, 50, width=32))).map(tuple),
    seed=seeds,
)
few_scores = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=12)


@quiet
@given(few_scores, filters, positions)
def test_small_rows_with_ties_are_filtered_as_told(
    values: list[float], given: Sampling, position: int
) -> None:
    check(scores(*values), given, position=position)


@quiet
@given(few_scores, penalties, st.lists(st.integers(0, 14), max_size=80), positions)
def test_penalties_and_biases_are_applied_as_told(
    values: list[float], given: Sampling, history: list[TokenId], position: int
) -> None:
    check(scores(*values), given, history, position)


@settings(quiet, max_examples=60)
@given(
    st.sampled_from([4095, 4097, 9000, 20_001]),
    seeds,
    st.sampled_from([0.01, 0.5, 2.5, 8.0]),
    st.sampled_from([0, 1, 30]),
    filters,
    positions,
)
def test_large_rows_are_chosen_from_as_by_the_full_computation(
    size: int, row_seed: int, spread: float, leaders: int, given: Sampling, position: int
) -> None:
    check(bell(size, row_seed, spread, leaders), given, position=position)


samplers = st.builds(
    Sampling,
    temperature=st.sampled_from([0, 0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 7, 40]),
    top_p=st.sampled_from([1.0, 1.0, 0.3, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    typical_p=st.sampled_from([1.0, 1.0, 0.0, 0.2, 0.7, 0.97]),
    top_n_sigma=st.sampled_from([-1.0, 0.0, 0.1, 1.0, 3.0]),
    dynatemp_range=st.sampled_from([0.0, 0.3, 1.0]),
    dynatemp_exponent=st.sampled_from([1.0, 0.0, 0.5, 3.0]),
    xtc_probability=st.sampled_from([0.0, 0.5, 1.0]),
    xtc_threshold=st.sampled_from([0.01, 0.1, 0.5, 0.6]),
    seed=seeds,
)


@settings(quiet, max_examples=150)
@given(
    st.sampled_from([1, 2, 3, 20, 300, 2000]),
    seeds,
    st.sampled_from([0.1, 1.0, 2.5, 20.0]),
    st.sampled_from([0, 3]),
    samplers,
    positions,
)
def test_the_less_common_samplers_do_as_told(
    size: int, row_seed: int, spread: float, leaders: int, given: Sampling, position: int
) -> None:
    check(bell(size, row_seed, spread, leaders), given, position=position)


def test_control_another_order_of_the_samplers_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kept_ids

    def xtc_first(row: Scores, given: Sampling, position: int) -> tuple[list[TokenId], float]:
        first, _ = plain(row, Sampling(xtc_probability=1.0, seed=given.seed), position)
        masked = np.full_like(row, -math.inf)
        masked[first] = row[first]
        return plain(masked, given.changed(xtc_probability=0.0), position)

    monkeypatch.setitem(globals(), "kept_ids", xtc_first)
    with pytest.raises(AssertionError):
        check(scores(3, 2.9, 2.8, 0), Sampling(temperature=0, top_k=2, xtc_probability=1.0))


def test_the_chance_of_xtc_is_that_asked_for_and_the_same_for_the_same_seed_and_position() -> None:
    row = scores(5, 4.5, 0)
    given = Sampling(temperature=0, xtc_probability=0.3, seed=4)
    found = [choose(row, given, (), position) for position in range(3000)]
    assert set(found) == {0, 1}
    assert np.mean(found) == pytest.approx(0.3, abs=0.03)
    assert found == [choose(row, given, (1, 2), position) for position in range(3000)]
    others = [choose(row, given.changed(seed=5), (), position) for position in range(3000)]
    assert others != found


@pytest.mark.parametrize(
    "given",
    [
        {"typical_p": 1.0},
        {"top_n_sigma": 0.0},
        {"top_n_sigma": -0.5},
        {"dynatemp_range": 0.0, "dynatemp_exponent": 9.0},
        {"dry_multiplier": 0.0, "dry_base": 9.0, "dry_allowed_length": 0},
        {"dry_multiplier": 1.0, "dry_penalty_last_n": 0},
        {"xtc_probability": 0.0, "xtc_threshold": 0.0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.51},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_neutral_settings_change_nothing(given: dict[str, float], temperature: float) -> None:
    plain = Sampling(temperature=temperature, seed=3)
    text = [1, 2, 3, 1, 2, 3, 1, 2]
    for position, row in enumerate(bell(500, seed, 2.5, 5) for seed in range(20)):
        expected = decide(row, plain, text, position), propose(row, plain, text, position)
        changed = plain.changed(**given)
        assert (decide(row, changed, text, position), propose(row, changed, text, position)) == (
            expected
        )


def test_what_a_bias_forbids_is_no_part_of_the_deviation() -> None:
    row = bell(2000, 1, 2.0, 4)
    for token in (0, 7):
        given = Sampling(temperature=1.0, top_n_sigma=1.0, logit_bias=((token, -1e6),))
        forbidden = row.copy()
        forbidden[token] = -math.inf
        plain = given.changed(logit_bias=())
        for position in range(20):
            assert decide(row, given, (), position) == decide(forbidden, plain, (), position)


def test_the_confidence_of_a_choice_without_the_likeliest_is_its_share_of_the_others() -> None:
    row = scores(9, 8, 2, 2)
    given = Sampling(temperature=0, xtc_probability=1.0)
    weights = np.exp([8.0, 2, 2])
    assert propose(row, given, (), 0).token == 1
    assert propose(row, given, (), 0).confidence == pytest.approx(weights[0] / weights.sum())


def noisiest_wins(rule: Callable[[Scores, Sampling, int], TokenId]) -> None:
    """`rule` against the full computation where far outsiders do win now and then."""
    row = bell(20_000, 1, 2.0, 30)
    ids = np.arange(row.size, dtype=np.uint64)
    for temperature in (0.3, 0.7, 1.0, 1.5, 3.0):
        for position in range(150):
            scaled = (row.astype(np.float64) - float(row.max())) / temperature
            expected = int(np.argmax(scaled + gumbel(9, position, ids)))
            assert rule(row, Sampling(temperature=temperature, seed=9), position) == expected


def test_the_margin_of_every_near_tie_is_seen() -> None:
    close = 0
    for row in (bell(20_000, 1, 2.0, 30), bell(20_000, 1, 0.2)):  # few leaders, and nothing but
        for temperature in (0.3, 0.7, 1.0, 1.5):
            for position in range(30):
                given = Sampling(temperature=temperature, seed=9)
                check(row, given, position=position)
                close += full_choice(row, given, (), position)[2] < NEAR
    assert close > 40


def test_control_rivals_that_are_not_looked_for_are_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(race, "NEAR", 0.0)
    with pytest.raises(AssertionError):
        test_the_margin_of_every_near_tie_is_seen()


@pytest.mark.parametrize(
    ("row", "given"),
    [
        (scores(3.0), Sampling(temperature=0)),
        (scores(1.0, 3.0, 2.0), Sampling(temperature=0.7, top_k=1)),
    ],
    ids=["one-id", "one-that-is-left"],
)
def test_a_choice_without_rivals_wins_by_far(row: Scores, given: Sampling) -> None:
    assert decide(row, given, (), 0)[1] == FAR


def test_the_race_is_exact_at_every_temperature() -> None:
    noisiest_wins(lambda row, given, position: choose(row, given, (), position))


def test_control_a_bound_on_the_noise_that_is_too_tight_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(race, "_SPAN", 6.0)
    with pytest.raises(AssertionError):
        test_the_race_is_exact_at_every_temperature()


def test_control_running_the_leaders_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_BLOCK", 10**9)  # one block, of which nobody joins
    monkeypatch.setattr(race, "mix", lambda x: mix(x) if x.size < 9000 else np.zeros_like(x))
    with pytest.raises(AssertionError):
        test_the_race_is_exact_at_every_temperature()


def test_an_outsider_at_the_very_bound_still_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Highest noise against the lowest makes up for 40.34 nats, not for 40.35."""

    def noise_for(winner: TokenId) -> Callable[[object, np.ndarray], Noise]:
        return lambda _, ids: np.where(ids == winner, HIGHEST_NOISE, LOWEST_NOISE)

    row = np.full(6000, -1000.0, np.float32)
    row[10], row[4000] = 20.0, 20.0 - 40.34
    monkeypatch.setattr(race, "keyed", noise_for(4000))
    assert choose(row, Sampling(temperature=1), (), 0) == 4000
    row[4000] = 20.0 - 40.35
    assert choose(row, Sampling(temperature=1), (), 0) == 10


@quiet
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9),
    st.one_of(filters, samplers),
)
@example([3.4e38, -3.4e38], Sampling(temperature=0.05))
@example([float("-inf"), 0.0], Sampling(top_p=0.9))
@example([float("-inf"), 0.0, 0.0], Sampling(xtc_probability=1.0, xtc_threshold=0.0))
@example([3.4e38, -3.4e38, 1.0], Sampling(top_n_sigma=1000.0, typical_p=0.5))
def test_any_row_gives_a_possible_token_or_is_refused(values: list[float], given: Sampling) -> None:
    row = scores(*values)
    if not math.isfinite(row.max()):
        with pytest.raises(BadScores):
            choose(row, given, (), 0)
        return
    choice = propose(row, given, (), 0)
    assert math.isfinite(row[choice.token])
    assert 0 <= choice.confidence <= 1


@pytest.mark.parametrize("temperature", [0, 0.1, 1])
@pytest.mark.parametrize("size", [8, 6000])
@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "an infinite score")])
def test_a_row_with_nan_or_infinity_is_refused(
    temperature: float, size: int, bad: float, word: str
) -> None:
    row = np.zeros(size, np.float32)
    row[size // 2] = bad
    for row[0] in (0.0, -math.inf):  # what else is there does not hide it
        with pytest.raises(BadScores, match=word):
            choose(row, Sampling(temperature=temperature), (), 0)
    with pytest.raises(BadScores):
        logprob(row, 0)


@pytest.mark.parametrize("row", [scores(), scores(-math.inf, -math.inf)], ids=["empty", "masked"])
def test_a_row_without_a_finite_value_is_refused(row: Scores) -> None:
    with pytest.raises(BadScores, match="no finite score"):
        choose(row, Sampling(), (), 0)


@pytest.mark.parametrize("temperature", [0, 1e-300, 5e-324])
def test_the_lowest_temperatures_choose_the_likeliest(temperature: float) -> None:
    row = bell(6000, 3, 2.0)
    assert choose(row, Sampling(temperature=temperature), (), 0) == int(row.argmax())


def test_a_vanishing_temperature_still_draws_among_ties() -> None:
    row = np.zeros(6000, np.float32)
    choice = propose(row, Sampling(temperature=1e-300), (), 0)
    assert choice.token == int(gumbel(0, 0, np.arange(6000, dtype=np.uint64)).argmax())
    assert choice.confidence == pytest.approx(1 / 6000)


# --- single cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Sampling(repeat_penalty=2, repeat_last_n=4), [-1, 0, 1, 3]),
        (Sampling(frequency_penalty=0.5, repeat_last_n=4), [-1, -0.5, 1, 3]),
        (Sampling(presence_penalty=0.5, repeat_last_n=4), [-1, -0.5, 1.5, 3]),
        (Sampling(repeat_penalty=2, repeat_last_n=1), [-0.5, 0, 1, 3]),
        (Sampling(repeat_penalty=2, repeat_last_n=0), [-0.5, 0, 2, 3]),
        (Sampling(repeat_penalty=2, repeat_last_n=-1), [-1, 0, 1, 1.5]),
        (Sampling(logit_bias=((0, 1.0), (0, 1.0), (3, -1.0))), [1.5, 0, 2, 2]),
        (Sampling(repeat_penalty=2, repeat_last_n=4, logit_bias=((0, 1.5),)), [0.5, 0, 1, 3]),
    ],
    ids=["repeat", "frequency", "presence", "last-1", "last-0", "all", "bias", "bias-comes-first"],
)
def test_penalties_are_those_of_llama_cpp(given: Sampling, expected: list[float]) -> None:
    row = scores(-0.5, 0, 2, 3)
    adjusted = under_test._adjust(row, given, [3, 0, 1, 2, 2])
    assert adjusted.tolist() == expected


def test_temperature_zero_takes_the_lowest_id_of_a_tie() -> None:
    assert choose(scores(1, 5, 5, 0), Sampling(temperature=0), (), 3) == 1


def test_the_confidence_at_temperature_zero_is_the_plain_softmax() -> None:
    choice = propose(scores(0, math.log(3)), Sampling(temperature=0, top_k=1), (), 0)
    assert choice.confidence == pytest.approx(0.75)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 2])
def test_the_confidence_above_is_the_softmax_of_the_logits_with_their_noise(
    temperature: float,
) -> None:
    row = scores(0, 1, -1, 0.5)
    for position in range(40):
        choice = propose(row, Sampling(temperature=temperature, top_k=2), (), position)
        noisy = np.exp(row + temperature * gumbel(0, position, np.arange(4, dtype=np.uint64)))
        assert choice.confidence == pytest.approx(noisy[choice.token] / noisy.sum(), rel=1e-5)


def test_a_low_temperature_makes_no_draft_sure_of_itself() -> None:
    """Its confidence is close to that at temperature 0, where it says how often it is right."""
    row = bell(50_000, 3, 2.0)
    greedy = propose(row, Sampling(temperature=0), (), 0)
    nearly = propose(row, Sampling(temperature=0.01), (), 0)
    assert nearly.token == greedy.token
    assert nearly.confidence == pytest.approx(greedy.confidence, rel=0.05)
    assert greedy.confidence < 0.5


def test_the_mass_of_tokens_without_a_chance_counts() -> None:
    """Only the likeliest get their noise; the others hold most of the mass all the same."""
    row = scores(6.0, *[0.0] * 5000)
    choice = propose(row, Sampling(temperature=0.01), (), 0)
    assert choice.token == 0
    assert choice.confidence == pytest.approx(math.exp(6) / (math.exp(6) + 5000), rel=0.1)


def test_top_k_keeps_the_lowest_ids_of_a_tie_at_its_end() -> None:
    row = np.zeros(5000, np.float32)
    row[[7, 300, 301, 4999]] = [2, 1, 1, 1]
    given = Sampling(temperature=50, top_k=3)
    assert {choose(row, given, (), n) for n in range(100)} == {7, 300, 301}


def test_top_p_zero_keeps_the_likeliest_alone() -> None:
    given = Sampling(temperature=10, top_p=0)
    assert {choose(scores(0, 1, 1), given, (), n) for n in range(50)} == {1}


def test_temperature_comes_last() -> None:
    """At temperature 1 the second id is outside the nucleus, at temperature 10 it would not be."""
    row = scores(math.log(9), 0)
    given = Sampling(temperature=10, top_p=0.85)
    assert {choose(row, given, (), n) for n in range(50)} == {0}


def test_ids_beyond_the_targets_vocabulary_are_never_chosen() -> None:
    row = scores(0, 1, 9, 9)
    for temperature in (0, 0.1, 5):
        given = Sampling(temperature=temperature)
        assert {choose(row, given, (), n, n_vocab=2) for n in range(40)} <= {0, 1}
    assert propose(row[:2], Sampling(), (), 0) == propose(row, Sampling(), (), 0, n_vocab=2)


def test_a_vocabulary_larger_than_the_row_masks_nothing() -> None:
    assert choose(scores(0, 1), Sampling(temperature=0), (), 0, n_vocab=10) == 1


def test_history_and_biases_beyond_the_row_are_skipped() -> None:
    given = Sampling(temperature=0, repeat_penalty=2, logit_bias=((99, 50.0),))
    assert choose(scores(1, 2), given, [99, 1, 1], 3) == 0


def test_the_draw_depends_on_position_and_seed() -> None:
    row = np.zeros(50, np.float32)
    by_position = {choose(row, Sampling(temperature=1), (), n) for n in range(50)}
    by_seed = {choose(row, Sampling(temperature=1, seed=n), (), 0) for n in range(50)}
    assert min(len(by_position), len(by_seed)) > 20


def test_logprob_is_the_plain_log_softmax() -> None:
    row = bell(5000, 2, 3.0)
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    assert logprob(row, 17) == pytest.approx(exact[17], rel=1e-5)
    assert logprob(scores(0, -math.inf), 1) == -math.inf


def test_a_read_only_row_is_fine() -> None:
    row = scores(1, 2, 3)
    row.flags.writeable = False
    assert choose(row, Sampling(temperature=0, repeat_penalty=9), [2], 1) == 1


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "0.7"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -2),
        ("presence_penalty", math.nan),
        ("frequency_penalty", 101),
        ("typical_p", 1.5),
        ("top_n_sigma", -2),
        ("dynatemp_range", -1),
        ("dynatemp_exponent", math.inf),
        ("dry_multiplier", -1),
        ("dry_base", 0.5),
        ("dry_allowed_length", 1025),
        ("dry_allowed_length", 1.5),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", ("é" * 21,)),
        ("xtc_probability", 2),
        ("xtc_threshold", -0.1),
        ("logit_bias", ((-1, 0.0),)),
        ("logit_bias", ((1, math.inf),)),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BadRequest, match=name) as caught:
        Sampling().changed(**{name: value})
    assert caught.value.param == name


def test_the_defaults_are_those_of_the_interface() -> None:
    given = Sampling()
    assert (given.temperature, given.top_k, given.top_p, given.min_p) == (0.1, 0, 1.0, 0.0)
    assert (given.repeat_penalty, given.presence_penalty, given.frequency_penalty) == (1, 0, 0)
