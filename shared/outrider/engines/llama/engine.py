"""The engine over llama.cpp: one GGUF model and its KV cache, through the ctypes bindings.

This is the only module that imports llama_cpp, and only when a model is loaded. An invalid call
kills the process inside the C library, so everything is checked here first. One thread owns an
engine: it calls `load`, `extend`, `rewind`, `close`. Until `close` any thread may call the rest.

Each slot is a stream of its own in the KV cache, so not one bit of what a request computes depends
on what the others have in theirs. But llama.cpp takes a pass in which slots have unequal numbers of
tokens apart, and evaluates several. Where further rows cost little that is dear (1, 3, 5 and 7 rows
took 1.8 times as long as in a unified cache), and where they cost much there are no drafts for
several requests, hence no unequal numbers, and streams are a tenth faster. So `load` measures a
row, if it may. In a unified cache, the order of the cells touches the last bits.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider.core.engine import Cancelled, EngineFault, ModelInfo, Part, tokens_of
from outrider.core.sampling import Scores
from outrider.core.values import TokenId
from outrider.engines.calibration import CHEAP, calibrate
from outrider.engines.llama.batch import Batch
from outrider.engines.llama.devices import Device, Offload, choose, present
from outrider.engines.llama.setup import (
    CANNOT_TAKE_BACK,
    NEEDED,
    LlamaSettings,
    Progress,
    check_file,
    check_kind,
    check_memory,
    describe_device,
    forward_log,
    load_model,
    make_context,
    metadata,
    needed,
    units,
)
from outrider.engines.llama.states import States, goes_back
from outrider.engines.llama.text import TextModel
from outrider.engines.memory import available_memory
from outrider.errors import InternalError, ModelUnusable

__all__ = ["LlamaEngine", "LlamaSettings", "Offload", "prepare_environment"]

DONE, ABORTED = 0, 2  # what llama_decode returns; everything else is a fault


class LlamaEngine:
    """`outrider.core.engine.Engine` over one GGUF file; made by `LlamaEngine.load`."""

    def __init__(
        self,
        lib: Any,
        model: Any,
        context: Any,
        info: ModelInfo,
        text: TextModel,
        drafts: bool = False,
    ) -> None:
        self.info = info
        self._is_unified = lib.llama_n_ctx_seq(context) == lib.llama_n_ctx(context)
        self._lib, self._model, self._context, self._text = lib, model, context, text
        self._memory = lib.llama_get_memory(context)
        slots = info.slots + info.spare
        self._batch = Batch(lib, info.chunk, slots)
        self._lengths = [0] * slots
        has_states = lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model)
        self._states = States(lib, context, slots, drafts) if has_states else None
        # llama.cpp asks after every graph node whether to stop. A Python callback would wait for
        # the interpreter each time; libc's strlen of this buffer is 0 or 1 and waits for nothing.
        self._stop, self._never = (ctypes.c_char * 2)(), (ctypes.c_char * 2)()
        self._asks = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        self._heed(self._stop)

    @classmethod
    def load(
        cls,
        path: Path,
        settings: LlamaSettings,
        progress: Progress = None,
        available: Callable[[], int] = available_memory,
    ) -> LlamaEngine:
        """Open the model in `path`; `progress` is told the loaded share, 0 to 1.

        Raises `ModelNotFound`, `ModelUnusable`, `ConfigError` where it names a device that is not
        there, or what `progress` raises to end the loading.
        """
        opened = functools.partial(cls._opened, path, progress, available)
        engine = opened(settings)
        better = settings.for_cheap_rows(bool(engine._states))
        if better is None or not rows_are_cheap(engine):
            return engine
        engine.close()
        with contextlib.suppress(ModelUnusable):  # no room for more; what was asked did fit
            return opened(better)
        return opened(settings)

    @classmethod
    def _opened(
        cls, path: Path, progress: Progress, available: Callable[[], int], settings: LlamaSettings
    ) -> LlamaEngine:
        size = check_file(path)
        room = math.inf if settings.offload.layers else available()
        check_memory(path, size, room, "its weights")
        lib = library(settings.exact or not settings.tiled)
        devices = choose(present(lib), settings.offload) if settings.offload.layers else ()
        with contextlib.ExitStack() as undo:
            model = load_model(lib, path, settings, devices, progress)
            undo.callback(lib.llama_model_free, model)
            check_kind(lib, path, model)
            if not devices:  # meanwhile another process, such as the other worker, has taken some
                room = min(room, available() + size)
                check_memory(path, needed(lib, model, settings, size), room, NEEDED)
            context = make_context(lib, path, model, settings, devices)
            undo.callback(lib.llama_free, context)
            text = TextModel(lib, model)
            info = ModelInfo(
                name=metadata(lib, model, "general.name") or path.stem,
                vocabulary=text.vocabulary,
                context=min(lib.llama_n_ctx_seq(context), settings.rounded_context),
                slots=settings.slots,
                spare=settings.spare,
                chunk=lib.llama_n_batch(context),
                device=describe_device(settings, devices),
                units=tuple(units(lib, model, settings, devices)),
                markers=text.markers,
            )
            engine = cls(lib, model, context, info, text, settings.drafts)
            engine._check_rollback(path)
            undo.pop_all()
            return engine

    def extend(self, slot: int, tokens: Sequence[TokenId], rows: int) -> Scores:
        """Append `tokens` to `slot`; see `Engine.extend`. On a GPU a `cancel` has no effect.

        The result lies in llama.cpp's own buffer: do not even read it after the next call.
        """
        return self.extend_all([Part(slot, tokens, rows)])[0]

    def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
        parts = [self._checked(part) for part in parts]
        total = sum(map(tokens_of, parts))
        if total > self.info.chunk or len({part.slot for part in parts}) < len(parts):
            raise ValueError(f"{len(parts)} parts with {total} tokens do not make one pass")
        if self._states and (first := self._states.split(parts)):
            self._pass(first)
            done = {part.slot: len(part.tokens) for part in first}
            parts = [Part(one.slot, one.tokens[done.get(one.slot, 0) :], one.rows) for one in parts]
        return self._pass(parts)

    def _pass(self, parts: Sequence[Part]) -> list[Scores]:
        self._stop[0] = b"\0"
        if self._states:
            may_stop = self._states.before(parts, self._lengths)
            self._heed(self._stop if may_stop else self._never)
        forks = [(part.slot, fork) for part in parts for fork in part.forks]
        for slot, fork in forks:
            self._clear(fork.slot)
            self._lib.llama_memory_seq_cp(self._memory, slot, fork.slot, -1, -1)
        code = self._lib.llama_decode(self._context, self._batch.fill(parts, self._lengths))
        if code != DONE:
            for _, fork in forks:
                self._clear(fork.slot)
        if code == ABORTED and all(
            self._go_back(one.slot, self._lengths[one.slot]) for one in parts
        ):
            raise Cancelled
        if code != DONE:
            # where states were being changed in place, not even the others' are certain
            for slot in range(len(self._lengths)) if self._states else [one.slot for one in parts]:
                self._clear(slot)
            total = sum(map(tokens_of, parts))
            raise EngineFault(f"llama.cpp could not evaluate {total} tokens (code {code})")
        for part in parts:
            self._lengths[part.slot] += len(part.tokens)
        for _, fork in forks:
            self._lengths[fork.slot] = fork.length + len(fork.tokens)
        if self._states:
            self._states.after(parts)
        rows = [part.rows + tokens_of(part) - len(part.tokens) for part in parts]
        shape = (sum(rows), self.info.vocabulary.size)
        if not sum(rows):
            return [np.empty((0, shape[1]), np.float32)] * len(parts)
        scores = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape=shape)
        return np.split(scores, np.cumsum(rows)[:-1])

    def rewind(self, slot: int, length: int) -> None:
        self._check_slot(slot)
        if not 0 <= length <= self._lengths[slot]:
            raise ValueError(f"cannot rewind {self._lengths[slot]} tokens to {length}")
        if length == 0:
            self._clear(slot)
        elif length < self._lengths[slot] and not self._go_back(slot, length):
            self._clear(slot)
            raise EngineFault(f"llama.cpp could not rewind slot {slot} to {length} tokens")

    def copy(self, source: int, slot: int, length: int) -> None:
        self._check_slot(source)
        self._check_slot(slot)
        if not 0 <= length <= self._lengths[source] or source == slot:
            raise ValueError(f"cannot copy {length} of {self._lengths[source]} tokens")
        self._clear(slot)
        if not length or (self._states and not self._states.can_be_copied):
            return
        # of a stream only the whole can be copied: with a range llama.cpp ends the process
        end = length if self._is_unified else -1
        self._lib.llama_memory_seq_cp(self._memory, source, slot, -1, end)
        if self._states:
            length = self._states.copy(source, slot, length, self._lengths[source])
        if not length:
            self._clear(slot)
            return
        if not self._cut(slot, length):
            self._clear(slot)
            raise EngineFault(f"llama.cpp could not copy slot {source} to {slot}")
        self._lengths[slot] = length

    def length(self, slot: int) -> int:
        self._check_slot(slot)
        return self._lengths[slot]

    def cancel(self) -> None:
        self._stop[0] = b"\1"

    def tokenize(self, text: str, *, special: bool) -> list[TokenId]:
        return self._text.tokenize(text, special)

    def piece(self, token: TokenId) -> bytes:
        return self._text.piece(token)

    def label(self, token: TokenId) -> str:
        return self._text.label(token)

    def chat_template(self, name: str = "") -> str | None:
        key = "tokenizer.chat_template" + (f".{name}" if name else "")
        return metadata(self._lib, self._model, key)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        return self._text.render(messages)

    def close(self) -> None:
        """Free the model and its cache; nothing else may be called afterwards."""
        if self._context is None:
            return
        self._lib.llama_set_abort_callback(self._context, self._lib.ggml_abort_callback(), None)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def _checked(self, part: Part) -> Part:
        """The same with arrays of tokens. Raises ValueError where it is out of range."""
        slot, tokens, rows, forks = part
        self._check_slot(slot)
        ids, before = self._ids(tokens), self._lengths[slot]
        if not 0 <= rows <= len(ids):
            raise ValueError(f"{rows} rows of {len(ids)} tokens")
        for fork in forks:
            self._check_slot(fork.slot)
            can_fork = self._is_unified and not self._states and fork.slot >= self.info.slots
            if not (can_fork and before <= fork.length <= before + len(ids)):
                raise ValueError(f"slot {fork.slot} cannot fork from {slot} at {fork.length}")
        ends = [before + len(ids), *(fork.length + len(fork.tokens) for fork in forks)]
        if max(ends) > self.info.context:
            raise ValueError(
                f"{max(ends)} tokens, {before} of them there before, exceed the context of "
                f"{self.info.context}"
            )
        forked = [fork._replace(tokens=self._ids(fork.tokens)) for fork in forks]
        return Part(slot, ids, rows, forked)

    def _ids(self, tokens: Sequence[TokenId]) -> Any:
        ids: NDArray[Any] = np.asarray(tokens)
        if ids.ndim != 1 or not 1 <= len(ids) <= self.info.chunk:
            raise ValueError(f"an array of {ids.shape} tokens, not 1 to {self.info.chunk} of them")
        if ids.dtype.kind not in "iu":
            raise ValueError("a token is not an integer of at most 64 bits")
        if ids.min() < 0 or ids.max() >= self.info.vocabulary.size:
            raise ValueError(f"a token is not in the vocabulary of {self.info.vocabulary.size}")
        return ids

    def _check_slot(self, slot: int) -> None:
        if self._context is None:
            raise ValueError("the engine is closed")
        if not 0 <= slot < len(self._lengths):
            raise ValueError(f"slot {slot} is not one of {len(self._lengths)}")

    def _heed(self, flag: Any) -> None:
        """End passes while `flag` is set."""
        where = ctypes.addressof(flag)
        self._lib.llama_set_abort_callback(self._context, self._asks, where)

    def _go_back(self, slot: int, length: int) -> bool:
        """Go back to `length` tokens, or fewer as `Engine.rewind` may; False: it did not work."""
        if self._states:
            length = self._states.restore(slot, length, self._lengths[slot])
        if not length:
            self._clear(slot)
            return True
        self._lengths[slot] = length
        return self._cut(slot, length)

    def _cut(self, slot: int, length: int) -> bool:
        """Remove all behind `length` tokens from the cache; True if exactly those are left."""
        removed = self._lib.llama_memory_seq_rm(self._memory, slot, length, -1)
        left = self._lib.llama_memory_seq_pos_max(self._memory, slot) + 1
        return bool(removed and left == length)

    def _clear(self, slot: int) -> None:
        self._lengths[slot] = 0
        if self._states:
            self._states.forget(slot)
        if not self._cut(slot, 0):
            raise InternalError(f"llama.cpp cannot clear slot {slot}")

    def _check_rollback(self, path: Path) -> None:
        """Raise ModelUnusable if only whole sequences can be dropped: a rollback drops a part."""
        try:
            for _ in range(2):
                self.extend(0, [0], 0)
        except EngineFault as exc:
            raise ModelUnusable(f"{path}: a first evaluation failed; {exc}") from exc
        removable = self._cut(0, 1) if not self._states else True
        self._clear(0)
        if not removable or (self._states and not goes_back(self)):
            raise ModelUnusable(f"{path}: {CANNOT_TAKE_BACK}")


def rows_are_cheap(engine: LlamaEngine) -> bool:
    """Whether a pass over four rows takes little longer than one over one."""
    one, *_, four = calibrate(engine, (1, 4))
    return four < CHEAP * one


def prepare_environment(untiled: bool) -> None:
    """Set the environment variables that llama.cpp reads once, when it is first used.

    So all engines of a process should agree on whether to do without the tiled kernels.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else a crash takes most of a second
    # an idle OpenMP thread must leave its core to the other worker, yet not sleep between two
    # layers. LLVM's runtime waits so many milliseconds: on two shared cores 1 and 0.2 were less
    # steady, 0 is half as fast, and in LLVM 22 no pause ends a longer wait. gcc's counts turns of a
    # loop: with its own count the default pair was five times slower than the target alone.
    os.environ.setdefault("KMP_BLOCKTIME", "3")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if untiled:
        os.environ["GGML_CPU_TILED_MM"] = "0"  # kernels for 8 rows or more, rounding otherwise


def library(untiled: bool = False) -> Any:
    """The initialised bindings of llama.cpp; its log goes to ours. Raises ModelUnusable."""
    prepare_environment(untiled)
    return _library()[0]


def devices() -> list[Device]:
    """All that llama.cpp sees in this process, the processor among them. Raises ModelUnusable."""
    return present(library())


@functools.cache
def _library() -> tuple[Any, Any]:
    """The bindings and the log callback, which must live as long as they do."""
    try:
        import llama_cpp.llama_cpp as lib
    except ImportError as exc:
        raise ModelUnusable(
            f"a model needs llama-cpp-python: `outrider setup` builds it ({exc})"
        ) from exc
    except RuntimeError as exc:  # as where a GPU's driver is missing that it was built for
        raise ModelUnusable(f"the library of llama.cpp cannot be loaded here: {exc}") from exc
    forward = lib.llama_log_callback(forward_log)
    lib.llama_log_set(forward, None)
    # C must not call into an interpreter that has shut down: libc's `abs` takes any call in silence
    silent = ctypes.cast(ctypes.CDLL(None).abs, lib.llama_log_callback)
    atexit.register(lib.llama_log_set, silent, None)
    lib.llama_backend_init()
    return lib, forward
