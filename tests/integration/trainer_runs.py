"""Run under torchrun: several trainings one after the other, to share the cost of importing verl.

usage: torchrun --nproc_per_node=N trainer_runs.py RUNS.json        RUNS.json: a list of lists of overrides
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tests.integration.megatron_layout import forget_megatron_layout
from verl_speculator.platforms import cpu
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.config.devices import apply_device
from verl_speculator.trainer.config.preflight import check_run
from verl_speculator.trainer.sft_trainer import SpeculatorSFTTrainer

if __name__ == "__main__":
    cpu.init_process_group()
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config(overrides)
        check_run(config, dist.get_world_size())
        apply_device(config)
        SpeculatorSFTTrainer(config).fit()
        forget_megatron_layout()
    dist.destroy_process_group()
