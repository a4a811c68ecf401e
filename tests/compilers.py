"""Compilers of our making, and packages of them, for tests of what builds llama.cpp."""

from __future__ import annotations

from pathlib import Path

SSE, AVX2 = frozenset({"sse4_2"}), frozenset({"sse4_2", "avx2"})
AMX = AVX2 | {"avx512f", "amx_tile", "amx_int8"}
ARM = frozenset({"asimd"})


def program(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def compiler(directory: Path, name: str, version: str, family: str, build: str = "exit 1") -> None:
    case = f'case "$1" in --version) echo {family} {version};; -dumpversion) echo {version};;'
    program(directory, name, f"{case} *) {build};; esac")


def clang(directory: Path, number: int, build: str) -> None:
    suffix = f"-{number}" if number else ""
    for name in ("clang", "clang++"):
        compiler(directory, name + suffix, f"{number}.1.0", "Debian clang version", build)


OPENMP = 'for last; do :; done; printf "#!/bin/sh\\n" >"$last"; chmod +x "$last"'
NO_OPENMP = "exit 1"


def only_gcc(tools: Path) -> Path:
    """A directory for PATH that has gcc 12, and little else."""
    for name in ("gcc", "g++"):
        compiler(tools, name, "12", "Debian GCC")
    (tools / "chmod").symlink_to("/bin/chmod")
    return tools


def unpack(folder: Path, package: str) -> None:
    """What `pip install --target` leaves of ziglang and of pyomp, as far as it is used."""
    folder.mkdir(parents=True, exist_ok=True)
    if package.startswith("ziglang=="):
        told = '"$ZIG_GLOBAL_CACHE_DIR" "$ZIG_LOCAL_CACHE_DIR" "$@"'
        program(folder / "ziglang", "zig", f"printf '%s\\n' {told}")
    if package.startswith("pyomp=="):
        (folder / "numba").mkdir()
        (folder / "numba" / "libomp.so").write_text("LLVM's OpenMP")
