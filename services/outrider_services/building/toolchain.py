"""Which compiler, and which of its flags, build a sound and fast library on this machine."""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

LEAST_CLANG, FIRST_GOOD_GCC = 17, 14
# clang, and LLVM's OpenMP runtime, from the Python index: neither needs root; see `equipped`
ZIGLANG, OPENMP = "ziglang==0.17.1", "pyomp==0.6.0"
OPENMP_HEADER = """
#ifdef __cplusplus
extern "C" {
#endif
int omp_get_max_threads(void);
int omp_get_num_threads(void);
int omp_get_thread_num(void);
#ifdef __cplusplus
}
#endif
"""  # all that llama.cpp and CMake ask for; neither package has the header
CLANGS = [f"clang++-{n}" for n in range(22, LEAST_CLANG - 1, -1)] + ["clang++"]
KEEP_TILE_STORES = ("-fno-tree-dse", "-fno-dse")
NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
OPENMP_PROGRAM = """
#include <omp.h>
#include <vector>
int main() { return omp_get_max_threads() < 1; }
"""
HINT = (
    "clang with libomp would build a library that verifies 8 rows in {} of the time: "
    "`sudo apt install clang-19 libomp-19-dev`, then `outrider setup --again`"
)


class NoCompiler(Exception):
    """One sentence for the user."""


@dataclass(frozen=True)
class Compiler:
    cc: str
    cxx: str
    is_clang: bool
    major: int
    text: str  # as people are told of it, and as wheels are told apart
    cmake_args: tuple[str, ...] = ()
    runtime: tuple[Path, str] | None = None  # goes along with what it builds, under this name


ZIG = Compiler("", "", True, 22, f"the clang 22 of {ZIGLANG}")  # as long as it is not unpacked


@dataclass(frozen=True)
class Choice:
    """A compiler, why it was chosen, and what another one would bring."""

    compiler: Compiler
    why: str
    hint: str = ""


@dataclass(frozen=True)
class Processor:
    machine: str
    model: str
    flags: frozenset[str]

    @property
    def is_x86(self) -> bool:
        return self.machine in ("x86_64", "AMD64")

    @property
    def has_amx(self) -> bool:
        return self.is_x86 and "amx_tile" in self.flags


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


def choose_compiler(environ: Mapping[str, str], cpu: Processor) -> Choice:
    """What CXX or CC name; else what is known to build the fastest library for this processor.

    Measured: on AVX2 (Zen 3) and on AVX-512 (Zen 4) clang's library verified 8 rows in 0.5 to 0.8
    of the time that gcc's took, and that of ziglang's clang was as fast; with AMX clang's took 0.8.
    Nothing was measured on ARM.
    """
    if named := environ.get("CXX") or cxx_of(environ.get("CC", "")):
        compiler = inspect(named, environ.get("CC"))
        if compiler is None:
            raise NoCompiler(f"the compiler {named} named by CXX or CC does not run")
        return Choice(compiler, "it is named by CXX or CC")
    if compiler := present_clang():
        return Choice(compiler, "no other builds a faster library")
    if cpu.is_x86 and not cpu.has_amx and "avx2" in cpu.flags:
        return Choice(ZIG, "without AMX its library verifies 8 rows in half to 3/4 of gcc's time")
    return present_gcc(cpu)


def present_clang() -> Compiler | None:
    """The newest clang that is installed, new enough, and can do OpenMP."""
    for name in CLANGS:
        found = inspect(name)
        if found and found.is_clang and found.major >= LEAST_CLANG and can_openmp(found):
            return found
    return None


def present_gcc(cpu: Processor) -> Choice:
    """The compiler that is installed. Raises NoCompiler."""
    for name in ("g++", "c++"):
        if compiler := inspect(name):
            hint = HINT.format("0.8" if cpu.has_amx else "0.5 to 0.8") if cpu.is_x86 else ""
            return Choice(compiler, "it is what is installed", hint)
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


def equipped(compiler: Compiler, folder: Path, fetch: Callable[[Path, str], None]) -> Compiler:
    """The compiler with LLVM's OpenMP runtime, which `fetch` puts into `folder`.

    A clang that is installed has it already. ziglang, which is clang, a linker and all headers in
    one, has none: llama.cpp's own threads would wait by spinning. In the place of gcc's runtime it
    understands the same calls. Where two workers computed on the same two cores, gcc's gave them a
    third of what they share with LLVM's, and spinning threads an eighth.
    """
    if compiler.is_clang and compiler != ZIG:
        return compiler
    fetch(folder, OPENMP)
    library = next(folder.rglob("libomp.so"), None)
    if library is None:
        raise NoCompiler(f"{OPENMP} has no libomp.so")
    if compiler != ZIG:
        return replace(compiler, runtime=(library, "libgomp.so.1"))
    fetch(folder, ZIGLANG)
    (folder / "omp.h").write_text(OPENMP_HEADER)
    cc, cxx = (wrapped(folder, name, f"-I{folder}") for name in ("cc", "c++"))
    archivers = [f"-DCMAKE_{name.upper()}={wrapped(folder, name)}" for name in ("ar", "ranlib")]
    openmp = [f"-DOpenMP_{of}_{what}" for of in ("C", "CXX")
              for what in ("FLAGS=-fopenmp", "LIB_NAMES=omp")]  # fmt: skip
    args = (*archivers, *openmp, f"-DOpenMP_omp_LIBRARY={library}")
    return replace(ZIG, cc=cc, cxx=cxx, cmake_args=args, runtime=(library, library.name))


def wrapped(folder: Path, name: str, *flags: str) -> str:
    """`zig cc`, `zig ar` and so on as programs by themselves, which is what CMake wants of them."""
    cache = shlex.quote(str(folder / "cache"))
    call = shlex.join([str(folder / "ziglang" / "zig"), name, *flags])
    wrapper = folder / f"zig-{name}"
    wrapper.write_text(
        f"#!/bin/sh\nexport ZIG_GLOBAL_CACHE_DIR={cache} ZIG_LOCAL_CACHE_DIR={cache}\n"
        f'exec {call} "$@"\n'
    )
    wrapper.chmod(0o755)
    return str(wrapper)


def flag_choices(compiler: Compiler, cpu: Processor) -> list[tuple[str, ...]]:
    """Sets of compiler flags, best first; the next is for when the former's library crashes."""
    if not cpu.has_amx:
        return [()]
    # gcc before 14 declares too small an operand for tile loads and drops the stores before them
    drops_stores = not compiler.is_clang and compiler.major < FIRST_GOOD_GCC
    return [KEEP_TILE_STORES if drops_stores else (), NO_AMX]


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
