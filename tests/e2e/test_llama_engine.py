"""The engine over llama.cpp on real models, set up to be exact: logits are compared bit for bit."""

from __future__ import annotations

import dataclasses
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.core.engine import Cancelled, EngineFault, Part
from outrider.core.sampling import Scores
from outrider.core.values import TokenId
from outrider.engines.llama import engine as llama
from outrider.engines.llama.devices import Offload
from outrider.engines.llama.engine import LlamaEngine, LlamaSettings
from outrider.engines.llama.setup import LONG, attention
from outrider.errors import BadRequest, ModelNotFound, ModelUnusable
from outrider.wire.messages import Turn
from outrider_services.pipeline import conversation
from outrider_services.templates.chat_template import ChatTemplate

pytestmark = [pytest.mark.model, pytest.mark.timeout(180)]

TEXT = "A hash table stores pairs of keys and values; the place of a pair follows from its key."
MIXED = "Zoë says: 你好, мир! 👩‍👩‍👧 🙂 — naïve\tcafé\n\n"
EXACT = LlamaSettings(context=1024, slots=2, threads=1, batch=1024, ubatch=64, exact=True)
BLOCK = 8


@pytest.fixture(scope="module")
def engine(test_model: Path) -> Iterator[LlamaEngine]:
    engine = LlamaEngine.load(test_model, EXACT)
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["test_model", "default_draft", "default_target"])
def each_engine(request: pytest.FixtureRequest) -> Iterator[LlamaEngine]:
    engine = LlamaEngine.load(request.getfixturevalue(request.param), EXACT)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def cache_agrees_with_the_lengths(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test each slot holds what the engine says, and is emptied."""
    yield
    for name in {"engine", "each_engine"} & set(request.fixturenames):
        used: LlamaEngine = request.getfixturevalue(name)
        for slot in range(used.info.slots):
            assert cached(used, slot) == used.length(slot)
            used.rewind(slot, 0)


def cached(engine: LlamaEngine, slot: int) -> int:
    end: int = engine._lib.llama_memory_seq_pos_max(engine._memory, slot)
    return end + 1


def fresh(engine: LlamaEngine, tokens: list[TokenId], rows: int) -> Scores:
    """The logits of a prefill into an empty slot."""
    engine.rewind(1, 0)
    return engine.extend(1, tokens, rows).copy()


def equal(one: Scores, other: Scores) -> bool:
    return one.shape == other.shape and np.array_equal(one, other)


def test_an_engine_that_has_nothing_to_do_leaves_its_cores_to_others(test_model: Path) -> None:
    """Its OpenMP threads wait without sleeping only while they evaluate."""
    engine = LlamaEngine.load(test_model, dataclasses.replace(EXACT, threads=2))
    engine.extend(0, engine.tokenize(TEXT, special=False), 1)
    time.sleep(0.05)
    wall, cpu = time.perf_counter(), time.process_time()
    time.sleep(0.4)
    assert time.process_time() - cpu < 0.25 * (time.perf_counter() - wall)
    engine.close()


def test_a_process_that_has_evaluated_comes_to_an_end(test_model: Path) -> None:
    """OpenMP's threads are waited for then, also those that were sent to sleep."""
    program = (
        "import sys; from pathlib import Path; from outrider.engines.llama.engine import *\n"
        "settings = LlamaSettings(context=64, slots=1, threads=2)\n"
        "engine = LlamaEngine.load(Path(sys.argv[1]), settings)\n"
        "engine.extend(0, [5], 1)\n"
        "engine.close()"
    )
    subprocess.run([sys.executable, "-c", program, str(test_model)], check=True, timeout=60)


def test_prefilling_in_chunks_equals_prefilling_at_once(engine: LlamaEngine) -> None:
    tokens = engine.tokenize(TEXT, special=False)
    chunks = [tokens[:1], tokens[1:4], tokens[4:5], tokens[5:13], tokens[13:]]
    rows = np.concatenate([engine.extend(0, chunk, len(chunk)).copy() for chunk in chunks])
    assert equal(rows, fresh(engine, tokens, len(tokens)))


def test_only_the_last_rows_are_returned(engine: LlamaEngine) -> None:
    tokens = engine.tokenize(TEXT, special=False)
    every = fresh(engine, tokens, len(tokens))
    for rows in (0, 1, 3):
        engine.rewind(0, 0)
        scores = engine.extend(0, tokens, rows)
        assert scores.dtype == np.float32
        assert equal(scores, every[len(tokens) - rows :])


def test_after_a_rejection_at_each_position_the_cache_equals_a_fresh_prefill(
    each_engine: LlamaEngine,
) -> None:
    tokens = each_engine.tokenize(TEXT, special=False)
    prompt, drafted, (correction, follower) = tokens[:8], tokens[12 : 12 + BLOCK], tokens[9:11]
    each_engine.extend(0, prompt[:-1], 0)
    for accepted in range(BLOCK + 1):
        each_engine.rewind(0, len(prompt) - 1)
        each_engine.extend(0, [prompt[-1], *drafted], BLOCK + 1)
        each_engine.rewind(0, len(prompt) + accepted)
        after = each_engine.extend(0, [correction, follower], 2).copy()
        committed = [*prompt, *drafted[:accepted], correction, follower]
        assert each_engine.length(0) == len(committed)
        assert equal(after, fresh(each_engine, committed, 2)), f"{accepted} accepted"


def test_control_a_rejected_token_left_in_the_cache_is_noticed(engine: LlamaEngine) -> None:
    tokens = engine.tokenize(TEXT, special=False)
    prompt, drafted, correction = tokens[:8], tokens[12:16], tokens[9]
    engine.extend(0, [*prompt, *drafted], 0)
    engine.rewind(0, len(prompt) + 3)
    stale = engine.extend(0, [correction], 1).copy()
    assert not equal(stale, fresh(engine, [*prompt, *drafted[:2], correction], 1))


def test_slots_do_not_influence_each_other(engine: LlamaEngine) -> None:
    tokens = engine.tokenize(TEXT, special=False)
    alone = np.concatenate([engine.extend(0, [token], 1).copy() for token in tokens[:6]])
    engine.rewind(0, 0)
    together = []
    for token in tokens[:6]:
        engine.extend(1, tokens[3:9], 2)
        together.append(engine.extend(0, [token], 1).copy())
        engine.rewind(1, engine.length(1) - 4)
    assert equal(alone, np.concatenate(together))


@pytest.mark.parametrize("lengths", [(1, 1), (3, 7), (12, 1)], ids=str)
def test_a_pass_over_two_sequences_gives_each_what_it_gets_alone(
    each_engine: LlamaEngine, lengths: tuple[int, int]
) -> None:
    """Bit for bit, whatever the lengths: so `--exact` keeps its promise for many requests."""
    tokens = each_engine.tokenize(TEXT, special=False)
    texts = [tokens, tokens[::-1]]
    alone = []
    for text, count in zip(texts, lengths, strict=True):
        each_engine.extend(0, text[:5], 0)
        alone.append(each_engine.extend(0, text[5 : 5 + count], count).copy())
        each_engine.rewind(0, 0)
    for slot, text in enumerate(texts):
        each_engine.extend(slot, text[:5], 0)
    parts = [
        Part(slot, text[5 : 5 + count], count)
        for slot, (text, count) in enumerate(zip(texts, lengths, strict=True))
    ]
    together = each_engine.extend_all(parts)
    assert all(equal(one, other) for one, other in zip(together, alone, strict=True))


def test_a_copied_beginning_is_as_good_as_one_that_was_read(engine: LlamaEngine) -> None:
    tokens = engine.tokenize(TEXT, special=False)
    engine.extend(0, tokens, 0)
    engine.copy(0, 1, 9)
    engine.rewind(0, 4)  # what becomes of the source does not matter
    engine.extend(0, tokens[:3], 0)
    after = engine.extend(1, tokens[9:12], 3).copy()
    assert equal(after, fresh(engine, tokens[:12], 12)[9:])


def test_in_a_unified_cache_slots_stay_apart_too(test_model: Path) -> None:
    """Shared passes, rollbacks and copies: what comes out differs by rounding at most."""
    settings = dataclasses.replace(EXACT, exact=False, unified=True, slots=3, context=256)
    engine = LlamaEngine.load(test_model, settings)
    tokens = engine.tokenize(TEXT, special=False)
    assert engine.info.context == 256
    alone = engine.extend(0, tokens, len(tokens)).copy()
    engine.rewind(0, 0)
    engine.extend_all([Part(0, tokens[:9], 0), Part(1, tokens[::-1], 0)])
    engine.rewind(1, 3)
    engine.copy(0, 2, 6)
    first, _, copied = engine.extend_all(
        [Part(0, tokens[9:12], 3), Part(1, tokens[:1], 1), Part(2, tokens[6:9], 3)]
    )
    assert np.allclose(first, alone[9:12], atol=0.5)
    assert np.allclose(copied, alone[6:9], atol=0.5)
    assert (first.argmax(axis=1) == alone[9:12].argmax(axis=1)).all()
    assert [engine.length(slot) for slot in range(3)] == [12, 4, 9]
    engine.close()


@pytest.mark.parametrize(("cheap", "unified"), [(99.0, True), (0.0, False)])
def test_the_cache_is_unified_where_further_rows_are_cheap(
    test_model: Path, monkeypatch: pytest.MonkeyPatch, cheap: float, unified: bool
) -> None:
    monkeypatch.setattr(llama, "CHEAP", cheap)
    settings = dataclasses.replace(EXACT, exact=False, unified=None, context=256)
    engine = LlamaEngine.load(test_model, settings)
    assert (engine._is_unified, engine.info.context) == (unified, 256)
    engine.close()


def test_a_pass_that_two_sequences_share_fails_for_both(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot in (0, 1):
        engine.extend(slot, [5, 6, 7], 0)
    with monkeypatch.context() as patch:
        patch.setattr(engine._lib, "llama_decode", lambda context, batch: -3)
        with pytest.raises(EngineFault):
            engine.extend_all([Part(0, [5], 1), Part(1, [5], 1)])
    assert (engine.length(0), engine.length(1)) == (0, 0)


@pytest.mark.parametrize(
    "parts",
    [
        [Part(0, [5], 1), Part(0, [6], 1)],
        [Part(0, [5] * 600, 1), Part(1, [5] * 600, 1)],
    ],
    ids=["one-slot-twice", "too-many-tokens"],
)
def test_what_is_not_one_pass_is_refused(engine: LlamaEngine, parts: list[Part]) -> None:
    with pytest.raises(ValueError, match="one pass"):
        engine.extend_all(parts)


def test_a_cancelled_prefill_leaves_the_former_length_and_a_sound_cache(
    engine: LlamaEngine,
) -> None:
    tokens = engine.tokenize(TEXT, special=False)
    engine.extend(0, tokens[:8], 0)
    done = threading.Event()

    def keep_cancelling() -> None:
        while not done.wait(0.05):  # long enough for some of the passes of 64 rows to be over
            engine.cancel()

    thread = threading.Thread(target=keep_cancelling)
    thread.start()
    try:
        with pytest.raises(Cancelled):
            engine.extend(0, (tokens * 64)[:1000], 1)
    finally:
        done.set()
        thread.join()
    assert engine.length(0) == cached(engine, 0) == 8
    assert equal(engine.extend(0, tokens[8:10], 2), fresh(engine, tokens[:10], 2))


def test_a_cancel_that_comes_too_late_does_not_touch_the_next_call(engine: LlamaEngine) -> None:
    engine.cancel()
    assert engine.extend(0, [1, 2, 3], 1).shape[0] == 1


class Broken:
    """The bindings, but for some functions that answer as told."""

    def __init__(self, lib: Any, **answers: Any) -> None:
        self._lib, self._answers = lib, answers

    def __getattr__(self, name: str) -> Any:
        if name in self._answers:
            return lambda *_: self._answers[name]
        return getattr(self._lib, name)


@pytest.mark.parametrize("code", [1, -1, -2, -3])
def test_a_failed_evaluation_empties_its_slot_and_no_other(
    engine: LlamaEngine, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.extend(0, [1, 2, 3], 0)
    engine.extend(1, [4, 5], 0)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_lib", Broken(engine._lib, llama_decode=code))
        with pytest.raises(EngineFault, match=f"2 tokens .code {code}."):
            engine.extend(0, [6, 7], 1)
    assert [engine.length(0), engine.length(1)] == [0, 2]
    assert [cached(engine, 0), cached(engine, 1)] == [0, 2]
    assert equal(engine.extend(0, [6, 7], 1), fresh(engine, [6, 7], 1))


def test_a_rewind_that_the_cache_refuses_is_a_fault(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.extend(0, [1, 2, 3], 0)
    cut = engine._cut
    monkeypatch.setattr(engine, "_cut", lambda slot, length: length == 0 and cut(slot, length))
    with pytest.raises(EngineFault, match="rewind slot 0 to 1"):
        engine.rewind(0, 1)
    assert engine.length(0) == cached(engine, 0) == 0


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"llama_model_has_decoder": False}, "continues a text"),
        ({"llama_model_is_diffusion": True}, "token by token"),
        ({"llama_vocab_type": 0}, "no vocabulary"),
        ({"llama_memory_seq_pos_max": -1}, "cannot take back single tokens"),
        ({"llama_decode": -3}, "first evaluation failed"),
        ({"llama_init_from_model": None}, "KV cache of about 0.0 GiB, 2 slots of 1024 tokens"),
    ],
    ids=str,
)
def test_a_model_that_cannot_serve_is_refused(
    answers: dict[str, Any], words: str, test_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(llama.library(untiled=True), **answers)
    monkeypatch.setattr(llama, "library", lambda untiled: broken)
    with pytest.raises(ModelUnusable, match=words):
        LlamaEngine.load(test_model, EXACT)


@pytest.mark.parametrize(
    ("slot", "tokens", "rows"),
    [
        pytest.param(-1, [1], 1, id="negative-slot"),
        pytest.param(2, [1], 1, id="slot-too-high"),
        pytest.param(0, [], 0, id="no-tokens"),
        pytest.param(0, [1] * 1025, 1, id="longer-than-a-chunk"),
        pytest.param(0, [1] * 1021, 1, id="beyond-the-context"),
        pytest.param(0, [-1], 1, id="negative-token"),
        pytest.param(0, [49_152], 1, id="token-beyond-the-vocabulary"),
        pytest.param(0, [2**31], 1, id="token-beyond-int32"),
        pytest.param(0, [2**70], 1, id="token-beyond-int64"),
        pytest.param(0, [1.5], 1, id="fractional-token"),
        pytest.param(0, [[1, 2]], 1, id="nested-tokens"),
        pytest.param(0, [1, 2], 3, id="more-rows-than-tokens"),
        pytest.param(0, [1, 2], -1, id="negative-rows"),
    ],
)
def test_arguments_out_of_range_leave_everything_as_it_was(
    engine: LlamaEngine, slot: int, tokens: list[Any], rows: int
) -> None:
    text = engine.tokenize(TEXT, special=False)
    engine.extend(0, text[:4], 0)
    with pytest.raises(ValueError):  # noqa: PT011 - each case has words of its own
        engine.extend(slot, tokens, rows)
    assert [engine.length(0), engine.length(1)] == [4, 0]
    assert equal(engine.extend(0, text[4:6], 1), fresh(engine, text[:6], 1))


def test_a_rewind_goes_only_backwards(engine: LlamaEngine) -> None:
    engine.extend(0, [1, 2, 3], 0)
    for slot, length in ((0, 4), (0, -1), (1, 1), (2, 0)):
        with pytest.raises(ValueError, match=r"rewind|slot"):
            engine.rewind(slot, length)
    assert engine.length(0) == 3


def test_a_context_can_be_filled_to_the_last_token_and_rewound(test_model: Path) -> None:
    settings = LlamaSettings(context=200, slots=1, threads=1, batch=128, exact=True)
    engine = LlamaEngine.load(test_model, settings)
    assert (engine.info.context, engine.info.chunk) == (256, 128)  # as llama.cpp rounds them
    engine.extend(0, [5] * 128, 0)
    engine.extend(0, [6] * 128, 1)
    with pytest.raises(ValueError, match="context of 256"):
        engine.extend(0, [1], 1)
    engine.rewind(0, 255)
    assert engine.extend(0, [7], 1).shape == (1, engine.info.vocabulary.size)
    engine.close()


def test_the_pieces_of_a_text_are_its_bytes(each_engine: LlamaEngine) -> None:
    for text in (TEXT, MIXED):
        tokens = each_engine.tokenize(text, special=False)
        assert b"".join(map(each_engine.piece, tokens)) == text.encode()
    assert each_engine.tokenize("", special=False) == []


def test_markers_are_control_tokens_only_if_asked_for(engine: LlamaEngine) -> None:
    (marker,) = engine.tokenize("<|im_end|>", special=True)
    assert engine.label(marker) == "<|im_end|>"
    assert engine.piece(marker) == b""
    assert marker in engine.info.vocabulary.ends
    typed = engine.tokenize("<|im_end|>", special=False)
    assert marker not in typed
    assert b"".join(map(engine.piece, typed)) == b"<|im_end|>"


def test_a_token_beyond_the_vocabulary_has_neither_piece_nor_label(engine: LlamaEngine) -> None:
    for token in (-1, engine.info.vocabulary.size):
        for ask in (engine.piece, engine.label):
            with pytest.raises(ValueError, match="not in the vocabulary"):
                ask(token)


def test_text_that_is_not_unicode_is_a_bad_request(engine: LlamaEngine) -> None:
    with pytest.raises(BadRequest, match="character 1"):
        engine.tokenize("a\ud800", special=False)
    with pytest.raises(BadRequest, match="NUL"):
        engine.render([("user", "a\0b")])


def test_a_chat_is_rendered_up_to_the_answer(engine: LlamaEngine) -> None:
    question = MIXED * 200  # longer than the first buffer
    text = engine.render([("system", "Be brief."), ("user", question)])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nZoë")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("👩‍👩‍👧") == 200


def test_a_system_message_that_a_template_would_drop_is_refused(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._text, "_template", b"<start_of_turn>")  # it is known by this
    monkeypatch.setattr(LlamaEngine, "chat_template", lambda self, name="": None)
    brief = Turn("system", "Be brief.")
    assert "Be brief." not in engine.render([("system", "Be brief.")])
    template = ChatTemplate(engine)
    with pytest.raises(BadRequest, match=r"leaves out messages\[0\]"):
        conversation.token_ids(engine, template, (brief,), None)
    turns = (brief, Turn("user", "Hi"))
    assert "Be brief.\n\nHi" in conversation.text(engine, template, turns, None)


def test_the_default_pair_has_one_vocabulary_and_another_model_another(
    default_target: Path, default_draft: Path, engine: LlamaEngine
) -> None:
    settings = LlamaSettings(context=256, slots=1, threads=1)
    found = []
    for path in (default_target, default_draft, default_draft):
        one = LlamaEngine.load(path, settings)
        found.append(one.info.vocabulary)
        one.close()
    assert found[0] == found[1] == found[2]
    assert found[0].digest != engine.info.vocabulary.digest


def test_a_closed_engine_refuses_to_work(test_model: Path) -> None:
    settings = LlamaSettings(context=256, slots=1, threads=1)
    shares: list[float] = []
    engine = LlamaEngine.load(test_model, settings, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    engine.close()
    engine.close()
    for call in (lambda: engine.extend(0, [1], 1), lambda: engine.rewind(0, 0)):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_what_the_progress_callback_raises_ends_the_loading(test_model: Path) -> None:
    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LlamaEngine.load(test_model, EXACT, stop)


def head(model: Path, path: Path, size: int) -> None:
    with model.open("rb") as file:
        path.write_bytes(file.read(size))


@pytest.mark.parametrize(
    ("write", "error", "words"),
    [
        pytest.param(lambda m, p: None, ModelNotFound, "no such file", id="missing"),
        pytest.param(lambda m, p: p.mkdir(), ModelUnusable, "cannot be read", id="directory"),
        pytest.param(lambda m, p: p.write_bytes(b""), ModelUnusable, "not a GGUF", id="empty"),
        pytest.param(lambda m, p: p.write_bytes(b"<html>"), ModelUnusable, "not a GGUF", id="html"),
        pytest.param(
            lambda m, p: p.write_bytes(b"GGUF" + bytes(range(256)) * 9),
            ModelUnusable,
            "cannot load",
            id="garbage",
        ),
        pytest.param(
            lambda m, p: head(m, p, 1000), ModelUnusable, "cannot load", id="cut-in-the-head"
        ),
        pytest.param(
            lambda m, p: head(m, p, 50_000_000), ModelUnusable, "cannot load", id="cut-short"
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(
    write: Callable[[Path, Path], Any],
    error: type[Exception],
    words: str,
    test_model: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.gguf"
    write(test_model, path)
    with pytest.raises(error, match=words) as caught:
        LlamaEngine.load(path, EXACT)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_into_memory_is_refused(test_model: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"weights would take about 0\.09 GiB.* 0\.00 GiB are"):
        LlamaEngine.load(test_model, EXACT, available=lambda: 1000)


def test_a_cache_that_does_not_fit_into_memory_is_refused(test_model: Path) -> None:
    settings = LlamaSettings(context=8192, slots=64, threads=1)
    with pytest.raises(ModelUnusable, match=r"workspace would take about 11\.\d+ GiB"):
        LlamaEngine.load(test_model, settings, available=lambda: 2**30)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("context", "ubatch"), [(1024, 512), (8192, 512), (8192, 128)])
def test_what_a_model_needs_is_told_and_is_about_what_it_takes(
    test_model: Path, caplog: pytest.LogCaptureFixture, context: int, ubatch: int, drafts: bool
) -> None:
    caplog.set_level("DEBUG", "outrider.engines.llama.engine")
    settings = LlamaSettings(context, slots=2, threads=1, ubatch=ubatch, drafts=drafts)
    engine = LlamaEngine.load(test_model, settings)
    engine.close()
    taken = sum(
        float(found[1]) * 2**20
        for found in re.finditer(r"(?:KV|compute) buffer size = +([\d.]+) MiB", caplog.text)
    )
    taken += test_model.stat().st_size
    with pytest.raises(ModelUnusable, match="its weights, KV cache and workspace") as caught:
        LlamaEngine.load(test_model, settings, available=lambda: int(0.9 * taken))
    told = re.findall(r"([\d.]+) GiB", str(caught.value))
    assert float(told[0]) == pytest.approx(taken / 2**30, rel=0.25)
    assert float(told[1]) == pytest.approx(0.9 * taken / 2**30, abs=0.01)


def test_what_another_process_takes_meanwhile_is_seen(test_model: Path) -> None:
    available = iter([2**40, 1000])
    with pytest.raises(ModelUnusable, match=r"and here 0\.09 GiB are available"):
        LlamaEngine.load(test_model, EXACT, available=lambda: next(available))


DRAFT = LlamaSettings(context=512, slots=1, threads=1, drafts=True)


@pytest.mark.parametrize(
    ("changes", "bf16", "expected"),
    [
        ({}, True, (True, "bf16", "bf16")),
        ({}, False, (True, "f16", "f16")),
        ({"context": LONG + 1}, True, (False, "f16", "f16")),
        ({"context": LONG + 1, "offload": Offload(-1)}, True, (True, "f16", "f16")),
        ({"exact": True}, True, (True, "f16", "f16")),
        ({"cache_type_k": "q8_0"}, True, (True, "q8_0", "f16")),
        ({"context": LONG + 1, "drafts": False}, True, (True, "f16", "f16")),
    ],
    ids=["bf16", "no-instructions", "long", "gpu", "exact", "types-are-given", "target"],
)
def test_only_a_draft_on_a_processor_computes_attention_its_own_way(
    changes: dict[str, Any], bf16: bool, expected: tuple[bool, str, str]
) -> None:
    assert attention(dataclasses.replace(DRAFT, **changes), bf16) == expected


def test_a_draft_pays_less_for_a_long_text_than_with_the_targets_attention(
    test_model: Path,
) -> None:
    target = LlamaSettings(context=LONG + 1, slots=1, threads=1)
    engines = [
        LlamaEngine.load(test_model, dataclasses.replace(target, drafts=drafts))
        for drafts in (False, True)
    ]
    seconds: list[list[float]] = [[], []]
    try:
        for engine in engines:
            for _ in range(2):
                engine.extend(0, [5] * 500, 0)
        for _ in range(15):
            for engine, spent in zip(engines, seconds, strict=True):
                began = time.perf_counter()
                engine.extend(0, [5], 1)
                spent.append(time.perf_counter() - began)
                engine.rewind(0, 1000)
    finally:
        for engine in engines:
            engine.close()
    as_target, as_draft = map(statistics.median, seconds)
    assert as_draft < as_target


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": 0},
        {"slots": 300},
        {"slots": 8, "batch": 4},
        {"cache_type_k": "q3"},
        {"cache_type_v": "q8_0", "flash_attention": False},
        {"exact": True, "offload": Offload(1)},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"slots|cache|exact"):
        LlamaSettings(**{"context": 256, "slots": 1, "threads": 1, **wrong})
