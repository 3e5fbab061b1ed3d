"""Writing the hidden states of all rows before a training, under torchrun: what `data hidden-states` starts."""

from __future__ import annotations

import os
import sys
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from verl_speculator.checkpoint.hidden_states import KEY, row_key, stored_bytes
from verl_speculator.errors import ConfigError
from verl_speculator.trainer.entry import run_trainer
from verl_speculator.trainer.hidden_states import mark_complete
from verl_speculator.trainer.sft_trainer import SpeculatorSFTTrainer, in_process_group


class HiddenStatesWriter(SpeculatorSFTTrainer):
    """The trainer, of which only data and engine are used: so what it writes is what a training would."""

    def write_all(self) -> None:
        """Have the states of all rows in the folder, and mark it as complete.

        Raises:
            ConfigError: there was no room for all of them.
        """
        states = self.engine.cached_states
        assert states is not None
        if not states.cache.is_complete:
            keys: set[str] = set()
            datasets: list[Any] = [dataset for dataset in (self.train_dataset, self.val_dataset) if dataset is not None]
            with tqdm(
                total=sum(map(len, datasets)), desc="Hidden states", unit="row", disable=not self.is_logging()
            ) as bar:
                for batch in (batch for dataset in datasets for batch in self._evaluation_loader(dataset)):
                    keys.update(map(row_key, batch["input_ids"].unbind()))
                    self.engine.store_states(self._tensordict(batch))
                    bar.update(len(batch["input_ids"]) * self.data_parallel_size())
            states.share()
            if self.processes.is_any(not states.cache.has(list(keys))):
                raise ConfigError(f"{KEY}: {str(states.cache.folder)!r} has no room for the states of all rows")
            self.processes.on_first(lambda: mark_complete(self.config))
        self._say(f"{states.cache.folder}: complete, {stored_bytes(states.cache.folder) / 1e9:.3g} GB")
        self.ckpt_handler.close()


def store(config: DictConfig) -> bool:
    """Write them in this process and its torchrun siblings; always to the end."""
    settings = config.model.speculator
    if settings.get("draft_vocab_size") is not None:
        # States do not depend on it, and the file of what was chosen would lie in the folder, which is the cache's own.
        settings.draft_vocab_size = None
    with in_process_group(config):
        HiddenStatesWriter(config).write_all()
    return True


if __name__ == "__main__":
    world_size, rank, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    sys.exit(run_trainer(store, sys.argv[1:], world_size, rank, local_rank))
