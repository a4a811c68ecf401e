"""Which compiler, and which of its flags, build a sound and fast library on this machine."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LEAST_CLANG, FIRST_GOOD_GCC = 17, 14
CLANGS = [f"clang++-{n}" for n in range(22, LEAST_CLANG - 1, -1)] + ["clang++"]
KEEP_TILE_STORES = ("-fno-tree-dse", "-fno-dse")
NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
OPENMP_PROGRAM = """
#include <omp.h>
#include <vector>
int main() { return omp_get_max_threads() < 1; }
"""


class NoCompiler(Exception):
    """One sentence for the user."""


@dataclass(frozen=True)
class Compiler:
    cc: str
    cxx: str
    is_clang: bool
    major: int
    text: str  # the first line of its --version


@dataclass(frozen=True)
class Processor:
    machine: str
    model: str
    flags: frozenset[str]

    @property
    def has_amx(self) -> bool:
        return self.machine in ("x86_64", "AMD64") and "amx_tile" in self.flags


def processor(cpuinfo: Path) -> Processor:
    """This machine's, from the first block of `cpuinfo`, whose names vary with the maker."""
    fields: dict[str, str] = {}
    with suppress(OSError), cpuinfo.open() as lines:
        for line in lines:
            if not line.strip():
                break
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    model = " ".join(fields.get(n, "") for n in ("model name", "model", "CPU part"))
    flags = fields.get("flags") or fields.get("Features") or ""
    return Processor(platform.machine(), model, frozenset(flags.split()))


def choose_compiler(environ: Mapping[str, str]) -> Compiler:
    """What CXX or CC name, else a clang that can do OpenMP, else g++."""
    if named := environ.get("CXX") or cxx_of(environ.get("CC", "")):
        compiler = inspect(named, environ.get("CC"))
        if compiler is None:
            raise NoCompiler(f"the compiler {named} named by CXX or CC does not run")
        return compiler
    for name in CLANGS:
        compiler = inspect(name)
        if (
            compiler
            and compiler.is_clang
            and compiler.major >= LEAST_CLANG
            and can_openmp(compiler)
        ):
            return compiler
    for name in ("g++", "c++"):
        if compiler := inspect(name):
            return compiler
    raise NoCompiler("no C++ compiler found; install one (g++ or clang) and run this again")


def cxx_of(cc: str) -> str:
    return re.sub(r"clang(?!\+)", "clang++", cc) if "clang" in cc else cc.replace("gcc", "g++")


def cc_of(cxx: str) -> str:
    return cxx.replace("clang++", "clang").replace("g++", "gcc").replace("c++", "cc")


def inspect(cxx: str, cc: str | None = None) -> Compiler | None:
    path = shutil.which(cxx)
    c_path = shutil.which(cc or cc_of(cxx))
    if not path or not c_path:
        return None
    first = output([path, "--version"]).partition("\n")[0]
    version = output([path, "-dumpversion"])
    if not version[:1].isdigit():
        return None
    return Compiler(c_path, path, "clang" in first, int(version.split(".")[0]), first)


def can_openmp(compiler: Compiler) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        source, program = Path(scratch, "probe.cpp"), Path(scratch, "probe")
        source.write_text(OPENMP_PROGRAM)
        build = [compiler.cxx, "-fopenmp", str(source), "-o", str(program)]
        return all(
            subprocess.run(c, capture_output=True).returncode == 0 for c in (build, [program])
        )


def flag_choices(compiler: Compiler, cpu: Processor) -> list[tuple[str, ...]]:
    """Sets of compiler flags, best first; the next is for when the former's library crashes."""
    if not cpu.has_amx:
        return [()]
    # gcc before 14 declares too small an operand for tile loads and drops the stores before them
    drops_stores = not compiler.is_clang and compiler.major < FIRST_GOOD_GCC
    return [KEEP_TILE_STORES if drops_stores else (), NO_AMX]


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
