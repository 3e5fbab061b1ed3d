"""The Megatron engine without an accelerator: for development and tests, not for training anything of size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from verl.workers.engine.base import EngineRegistry

from verl_speculator.engine.megatron.engine import MegatronEngineWithLMHeadAndSpeculator
from verl_speculator.engine.model_config import MODEL_TYPE
from verl_speculator.platforms import megatron_cpu

CallT = TypeVar("CallT", bound=Callable[..., Any])


def _emulated(method: CallT) -> CallT:
    """Megatron finds its device for as long as the call lasts."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with megatron_cpu.emulated_device():
            return method(*args, **kwargs)

    return cast(CallT, call)


@EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron", device="cpu")
class MegatronEngineOnCpu(MegatronEngineWithLMHeadAndSpeculator):
    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        megatron_cpu.install()
        with megatron_cpu.emulated_device():
            super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
            # verl seeds Megatron's generators where it finds an accelerator only.
            model_parallel_cuda_manual_seed(engine_config.seed)

    initialize = _emulated(MegatronEngineWithLMHeadAndSpeculator.initialize)
    forward_backward_batch = _emulated(MegatronEngineWithLMHeadAndSpeculator.forward_backward_batch)
    optimizer_zero_grad = _emulated(MegatronEngineWithLMHeadAndSpeculator.optimizer_zero_grad)
    optimizer_step = _emulated(MegatronEngineWithLMHeadAndSpeculator.optimizer_step)
    lr_scheduler_step = _emulated(MegatronEngineWithLMHeadAndSpeculator.lr_scheduler_step)
    save_checkpoint = _emulated(MegatronEngineWithLMHeadAndSpeculator.save_checkpoint)
    load_checkpoint = _emulated(MegatronEngineWithLMHeadAndSpeculator.load_checkpoint)
