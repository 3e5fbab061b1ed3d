"""Trainings of a scorer one after the other, by one cluster of Ray's and one driver: importing verl is slow.

usage: python scorer_runs.py RUNS.json        RUNS.json: a list of {"overrides": ..., "again": [step, folder] or null}

With `again` the same trainer then loads its own checkpoint of a step and goes on from there in another folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from verl_speculator.scorer.training_config import check_run, load_config


@ray.remote
class Runner:
    """In the place of verl's task runner: does all runs and not the first alone."""

    def __init__(self, runs: list[tuple[Any, list[Any] | None]]) -> None:
        self.runs = runs

    def run(self, first: Any) -> None:
        from verl.trainer.ppo.v1.trainer_base import register_trainer

        from verl_speculator.scorer.spd_ray_trainer import SPDRayTrainer, SPDTaskRunner

        @register_trainer("twice")
        class Twice(SPDRayTrainer):
            again: list[Any] | None = None

            def fit(self, agent_loop_manager: Any) -> None:
                super().fit(agent_loop_manager)
                if self.again is not None:
                    step, folder = self.again
                    trainer = self.config.trainer
                    trainer.resume_mode = "resume_path"
                    trainer.resume_from_path = f"{trainer.default_local_dir}/global_step_{step}"
                    trainer.default_local_dir = folder
                    self.train_dataloader_it = None
                    self._init_dump_executor()
                    self._load_checkpoint()
                    super().fit(agent_loop_manager)

        for config, again in self.runs:
            Twice.again = again
            config.trainer.v1.trainer_mode = "twice"
            runner = SPDTaskRunner()
            runner.run(config)
            # What else ends with the driver.
            for worker in runner.trainer.reward_loop_manager.reward_loop_workers:
                ray.kill(worker)
            for pool in runner.trainer.resource_pool_manager.resource_pool_dict.values():
                for group in pool.get_placement_groups():
                    ray.util.remove_placement_group(group)


if __name__ == "__main__":
    runs = [(load_config(run["overrides"]), run["again"]) for run in json.loads(Path(sys.argv[1]).read_text())]
    for config, _ in runs:
        check_run(config)
    from verl.trainer.main_ppo import run_ppo

    # verl starts Ray as the first of them says.
    run_ppo(runs[0][0], SimpleNamespace(remote=lambda: Runner.remote(runs)))
