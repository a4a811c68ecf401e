"""The whole algorithm in one thread: whatever is drafted, the text is the target's own."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from itertools import islice

import pytest
from tests.oracle import NoDraft, alone

from outrider.core.drafter import Drafter
from outrider.core.reference import generate
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, TokenId
from outrider.engines.drafter import ModelDrafter
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.engines.toy_text import END, SMALLEST

PROMPT = tuple(b"the old river ")
COUNT = 150
GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=11)
PENALISED = Sampling(
    temperature=0.8, repeat_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, seed=5
)
samplings = pytest.mark.parametrize(
    "sampling", [GREEDY, WARM, PENALISED], ids=["greedy", "warm", "penalised"]
)


class Wrong(NoDraft):
    """Has read everything, and says what has nothing to do with it."""

    def __init__(self) -> None:
        self.length = 0
        self.asked = 0

    def cut(self, slot: int, length: int) -> None:
        self.length = min(self.length, length)

    def read(self, slot: int) -> int:
        return self.length

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        self.length = len(text)
        self.asked += 1
        return tuple(Drafted(token, 1.0) for token in self.ideas(text))

    def ideas(self, text: Sequence[TokenId]) -> list[TokenId]:
        raise NotImplementedError


class Guesses(Wrong):
    """One or more tokens at random, now and then none, now and then what the text repeats."""

    def ideas(self, text: Sequence[TokenId]) -> list[TokenId]:
        rng = random.Random(f"{list(text)} {self.asked}")
        return [rng.randrange(SMALLEST) for _ in range(rng.choice([0, 1, 1, 3, 7]))]


class Ends(Wrong):
    """Believes that it is over, and goes on all the same."""

    def ideas(self, text: Sequence[TokenId]) -> list[TokenId]:
        return [END, END, 65]


class Speechless(Wrong):
    def ideas(self, text: Sequence[TokenId]) -> list[TokenId]:
        return []


class Lookup(Wrong):
    """What has followed the last four tokens before: right for a while, then not."""

    def ideas(self, text: Sequence[TokenId]) -> list[TokenId]:
        text, last = list(text), list(text[-4:])
        for at in range(len(text) - 5, 3, -1):
            if text[at - 3 : at + 1] == last:
                return text[at + 1 : at + 6]
        return []


class Looks:
    """A drafter that is watched: how often it was rolled back, and what it has said."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.cuts, self.said = 0, 0

    def cut(self, slot: int, length: int) -> None:
        self.cuts += 1
        self._drafter.cut(slot, length)

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        drafted = self._drafter.propose(slot, text)
        self.said += len(drafted)
        return drafted

    def __getattr__(self, name: str) -> object:
        return getattr(self._drafter, name)


def target(**settings: object) -> ToyEngine:
    return ToyEngine(ToySettings(**{"context": 512, **settings}))  # type: ignore[arg-type]


def model(agreement: float, chunk: int = 512) -> Drafter:
    return ModelDrafter(ToyEngine(ToySettings("draft", agreement=agreement, chunk=chunk)))


def first(blocks: Iterator[list[TokenId]], count: int = COUNT) -> list[TokenId]:
    return list(islice((token for block in blocks for token in block), count))


@samplings
@pytest.mark.parametrize("n_draft", [0, 1, 4, 8])
@pytest.mark.parametrize("agreement", [0.0, 0.8, 1.0], ids=["bad", "good", "perfect"])
def test_the_text_is_the_targets_however_much_is_drafted(
    sampling: Sampling, n_draft: int, agreement: float
) -> None:
    drafter = model(agreement)
    answer = first(generate(target(), drafter, PROMPT, sampling, n_draft))
    assert answer == first_alone(sampling)


def first_alone(sampling: Sampling, **settings: object) -> list[TokenId]:
    return list(islice(alone(target(**settings), PROMPT, sampling), COUNT))


def test_drafting_takes_fewer_passes() -> None:
    blocks = list(islice(generate(target(), model(0.9), PROMPT, GREEDY, 4), 40))
    assert max(map(len, blocks)) == 5  # four accepted, and the bonus
    assert sum(map(len, blocks)) > 100


def test_after_a_hit_the_draft_rides_on_and_after_a_miss_it_is_rolled_back() -> None:
    drafter, perfect = Looks(model(0.8)), Looks(model(1.0))
    list(islice(generate(target(), drafter, PROMPT, GREEDY, 4), 40))  # type: ignore[arg-type]
    list(islice(generate(target(), perfect, PROMPT, GREEDY, 4), 40))  # type: ignore[arg-type]
    assert 5 < drafter.cuts < 35
    assert perfect.cuts == 0
    assert perfect.said < 40 * 5 + 10  # each token is drafted once
    assert drafter.said > 40 * 5  # what is void is drafted anew


@samplings
@pytest.mark.parametrize("drafter", [Guesses, Ends, Speechless, Lookup])
@pytest.mark.parametrize("n_draft", [1, 4])
def test_a_drafter_that_is_wrong_changes_nothing(
    sampling: Sampling, drafter: type[Wrong], n_draft: int
) -> None:
    made = drafter()
    assert first(generate(target(), made, PROMPT, sampling, n_draft)) == first_alone(sampling)
    assert made.asked > 10


@pytest.mark.parametrize("n_draft", [0, 1, 4, 8])
@pytest.mark.parametrize("make", [lambda: model(1.0), Guesses, Ends], ids=["model", "any", "ends"])
def test_it_ends_behind_an_end_token(n_draft: int, make: object) -> None:
    expected = first_alone(WARM, end_probability=0.1)
    assert expected[-1] == END
    assert 10 < len(expected) < COUNT
    engine, drafter = target(end_probability=0.1), make()  # type: ignore[operator]
    answer = [
        token for block in generate(engine, drafter, PROMPT, WARM, n_draft) for token in block
    ]
    assert answer == expected


@pytest.mark.parametrize("n_draft", [0, 4])
def test_a_long_prompt_is_read_in_parts_by_both(n_draft: int) -> None:
    prompt = PROMPT * 12
    whole = first(generate(target(), NoDraft(), prompt, GREEDY, 0))
    parts = first(generate(target(chunk=10), model(0.8, chunk=16), prompt, GREEDY, n_draft))
    assert parts == whole


def test_an_end_token_in_the_prompt_is_not_the_end() -> None:
    blocks = generate(target(), model(0.8), (*PROMPT, END), GREEDY, 4)
    assert len(first(blocks, 30)) == 30


def test_it_can_be_read_on_a_page() -> None:
    assert len(inspect.getsource(generate).splitlines()) <= 40


class GoesBackInSteps(ToyEngine):
    """Keeps the state after every eighth token alone."""

    def rewind(self, slot: int, length: int) -> None:
        super().rewind(slot, length - length % 8 if length < self.length(slot) else length)


@samplings
@pytest.mark.parametrize("n_draft", [1, 4, 16])
def test_a_target_that_goes_back_farther_than_asked_says_the_same(
    sampling: Sampling, n_draft: int
) -> None:
    blocks = generate(
        GoesBackInSteps(ToySettings(context=512)), model(0.7), PROMPT, sampling, n_draft
    )
    assert first(blocks) == first_alone(sampling)


# ---- controls -----------------------------------------------------------------------------------


class SkipsTheRewind(ToyEngine):
    """Wrong on purpose: what it evaluated in vain stays."""

    def rewind(self, slot: int, length: int) -> None:
        pass


@pytest.mark.parametrize("n_draft", [1, 4])
def test_control_a_target_that_is_not_rolled_back_is_caught(n_draft: int) -> None:
    wrong = SkipsTheRewind(ToySettings(context=2048))
    with pytest.raises((AssertionError, ValueError)):
        assert first(generate(wrong, model(0.8), PROMPT, WARM, n_draft)) == first_alone(WARM)
