"""Which tokens a run's speculator can draft: those that its training data trains most often."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from verl_speculator.checkpoint.layout import find_resume_path
from verl_speculator.errors import ConfigError
from verl_speculator.models.serialization import SAFETENSORS_NAME, find_folder

FILE = "draft_vocabulary.npy"


def choose_draft_vocabulary(config: DictConfig, dataset: Dataset, vocab_size: int) -> dict[str, Any]:
    """Settle what `model.speculator.draft_vocab_size` stands for and write it to the run's folder; one process does.

    A run that goes on takes the tokens of its checkpoint. The file is `draft_vocabulary.npy`, V booleans, which can be
    given to another run as `model.speculator.draft_vocab_path`.

    Args:
        config: The run's configuration.
        dataset: What the run trains on.
        vocab_size: V, of the base.

    Returns:
        The settings of `model.speculator` to build with; nothing where the size is not given, or the tokens are.
    """
    settings = config.model.speculator
    size = settings.get("draft_vocab_size")
    if size is None or settings.get("draft_vocab_path") is not None or config.model.speculator_path is not None:
        return {}
    root, trainer = Path(config.trainer.default_local_dir), config.trainer
    checkpoint = find_resume_path(root, trainer.resume_mode, trainer.resume_from_path)
    if checkpoint is not None:
        ids = _of_checkpoint(checkpoint, size, vocab_size)
    else:
        counts = count_trained_tokens(dataset, vocab_size, config.data.num_workers)
        ids = most_frequent(counts, size)
        if not len(ids):
            raise ConfigError("model.speculator.draft_vocab_size: data.train_files have no token to train")
        share = counts[ids].sum().item() / counts.sum().item()
        print(f"Draft vocabulary: {len(ids)} of {vocab_size} tokens, {share:.2%} of the tokens that are trained")
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[ids] = True
    partial = root / f".{FILE}.{os.getpid()}.npy"
    np.save(partial, t2d.numpy())
    os.replace(partial, root / FILE)
    return {"draft_vocab_size": len(ids), "draft_vocab_path": str(root / FILE)}


def _of_checkpoint(checkpoint: Path, size: int, vocab_size: int) -> Tensor:
    with safe_open(find_folder(checkpoint) / SAFETENSORS_NAME, framework="pt") as opened:
        if "d2t" in opened.keys():  # noqa: SIM118 - not a dictionary
            d2t = opened.get_tensor("d2t")
            return d2t + torch.arange(len(d2t))
    if size < vocab_size:
        raise ConfigError(
            f"model.speculator.draft_vocab_size={size}, but {checkpoint} was trained without one: leave it out to go "
            "on, or start afresh with another trainer.default_local_dir"
        )
    return torch.arange(vocab_size)


def count_trained_tokens(dataset: Dataset, vocab_size: int, num_workers: int = 0) -> Tensor:
    """[V], int64: how often each token is one that the first draft head learns."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in DataLoader(dataset, batch_size=None, num_workers=num_workers):
        # A row's first two tokens are nobody's draft: the first is read, and the base itself gives the second.
        ids, mask = row["input_ids"][2:], row["loss_mask"][2:]
        counts += torch.bincount(ids[mask == 1], minlength=vocab_size)
    return counts


def most_frequent(counts: Tensor, size: int) -> Tensor:
    """The `size` tokens of the highest counts, ascending; of equal counts the lower ids. Those that occur, if fewer."""
    order = counts.argsort(descending=True, stable=True)[:size]
    return order[counts[order] > 0].sort().values
