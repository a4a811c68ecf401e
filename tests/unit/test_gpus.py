"""What `outrider setup --gpu` looks for, and what it says where something is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from outrider_services.building import gpus


def tool(path: Path, script: str = "exit 0") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def sdk(tmp_path: Path, version: int) -> dict[str, str]:
    """An environment in which all that Vulkan needs is found."""
    headers = tmp_path / "include" / "vulkan"
    headers.mkdir(parents=True)
    (headers / "vulkan.hpp").write_text("// the real one\n")
    (headers / "vulkan_core.h").write_text(f"#define VK_HEADER_VERSION {version}\n")
    spirv = tmp_path / "include" / "spirv" / "unified1" / "spirv.hpp"
    spirv.parent.mkdir(parents=True)
    spirv.write_text("")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libvulkan.so").write_text("")
    tool(tmp_path / "bin" / "glslc")
    return {"VULKAN_SDK": str(tmp_path), "PATH": "/nowhere"}


@pytest.mark.parametrize(("version", "is_new"), [(239, False), (272, True), (309, True)])
def test_vulkans_headers_are_put_together(tmp_path: Path, version: int, is_new: bool) -> None:
    gpu = gpus.find("vulkan", sdk(tmp_path / "sdk", version))
    assert gpu.cmake_args == ("-DGGML_VULKAN=ON",)
    assert f"headers {version}" in gpu.found  # another version, another wheel
    told = dict(arg.removeprefix("-D").split("=") for arg in gpu.equip(tmp_path / "gpu"))
    assert told == {
        "Vulkan_INCLUDE_DIR": str(tmp_path / "gpu"),
        "Vulkan_LIBRARY": str(tmp_path / "sdk" / "lib" / "libvulkan.so"),
        "Vulkan_GLSLC_EXECUTABLE": str(tmp_path / "sdk" / "bin" / "glslc"),
        "CMAKE_NO_SYSTEM_FROM_IMPORTED": "ON",
    }
    seen = (tmp_path / "gpu" / "vulkan" / "vulkan.hpp").read_text()
    assert (seen == "// the real one\n") is is_new
    if not is_new:  # what the old ones lack comes behind them
        include = f'#include "{tmp_path / "sdk" / "include" / "vulkan" / "vulkan.hpp"}"'
        assert include in seen
        assert "{{" not in seen
        assert "struct LayerSettingsCreateInfoEXT {" in seen
    assert (tmp_path / "gpu" / "spirv" / "unified1" / "spirv.hpp").exists()


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("include/vulkan/vulkan.hpp", "Vulkan's headers"),
        ("lib/libvulkan.so", "its library"),
        ("include/spirv/unified1/spirv.hpp", "the headers of SPIR-V"),
        ("bin/glslc", "the compiler glslc"),
    ],
)
def test_what_vulkan_lacks_is_one_sentence_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, told: str
) -> None:
    environ = sdk(tmp_path, 300)
    (tmp_path / missing).unlink()
    only(monkeypatch, tmp_path)
    with pytest.raises(gpus.Lacking) as raised:
        gpus.find("vulkan", environ)
    assert str(raised.value) == (
        f"a build for Vulkan needs {told}; "
        "`sudo apt install libvulkan-dev glslc spirv-headers` brings them"
    )


def only(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Have nothing found but below `root`, whatever is installed here."""
    holder, libraries = gpus.holder, gpus.libraries

    def inside(roots: list[Path]) -> list[Path]:
        return [one for one in roots if one.is_relative_to(root)]

    monkeypatch.setattr(gpus, "holder", lambda roots, file: holder(inside(roots), file))
    monkeypatch.setattr(gpus, "libraries", lambda roots, name: libraries(inside(roots), name))


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "CUDA_HOME", "/nowhere")
    monkeypatch.setattr(gpus, "ROCM_HOME", "/nowhere")


def test_cuda_needs_its_compiler(tmp_path: Path) -> None:
    with pytest.raises(gpus.Lacking, match=r"needs the compiler nvcc; `sudo apt install nvidia-"):
        gpus.find("cuda", {"PATH": "/nowhere", "CUDACXX": str(tmp_path / "nvcc")})
    tool(tmp_path / "bin" / "nvcc", "echo Cuda tools; echo V12.8.93")
    gpu = gpus.find("cuda", {"PATH": "/nowhere", "CUDA_PATH": str(tmp_path)})
    assert gpu.env == {"CUDACXX": str(tmp_path / "bin" / "nvcc")}
    assert "V12.8.93" in gpu.found
    assert gpu.cmake_args == ("-DGGML_CUDA=ON",)


@pytest.mark.parametrize(
    ("version", "libraries", "told"),
    [
        ("6.4.1-0", ("hipblas", "rocblas"), ""),
        ("6.1.0", ("hipblas", "rocblas"), ""),
        ("5.7.1", ("hipblas", "rocblas"), "needs ROCm 6.1 or later;"),
        ("6.4.1", ("rocblas",), "needs hipBLAS;"),
        ("6.4.1", (), "needs hipBLAS and rocBLAS;"),
        ("", ("hipblas", "rocblas"), "needs ROCm 6.1 or later;"),
    ],
)
def test_rocm_has_to_be_new_and_whole(
    tmp_path: Path, version: str, libraries: tuple[str, ...], told: str
) -> None:
    script = f"case $1 in --version) echo {version};; -R) echo {tmp_path};; *) echo /llvm;; esac"
    tool(tmp_path / "bin" / "hipconfig", script)
    for name in libraries:
        (tmp_path / "lib" / "cmake" / name).mkdir(parents=True)
        (tmp_path / "lib" / "cmake" / name / f"{name}-config.cmake").write_text("")
    environ = {"PATH": "/usr/bin:/bin", "ROCM_PATH": str(tmp_path)}
    if told:
        with pytest.raises(gpus.Lacking, match=told):
            gpus.find("rocm", environ)
        return
    gpu = gpus.find("rocm", environ)
    assert gpu.env == {"HIPCXX": "/llvm/clang", "HIP_PATH": str(tmp_path)}
    assert gpu.cmake_args == ("-DGGML_HIP=ON",)


def test_rocm_that_is_not_there_is_told() -> None:
    with pytest.raises(gpus.Lacking, match="needs the program hipconfig; AMD's packages"):
        gpus.find("rocm", {"PATH": "/nowhere"})


@pytest.mark.skipif(sys.platform == "darwin", reason="Metal is there")
def test_metal_is_for_macos() -> None:
    with pytest.raises(gpus.Lacking, match="needs macOS; on Linux, take cuda, rocm or vulkan"):
        gpus.find("metal", {"PATH": "/usr/bin"})
