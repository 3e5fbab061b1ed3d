"""The draft loop as CUDA graphs: one launch for all heads instead of a few dozen small kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from verl_speculator.models import ChainSpeculator


class DraftGraphs:
    """Graphs of `ChainSpeculator.draft` for batch sizes 1, 2, 4, ... up to `max_batch`, captured when it is built.

    A batch runs in the smallest graph it fits into. Batches beyond `largest` and other numbers of drafts run without.
    """

    def __init__(self, speculator: ChainSpeculator, max_batch: int, num_tokens: int, largest: int = 256) -> None:
        self.speculator = speculator
        self.num_tokens = num_tokens
        sizes = [1 << power for power in range(min(max_batch, largest).bit_length() + 1)]
        self.sizes = [size for size in sizes if size < 2 * min(max_batch, largest)]
        weight = speculator.head_weight(0)
        self.hidden = torch.zeros(
            self.sizes[-1], speculator.config.input_hidden_dim, device=weight.device, dtype=weight.dtype
        )
        self.token = torch.zeros(self.sizes[-1], dtype=torch.long, device=weight.device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.drafts: dict[int, Tensor] = {}
        self._capture()

    def draft(self, hidden_states: Tensor, last_token: Tensor, num_tokens: int) -> Tensor:
        """As `ChainSpeculator.draft`: [B, num_tokens] from [B, H] and [B]."""
        batch = len(last_token)
        if num_tokens != self.num_tokens or batch > self.sizes[-1]:
            return self.speculator.draft(hidden_states, last_token, num_tokens)
        self.hidden[:batch].copy_(hidden_states)
        self.token[:batch].copy_(last_token)
        size = next(size for size in self.sizes if size >= batch)
        self.graphs[size].replay()
        # The next replay writes to the same memory.
        return self.drafts[size][:batch].clone()

    @torch.inference_mode()
    def _capture(self) -> None:
        pool = None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for size in reversed(self.sizes):
            hidden, token = self.hidden[:size], self.token[:size]
            with torch.cuda.stream(stream):
                self.speculator.draft(
                    hidden, token, self.num_tokens
                )  # libraries choose their kernels outside the graph
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self.drafts[size] = self.speculator.draft(hidden, token, self.num_tokens)
            pool = pool or graph.pool()
            self.graphs[size] = graph
        torch.cuda.current_stream().wait_stream(stream)
