"""Writes a model again with weights of another type. No answer depends on those of a draft."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from outrider.engines.llama import engine as llama
from outrider.engines.llama.setup import check_file, complaints, filled, reasons
from outrider.errors import ModelUnusable

# name: (enum llama_ftype, enum ggml_type)
KINDS = {"q4_0": (2, 2), "q4_1": (3, 3), "q8_0": (7, 8)}


def partial(target: Path) -> Path:
    """The name of the file that becomes `target` once it is whole."""
    return target.with_name(target.name + ".partial")


def requantise(source: Path, target: Path, kind: str, threads: int) -> None:
    """Write the model in `source` to `target`, its matrices of type `kind`. Raises ModelUnusable.

    That includes the output matrix, which llama.cpp would leave finer: in a small model it is a
    third of the bytes that every token reads.
    """
    check_file(source)
    file_type, tensor_type = KINDS[kind]
    lib = llama.library()
    params = filled(
        lib.llama_model_quantize_default_params(),
        ftype=file_type,
        output_tensor_type=tensor_type,
        allow_requantize=True,
        nthread=threads,
    )
    unfinished = partial(target)
    complaints.clear()
    try:
        code = lib.llama_model_quantize(
            os.fsencode(source), os.fsencode(unfinished), ctypes.byref(params)
        )
        if code:
            raise ModelUnusable(f"{source}: cannot be made {kind} ({reasons()})")
        unfinished.rename(target)
    except OSError as exc:
        raise ModelUnusable(f"{target} could not be written ({exc.strerror})") from exc
    finally:
        unfinished.unlink(missing_ok=True)
