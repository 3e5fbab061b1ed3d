"""verl's engine for a scorer: actions are the tokens of a language model of two words. Checked on verl 0.9.1.

The target is frozen. Every rank keeps a whole copy, in which it also decodes, and nothing is sharded: what trains is
the head (and LoRA), a few megabytes, and ranks average its gradients. Of the two logits verl's own code then makes
log-probabilities, entropy, KL and the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_speculator.base_model.loading import load_target
from verl_speculator.base_model.settings import LoadSettings
from verl_speculator.checkpoint.training_state import load_training_state, save_training_state
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.controllers import learned_threshold
from verl_speculator.scorer.model import WEIGHTS_FILE, AutoModelForSPDScoring, ScoringActor

MODEL_TYPE = "spd_scorer"
SCORER_FOLDER = "scorer"


@dataclass
class ScorerModelConfig(HFModelConfig):
    """verl's model configuration of the target, and what is the scorer's.

    Attributes:
        scorer: Fields of `ScoringModelConfig`, or a scorer's `path`.
        quantization: Of target and draft model, as of `LoadSettings`; empty for none.
    """

    scorer: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)


class ScorerPolicy(nn.Module):
    """What verl's engine calls: two logits for each decision, in the slot before its token as in a language model."""

    def __init__(self, actor: ScoringActor) -> None:
        super().__init__()
        self.actor = actor
        self.config = actor.config

    def forward(
        self,
        num_tokens: int,
        slots: Tensor,
        features: Tensor | None = None,
        windows: dict[str, Tensor] | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """An object with `.logits` [num_tokens, 2].

        Args:
            num_tokens: Of the packed batch.
            slots: [N], where the decisions' logits go.
            features: [N, F] of the decisions, for a frozen target.
            windows: Or what `ScoringActor.forward` takes of the windows whose drafts they are.
            use_cache: verl's.
        """
        if features is not None:
            logits = self.actor.head(features)
        else:
            assert windows is not None
            logits = self.actor(**windows).logits[windows["draft_mask"]]
        return SimpleNamespace(logits=logits.new_zeros(num_tokens, 2).index_put((slots,), logits))


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class SPDScorerEngine(FSDPEngineWithLMHead):
    """Trains a `ScoringActor` on actions that a rollout has taken."""

    # Building: verl calls these in this order.

    def _build_module(self) -> nn.Module:
        config = self.model_config
        dtype = PrecisionType.to_dtype(self.engine_config.model_dtype)
        load = LoadSettings(
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.override_config.get("attn_implementation"),
            quantization=dict(config.quantization) or None,
        )
        self.target = load_target(config.local_path, load, config.tokenizer)
        values = dict(config.scorer)
        path = values.pop("path", None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.engine_config.seed)
            if path is not None:
                actor = AutoModelForSPDScoring.from_pretrained(path, self.target.model)
            else:
                scoring_config = ScoringModelConfig.from_dict(
                    {
                        "hidden_size": self.target.model.get_output_embeddings().weight.shape[1],
                        "lora_rank": config.lora_rank,
                        "lora_alpha": config.lora_alpha,
                        "target_modules": config.target_modules,
                        "target_model_path": config.path,
                        **values,
                    }
                )
                actor = AutoModelForSPDScoring.from_config(scoring_config, self.target.model)
        if actor.scoring_config.lora_rank and config.enable_gradient_checkpointing:
            actor.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.actor = actor.float() if dtype == torch.float32 and not config.quantization else actor
        self.start_state = _copy(actor.trained_state())
        self.threshold = actor.scoring_config.threshold
        self.learns_threshold = False
        self.is_standardised = path is not None
        return ScorerPolicy(actor)

    def _build_lora_module(self, module: nn.Module) -> nn.Module:
        return module  # the actor has its LoRA

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        self._autocast_dtype = torch.float32
        return module

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        trained = {name.replace(".", "/"): one for name, one in module.named_parameters() if one.requires_grad}
        # One module of what trains and nothing else, for the checkpoint.
        self.trained = nn.ParameterDict(trained)
        return build_optimizer(self.trained.parameters(), self.optimizer_config)

    def standardise(self, features: Tensor) -> None:
        """Bring a fresh head's features to a common size by those `[N, F]` of this rank's first mismatches, once."""
        if self.is_standardised:
            return
        # Sums and not the features themselves: ranks may have different numbers of them.
        sums = torch.stack([torch.ones_like(features), features, features**2]).double().sum(1)
        sums = sums.to(get_device_id())
        dist.all_reduce(sums)
        count, mean = sums[0].clamp(min=1), sums[1] / sums[0].clamp(min=1)
        deviation = (sums[2] / count - mean**2).clamp(min=0).sqrt()
        # Two rows with this mean and deviation.
        self.actor.head.standardise(torch.stack([mean - deviation / 2**0.5, mean + deviation / 2**0.5]).float())
        self.start_state = _copy(self.actor.trained_state())
        self.is_standardised = True

    # A step

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        offsets = micro_batch["input_ids"].offsets()
        responses = list(micro_batch["responses"].unbind())
        # Token i is predicted in slot i - 1. verl's padding rows have a response of its own choosing, without weight.
        ends = offsets[1:].tolist()
        slots = torch.cat(
            [torch.arange(end - len(row) - 1, end - 1) for end, row in zip(ends, responses, strict=True)]
        ).to(offsets.device)
        num_tokens = int(offsets[-1])
        actions = torch.cat(responses).clamp(0, 1)
        labels = actions.new_zeros(num_tokens).index_put((slots,), actions)
        temperature = torch.as_tensor(micro_batch["temperature"], dtype=torch.float32, device=offsets.device)
        output_args = {
            "input_ids_rmpad_rolled": labels,
            "temperature_rmpad": temperature.reshape(-1)[:1].expand(num_tokens),
            "pad_size": 0,
        }
        model_inputs: dict[str, Any] = {"num_tokens": num_tokens, "slots": slots}
        if self.actor.scoring_config.lora_rank == 0:
            width = self.actor.scoring_config.num_features
            rows = [
                flat.reshape(-1, width)[: len(row)]
                for flat, row in zip(micro_batch["features"].unbind(), responses, strict=True)
            ]
            model_inputs["features"] = torch.cat(rows)
        else:
            model_inputs["windows"] = self._windows(micro_batch, responses)
        return model_inputs, output_args

    def _windows(self, micro_batch: TensorDict, responses: list[Tensor]) -> dict[str, Tensor]:
        """The windows whose drafts responses decide on, padded on the right; what is not a draft has zeros."""
        rows = micro_batch["input_ids"].unbind()
        num_scalars = len(self.actor.scoring_config.scalars)
        shape = (len(rows), max(map(len, rows)))
        device = rows[0].device
        windows = {
            name: torch.zeros(shape, dtype=torch.long, device=device)
            for name in ("input_ids", "attention_mask", "target_ids")
        }
        scalars = torch.zeros(*shape, num_scalars, device=device)
        draft_mask = torch.zeros(shape, dtype=torch.bool, device=device)
        targets, values = micro_batch["target_ids"].unbind(), micro_batch["scalars"].unbind()
        for place, (row, response) in enumerate(zip(rows, responses, strict=True)):
            drafts = slice(len(row) - len(response), len(row))
            windows["input_ids"][place, : len(row)] = row
            windows["attention_mask"][place, : len(row)] = 1
            windows["target_ids"][place, drafts] = targets[place][: len(response)]
            scalars[place, drafts] = values[place].reshape(-1, num_scalars)[: len(response)]
            draft_mask[place, drafts] = True
        positions = torch.arange(shape[1], device=device).expand(shape)
        return {**windows, "position_ids": positions, "scalars": scalars, "draft_mask": draft_mask}

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        # The logits are packed, whatever the layout in which a backbone ran.
        tu.assign_non_tensor(micro_batch, use_remove_padding=True, use_fused_kernels=False)
        return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)

    def optimizer_step(self) -> float:
        world_size = dist.get_world_size()
        if world_size > 1:
            for parameter in self.trained.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size  # gloo has no mean
        return super().optimizer_step()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside it the policy is the one that this run has started from: verl's reference for the KL."""
        now = _copy(self.actor.trained_state())
        self.actor.load_trained_state(self.start_state)
        try:
            yield
        finally:
            self.actor.load_trained_state(now)

    # Checkpoints

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `scorer/`, for decoding, and `resume/`; the target is in neither."""
        folder = Path(local_path)
        folder.mkdir(parents=True, exist_ok=True)
        if dist.get_rank() == 0:
            self._save_scorer(folder / SCORER_FOLDER)
        # What trains as it is: a threshold that was learned is taken out of the head in `scorer/`.
        save_training_state(folder, self.trained, self.optimizer, self.lr_scheduler, None)
        dist.barrier()
        if dist.get_rank() == 0:
            self.checkpoint_manager.register_checkpoint(str(folder), max_ckpt_to_keep)

    def _save_scorer(self, folder: Path) -> None:
        actor, state, threshold = self.actor, self.actor.trained_state(), self.threshold
        if self.learns_threshold:
            bias, start = state["head.out.bias"], self.start_state["head.out.bias"]
            threshold = learned_threshold(float(start[1] - start[0]), float(bias[1] - bias[0]))
            state = {**state, "head.out.bias": start.to(bias)}
        kept = actor.scoring_config
        actor.scoring_config = replace(kept, threshold=threshold)
        try:
            actor.save_pretrained(folder, state)
        finally:
            actor.scoring_config = kept

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = True, **kwargs: Any
    ) -> None:
        saved = load_file(Path(local_path) / SCORER_FOLDER / WEIGHTS_FILE)
        self.is_standardised = True
        # First what has no gradient, such as the features' scale; then what trains, exactly.
        self.actor.load_trained_state(saved, local_path)
        load_training_state(Path(local_path), self.trained, self.optimizer, self.lr_scheduler, None)
        dist.barrier()


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
