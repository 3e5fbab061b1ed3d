"""Several trainings of a scorer one after the other, by one cluster of Ray's and one driver: importing verl is slow.

usage: python scorer_runs.py RUNS.json        RUNS.json: a list of lists of overrides
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from verl_speculator.scorer.training_config import check_run, load_config


def run_all(configs: list[Any]) -> None:
    from verl_speculator.scorer.spd_ray_trainer import SPDTaskRunner

    for config in configs:
        runner = SPDTaskRunner()
        runner.run(config)
        # What else ends with the driver.
        for worker in runner.trainer.reward_loop_manager.reward_loop_workers:
            ray.kill(worker)
        for pool in runner.trainer.resource_pool_manager.resource_pool_dict.values():
            for group in pool.get_placement_groups():
                ray.util.remove_placement_group(group)


@ray.remote
class Runner:
    """In the place of verl's task runner: runs all configurations and not the first alone."""

    def __init__(self, configs: list[Any]) -> None:
        self.configs = configs

    def run(self, first: Any) -> None:
        run_all(self.configs)


if __name__ == "__main__":
    configs = [load_config(overrides) for overrides in json.loads(Path(sys.argv[1]).read_text())]
    for config in configs:
        check_run(config)
    from verl.trainer.main_ppo import run_ppo

    # verl starts Ray as the first of them says.
    run_ppo(configs[0], SimpleNamespace(remote=lambda: Runner.remote(configs)))
