"""The loss of design.md computed plainly: one process, one sequence at a time, float64, all logits held."""

from __future__ import annotations

import collections
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.integration.needy_adapter import LAYER_IDS, soft_loss
from tests.support.eagle3_reference import Reference
from verl_speculator.algorithms.eagle3 import Eagle3Speculator
from verl_speculator.losses import PackedHiddenStates, TargetHead
from verl_speculator.models import Speculator

# As `EAGLE3` of the numbers' world sets them.
EAGLE3_SETTINGS = {"ttt_steps": 3, "decay": 0.8}

Rows = list[tuple[torch.Tensor, torch.Tensor]]


class PlainTraining:
    """A base model and a speculator in float64."""

    def __init__(self, base_folder: Path, speculator_folder: Path) -> None:
        self.base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float64).eval()
        self.speculator = Speculator.from_pretrained(speculator_folder, dtype=torch.float64)

    def speculator_loss(self, rows: Rows, *, detach: bool, objective: str = "ce") -> torch.Tensor:
        """Mean over heads of each head's mean loss over its trained positions: the cross entropy, or kl or lk.

        Of EAGLE-3 its own loss.
        """
        if isinstance(self.speculator, Eagle3Speculator):
            return self.eagle3_loss(rows)
        n_predict = self.speculator.n_predict
        losses: list[list[torch.Tensor]] = [[] for _ in range(n_predict)]
        for ids, mask in rows:
            output = self.base(ids.unsqueeze(0), output_hidden_states=True)
            hidden, base_logits = output.hidden_states[-1], output.logits[0]
            if self.base.config.model_type == "llama":
                base_logits = base_logits * getattr(self.base.config, "logit_scale", 1.0)
            hidden = hidden.detach() if detach else hidden
            padded = F.pad(ids, (0, n_predict + 1))
            logits = self.speculator(hidden, padded[1:].unsqueeze(0)[:, : ids.numel() + n_predict])
            for head in range(n_predict):
                for position in range(ids.numel()):
                    target = position + 2 + head
                    if target < ids.numel() and mask[target] == 1:
                        row = logits[head, 0, position]
                        if objective == "ce":
                            # With a draft vocabulary there is nothing to learn where it lacks the token.
                            if row[ids[target]].isfinite():
                                losses[head].append(F.cross_entropy(row, ids[target]))
                        else:
                            # What the base itself would say there; its own part in it learns nothing.
                            losses[head].append(_against_target(row, base_logits[target - 1].detach(), objective))
        means = [torch.stack(head).mean() if head else torch.zeros((), dtype=torch.float64) for head in losses]
        return torch.stack(means).mean()

    def eagle3_loss(self, rows: Rows) -> torch.Tensor:
        """The mean over all trained rows of the divergence from the base, each sequence on its own."""
        reference = Reference(self.speculator)
        head = self.base.get_output_embeddings().weight.detach()
        sums, total = [], 0.0
        for ids, mask in rows:
            with torch.no_grad():
                last, layers = self.states(ids)
            aux = torch.cat([layers[i] for i in self.speculator.target_layer_ids], dim=-1)
            part, weight = reference.loss(aux, ids, mask, last, head, **EAGLE3_SETTINGS)
            sums, total = [*sums, part], total + weight
        return torch.stack(sums).sum() / total

    def states(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last hidden states [S, H], and the residual stream after 0, 1, ... layers."""
        after_last: list[torch.Tensor] = []
        hook = self.base.model.layers[-1].register_forward_hook(lambda module, args, output: after_last.append(output))
        states = self.base(ids[None], output_hidden_states=True).hidden_states
        hook.remove()
        # transformers gives the last layer's states after the norm only.
        return states[-1][0], [*(layer[0] for layer in states[:-1]), after_last[0][0]]

    def soft_loss(self, rows: Rows, *, detach: bool) -> torch.Tensor:
        """What `NeedyAdapter` adds, from the states that transformers itself gives out."""
        layers = self.base.model.layers
        weight = self.base.get_output_embeddings().weight.detach()
        losses, count = [], 0
        for ids, mask in rows:
            # transformers gives the last layer's states after the norm only.
            before_norm: list[torch.Tensor] = []
            hook = layers[-1].register_forward_hook(lambda module, args, output, out=before_norm: out.append(output))
            states = self.base(ids.unsqueeze(0), output_hidden_states=True).hidden_states
            hook.remove()
            stream = [tensor[0] for tensor in (*states[:-1], before_norm[0])]
            last = states[-1][0]
            if detach:
                last, stream = last.detach(), [tensor.detach() for tensor in stream]
            positions = torch.arange(ids.numel())
            losses.append(soft_loss(last, [stream[layer_id] for layer_id in LAYER_IDS], positions, mask, weight))
            count += int(mask[2:].sum())
        return torch.stack(losses).sum() / count

    def base_loss(self, rows: Rows) -> torch.Tensor:
        """Mean over all trained tokens of the batch, as in verl's SFT."""
        losses = []
        for ids, mask in rows:
            logits = self.base(ids.unsqueeze(0)).logits[0]
            losses += [F.cross_entropy(logits[t - 1], ids[t]) for t in range(1, ids.numel()) if mask[t] == 1]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def packed(self, rows: Rows) -> PackedHiddenStates:
        """All rows with the hidden states of each on its own."""
        states = [self.base(ids[None], output_hidden_states=True).hidden_states[-1][0] for ids, _ in rows]
        return PackedHiddenStates(
            hidden_states=torch.cat(states),
            input_ids=torch.cat([ids for ids, _ in rows]),
            loss_mask=torch.cat([mask for _, mask in rows]),
            cu_seqlens=torch.tensor([0, *itertools.accumulate(ids.numel() for ids, _ in rows)]),
            target_head=self.target_head(),
        )

    def target_head(self) -> TargetHead:
        """What the base does to its last states, from what is known of its kind."""
        head, config = self.base.get_output_embeddings(), self.base.config
        made = TargetHead(head.weight, head.bias)
        if config.model_type == "gemma2":
            return made._replace(softcap=config.final_logit_softcapping)
        if config.model_type == "granite":
            return made._replace(scale=1 / config.logits_scaling)
        return made._replace(scale=getattr(config, "logit_scale", 1.0))

    def train_speculator(self, batches: list[Rows], *, lr: float, weight_decay: float, clip: float) -> list[dict]:
        """AdamW with clipped gradients, a step on each batch; the loss and each head's sums before every step."""
        optimizer = torch.optim.AdamW(self.speculator.parameters(), lr=lr, weight_decay=weight_decay)
        steps = []
        for rows in batches:
            optimizer.zero_grad()
            loss = self.speculator_loss(rows, detach=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.speculator.parameters(), clip)
            steps.append({"speculator_loss": loss.item(), **self.head_sums(rows)})
            optimizer.step()
        return steps

    @torch.no_grad()
    def head_sums(self, rows: Rows) -> dict[str, float]:
        """Loss, right drafts and positions of each head, added up over the rows."""
        n_predict = self.speculator.n_predict
        sums: dict[str, float] = collections.Counter()
        for ids, mask in rows:
            hidden = self.base(ids.unsqueeze(0), output_hidden_states=True).hidden_states[-1]
            padded = F.pad(ids, (0, n_predict + 1))
            logits = self.speculator(hidden, padded[1:].unsqueeze(0)[:, : ids.numel() + n_predict])
            for head in range(n_predict):
                for target in range(2 + head, ids.numel()):
                    trained = int(mask[target] == 1)
                    row = logits[head, 0, target - 2 - head]
                    sums[f"head_{head}/loss_sum"] += trained * F.cross_entropy(row, ids[target]).item()
                    sums[f"head_{head}/correct_sum"] += trained * float(row.argmax() == ids[target])
                    sums[f"head_{head}/count"] += trained
        return dict(sums)

    def gradients(self) -> dict[str, torch.Tensor]:
        named = [(f"speculator.{name}", p) for name, p in self.speculator.named_parameters()]
        named += [(f"base.{name}", p) for name, p in self.base.named_parameters()]
        return {name: p.grad for name, p in named if p.grad is not None}


def _against_target(logits: torch.Tensor, target_logits: torch.Tensor, objective: str) -> torch.Tensor:
    drafted = logits.isfinite()
    q, p = logits[drafted].softmax(0), target_logits[drafted].softmax(0)
    kl = (p * (p.log() - q.log())).sum()
    if objective == "kl":
        return kl
    overlap = torch.minimum(p, q).sum()
    blend = torch.exp(-3 * overlap.detach())
    return blend * kl + (1 - blend) * (1 - overlap)
