"""DFlash written plainly: one sequence and one block at a time, with every key in sight."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.eagle3_reference import Reference as LayersReference
from tests.support.eagle3_reference import rotate


class Reference(LayersReference):
    """The weights of a `DFlashSpeculator` by their names in files."""

    def fuse(self, aux: Tensor) -> Tensor:
        return self.norm(self.linear(aux, "fc"), "hidden_norm")

    def keys_and_values(self, i: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        prefix, size = f"layers.{i}.self_attn", self.layer.head_dim
        k, v = (self.linear(x, f"{prefix}.{n}_proj").unflatten(-1, (-1, size)).transpose(0, 1) for n in ("k", "v"))
        return rotate(self.norm(k, f"{prefix}.k_norm"), positions, self.theta), v

    def block(self, anchor: Tensor, context: Tensor, size: int) -> Tensor:
        """Logits over the draft vocabulary [size - 1, V'] after `context` [n, H] and the token that follows it."""
        n = len(context)
        tokens = torch.cat([anchor.view(1), anchor.new_full((size - 1,), self.config.mask_token_id)])
        x = F.embedding(tokens, self.weights["embed_tokens.weight"])
        here = torch.arange(size) + n
        for i in range(self.layer.num_hidden_layers):
            prefix, head_dim = f"layers.{i}.self_attn", self.layer.head_dim
            normed = self.norm(x, f"layers.{i}.input_layernorm")
            q = self.linear(normed, f"{prefix}.q_proj").unflatten(-1, (-1, head_dim)).transpose(0, 1)
            q = rotate(self.norm(q, f"{prefix}.q_norm"), here, self.theta)
            pairs = [self.keys_and_values(i, context, torch.arange(n)), self.keys_and_values(i, normed, here)]
            keys, values = (torch.cat(part, dim=1) for part in zip(*pairs, strict=True))
            groups = q.shape[0] // keys.shape[0]
            scores = q @ keys.repeat_interleave(groups, 0).mT / head_dim**0.5
            attended = scores.softmax(-1) @ values.repeat_interleave(groups, 0)
            x = x + self.linear(attended.transpose(0, 1).flatten(1), f"{prefix}.o_proj")
            x = x + self.mlp(i, self.norm(x, f"layers.{i}.post_attention_layernorm"))
        return self.linear(self.norm(x, "norm")[1:], "lm_head")

    def loss(  # type: ignore[override]
        self, aux: Tensor, ids: Tensor, mask: Tensor, last: Tensor, head: Tensor, picked: Tensor, *, gamma: float,
        kind: str = "kl",
    ) -> tuple[Tensor, float]:  # fmt: skip
        """The weighted sum over a sequence's trained tokens, and the sum of their weights."""
        context = self.fuse(aux)
        draft_ids = torch.arange(len(head)) if self.draft_ids is None else self.draft_ids
        total, weights = context.sum() * 0, 0.0
        for anchor in range(1, len(ids) - 1):
            if mask[anchor + 1] != 1 or not picked[anchor - 1]:
                continue
            logits = self.block(ids[anchor], context[:anchor], self.config.block_size)
            for k in range(1, self.config.block_size):
                at = anchor + k
                if at >= len(ids) or mask[at] != 1:
                    continue
                found = (draft_ids == ids[at]).nonzero()
                if kind == "ce" and not len(found):
                    continue
                log_q = logits[k - 1].log_softmax(-1)
                if kind == "ce":
                    row = -log_q[found[0, 0]]
                else:
                    log_p = (last[at - 1] @ head[draft_ids].T).log_softmax(-1)
                    row = (log_p.exp() * (log_p - log_q)).sum()
                weight = math.exp(-(k - 1) / gamma)
                total, weights = total + weight * row, weights + weight
        return total, weights

    def greedy_drafts(self, aux: Tensor, ids: Tensor, count: int) -> list[int]:
        """Drafts after `ids`, of which all but the last have states `aux`: everything computed anew, no cache."""
        logits = self.block(ids[-1], self.fuse(aux), count + 1)
        draft_ids = torch.arange(logits.shape[-1]) if self.draft_ids is None else self.draft_ids
        return draft_ids[logits.argmax(-1)].tolist()
