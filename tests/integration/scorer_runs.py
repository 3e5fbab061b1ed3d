"""Several trainings of a scorer one after the other, on one cluster of Ray's and with verl imported once.

usage: python scorer_runs.py RUNS.json        RUNS.json: a list of lists of overrides
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray
from verl.trainer.main_ppo import run_ppo

from verl_speculator.scorer.spd_ray_trainer import SPDTaskRunner
from verl_speculator.scorer.training_config import check_run, load_config

if __name__ == "__main__":
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config(overrides)
        check_run(config)
        run_ppo(config, task_runner_class=ray.remote(SPDTaskRunner))
