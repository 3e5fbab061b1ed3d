"""Several runs of one process may lay Megatron out differently."""

from __future__ import annotations

import sys


def forget_megatron_layout() -> None:
    """Let the next engine of this process choose its own tensor and pipeline parallelism."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None and parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
