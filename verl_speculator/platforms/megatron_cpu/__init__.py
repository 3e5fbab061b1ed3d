"""Megatron on machines without an accelerator: a platform for development and tests, not for training in earnest.

megatron-core and mbridge take CUDA, TransformerEngine and apex for granted. `emulated_device` answers their calls
with the CPU for as long as it lasts and puts everything back when it ends; nothing is replaced outside of it. Checked
with megatron-core 0.16.1, mbridge 0.15.1, verl 0.9.1 and torch 2.13.0.

Covered are the dense text models of mbridge with RMS norms (Llama, Qwen2, Qwen3), padded and packed input, tensor,
sequence, pipeline and data parallelism over gloo, and Megatron's distributed optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from verl_speculator.errors import ConfigError
from verl_speculator.platforms import cpu
from verl_speculator.platforms.megatron_cpu.cuda_calls import cuda_patches
from verl_speculator.platforms.megatron_cpu.environment import no_attention_choice
from verl_speculator.platforms.megatron_cpu.patches import Patch, patched
from verl_speculator.platforms.megatron_cpu.tensor_calls import cuda_tensors_on_cpu

_patches: list[Patch] = []


def install() -> None:
    """Load Megatron and prepare `emulated_device`. Replaces nothing yet; a second call does nothing.

    Raises:
        ConfigError: this machine has an accelerator, or verl was told to use another platform than `cpu`.
        ImportError: megatron-core or mbridge is missing.
    """
    if torch.cuda.is_available() or not cpu.is_active():
        raise ConfigError("Megatron runs on the CPU only where there is no accelerator and verl's platform is cpu")
    if not _patches:
        from verl_speculator.platforms.megatron_cpu.bridge import bridge_patches
        from verl_speculator.platforms.megatron_cpu.optimizer_state import optimizer_patches
        from verl_speculator.platforms.megatron_cpu.random_states import random_patches

        _patches.extend([*cuda_patches(), *random_patches(), *bridge_patches(), *optimizer_patches()])


@contextmanager
def emulated_device() -> Iterator[None]:
    """Megatron's device calls are answered by the CPU, and what it compiles runs as it is written.

    Wrap every call into an engine with it. It nests, and it is for one thread: what it replaces in modules is seen by
    all threads, what it does to tensor calls only by the one that entered.

    Raises:
        RuntimeError: `install` has not been called.
    """
    if not _patches:
        raise RuntimeError("call megatron_cpu.install() first")
    with ExitStack() as stack:
        stack.enter_context(no_attention_choice())
        stack.enter_context(patched(_patches))
        stack.enter_context(cuda_tensors_on_cpu())
        # Megatron and verl compile small functions: on a CPU that takes minutes and a C++ compiler.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
