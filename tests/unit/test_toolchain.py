"""Which compiler builds llama.cpp, with which flags, and what it is given that it lacks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.compilers import AMX, ARM, AVX2, NO_OPENMP, OPENMP, SSE, clang, only_gcc, unpack

from outrider_services.building import toolchain


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of our making, with gcc 12 on it."""
    tools = only_gcc(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tools))
    return tools


# --- the compiler ---


def name_of(choice: toolchain.Choice) -> str:
    return "ZIG" if choice.compiler == toolchain.ZIG else Path(choice.compiler.cxx).name


@pytest.mark.parametrize(
    ("machine", "flags", "chosen", "hint"),
    [
        pytest.param("x86_64", AVX2, "ZIG", "", id="avx2"),
        pytest.param("AMD64", AVX2 | {"avx512f"}, "ZIG", "", id="avx512"),
        pytest.param("x86_64", AMX, "g++", " 8 rows in 0.8 of the time", id="amx"),
        pytest.param("x86_64", SSE, "g++", " 8 rows in 0.5 to 0.8 of the time", id="sse"),
        pytest.param("aarch64", ARM, "g++", "", id="arm"),
    ],
)
def test_the_processor_decides_where_there_is_only_gcc(
    path: Path, machine: str, flags: frozenset[str], chosen: str, hint: str
) -> None:
    found = toolchain.choose_compiler({}, toolchain.Processor(machine, "", flags))
    assert name_of(found) == chosen
    assert bool(found.hint) == bool(hint)
    assert hint in found.hint


@pytest.mark.parametrize(
    ("number", "build", "flags", "chosen"),
    [
        pytest.param(19, OPENMP, AVX2, "clang++-19", id="clang-avx2"),
        pytest.param(19, OPENMP, AMX, "clang++-19", id="clang-amx"),
        pytest.param(19, NO_OPENMP, AVX2, "ZIG", id="clang-without-openmp-avx2"),
        pytest.param(19, NO_OPENMP, AMX, "g++", id="clang-without-openmp-amx"),
        pytest.param(16, OPENMP, AVX2, "ZIG", id="clang-too-old-avx2"),
        pytest.param(16, OPENMP, AMX, "g++", id="clang-too-old-amx"),
    ],
)
def test_a_clang_is_taken_if_new_and_able(
    path: Path, number: int, build: str, flags: frozenset[str], chosen: str
) -> None:
    clang(path, number, build)
    found = toolchain.choose_compiler({}, toolchain.Processor("x86_64", "", flags))
    assert name_of(found) == chosen
    c_name = chosen.replace("clang++", "clang").replace("g++", "gcc").replace("ZIG", "")
    assert Path(found.compiler.cc).name == c_name


def test_the_newest_clang_is_taken(path: Path) -> None:
    for number in (17, 20, 18):
        clang(path, number, OPENMP)
    cpu = toolchain.Processor("x86_64", "", AVX2)
    assert toolchain.choose_compiler({}, cpu).compiler.major == 20


@pytest.mark.parametrize(
    "environ", [{"CXX": "g++"}, {"CC": "gcc"}, {"CC": "gcc", "CXX": "g++"}], ids=str
)
@pytest.mark.parametrize("with_clang", [True, False], ids=["clang", "no-clang"])
def test_a_named_compiler_is_taken_before_any_other(
    path: Path, environ: dict[str, str], with_clang: bool
) -> None:
    if with_clang:
        clang(path, 19, OPENMP)
    choice = toolchain.choose_compiler(environ, toolchain.Processor("x86_64", "", AVX2))
    found = choice.compiler
    assert (Path(found.cc).name, Path(found.cxx).name) == ("gcc", "g++")
    assert (found.is_clang, found.major, choice.hint) == (False, 12, "")


def test_a_named_compiler_that_is_missing_is_told(path: Path) -> None:
    with pytest.raises(toolchain.NoCompiler, match="g\\+\\+-99"):
        toolchain.choose_compiler({"CXX": "g++-99"}, toolchain.Processor("x86_64", "", AVX2))


@pytest.mark.parametrize(
    ("machine", "flags"),
    [("x86_64", AMX), ("x86_64", SSE), ("aarch64", ARM)],
    ids=["amx", "", "arm"],
)
def test_without_a_compiler_one_sentence_says_so(
    path: Path, machine: str, flags: frozenset[str]
) -> None:
    (path / "g++").unlink()
    with pytest.raises(toolchain.NoCompiler, match=r"no C\+\+ compiler found; install one"):
        toolchain.choose_compiler({}, toolchain.Processor(machine, "", flags))


# --- what it lacks ---


def test_ziglang_becomes_a_compiler_that_runs(tmp_path: Path) -> None:
    folder = tmp_path / "someone's tools"
    found = toolchain.equipped(toolchain.ZIG, folder, unpack)
    for wrapper, command in ((found.cc, "cc"), (found.cxx, "c++")):
        call = [wrapper, "-c", "a file.c", "$HOME"]
        told = subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()
        cache = str(folder / "cache")
        assert told == [cache, cache, command, f"-I{folder}", "-c", "a file.c", "$HOME"]
    assert "int omp_get_max_threads(void);" in (folder / "omp.h").read_text()


def test_ziglang_comes_with_an_openmp(tmp_path: Path) -> None:
    folder = tmp_path / "someone's tools"
    found = toolchain.equipped(toolchain.ZIG, folder, unpack)
    library = folder / "numba" / "libomp.so"
    assert found.runtime == (library, "libomp.so")
    assert sorted(found.cmake_args) == [
        f"-DCMAKE_AR={folder}/zig-ar",
        f"-DCMAKE_RANLIB={folder}/zig-ranlib",
        "-DOpenMP_CXX_FLAGS=-fopenmp",
        "-DOpenMP_CXX_LIB_NAMES=omp",
        "-DOpenMP_C_FLAGS=-fopenmp",
        "-DOpenMP_C_LIB_NAMES=omp",
        f"-DOpenMP_omp_LIBRARY={library}",
    ]
    assert (found.text, found.is_clang) == (toolchain.ZIG.text, True)


def test_gcc_has_its_openmp_replaced(tmp_path: Path) -> None:
    gcc, fetched = toolchain.Compiler("gcc", "g++", False, 12, "gcc 12"), []

    def fetch(folder: Path, package: str) -> None:
        fetched.append(package)
        unpack(folder, package)

    found = toolchain.equipped(gcc, tmp_path, fetch)
    assert found.runtime == (tmp_path / "numba" / "libomp.so", "libgomp.so.1")
    assert (found.cc, found.cxx, found.text, found.cmake_args) == ("gcc", "g++", "gcc 12", ())
    assert fetched == [toolchain.OPENMP]


def test_a_clang_that_is_installed_lacks_nothing(tmp_path: Path) -> None:
    def fetch(folder: Path, package: str) -> None:
        raise AssertionError(f"{package} was fetched")

    installed = toolchain.Compiler("clang", "clang++", True, 19, "clang 19")
    assert toolchain.equipped(installed, tmp_path, fetch) == installed


def test_a_package_without_the_openmp_library_is_told(tmp_path: Path) -> None:
    with pytest.raises(toolchain.NoCompiler, match=r"pyomp==.* has no libomp\.so"):
        toolchain.equipped(toolchain.ZIG, tmp_path, lambda folder, package: None)


# --- its flags ---


@pytest.mark.parametrize(
    ("is_clang", "major", "machine", "cpu_flags", "first", "choices"),
    [
        pytest.param(False, 12, "x86_64", AMX, "KEEP_TILE_STORES", 2, id="gcc-12-amx"),
        pytest.param(False, 13, "x86_64", AMX, "KEEP_TILE_STORES", 2, id="gcc-13-amx"),
        pytest.param(False, 14, "x86_64", AMX, "", 2, id="gcc-14-amx"),
        pytest.param(True, 13, "x86_64", AMX, "", 2, id="clang-13-amx"),
        pytest.param(True, 19, "x86_64", AMX, "", 2, id="clang-19-amx"),
        pytest.param(False, 12, "x86_64", frozenset({"avx2"}), "", 1, id="gcc-12-without-amx"),
        pytest.param(False, 12, "aarch64", frozenset({"asimd"}), "", 1, id="gcc-12-arm"),
    ],
)
def test_flags_fit_compiler_and_processor(
    is_clang: bool,
    major: int,
    machine: str,
    cpu_flags: frozenset[str],
    first: str,
    choices: int,
) -> None:
    built_with = toolchain.Compiler("cc", "c++", is_clang, major, "")
    found = toolchain.flag_choices(built_with, toolchain.Processor(machine, "", cpu_flags))
    assert found[0] == (getattr(toolchain, first) if first else ())
    assert found[1:] == [toolchain.NO_AMX][: choices - 1]


@pytest.mark.parametrize(
    ("cpuinfo", "model", "flags"),
    [
        pytest.param(
            "model name\t: Xeon\nflags\t\t: fpu amx_tile\n\nmodel name\t: Other\n",
            "Xeon",
            {"fpu", "amx_tile"},
            id="x86",
        ),
        pytest.param(
            "Features\t: fp asimd\nCPU part\t: 0xd40\n", "0xd40", {"fp", "asimd"}, id="arm"
        ),
        pytest.param("", "", set(), id="empty"),
    ],
)
def test_the_first_processor_is_read(
    tmp_path: Path, cpuinfo: str, model: str, flags: set[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    found = toolchain.processor(tmp_path / "cpuinfo")
    assert (found.model.strip(), {*found.flags}) == (model, flags)
    assert toolchain.processor(tmp_path / "absent").flags == frozenset()
