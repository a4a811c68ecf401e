"""Branches of a real draft model: sequences that begin as copies, in one cache with the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outrider.core.branches import RANKS
from outrider.core.drafter import Opening
from outrider.core.engine import Fork, Part
from outrider.core.sampling import Sampling
from outrider.engines.drafter import ModelDrafter
from outrider.engines.llama import engine
from outrider.engines.llama.engine import LlamaEngine
from outrider.engines.llama.setup import LlamaSettings, make_context
from outrider.errors import ModelUnusable

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]

SETTINGS = LlamaSettings(
    context=256,
    slots=2,
    threads=1,
    batch=128,
    ubatch=128,
    drafts=True,
    unified=True,
    spare=4,
    tiled=False,  # llama.cpp asks once in a process, and other tests want it so
)
GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=0.8, seed=4)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_branch_goes_on_as_its_text_would(test_model: Path, sampling: Sampling) -> None:
    loaded = LlamaEngine.load(test_model, SETTINGS)
    drafter = ModelDrafter(loaded)
    try:
        assert (drafter.info.slots, drafter.info.spare, len(drafter.crowd_s)) == (2, 4, 6)
        text = tuple(loaded.tokenize("Once upon a time, there was a little", special=True))
        other = tuple(loaded.tokenize("The cat sat on", special=True))
        opening = Opening(sampling, loaded.info.vocabulary.size)
        for slot, prompt in enumerate((text, other)):
            drafter.open(slot, opening)
            drafter.propose(slot, prompt)
        (first,) = drafter.propose(0, text)
        others = drafter.others(0)
        assert len(set(others) | {first.token}) == 1 + len(RANKS)
        main = (*text, first.token)
        branches = [(*text, token) for token in others]
        for slot in range(2, 6):
            drafter.fork(0, slot, len(text))
        rows = [(0, main), (1, other), *zip(range(2, 6), branches, strict=True)]
        together = [found[0].token for found in drafter.propose_all(rows)]
        for _, prompt in rows:  # each alone, in a sequence of its own
            drafter.open(1, opening)
            assert drafter.propose(1, prompt)[0].token == together.pop(0)
        drafter.open(1, opening)
        # the text goes on in a branch's place, and the branch in the text's
        drafter.fork(2, 0, len(text) + 1)
        assert drafter.read(0) == len(text) + 1
        goes_on = (*branches[0], drafter.propose(1, branches[0])[0].token)
        (mine,), (its,) = drafter.propose(0, goes_on), drafter.propose(1, goes_on)
        assert mine.token == its.token
    finally:
        drafter.close()


def test_branches_are_held_where_rows_are_cheap_only() -> None:
    asked = LlamaSettings(context=256, slots=2, threads=1, branches=16)
    found = asked.for_cheap_rows(has_states=False)
    assert found is not None
    assert (found.spare, found.unified, found.all_slots) == (16, True, 18)
    assert found.cells == 2 * 256 + 16 * 32
    assert found.for_cheap_rows(has_states=False) is None
    assert asked.for_cheap_rows(has_states=True) is None
    assert LlamaSettings(256, 2, 1, branches=16, exact=True).for_cheap_rows(False) is None


def test_a_draft_without_room_for_branches_drafts_without(
    test_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spares: list[int] = []

    def make(lib: Any, path: Path, model: Any, settings: LlamaSettings, devices: Any) -> Any:
        spares.append(settings.spare)
        if settings.spare:
            raise ModelUnusable("no room for its cache")
        return make_context(lib, path, model, settings, devices)

    monkeypatch.setattr(engine, "make_context", make)
    monkeypatch.setattr(engine, "rows_are_cheap", lambda one: True)
    asked = LlamaSettings(256, 2, 1, drafts=True, branches=4, tiled=False)
    found = LlamaEngine.load(test_model, asked)
    try:
        assert spares == [0, 4, 0]
        assert (found.info.slots, found.info.spare) == (2, 0)
        assert found.tokenize("Once upon a time", special=True)
    finally:
        found.close()


def test_what_is_evaluated_beside_a_block_is_scored_as_its_text_is(test_model: Path) -> None:
    model = LlamaEngine.load(test_model, SETTINGS)
    try:
        text = model.tokenize("Once upon a time, there was a little", special=True)
        block = model.tokenize(" girl who lived", special=True)
        one, other = (model.tokenize(said, special=True) for said in (" boy named", " dog"))
        model.extend(0, text, 0)
        model.extend(1, text[:3], 0)
        forks = Fork(3, len(text) + 1, other), Fork(2, len(text), one)
        parts = [Part(0, block, len(block), forks), Part(1, text[3:4], 1)]
        first, second = (rows.copy() for rows in model.extend_all(parts))
        assert len(first) == len(block) + len(other) + len(one)
        texts = [[*text, *block[: n + 1]] for n in range(len(block))]
        texts += [[*text, block[0], *other[: n + 1]] for n in range(len(other))]
        texts += [[*text, *one[: n + 1]] for n in range(len(one))]
        for known, row in zip([*texts, text[:4]], [*first, second[0]], strict=True):
            model.rewind(1, 0)
            (alone,) = model.extend(1, known, 1)
            assert abs(alone - row).max() < 0.05
        # not a bit of what comes behind depends on what was evaluated beside the block
        for slot in (2, 3):
            model.rewind(slot, 0)
        model.rewind(0, len(text))
        mine = model.extend(0, [*one, *block], 1)[0].copy()
        for slot in (0, 1):
            model.rewind(slot, 0)
        model.extend(0, text, 0)
        assert (model.extend(0, [*one, *block], 1)[0] == mine).all()
        for bad in (Fork(1, len(text), one), Fork(2, 1, one)):
            with pytest.raises(ValueError, match="cannot fork"):
                model.extend_all([Part(0, block, 0, (bad,))])
    finally:
        model.close()
