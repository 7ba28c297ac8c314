"""Build and run controls.cpp: what this machine can do at the moment, printed beside every round.

Used by serve.py. Without a C++ compiler there are no controls, and the bench says so.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma", "asimd", "bf16")  # those that decide which kernels can run


class Controls:
    """The built program, or the reason why there is none (`note`)."""

    def __init__(self, folder: Path) -> None:
        self.note = ""
        self._program = folder / "controls"
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
        if compiler is None:
            self.note = "no C++ compiler: machine controls skipped"
            return
        source = Path(__file__).with_name("controls.cpp")
        built = subprocess.run(
            [*compiler.split(), "-O3", "-march=native", "-pthread", str(source), "-o", str(self._program)], capture_output=True, text=True
        )
        if built.returncode:
            self.note = f"controls.cpp does not build here, machine controls skipped: {built.stderr.strip().splitlines()[-1:]}"

    def measure(self) -> dict[str, Any] | None:
        """{"read_gb_s": [1 thread, 2 threads], "product_gflop_s": [..], "product": instruction}, or None."""
        if self.note:
            return None
        result: dict[str, Any] = json.loads(subprocess.run([str(self._program)], check=True, capture_output=True, text=True).stdout)
        return result


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, its deciding flags, threads used."""
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    have = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    family = f" (family {fields['cpu family']}, model {fields['model']})" if {"cpu family", "model"} <= fields.keys() else ""
    return {"cpu": model + family, "flags": [flag for flag in _FLAGS if flag in have], "cores": os.cpu_count(), "threads": threads}


def format_controls(found: dict[str, Any] | None, note: str) -> str:
    """One line for a reader."""
    if found is None:
        return note
    (read1, read2), (product1, product2) = found["read_gb_s"], found["product_gflop_s"]
    return f"read {read1} GB/s with 1 thread, {read2} with 2; {found['product']} products {product1} GFLOP/s with 1 thread, {product2} with 2"
