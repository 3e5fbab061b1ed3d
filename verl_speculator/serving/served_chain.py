"""A chain of heads as it stands in a worker of vLLM, whichever model runner drives it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.errors import ConfigError
from verl_speculator.models import ChainSpeculator
from verl_speculator.models.serialization import PREFIX
from verl_speculator.serving.speculative_config_hook import ATTRIBUTE

logger = logging.getLogger("vllm.verl_speculator")

# The next token [B] from its logits [B, V] and the number of the head, from 0.
Choose: TypeAlias = Callable[[Tensor, int], Tensor]

# A vocabulary matrix of at least so many MiB is divided among tensor-parallel ranks. Below, reading the whole of it
# takes about as long as asking the other ranks.
SHARD_VARIABLE = "VERL_SPECULATOR_SHARD_FROM_MIB"
SHARD_FROM_MIB = 64


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's share of the rows of every vocabulary matrix, `rows` in all.

    `gather` puts the ranks' [..., n] side by side on every rank: [..., size * n].
    """

    rank: int
    size: int
    rows: int
    gather: Callable[[Tensor], Tensor]

    @property
    def here(self) -> slice:
        width = -(-self.rows // self.size)
        return slice(self.rank * width, min((self.rank + 1) * width, self.rows))

    def likeliest(self, logits: Tensor) -> Tensor:
        """Which of all rows has the largest logit [...], from this rank's [..., rows here]."""
        value, row = logits.max(-1)
        # As float32, which holds every row's number: one message instead of two.
        mine = torch.stack([value.float(), (row + self.here.start).float()], dim=-1)
        theirs = self.gather(mine).unflatten(-1, (self.size, 2))
        best = theirs[..., 0].argmax(-1, keepdim=True)
        return theirs[..., 1].gather(-1, best).squeeze(-1).long()

    def all_logits(self, logits: Tensor) -> Tensor:
        """Logits [..., rows] of all rows from this rank's."""
        width = -(-self.rows // self.size)
        return self.gather(F.pad(logits, (0, width - logits.shape[-1])))[..., : self.rows]


class ServedChain(nn.Module):
    """Drafts with a `ChainSpeculator`, and takes new weights while it does."""

    def __init__(
        self,
        speculator: ChainSpeculator,
        to_state: Callable[[Tensor], Tensor] | None = None,
        shard: VocabularyShard | None = None,
    ) -> None:
        """`to_state` leads from what the base's forward returns to what its `lm_head` reads, where these differ."""
        super().__init__()
        self.speculator = speculator
        # In a tuple: a layer of the base is not to become a part of this module.
        self._to_state = (to_state,)
        self.shard = shard
        if shard is not None:
            for i, head in enumerate(speculator.head):
                head.weight = nn.Parameter(speculator.head_weight(i)[shard.here].clone(), requires_grad=False)
        self.requires_grad_(False)
        self.eval()

    def draft(self, hidden_states: Tensor, last_token: Tensor, num_tokens: int, choose: Choose | None = None) -> Tensor:
        """As `ChainSpeculator.draft`: [B, num_tokens] from [B, H] and [B]."""
        states = self.read_state(hidden_states)

        def next_token(output: Tensor, head_index: int) -> Tensor:
            if choose is not None:
                return choose(self._target_logits(output, head_index), head_index)
            if self.shard is None:
                return self.speculator.likeliest(output, head_index)
            logits = F.linear(output, self.speculator.head_weight(head_index))
            return self.speculator.to_target_ids(self.shard.likeliest(logits))

        return self.speculator.draft_by(next_token, states, last_token, num_tokens)

    def read_state(self, hidden_states: Tensor) -> Tensor:
        """What the base's `lm_head` reads, from what its forward returns."""
        (to_state,) = self._to_state
        return hidden_states if to_state is None else to_state(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Replace weights in place, under the file format's names: `Speculator.load_weights`, on every rank alike.

        vLLM calls this where it sends new weights to a draft model; a worker extension may too.
        """
        if self.shard is not None:
            weights = ((name, self._share_of(name, tensor)) for name, tensor in weights)
        return self.speculator.load_weights(weights)

    def _share_of(self, name: str, tensor: Tensor) -> Tensor:
        assert self.shard is not None
        # Of another number of rows it is left as it is, for the error that names its shape.
        is_matrix = name.removeprefix(PREFIX).startswith("head.") and len(tensor) == self.shard.rows
        return tensor[self.shard.here] if is_matrix else tensor

    def _target_logits(self, output: Tensor, head_index: int) -> Tensor:
        logits = F.linear(output, self.speculator.head_weight(head_index))
        return self.speculator.to_target_logits(logits if self.shard is None else self.shard.all_logits(logits))


def load_served_chain(vllm_config: Any, target_model: nn.Module, device: torch.device) -> ServedChain:
    """The speculator of a configuration, in the type of the base model; vLLM's groups of ranks must be there.

    Raises:
        SpeculatorError: Its folder is not on this machine or not usable, or the base gives it nothing to draft from.
    """
    from verl_speculator.serving.base_state import find_state

    served = getattr(vllm_config.speculative_config, ATTRIBUTE, None)
    if served is None:
        raise ConfigError("name a speculator folder as the model of the speculative config, not its proposer class.")
    folder = served.folder(vllm_config.load_config.download_dir)
    dtype = vllm_config.model_config.dtype
    speculator = ChainSpeculator.from_pretrained(folder, dtype=dtype)
    to_state = find_state(target_model, speculator.config.input_hidden_dim, dtype, device)
    chain = ServedChain(speculator, to_state, _shard(speculator)).to(device)
    logger.info(
        "Drafting with the %s in %s (%d heads, %.1f M parameters here, %s%s).",
        *(type(speculator).__name__, folder, speculator.n_predict),
        *(sum(parameter.numel() for parameter in chain.parameters()) / 1e6, dtype),
        "" if chain.shard is None else f", vocabulary matrix in {chain.shard.size} shards",
    )
    return chain


def _shard(speculator: ChainSpeculator) -> VocabularyShard | None:
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_gather,
    )

    size = get_tensor_model_parallel_world_size()
    weight = speculator.head_weight(0)
    least = float(os.environ.get(SHARD_VARIABLE, SHARD_FROM_MIB)) * 2**20
    if size == 1 or weight.numel() * weight.itemsize < least:
        return None
    return VocabularyShard(get_tensor_model_parallel_rank(), size, len(weight), tensor_model_parallel_all_gather)
