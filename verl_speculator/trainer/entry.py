"""What every way to start a training shares: configuration, checks, and errors as one sentence."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from verl_speculator.errors import SpeculatorError
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.config.preflight import check_run
from verl_speculator.trainer.launch import joins_cluster

EXIT_USER_ERROR = 2
# As of a process that SIGTERM has ended: schedulers that start a job again look for a failure.
EXIT_STOPPED = 128 + signal.SIGTERM


def run_trainer(
    train: Callable[[DictConfig], bool],
    overrides: Sequence[str],
    world_size: int | None,
    rank: int = 0,
    local_rank: int = 0,
) -> int:
    """Check the configuration and train.

    Args:
        train: trains with the checked configuration; whether to the end.
        overrides: `key=value` from the command line.
        world_size: None on a Ray driver, which takes it from `trainer.nnodes` and `trainer.n_gpus_per_node`.
        rank: of this process.
        local_rank: among the processes of this machine, which find the same; the first one says it.

    Returns:
        The exit status: 0; 2 after an error of the user's; 143 if SIGTERM has stopped the training.
    """
    try:
        config = load_config(overrides)
        under_ray = world_size is None
        world_size = world_size or config.trainer.nnodes * config.trainer.n_gpus_per_node
        check_run(config, world_size, read_weights=rank == 0, workers_elsewhere=under_ray and joins_cluster())
    except SpeculatorError as error:
        return _report(error, rank) if local_rank == 0 else EXIT_USER_ERROR
    try:
        return 0 if train(config) else EXIT_STOPPED
    except SpeculatorError as error:
        return _report(error, rank)


def _report(error: SpeculatorError, rank: int = 0) -> int:
    # An error of a Ray worker arrives inside one of the same type that prints the worker's traceback too.
    error = getattr(error, "cause", None) or error
    print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr)
    return EXIT_USER_ERROR
