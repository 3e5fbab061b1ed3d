"""Entry point for torchrun: verl's own SFT trainer, on a machine that may have no accelerator."""

import hydra
import torch
from omegaconf import DictConfig
from verl.utils.distributed import initialize_global_process_group

from verl_speculator.platforms import cpu


@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
def main(config: DictConfig) -> None:
    from verl.trainer.sft_trainer import SFTTrainer

    SFTTrainer(config=config).fit()
    torch.distributed.destroy_process_group()


# Saving a checkpoint starts processes that import this file again: they must not start training.
if __name__ == "__main__":
    cpu.ensure_registered()
    if cpu.is_active():
        cpu.enable_verl_engines()
        cpu.init_process_group()
    else:
        initialize_global_process_group()
    main()
