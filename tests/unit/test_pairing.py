"""Which drafts may serve a target: they must mean the same by every id."""

from __future__ import annotations

import pytest

from outrider.core.engine import Vocabulary
from outrider.errors import IncompatiblePair
from outrider_services.pipeline.vocabularies import BATCH, FIRST_COMPARED, PADDING, check_pair

SIZE = 2 * BATCH + 10  # three batches of texts
TARGET = Vocabulary("bpe", SIZE, 1, 2, True, False, (2, 7), "d1")


class Texts:
    """A worker that tells its tokens' texts and remembers what it was asked."""

    def __init__(self, different: dict[int, str] | None = None) -> None:
        self.different = different or {}
        self.asked: list[tuple[int, int]] = []

    async def __call__(self, start: int, count: int) -> tuple[str, ...]:
        self.asked.append((start, count))
        return tuple(self.different.get(n, f"t{n}") for n in range(start, start + count))


def like_target(**changes: object) -> Vocabulary:
    values = {name: getattr(TARGET, name) for name in TARGET.__struct_fields__}
    return Vocabulary(**{**values, **changes})


async def test_equal_fingerprints_pass_without_a_question() -> None:
    texts = Texts()
    await check_pair(TARGET, like_target(), texts, texts)
    assert texts.asked == []


@pytest.mark.parametrize(
    ("draft", "different"),
    [
        pytest.param(like_target(digest="d2"), {}, id="same-texts"),
        pytest.param(
            like_target(digest="d2"), {0: "x", FIRST_COMPARED - 1: "y"}, id="first-ids-may-differ"
        ),
        pytest.param(like_target(size=SIZE - PADDING, digest="d2"), {}, id="a-smaller-draft"),
        pytest.param(like_target(size=SIZE + PADDING, digest="d2"), {}, id="a-padded-draft"),
        pytest.param(
            like_target(size=SIZE + 3, digest="d2"), {SIZE: "z"}, id="padding-may-be-anything"
        ),
        pytest.param(like_target(eos=7), {}, id="an-end-token-that-nobody-adds"),
        pytest.param(like_target(ends=(2,)), {}, id="what-ends-is-the-targets-alone"),
    ],
)
async def test_a_pair_that_fits(draft: Vocabulary, different: dict[int, str]) -> None:
    await check_pair(TARGET, draft, Texts(), Texts(different))


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        pytest.param(
            like_target(kind="spm"), "vocabulary type is bpe in the target, spm", id="kind"
        ),
        pytest.param(like_target(bos=3), "begin-of-text token is 1 in the target, 3", id="bos"),
        pytest.param(like_target(bos=None), "is 1 in the target, None", id="no-bos"),
        pytest.param(like_target(adds_bos=False), "use of a begin-of-text token", id="adds-bos"),
        pytest.param(like_target(adds_eos=True), "use of an end-of-text token", id="adds-eos"),
        pytest.param(like_target(size=SIZE + PADDING + 1), "more than padding apart", id="larger"),
        pytest.param(like_target(size=SIZE - PADDING - 1), "more than padding apart", id="smaller"),
    ],
)
async def test_a_pair_that_does_not_fit(draft: Vocabulary, words: str) -> None:
    with pytest.raises(IncompatiblePair, match=words) as caught:
        await check_pair(TARGET, draft, Texts(), Texts())
    assert caught.value.token_id is None


async def test_begin_and_end_tokens_matter_only_where_they_are_added() -> None:
    texts = Texts()
    silent = like_target(adds_bos=False)
    await check_pair(silent, like_target(adds_bos=False, bos=3, eos=None), texts, texts)
    adding = like_target(adds_eos=True)
    with pytest.raises(IncompatiblePair, match="the end-of-text token is 2 in the target, 7"):
        await check_pair(adding, like_target(adds_eos=True, eos=7), texts, texts)


@pytest.mark.parametrize(
    "token", [FIRST_COMPARED, FIRST_COMPARED + BATCH - 1, FIRST_COMPARED + BATCH, SIZE - 1]
)
async def test_the_first_different_text_is_named(token: int) -> None:
    different = Texts({token: "x", SIZE - 1: "x"})
    with pytest.raises(IncompatiblePair) as caught:
        await check_pair(TARGET, like_target(digest="d2"), Texts(), different)
    assert caught.value.token_id == token
    assert str(caught.value) == f"token {token} is 't{token}' in the target, 'x' in the draft"


async def test_texts_are_asked_for_once_each_in_batches_from_the_first_that_counts() -> None:
    ours, theirs = Texts(), Texts()
    await check_pair(TARGET, like_target(size=SIZE - 7, digest="d2"), ours, theirs)
    assert ours.asked == theirs.asked
    ids = [n for start, count in ours.asked for n in range(start, start + count)]
    assert ids == list(range(FIRST_COMPARED, SIZE - 7))
    assert max(count for _, count in ours.asked) <= BATCH


async def test_cheap_differences_are_found_before_texts_are_asked_for() -> None:
    texts = Texts()
    with pytest.raises(IncompatiblePair):
        await check_pair(TARGET, like_target(bos=3, digest="d2"), texts, texts)
    assert texts.asked == []
