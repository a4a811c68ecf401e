"""The installed llama.cpp library, looked at without loading it."""

from __future__ import annotations

import importlib.util
import os
from contextlib import suppress
from pathlib import Path


def kernels() -> Path | None:
    """The file with its code for processors; None if it is not where the package puts it."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if not folder:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            return None
        folder = str(Path(spec.origin).parent / "lib")
    path = Path(folder) / "libggml-cpu.so"
    return path if path.is_file() else None


def built_by() -> str:
    """The compiler, as `outrider setup` has noted it beside the library; "" if it has not."""
    path = kernels()
    with suppress(OSError):
        return (path.parent / "built-by.txt").read_text("utf-8").strip() if path else ""
    return ""


def built_by_gcc() -> bool:
    """Whether gcc compiled it; False also where that cannot be told.

    Compilers leave their name in what they make. Where clang was at work gcc's name may stand
    there too, from the start-up code that the system adds.
    """
    path = kernels()
    with suppress(OSError):
        code = path.read_bytes() if path else b""
        return b"GCC: (" in code and b"clang version" not in code
    return False
