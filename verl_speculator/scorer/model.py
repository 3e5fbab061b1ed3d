"""The scorer: a small head that accepts or rejects a mismatch, on the states of the target or of the target with LoRA.

One head, two ways to run it, with the same numbers:

- **While decoding** (`ScoringActor.score_tokens`) it reads a `Verification`. With `lora_rank: 0` these are the very
  states that verification has computed: no model runs. With LoRA the scorer reads context and drafts in one forward.
- **In training** (`ScoringActor.forward`) it reads windows of tokens, and runs the backbone on them.

A window is `input_ids` = context + drafts. The context is the prompt and what was generated so far, its last token
included; `draft_start_idx` is its length without any padding, the index of the first draft. What the target would have
written is not among them: attention is causal, so the states at the drafts could not see it. It comes in beside them,
as `target_ids` and scalars. Logits at t judge the token AT t, not the one after: [:, t, 0] rejects, [:, t, 1] accepts.

Log π(a) of an action a in {0, 1} is then `logits.log_softmax(-1)[..., a]`, that of a language model of two words.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from verl_speculator.decoding.acceptance import Verification
from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.features import draft_scalars, head_features

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "spd_scorer"
# Half the distance between the logits of what is not decided: its log-probability is 0 in every number type.
FORCED = 50.0


class ScoreHead(nn.Module):
    """An MLP from what is known of a mismatch to two logits, {reject 0, accept 1}.

    `shift` and `scale` bring features to a common size; they are set once from data (`standardise`) and saved.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: ScoringModelConfig) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(config.num_features))
        self.register_buffer("scale", torch.ones(config.num_features))
        layers: list[nn.Module] = []
        width = config.num_features
        for _ in range(config.num_layers):
            layers += [nn.Linear(width, config.inner_dim), nn.GELU()]
            width = config.inner_dim
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(width, 2)
        # A fresh head says the same of every mismatch, so training starts from a policy that is known.
        nn.init.zeros_(self.out.weight)
        self.out.bias.data = torch.tensor([-config.accept_bias / 2, config.accept_bias / 2])

    def standardise(self, features: Tensor) -> None:
        """Mean 0 and variance 1 over `features [N, num_features]`, those of mismatches."""
        self.shift.copy_(features.mean(0))
        self.scale.copy_(features.std(0).clamp(min=1e-3))

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[..., 2]` of `features [..., num_features]`, in float32."""
        weight = self.out.weight
        scaled = ((features.float() - self.shift) / self.scale).to(weight.dtype)
        return self.out(self.layers(scaled)).float()


class ScoringActor(nn.Module):
    """A backbone, the target's layers up to its final norm, and a `ScoreHead`.

    With `lora_rank: 0` only the head trains. Else the backbone is this scorer's own: it shares the weights of the
    target that it was made from, and adds LoRA to them.
    """

    def __init__(self, config: ScoringModelConfig, backbone: Any, head: ScoreHead) -> None:
        super().__init__()
        self.scoring_config = config
        self.backbone: Any = backbone
        self.head = head
        # What verl and transformers ask of a module that they wrap.
        self.config: Any = backbone.config
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)

    @property
    def needs_draft_logits(self) -> bool:
        return self.scoring_config.needs_draft_logits

    @property
    def target_calls(self) -> int:
        return int(self.scoring_config.lora_rank > 0)

    def train(self, mode: bool = True) -> ScoringActor:
        super().train(mode)
        if not self.scoring_config.lora_rank:
            self.backbone.eval()  # frozen: the states of training are those of decoding
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        target_ids: Tensor,
        scalars: Tensor,
        draft_mask: Tensor,
        **ignored: Any,
    ) -> Any:
        """Logits [B, S, 2] of the tokens of windows, an object with `.logits` as of a causal model.

        What is no draft, and drafts that match, are forced to be accepted: their logits are constants without gradient.

        Args:
            input_ids: [B, S], windows, padded on either side or packed into one row.
            attention_mask: [B, S].
            position_ids: [B, S].
            target_ids: [B, S], at each draft the token that the target would have written there; elsewhere anything.
            scalars: [B, S, len(config.scalars)], at each draft what `features.draft_scalars` gives; elsewhere anything.
            draft_mask: [B, S], bool, where drafts are.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        hidden = self.states(input_ids, attention_mask, position_ids)
        drafted = draft_mask[:, 1:].bool()
        matches = input_ids[:, 1:] == target_ids[:, 1:]
        # No text begins with a draft, so every draft has a state before it.
        logits = self._judge(hidden, matches, drafted, target_ids[:, 1:], scalars[:, 1:])
        logits = torch.cat([_forced(logits[:, :1]), logits], dim=1)
        return CausalLMOutputWithPast(logits=logits)

    def score_tokens(self, verification: Verification) -> Tensor:
        """Probability [B, k] of accepting each draft; 1 where it matches."""
        log_odds = self.decision_logits(verification).diff(dim=-1).squeeze(-1)
        return self.scoring_config.normalise(log_odds).sigmoid()

    def decision_logits(self, verification: Verification) -> Tensor:
        """Logits [B, k, 2] of each draft, as `forward` gives them for the same window."""
        drafts, context = verification.drafts, verification.tokens
        hidden = verification.hidden_states
        if self.scoring_config.lora_rank:
            inputs = torch.cat([context, drafts], dim=1)
            slots = torch.arange(inputs.size(1), device=inputs.device)
            mask = (slots >= context.size(1) - verification.context_lengths[:, None]).long()
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            hidden = self.states(inputs, mask, positions)[:, context.size(1) - 1 :]
        return self._judge(
            hidden,
            drafts == verification.target_tokens[:, :-1],
            verification.drafted,
            verification.target_tokens[:, :-1],
            draft_scalars(verification, self.scoring_config.scalars),
        )

    def _judge(self, hidden: Tensor, matches: Tensor, drafted: Tensor, target_ids: Tensor, scalars: Tensor) -> Tensor:
        """Logits [B, k, 2] from states [B, k + 1, H] and what is known of the k slots between them."""
        logits = self.head(self.features(hidden, matches, drafted, target_ids, scalars))
        return torch.where((drafted & ~matches)[..., None], logits, _forced(logits))

    def features(self, hidden: Tensor, matches: Tensor, drafted: Tensor, target_ids: Tensor, scalars: Tensor) -> Tensor:
        """What the head reads, [B, k, num_features]; arguments as of `features.head_features`, and ids [B, k]."""
        with torch.no_grad():
            # -1 and the like may stand where no draft is.
            embeddings = self.backbone.get_input_embeddings()(target_ids.clamp(min=0))
        return head_features(
            hidden,
            matches,
            drafted,
            embeddings,
            scalars.to(hidden.dtype),
            lookahead=self.scoring_config.lookahead,
            use_states=self.scoring_config.use_states,
        )

    def states(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """The backbone's last states [B, S, H]; with a gradient only where LoRA trains."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.scoring_config.lora_rank > 0):
            output = self.backbone(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
        return output.last_hidden_state

    def trained_state(self) -> dict[str, Tensor]:
        """What belongs to the scorer: the head, and LoRA under `lora.`; nothing of the target."""
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        if self.scoring_config.lora_rank:
            from peft import get_peft_model_state_dict

            state |= {f"lora.{name}": tensor for name, tensor in get_peft_model_state_dict(self.backbone).items()}
        return state

    def load_trained_state(self, state: dict[str, Tensor], source: str = "the scorer") -> None:
        """Raises CheckpointError for names or shapes that are not this scorer's."""
        own = self.trained_state()
        if wrong := sorted(set(own) ^ set(state)):
            raise CheckpointError(f"{source}: {wrong[0]!r} is missing or too much: it is of another configuration")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{source}: {name!r} has shape {list(state[name].shape)} and should have {list(tensor.shape)}"
                )
        prefix = "head."
        self.head.load_state_dict({name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)})
        if self.scoring_config.lora_rank:
            from peft import set_peft_model_state_dict

            prefix = "lora."
            lora = {name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)}
            set_peft_model_state_dict(self.backbone, lora)

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write `config.json` and `model.safetensors`: head, LoRA and sizes, never the target.

        `state` is a `trained_state` that was gathered elsewhere, where this module's own is sharded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.trained_state() if state is None else state
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
        text = json.dumps({"model_type": MODEL_TYPE, **self.scoring_config.to_dict()}, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


class AutoModelForSPDScoring:
    """Scorers from a folder or a configuration; both need the target, a folder or a loaded causal model."""

    @staticmethod
    def from_config(
        config: ScoringModelConfig, target: Any = None, *, dtype: torch.dtype = torch.float32
    ) -> ScoringActor:
        """A fresh scorer on `target`, by default the one at `config.target_model_path`.

        A loaded model is shared, not copied: with LoRA the layers are new and their weights the target's own.

        Raises:
            ConfigError: No target, or one of another hidden size.
        """
        target = config.target_model_path if target is None else target
        if target is None:
            raise ConfigError("target_model_path of the scorer must name the target whose states it reads")
        if isinstance(target, str | Path):
            from transformers import AutoModelForCausalLM

            target = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
        hidden_size = target.get_output_embeddings().weight.shape[1]
        if hidden_size != config.hidden_size:
            raise ConfigError(
                f"hidden_size={config.hidden_size} of the scorer is not the target's, {hidden_size}: "
                "give the target that it was trained on"
            )
        backbone = target.get_decoder()
        if config.lora_rank:
            from peft import LoraConfig, get_peft_model

            # LoRA is put into layers in place: they must not be the ones that verify. A deep copy whose memo holds the
            # weights makes new layers around the same weights.
            backbone = copy.deepcopy(backbone, {id(tensor): tensor for tensor in backbone.parameters()})
            modules = config.target_modules
            lora = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules=modules if isinstance(modules, str) else list(modules),
            )
            backbone = get_peft_model(backbone, lora)
        else:
            backbone.requires_grad_(False)
        head = ScoreHead(config).to(next(backbone.parameters()).device)
        return ScoringActor(config, backbone, head).train(False)

    @staticmethod
    def from_pretrained(folder: str | Path, target: Any = None, *, dtype: torch.dtype = torch.float32) -> ScoringActor:
        """The scorer in `folder`, with the scores that it had when it was saved.

        Raises:
            MissingFileError: The folder holds no scorer.
            CheckpointError: Its files do not belong together.
        """
        return _with_weights(AutoModelForSPDScoring.from_config(read_config(folder), target, dtype=dtype), folder)

    @staticmethod
    def on_states(folder: str | Path, backbone: Any) -> ScoringActor:
        """The scorer in `folder`, without LoRA, where another engine runs the target and only decisions are asked for.

        `backbone` has the target's `config`, and `get_input_embeddings()` gives what embeds its tokens. Errors are as
        of `from_pretrained`.
        """
        config = read_config(folder)
        return _with_weights(ScoringActor(config, backbone, ScoreHead(config)).train(False), folder)


def read_config(folder: str | Path) -> ScoringModelConfig:
    """Raises MissingFileError or CheckpointError if `folder` holds no scorer."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise MissingFileError(f"{str(folder)!r} has no {CONFIG_FILE}: it holds no scorer")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.pop("model_type", None) != MODEL_TYPE:
        raise CheckpointError(f"{str(path)!r} is not of a scorer: its model_type should be {MODEL_TYPE!r}")
    return ScoringModelConfig.from_dict(values)


def _with_weights(actor: ScoringActor, folder: str | Path) -> ScoringActor:
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise MissingFileError(f"{str(folder)!r} has no {WEIGHTS_FILE}: it holds no scorer")
    actor.load_trained_state(load_file(path), str(path))
    return actor


def _forced(logits: Tensor) -> Tensor:
    """Logits of acceptance beyond doubt, in the shape of `logits [..., 2]`."""
    return logits.new_tensor([-FORCED, FORCED]).expand_as(logits)
