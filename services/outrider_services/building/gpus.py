"""What a build of llama.cpp for a kind of GPU needs, and how CMake is told of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

FIRST_WITH_LAYER_SETTINGS = 272  # of VK_HEADER_VERSION
# ggml-vulkan names these types, which only its validation uses; the headers of Debian 12 lack them
LAYER_SETTINGS = """#pragma once
#include "{}"
#include <vector>
namespace vk {{
enum class LayerSettingTypeEXT {{ eBool32 }};
struct LayerSettingEXT {{
    const char *layer, *name;
    LayerSettingTypeEXT type;
    uint32_t count;
    const void *values;
}};
struct LayerSettingsCreateInfoEXT {{
    uint32_t type = 1000496000;
    const void *next = nullptr;
    uint32_t count;
    const LayerSettingEXT *settings;
    LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> &given)
        : count(uint32_t(given.size())), settings(given.data()) {{}}
}};
}}
"""
CUDA_HOME, ROCM_HOME = "/usr/local/cuda", "/opt/rocm"  # as their makers' packages have it
LEAST_ROCM = (6, 1)


class Lacking(Exception):
    """One sentence for the user: what a build needs and is not here, and how it comes here."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU to build for, and what was found here for that."""

    name: str
    cmake_args: tuple[str, ...]
    found: str  # what it is built against, by which wheels are told apart
    env: Mapping[str, str] = field(default_factory=dict)
    # puts into an empty folder what the sources are to find, and returns how CMake is told of it
    equip: Callable[[Path], tuple[str, ...]] = lambda folder: ()


def find(name: str, environ: Mapping[str, str]) -> Gpu:
    """The kind of this name, if all that a build for it needs is here. Raises Lacking."""
    return KINDS[name](environ)


def need(gpu: str, parts: Mapping[str, object], remedy: str) -> None:
    """Raise Lacking if a part was not found."""
    if missing := [name for name, part in parts.items() if not part]:
        raise Lacking(f"a build for {gpu} needs {' and '.join(missing)}; {remedy}")


def program(name: str, environ: Mapping[str, str], *homes: str) -> str | None:
    """Its path: on PATH, else in the `bin` of one of `homes`."""
    folders = [environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(folders))


def holder(roots: list[Path], file: str) -> Path | None:
    """The first of `roots` that has the file."""
    return next((root for root in roots if (root / file).exists()), None)


# ---- Vulkan -------------------------------------------------------------------------------------


def vulkan(environ: Mapping[str, str]) -> Gpu:
    sdk = environ.get("VULKAN_SDK", "")
    roots = [Path(root) for root in (sdk, "/usr", "/usr/local") if root]
    headers = holder(roots, "include/vulkan/vulkan.hpp")
    spirv = holder(roots, "include/spirv/unified1/spirv.hpp")
    library = next(libraries(roots, "libvulkan.so"), None)
    glslc = program("glslc", environ, sdk)
    parts = {"Vulkan's headers": headers, "its library": library, "the headers of SPIR-V": spirv,
             "the compiler glslc": glslc}  # fmt: skip
    need("Vulkan", parts, "`sudo apt install libvulkan-dev glslc spirv-headers` brings them")
    assert headers is not None
    assert spirv is not None
    folders = (headers / "include" / "vulkan", spirv / "include" / "spirv")
    version = header_version(folders[0])

    def equip(folder: Path) -> tuple[str, ...]:
        with_headers(folder, *folders)
        return (
            f"-DVulkan_INCLUDE_DIR={folder}",
            f"-DVulkan_LIBRARY={library}",
            f"-DVulkan_GLSLC_EXECUTABLE={glslc}",
            "-DCMAKE_NO_SYSTEM_FROM_IMPORTED=ON",
        )

    found = f"headers {version}, {library}, {glslc}"
    return Gpu("Vulkan", ("-DGGML_VULKAN=ON",), found, equip=equip)


def with_headers(folder: Path, vulkan: Path, spirv: Path) -> None:
    """Put Vulkan's headers into `folder`, and what older ones lack.

    It is to be searched as the sources' own: before a folder that CMake calls a system's, ziglang's
    clang looks into /usr/include. So it cannot be that one, where C's headers are, too.
    """
    (folder / "vulkan").mkdir(parents=True)
    for header in vulkan.iterdir():
        (folder / "vulkan" / header.name).symlink_to(header)
    if (video := vulkan.parent / "vk_video").exists():
        (folder / "vk_video").symlink_to(video)
    (folder / "spirv").symlink_to(spirv)
    if header_version(vulkan) < FIRST_WITH_LAYER_SETTINGS:
        wrapper = folder / "vulkan" / "vulkan.hpp"
        wrapper.unlink()
        wrapper.write_text(LAYER_SETTINGS.format(vulkan / "vulkan.hpp"))


def header_version(folder: Path) -> int:
    """What counts the versions of the headers in `folder`; 0 if they do not say it."""
    with suppress(OSError):
        text = (folder / "vulkan_core.h").read_text("utf-8")
        if told := re.search(r"#define VK_HEADER_VERSION (\d+)", text):
            return int(told[1])
    return 0


def libraries(roots: list[Path], name: str) -> Iterator[Path]:
    for root in roots:
        for pattern in (f"lib/*-linux-gnu/{name}", f"lib64/{name}", f"lib/{name}"):
            yield from sorted(root.glob(pattern))


# ---- the others ---------------------------------------------------------------------------------


def cuda(environ: Mapping[str, str]) -> Gpu:
    homes = [environ.get("CUDA_PATH", ""), environ.get("CUDA_HOME", ""), CUDA_HOME]
    nvcc = environ.get("CUDACXX") or program("nvcc", environ, *homes)
    remedy = "`sudo apt install nvidia-cuda-toolkit` (Debian's non-free) or NVIDIA's own brings it"
    need("CUDA", {"the compiler nvcc": nvcc and shutil.which(nvcc)}, remedy)
    assert nvcc is not None
    version = said([nvcc, "--version"]).splitlines()[-1:]
    return Gpu("CUDA", ("-DGGML_CUDA=ON",), f"{nvcc} {version}", {"CUDACXX": nvcc})


def rocm(environ: Mapping[str, str]) -> Gpu:
    homes = [environ.get("ROCM_PATH", ""), environ.get("HIP_PATH", ""), ROCM_HOME]
    hipconfig = program("hipconfig", environ, *homes)
    least = ".".join(map(str, LEAST_ROCM))
    remedy = (
        f"AMD's packages of ROCm {least} or later have it (Debian's are older): "
        "`sudo apt install rocm-dev hipblas-dev rocblas-dev`, from AMD's repository"
    )
    need("ROCm", {"the program hipconfig": hipconfig}, remedy)
    assert hipconfig is not None
    version = said([hipconfig, "--version"])
    home, clang = Path(said([hipconfig, "-R"])), Path(said([hipconfig, "-l"]), "clang")
    config = [next(home.glob(f"lib*/**/{name}-config.cmake"), None)
              for name in ("hipblas", "rocblas")]  # fmt: skip
    is_new = tuple(map(int, re.findall(r"\d+", version)[:2])) >= LEAST_ROCM
    parts = {f"ROCm {least} or later": is_new, "hipBLAS": config[0], "rocBLAS": config[1]}
    need("ROCm", parts, remedy)
    env = {"HIPCXX": str(clang), "HIP_PATH": str(home)}
    return Gpu("ROCm", ("-DGGML_HIP=ON",), f"{home} {version}", env)


def metal(environ: Mapping[str, str]) -> Gpu:
    need("Metal", {"macOS": sys.platform == "darwin"}, "on Linux, take cuda, rocm or vulkan")
    need("Metal", {"Xcode's tools": program("xcrun", environ)}, "`xcode-select --install`")
    return Gpu("Metal", ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"), "")


KINDS = {"cuda": cuda, "vulkan": vulkan, "metal": metal, "rocm": rocm}


def said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
