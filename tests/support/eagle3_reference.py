"""EAGLE-3's training-time test written plainly: one sequence at a time, explicit masks, all logits held."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE of x [heads, N, D]."""
    half = x.shape[-1] // 2
    # As transformers has it: the table is float32 whatever the model is.
    frequencies = 1.0 / theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
    angles = (positions[:, None].float() * frequencies).repeat(1, 2)
    rotated = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * angles.cos().to(x.dtype) + rotated * angles.sin().to(x.dtype)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class Reference:
    """The weights of an `Eagle3Speculator` by their names in files, for sequences of any length without a cache."""

    def __init__(self, model) -> None:
        self.weights = dict(model.named_parameters())
        self.config = model.config
        self.layer = model.config.layer_config()
        self.theta = self.layer.rope_parameters["rope_theta"]
        self.draft_ids = model.draft_ids

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms(x, self.weights[f"{name}.weight"], self.layer.rms_norm_eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def fuse(self, aux: Tensor) -> Tensor:
        if self.config.norm_before_fc:
            aux = self.norm(aux, "input_norm")
        if self.config.fc_norm:
            parts = aux.chunk(len(self.config.eagle_aux_hidden_state_layer_ids), dim=-1)
            aux = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)], dim=-1)
        return self.linear(aux, "fc")

    def attention(self, i: int, x: Tensor, positions: Tensor, past: list, mask: Tensor) -> Tensor:
        """All keys so far, those of `past` and x's own, under an explicit mask [N, all]."""
        prefix, size = f"layers.{i}.self_attn", self.layer.head_dim
        q, k, v = (
            self.linear(x, f"{prefix}.{name}_proj").unflatten(-1, (-1, size)).transpose(0, 1)
            for name in ("q", "k", "v")
        )
        if self.layer.model_type == "qwen3":
            q, k = self.norm(q, f"{prefix}.q_norm"), self.norm(k, f"{prefix}.k_norm")
        past.append((rotate(k, positions, self.theta), v))
        keys, values = (torch.cat(part, dim=1) for part in zip(*past, strict=True))
        groups = q.shape[0] // keys.shape[0]
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        scores = rotate(q, positions, self.theta) @ keys.mT / size**0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.linear((weights @ values).transpose(0, 1).flatten(1), f"{prefix}.o_proj")

    def mlp(self, i: int, x: Tensor) -> Tensor:
        gate, up = (self.linear(x, f"layers.{i}.mlp.{name}_proj") for name in ("gate", "up"))
        return self.linear(F.silu(gate) * up, f"layers.{i}.mlp.down_proj")

    def step(self, tokens: Tensor, hidden: Tensor, positions: Tensor, pasts: list[list], mask: Tensor):
        """Entries [N]: the state to go on from and the logits over the draft vocabulary."""
        embeds = self.norm(F.embedding(tokens, self.weights["embed_tokens.weight"]), "layers.0.input_layernorm")
        for i, past in enumerate(pasts):
            if i == 0:
                normed = self.norm(hidden, "layers.0.hidden_norm")
                residual = normed if self.config.norm_before_residual else hidden
                inputs = torch.cat([embeds, normed], dim=-1)
            else:
                residual, inputs = hidden, self.norm(hidden, f"layers.{i}.input_layernorm")
            hidden = residual + self.attention(i, inputs, positions, past, mask)
            hidden = hidden + self.mlp(i, self.norm(hidden, f"layers.{i}.post_attention_layernorm"))
        normed = self.norm(hidden, "norm")
        return (normed if self.config.norm_output else hidden), self.linear(normed, "lm_head")

    def loss(
        self, aux: Tensor, ids: Tensor, mask: Tensor, last: Tensor, head: Tensor, *, ttt_steps: int, decay: float,
        kind: str = "kl",
    ) -> tuple[Tensor, float]:  # fmt: skip
        """The weighted sum over a sequence's trained rows, and the sum of their weights."""
        n = len(ids)
        hidden = self.fuse(aux)
        pasts: list[list] = [[] for _ in range(self.layer.num_hidden_layers)]
        causal, own = torch.ones(n, n).tril().bool(), torch.eye(n).bool()
        draft_ids = torch.arange(len(head)) if self.draft_ids is None else self.draft_ids
        total, weights = hidden.sum() * 0, 0.0
        for k in range(ttt_steps):
            tokens = torch.cat([ids[1 + k :], ids.new_zeros(min(1 + k, n))])
            seen = torch.cat([causal, *[own] * k], dim=1)
            hidden, logits = self.step(tokens, hidden, torch.arange(n) + k, pasts, seen)
            for t in range(n - 2 - k):
                label = ids[t + 2 + k]
                at = (draft_ids == label).nonzero()
                if mask[t + 2 + k] != 1 or (kind == "ce" and not len(at)):
                    continue
                log_q = logits[t].log_softmax(-1)
                if kind == "ce":
                    row = -log_q[at[0, 0]]
                else:
                    log_p = (last[t + 1 + k] @ head[draft_ids].T).log_softmax(-1)
                    row = (log_p.exp() * (log_p - log_q)).sum()
                total, weights = total + decay**k * row, weights + decay**k
        return total, weights

    def greedy_drafts(self, aux: Tensor, ids: Tensor, count: int) -> list[int]:
        """Drafts after `ids`, of which all but the last have states `aux`: everything computed anew, no cache."""
        n = len(aux)
        hidden, drafts, tokens = self.fuse(aux), [], ids[1 : n + 1]
        pasts: list[list] = [[] for _ in range(self.layer.num_hidden_layers)]
        hidden, logits = self.step(tokens, hidden, torch.arange(n), pasts, torch.ones(n, n).tril().bool())
        hidden, logits = hidden[-1:], logits[-1:]
        draft_ids = torch.arange(logits.shape[-1]) if self.draft_ids is None else self.draft_ids
        for k in range(count):
            drafts.append(int(draft_ids[logits[0].argmax()]))
            if k + 1 < count:
                mask = torch.ones(1, n + k + 1).bool()
                hidden, logits = self.step(torch.tensor(drafts[-1:]), hidden, torch.tensor([n + k]), pasts, mask)
        return drafts
