"""The prompt for a gap: what stands where, and what is left out for want of room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.core.engine import ModelInfo
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.engines.toy_text import FIM
from outrider.errors import BadRequest
from outrider.wire.messages import Infill
from outrider_services.pipeline import infill

ENGINE = ToyEngine(ToySettings(context=512))


def shown(tokens: list[int]) -> str:
    return "".join(ENGINE.label(token) for token in tokens)


def asked(prefix: str = "", suffix: str = "", start: str = "", *extra: tuple[str, str]) -> Infill:
    return Infill(1, prefix, suffix, start, extra, room=16)


def test_the_order_is_files_prefix_suffix_and_the_start_of_the_answer() -> None:
    files = (("a.py", "A"), ("b.py", "B"))
    assert shown(infill.token_ids(ENGINE, asked("before", "after", "start", *files))) == (
        "<|repo_name|>myproject<0x0A><|file_sep|>a.py<0x0A>A<|file_sep|>b.py<0x0A>B"
        "<|file_sep|>filename<0x0A>"
        "<|fim_prefix|>before<|fim_suffix|>after<|fim_middle|>start"
    )


def test_without_files_there_is_no_head() -> None:
    tokens = infill.token_ids(ENGINE, asked("x", "y"))
    assert shown(tokens) == "<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>"


def test_markers_in_the_text_are_text() -> None:
    tokens = infill.token_ids(ENGINE, asked(FIM[1], FIM[2], FIM[0], (FIM[3], FIM[4])))
    controls = [token for token in tokens if token >= 256]
    assert [ENGINE.label(token) for token in controls] == [FIM[3], FIM[4], FIM[4], *FIM[:3]]


def test_what_is_far_from_the_gap_is_left_out_first() -> None:
    prefix = "".join(f"{n:04}" for n in range(200))
    files = [(f"{n}.py", "text " * 20) for n in range(9)]
    told = shown(infill.token_ids(ENGINE, asked("near", "", "", *files)))
    assert told.count("<|file_sep|>") == 5  # four files, and this one
    assert "8.py" in told
    assert "4.py" not in told
    cut = shown(infill.token_ids(ENGINE, asked(prefix, prefix, "go", *files)))
    assert "<|file_sep|>" not in cut
    before, _, after = cut.partition("<|fim_suffix|>")
    assert before.endswith("0199")
    assert after.startswith("0000")
    assert cut.endswith("<|fim_middle|>go")


def test_the_next_keystrokes_leave_the_cut_where_it_was() -> None:
    """So the text in front of it need not be read again."""
    starts = {
        tuple(infill.token_ids(ENGINE, asked("p" * (900 + n), "s", ""))[:256]) for n in range(40)
    }
    assert len(starts) <= 2


@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 300), st.integers(0, 9))
def test_there_is_always_room_for_the_answer(
    before: int, after: int, start: int, files: int
) -> None:
    extra = tuple((str(n), "x" * 90) for n in range(files))
    tokens = infill.token_ids(ENGINE, asked("p" * before, "s" * after, "m" * start, *extra))
    assert len(tokens) < 512 - 16


def test_a_start_without_end_is_refused() -> None:
    with pytest.raises(BadRequest, match="no room"):
        infill.token_ids(ENGINE, asked(start="x" * 500))


class Headless(ToyEngine):
    """A model that has no marker for files, or none at all, and begins each text."""

    def __init__(self, *, fills: bool) -> None:
        super().__init__()
        old = self.info
        assert old.markers
        markers = type(old.markers)(*(300, 301, 302)) if fills else None
        vocabulary = old.vocabulary.changed(bos=256, adds_bos=True)
        self.info = ModelInfo(
            name=old.name,
            vocabulary=vocabulary,
            context=old.context,
            slots=old.slots,
            chunk=old.chunk,
            device=old.device,
            markers=markers,
        )

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return [256, *super().tokenize(text, special=special)]


def test_a_model_without_markers_of_files_gets_snippets_and_begins_once() -> None:
    tokens = infill.token_ids(Headless(fills=True), asked("a", "b", "", ("f", "F")))
    snippet = list(infill.SNIPPET.encode())
    assert tokens == [256, *snippet, ord("F"), 300, ord("a"), 301, ord("b"), 302]


def test_a_model_without_markers_is_one_sentence() -> None:
    with pytest.raises(BadRequest, match="'toy-target' has no markers for filling gaps"):
        infill.token_ids(Headless(fills=False), asked())
