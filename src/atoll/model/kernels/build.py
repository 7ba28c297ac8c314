"""Compile the CPU forward, the operations of a training step, or the memory for tensors, once for this machine, keep the library, and load it.

A library is kept under a key of everything that decides it: sources, flags, compiler and target. So a new version, another processor or another
compiler builds anew (in a few seconds), and nothing stale is ever loaded. The target is the best one that the processor has; the environment variable
ATOLL_KERNEL names another, or "plain" for none.

Used by decoder.py and training.py of this folder, and by model/memory.py. Raises nothing: where it cannot build, it says why in the log and returns
None.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from atoll.config import atoll_home

_BUILD_TIMEOUT_S = 300

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """One kind of processor: the flags of /proc/cpuinfo that it must have, and what the compiler is told."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_AVX512_NEEDS = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"})

TARGETS = (  # best first
    Target(
        "amx",
        _AVX512_NEEDS | {"avx512_bf16", "amx_tile", "amx_bf16"},
        (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DATOLL_AMX"),
    ),
    Target("avx512_bf16", _AVX512_NEEDS | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16")),
    Target("avx512", _AVX512_NEEDS, _AVX512),
    Target("avx2", frozenset({"avx2", "fma"}), _AVX2),
    Target("arm64", frozenset({"asimd"}), ()),
    # For tests only: the AMX files with their tile operations as loops.
    Target("amx_emulated", _AVX512_NEEDS, (*_AVX512, "-DATOLL_AMX", "-DATOLL_AMX_EMULATED")),
)
_COMMON = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
_TENSORS = "tensors.cpp"


def _flags(target: Target, source: str) -> tuple[str, ...]:
    """What the compiler is told beyond the source and the result."""
    if source == "training.cpp":
        return (*_COMMON, *target.flags, "-fopenmp")  # torch's own pool of threads, which its products use
    if source == _TENSORS:  # the only one that sees torch: its headers and its library must be those that will be loaded
        import torch

        root = Path(torch.__file__).parent
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        return (*_COMMON, abi, f'-DATOLL_TORCH="{torch.__version__}"', f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10")
    return (*_COMMON, *target.flags)


def usable_targets() -> list[Target]:
    """The targets to try, best first: ATOLL_KERNEL's alone, else all that the processor can run; none for plain torch."""
    asked = os.environ.get("ATOLL_KERNEL", "auto")
    fitting = [target for target in TARGETS if target.needs <= _processor_flags()]
    if asked == "plain":
        return []
    if asked == "auto":
        return [target for target in fitting if target.name != "amx_emulated"]
    found = [target for target in fitting if target.name == asked]
    if not found:
        names = ", ".join(["plain", *(target.name for target in fitting)])
        _log.warning("ATOLL_KERNEL is %r, which this processor cannot run; it can run %s. Using plain torch.", asked, names)
    return found


def load_library(target: Target, source: str) -> ctypes.CDLL | None:
    """The library made of a source file of this folder for a target, built if it is not there; None (and a warning that says why) if that fails."""
    compiler = compiler_path()
    if compiler is None:
        return None
    path = _library_path(target, compiler, source)
    if not path.exists() and not _build(target, compiler, source, path):
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _log.warning("the compiled %s cannot be loaded (%s)", path, error)
        return None


def _sources() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".h", ".cpp"))


def _library_path(target: Target, compiler: str, source: str) -> Path:
    digest = hashlib.sha256(source.encode())
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join((*_flags(target, source), compiler, _compiler_version(compiler), platform.machine())).encode())
    return atoll_home() / "kernels" / f"{target.name}-{digest.hexdigest()[:16]}.so"


def _build(target: Target, compiler: str, source: str, path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, str(Path(__file__).parent / source), "-o", str(built), *_flags(target, source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                _log.warning("%s does not build with %s (%s)", source, compiler, reason)
                return False
            built.replace(path)  # whole or not at all: two processes that build at once both put the same file here
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("%s could not be built (%s)", source, error)
        return False
    return True


@functools.cache
def compiler_path() -> str | None:
    """The C++ compiler that will be used: CXX, g++, clang++ or c++; None if there is none."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def _compiler_version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""  # what is wrong with it, the build will say


@functools.cache
def _processor_flags() -> frozenset[str]:
    """What /proc/cpuinfo says; on a Mac with an ARM processor there is no such file, and every one of them has asimd."""
    if platform.system() == "Darwin":
        return frozenset({"asimd"}) if platform.machine() == "arm64" else frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(found.split(":", 1)[1].split())
