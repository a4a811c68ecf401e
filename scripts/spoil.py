"""Spoil a GGUF model, to see what a useless draft costs: scripts/spoil.py MODEL SPOILT

Its layers 10, 11 … are put in reverse order, by exchanging names in the header: a model that loads
and runs as before, and says nothing that makes sense.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

HEADER = 64 << 20  # bytes; the names of tensors are among the first
NAME = re.compile(rb"blk\.([1-9]\d)\.")  # two digits, so that nothing moves


def spoil(model: Path, spoilt: Path) -> None:
    shutil.copyfile(model, spoilt)
    with spoilt.open("r+b") as file:
        header = file.read(HEADER)
        layers = sorted({int(found) for found in NAME.findall(header)})
        if len(layers) < 2:
            sys.exit(f"{model} has too few layers")
        other = dict(zip(layers, reversed(layers), strict=True))
        file.seek(0)
        file.write(NAME.sub(lambda name: b"blk.%d." % other[int(name[1])], header))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: scripts/spoil.py MODEL SPOILT")
    spoil(Path(sys.argv[1]), Path(sys.argv[2]))
