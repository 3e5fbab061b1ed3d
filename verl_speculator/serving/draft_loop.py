"""Drafting from buffers that stay where they are, so that CUDA graphs can do it: one launch for all heads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from verl_speculator.serving.served_chain import Choose, ServedChain


class DraftLoop:
    """The drafts of a whole batch, from the first rows of `hidden` [R, H] and `token` [R] into `drafts` [R, k].

    With graphs captured, a batch runs in the smallest that it fits into; more than `LARGEST` requests, other numbers of
    tokens, and whatever could not be captured run without.
    """

    LARGEST = 256

    chain: ServedChain
    choose: Callable[[int], Choose] | None

    def __init__(
        self, max_batch: int, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """To be made outside of vLLM's loading of weights: what is allocated there is gone after a deep sleep."""
        self.hidden = torch.zeros(max_batch, hidden_size, dtype=dtype, device=device)
        self.token = torch.zeros(max_batch, dtype=torch.long, device=device)
        self.drafts = torch.zeros(max_batch, num_tokens, dtype=torch.long, device=device)
        self.logits: Tensor | None = None
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def draft_with(self, chain: ServedChain, choose: Callable[[int], Choose] | None = None) -> DraftLoop:
        """Say what drafts; `choose(batch)` gives what picks the tokens of so many rows, None takes the likeliest."""
        self.chain, self.choose = chain, choose
        return self

    def keep_logits(self, vocab_size: int) -> None:
        """Have greedy drafts leave what they were chosen from in `logits` [R, k, V]."""
        self.logits = self.hidden.new_zeros(*self.drafts.shape, vocab_size)

    def choose_and_keep(self, batch: int) -> Choose:
        """A `choose` of `draft_with`, after `keep_logits`: the likeliest token of each row."""

        def choose(logits: Tensor, head_index: int) -> Tensor:
            assert self.logits is not None
            self.logits[:batch, head_index] = logits
            return logits.argmax(-1)

        return choose

    @property
    def sizes(self) -> list[int]:
        """The batch sizes to capture: 1, 2, 4, ... until all batches, or the `LARGEST`, fit."""
        largest = min(len(self.token), self.LARGEST)
        return [*(1 << power for power in range((largest - 1).bit_length())), largest]

    def run(self, batch: int, num_tokens: int) -> Tensor:
        """Drafts [batch, num_tokens] of the first rows: a view of `drafts`, which the next call writes to."""
        size = next((size for size in self.sizes if size >= batch), batch)
        graph = self.graphs.get((size, num_tokens))
        if graph is None:
            self._draft(batch, num_tokens)
        else:
            graph.replay()
        return self.drafts[:batch, :num_tokens]

    @torch.inference_mode()
    def capture(self, numbers_of_tokens: Collection[int], around: AbstractContextManager[object] | None = None) -> None:
        """Capture graphs for these numbers of tokens, within a context with a stream for it; None makes one.

        Raises:
            Exception: Whatever CUDA or a library says. No graph is kept then.
        """
        self.graphs.clear()
        captured, pool = {}, torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        # Not the default stream, on which nothing can be captured.
        with around or torch.cuda.stream(torch.cuda.Stream()):
            for size in reversed(self.sizes):
                for num_tokens in sorted(numbers_of_tokens, reverse=True):
                    self._draft(size, num_tokens)  # libraries choose their kernels outside the graph
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                        self._draft(size, num_tokens)
                    captured[size, num_tokens] = graph
        torch.cuda.synchronize()
        self.graphs = captured

    def _draft(self, batch: int, num_tokens: int) -> None:
        choose = None if self.choose is None else self.choose(batch)
        drafted = self.chain.draft(self.hidden[:batch], self.token[:batch], num_tokens, choose)
        self.drafts[:batch, :num_tokens] = drafted
