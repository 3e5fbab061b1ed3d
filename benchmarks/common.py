"""What every benchmark needs: the machine's description, its matmul peak, peak memory, and tables."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where the numbers come from. The load average tells whether something else ran next to them."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": load_average(),
        "platform": platform.platform(),
    }


def load_average() -> list[float]:
    return [round(load, 2) for load in os.getloadavg()]


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions; None for a package that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def matmul_peak(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """Floating-point operations per second of `torch.matmul` on large square matrices: the best of five."""
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: left @ right, device) for _ in range(5))


def add_peak_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peak-size", type=int, help="rows of the matmul peak's matrices; large ones when left out")


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory that torch's allocator holds during `run`, beyond what it held before.

    On CPU it is summed from the profiler's allocation events, so what other processes and the libc do is not in it.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # Only these raw events have each allocation and its time: the public tables have sums per operation.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    cells = [list(columns)] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
