"""GRPO with a speculator that follows: `python -m verl_speculator.rl.train_grpo key=value ...`

`verl-speculator grpo` is the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from verl_speculator.errors import SpeculatorError
from verl_speculator.rl.grpo_config import CPU_ENVIRONMENT, check_run, load_config

EXIT_USER_ERROR = 2


def train(config: DictConfig) -> None:
    """Train with workers on the Ray cluster that RAY_ADDRESS names, or on one started here."""
    if config.trainer.device == "cpu":
        # Before Ray is started, whose processes inherit it.
        os.environ.update({name: value for name, value in CPU_ENVIRONMENT.items() if name not in os.environ})
    import ray
    from verl.trainer.main_ppo import run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from verl_speculator.rl.grpo_trainer import GRPOTaskRunner

    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    try:
        run_ppo(config, task_runner_class=ray.remote(GRPOTaskRunner))
    finally:
        ray.shutdown()


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 2 after an error of the user's."""
    try:
        config = load_config(arguments)
        check_run(config)
        train(config)
    except SpeculatorError as error:
        # From a worker it comes inside others of its type, one for each process on its way.
        while (cause := getattr(error, "cause", None)) is not None:
            error = cause
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
