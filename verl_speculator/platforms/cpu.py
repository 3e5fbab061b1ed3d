"""verl on machines without an accelerator: a platform named `cpu` over gloo.

Checked on verl 0.9.1. verl picks the platform by asking each registered one whether it is available, in the order of
registration; ours comes last, so an accelerator always wins, and `VERL_PLATFORM` overrides the choice as usual.
This module runs inside `import verl` (entry point group `verl.plugins`) and so may import nothing heavy of verl.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry, get_platform

PLATFORM_NAME = "cpu"


def _nothing(*args: Any, **kwargs: Any) -> None:
    """For device calls that have no meaning without a device."""


def _no_bytes(*args: Any, **kwargs: Any) -> int:
    return 0


def _peak_resident_bytes(*args: Any, **kwargs: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _CpuDeviceModule(ModuleType):
    """`torch.cpu` with the functions of `torch.cuda` that verl calls on any device."""

    memory_allocated = staticmethod(_no_bytes)
    memory_reserved = staticmethod(_no_bytes)
    max_memory_allocated = staticmethod(_peak_resident_bytes)
    max_memory_reserved = staticmethod(_peak_resident_bytes)
    empty_cache = staticmethod(_nothing)
    reset_peak_memory_stats = staticmethod(_nothing)
    ipc_collect = staticmethod(_nothing)
    set_device = staticmethod(_nothing)
    get_rng_state = staticmethod(torch.get_rng_state)
    set_rng_state = staticmethod(torch.set_rng_state)
    manual_seed = staticmethod(torch.manual_seed)

    @staticmethod
    def mem_get_info(*args: Any) -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def get_device_name(*args: Any) -> str:
        return "CPU"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name)


_DEVICE_MODULE = _CpuDeviceModule("verl_speculator.platforms.cpu.device")


class CpuPlatform(PlatformBase):
    """One logical device per process. Ray workers take a logical `GPU` each, which `ray_init_args` declares."""

    device_name = PLATFORM_NAME
    vendor_name = PLATFORM_NAME
    device_module = _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        has_npu = hasattr(torch, "npu") and torch.npu.is_available()
        return not torch.cuda.is_available() and not has_npu

    def current_device(self) -> Any:
        return torch.device(PLATFORM_NAME)

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def ensure_registered() -> None:
    """Register the platform with verl, once."""
    if PlatformRegistry.get(PLATFORM_NAME) is None:
        PlatformRegistry.register(platform=PLATFORM_NAME)(CpuPlatform)


def is_active() -> bool:
    return get_platform().device_name == PLATFORM_NAME


def enable_verl_engines() -> None:
    """Let verl's own FSDP language-model engine be chosen on this platform: verl names only cuda and npu for it."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp import FSDPEngineWithLMHead

    backends = EngineRegistry._engines.get("language_model", {})
    if PLATFORM_NAME not in backends.get("fsdp2", {}):
        EngineRegistry.register(model_type="language_model", backend="fsdp2", device=PLATFORM_NAME)(
            FSDPEngineWithLMHead
        )


def keep_freed_memory() -> None:
    """Let glibc keep large buffers that torch frees, for the next one; elsewhere nothing happens.

    By default it gives every buffer above some size back to the system at once, and takes a new one, zeroed page by
    page, for the next result: a tenth of a training step. The process then stays as large as it once was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # M_MMAP_MAX: no buffers outside of the heap. M_TRIM_THRESHOLD: the heap is never cut back.
        mallopt(-4, 0)
        mallopt(-1, -1)


def init_process_group(timeout_s: int = 36000) -> None:
    """Initialise gloo from torchrun's or Ray's variables; verl itself would ask for `cpu:gloo,cpu:gloo` and fail."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo",
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            init_method=os.environ.get("DIST_INIT_METHOD"),
            timeout=timedelta(seconds=timeout_s),
        )


def ray_init_args(num_workers: int) -> dict[str, Any]:
    """Arguments for `ray.init` on one machine: a logical GPU for each worker, and CPUs to schedule them on."""
    return {"num_gpus": num_workers, "num_cpus": max(os.cpu_count() or 1, num_workers + 1)}
