"""Tensor calls that name a CUDA device, answered on the CPU. Checked with torch 2.13.0 and megatron-core 0.16.1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from verl_speculator.platforms.megatron_cpu.cuda_calls import CPU
from verl_speculator.platforms.megatron_cpu.patches import Patch, patched


class _CudaOnCpu(TorchFunctionMode):
    """`x.cuda()` is x, `device="cuda"` is the CPU, and `x.type()` names the CUDA type.

    Megatron sorts parameters by that name, and refuses those whose name it does not know.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is Tensor.to:
            args = tuple(CPU if _is_cuda(argument) else argument for argument in args)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


@contextmanager
def cuda_tensors_on_cpu() -> Iterator[None]:
    """Let this thread's tensor calls be answered as `_CudaOnCpu` says, in the backward pass too."""
    mode = _CudaOnCpu()
    run_backward = torch.autograd._engine_run_backward

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        # `backward` is itself a call that the mode handles, and a mode is off while it handles one.
        with mode:
            return run_backward(*args, **kwargs)

    with patched([Patch(torch.autograd, "_engine_run_backward", run_backward_in_mode)]), mode:
        yield
