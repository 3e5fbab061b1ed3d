"""`ChainSpeculator`: draft heads that run one after the other on a base model's last hidden state.

    state = begin(hidden_states)
    for each head i:    state, output = step(state, embed(token i, i), i)
                        logits of the next token = output @ head_weight(i).T

In training the tokens are those of the text; in decoding each is chosen from the logits of the head before it. Both go
through `unroll`, the one loop over the heads.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from verl_speculator.errors import ConfigError
from verl_speculator.models.base_start import BaseRows
from verl_speculator.models.config import SpeculatorConfig, require_bool, require_positive_int
from verl_speculator.models.draft_vocabulary import DraftVocabulary
from verl_speculator.models.layers import for_head, scale_hidden_states
from verl_speculator.models.speculator import Speculator

State: TypeAlias = tuple[Tensor, ...]


@dataclass(kw_only=True)
class ChainTrainingArguments:
    """What a run may set of a chain beside its shape."""

    objective: Any = field(
        default="ce",
        metadata={"help": "ce: the text's tokens; kl, rkl, tv, nla, lk: the base's distribution; or a weighted sum"},
    )
    objective_temperature: float = field(
        default=1.0, metadata={"help": "the sampling temperature for which drafts are meant"}
    )
    head_loss_weights: Any = field(
        default=None, metadata={"help": "how much each head counts: a list, {decay: 0.8} or adaptive"}
    )
    draft_vocab_path: str | None = field(
        default=None,
        metadata={"help": "a .npy file of V booleans, true for the tokens that it can draft (t2d.npy of Speculators)"},
    )
    init_from_base: Any = field(
        default="auto",
        metadata={"help": "embeddings and vocabulary matrix start from the base's: true, false, or auto for true"},
    )


@dataclass(kw_only=True)
class ChainSpeculatorConfig(SpeculatorConfig):
    """Adds what IBM's `MLPSpeculator` and its descendants have in common, and the keys that their engines look for.

    Attributes:
        draft_vocab_size: The number of tokens that can be drafted, where these are not all.
    """

    model_type: ClassVar[str] = "mlp_speculator"
    training_arguments: ClassVar[type | None] = ChainTrainingArguments

    scale_input: bool = field(default=False, metadata={"help": "normalise the hidden state first"})
    tie_weights: bool = field(
        default=True, metadata={"help": "heads share embedding, norm and vocabulary matrix; sum_lstm needs it"}
    )
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "how many tokens it can draft, the most frequent of the data; null for all"}
    )

    @property
    def head_rows(self) -> int:
        """Rows of a vocabulary matrix: the tokens that can be drafted."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    def validate(self) -> None:
        super().validate()
        if self.draft_vocab_size is not None:
            require_positive_int(self.draft_vocab_size, "draft_vocab_size")
            if self.draft_vocab_size > self.vocab_size:
                raise ConfigError(f"draft_vocab_size must be at most vocab_size ({self.vocab_size}).")
        for name in ("scale_input", "tie_weights"):
            require_bool(getattr(self, name), name)

    def to_dict(self) -> dict[str, Any]:
        common = {one.name for one in dataclasses.fields(ChainSpeculatorConfig)}
        own = {one.name for one in dataclasses.fields(self) if one.init} - common
        return {
            **self.common_values(),
            "n_candidates": self.n_predict,
            "top_k_tokens_per_head": [1] * self.n_predict,
            "scale_input": self.scale_input,
            "tie_weights": self.tie_weights,
            **{name: getattr(self, name) for name in sorted(own)},
            # Absent where there is none, for engines that know no such thing.
            **({} if self.draft_vocab_size is None else {"draft_vocab_size": self.draft_vocab_size}),
        }

    @classmethod
    def _fields_from_file(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        # Files from before weights could be tied do not have the key.
        return {"tie_weights": False, **super()._fields_from_file(values)}


class ChainSpeculator(DraftVocabulary, Speculator):
    """A chain of `n_predict` heads. Head i (from 0) at position t reads token `x_{t+1+i}` and predicts `x_{t+2+i}`.

    A subclass gives `embed` and `step`, and fills `head` with linear layers without bias: one if all heads share it,
    else `n_predict`; each has `config.head_rows` rows, so that it can have a draft vocabulary.
    """

    # How a chain is built and trained does not depend on its class.
    required_methods: ClassVar[tuple[str, ...]] = ()

    config: ChainSpeculatorConfig
    head: nn.ModuleList

    def __init__(self, config: ChainSpeculatorConfig) -> None:
        super().__init__(config)
        self.make_draft_vocabulary(config.draft_vocab_size)

    def begin(self, hidden_states: Tensor) -> State:
        """The state before the first head, each part [..., some width], from hidden states [..., H]."""
        return (scale_hidden_states(hidden_states) if self.config.scale_input else hidden_states,)

    @abstractmethod
    def init_std(self, weight: Tensor) -> float: ...

    @abstractmethod
    def embed(self, tokens: Tensor, head_index: int) -> Tensor:
        """What `step` takes of the `tokens` [...] int64 that a head reads: [..., any shape]."""

    @abstractmethod
    def step(self, state: State, embedded: Tensor, head_index: int) -> tuple[State, Tensor]:
        """One head: takes what `embed` gave; returns the next state and the output [..., D] for `head_weight`."""

    @property
    def embeddings_are_tied(self) -> bool:
        """Whether `embed` does the same for every head, so that one call serves all of them."""
        return False

    @property
    def heads_are_tied(self) -> bool:
        """Whether every head has the same vocabulary matrix."""
        return len(self.head) == 1

    def head_weight(self, head_index: int) -> nn.Parameter:
        """The vocabulary matrix of a head: [V, D], or [V', D] with a draft vocabulary."""
        weight = for_head(self.head, head_index).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def tied_copies(self) -> dict[str, str]:
        return {f"head.{i}": "head.0" for i in range(1, self.n_predict)} if self.heads_are_tied else {}

    @torch.no_grad()
    def start_from_base(self, embed_tokens: Tensor, lm_head: Tensor, generator: torch.Generator) -> None:
        """Fill token embeddings and vocabulary matrices from the base's, as large as fresh weights are drawn.

        Where `first_projection` gives one, it brings hidden states to the dimensions of the first vocabulary matrix.

        Args:
            embed_tokens: The base's [V, any width].
            lm_head: The base's [V, any width]; of these rows those that can be drafted are taken.
            generator: For the rotations of `BaseRows`: each table has its own.
        """
        ids = self.draft_ids
        rows = BaseRows(lm_head if ids is None else lm_head[ids.to(lm_head.device)])
        for i in range(len(self.head)):
            weight, projection = self.head_weight(i), self.first_projection()
            fitted, to_width = rows.fit(weight.shape[1], generator)
            weight.copy_(fitted * self.init_std(weight))
            if i == 0 and projection is not None and projection.shape == to_width.shape:
                projection.copy_(to_width * self.init_std(projection))
        rows = BaseRows(embed_tokens)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == self.config.vocab_size:
                # Piece by piece: of fused tables each is one.
                for table in self.file_views({f"{name}.weight": module.weight}).values():
                    table.copy_(rows.fit(table.shape[1], generator)[0] * self.init_std(table))

    def first_projection(self) -> Tensor | None:
        """The weight [D, H], or part of one, by which the first output follows most directly from hidden states."""
        return None

    def embed_all(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """`embed` of each head's tokens, where all are known.

        Tied tables are read once: the gradient of a table is as large as the table, and there is one per reading.
        """
        if not self.embeddings_are_tied:
            return [self.embed(head_tokens, i) for i, head_tokens in enumerate(tokens)]
        embedded = self.embed(torch.cat([head_tokens.flatten() for head_tokens in tokens]), 0)
        parts = embedded.split([head_tokens.numel() for head_tokens in tokens])
        return [part.reshape(*read.shape, *part.shape[1:]) for part, read in zip(parts, tokens, strict=True)]

    def unroll(
        self,
        hidden_states: Tensor,
        embedded: Iterable[Tensor],
        narrow: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Run as many heads as `embedded` has entries, and give each one's output [..., D] in turn.

        Args:
            hidden_states: [..., H].
            embedded: For each head what `embed` gave. A head's entry is asked for when the caller has seen the output
                of the head before it, so that it may depend on it.
            narrow: `narrow(part, i)` gives the rows that head i goes on with, of the hidden states for head 0 and of
                each part of the state for a later head; None keeps all.
        """
        state: State = ()
        for i, head_embedded in enumerate(embedded):
            if i == 0:
                state = self.begin(hidden_states if narrow is None else narrow(hidden_states, 0))
            elif narrow is not None:
                state = tuple(narrow(part, i) for part in state)
            state, output = self.step(state, head_embedded, i)
            yield output

    def forward(self, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        """Logits of all heads with the true tokens as input.

        Args:
            hidden_states: [B, S, H].
            tokens: [B, S + n_predict] int64; `tokens[:, t]` is the token that `hidden_states[:, t]` predicts, and head
                i at position t reads `tokens[:, t + i]`.

        Returns:
            [n_predict, B, S, V]; entry [i, :, t] predicts `tokens[:, t + i + 1]`. -inf for tokens that are not drafted.
        """
        length = hidden_states.shape[1]
        if tokens.shape[1] < length + self.n_predict - 1:
            raise ValueError(
                f"tokens must be [B, S + n_predict] = [{hidden_states.shape[0]}, {length + self.n_predict}], "
                f"not {list(tokens.shape)}."
            )
        embedded = self.embed_all([tokens[:, i : i + length] for i in range(self.n_predict)])
        outputs = self.unroll(hidden_states, embedded)
        logits = torch.stack([F.linear(output, self.head_weight(i)) for i, output in enumerate(outputs)])
        return self.to_target_logits(logits)

    @torch.no_grad()
    def draft(
        self,
        hidden_states: Tensor,
        last_token: Tensor,
        num_tokens: int,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Draft tokens [B, num_tokens] of the base's vocabulary after `last_token`.

        Args:
            hidden_states: [B, H] of the position that predicted `last_token`; cast to the type of the weights.
            last_token: [B] int64.
            num_tokens: 1 to `n_predict`.
            choose: The next token [B] from its logits [B, V], -inf for what is not drafted; None for the likeliest.

        Raises:
            ConfigError: `num_tokens` is out of range.
        """
        if choose is None:
            return self.draft_by(self.likeliest, hidden_states, last_token, num_tokens)

        def next_token(output: Tensor, head_index: int) -> Tensor:
            return choose(self.to_target_logits(F.linear(output, self.head_weight(head_index))))

        return self.draft_by(next_token, hidden_states, last_token, num_tokens)

    def likeliest(self, output: Tensor, head_index: int) -> Tensor:
        """The base's token [B] to which a head gives the largest logit, from its output [B, D]."""
        return self.to_target_ids(F.linear(output, self.head_weight(head_index)).argmax(-1))

    @torch.no_grad()
    def draft_by(
        self,
        next_token: Callable[[Tensor, int], Tensor],
        hidden_states: Tensor,
        last_token: Tensor,
        num_tokens: int,
    ) -> Tensor:
        """As `draft`, with `next_token(output, head_index)` for the way from an output [B, D] to a token [B]."""
        if not 1 <= num_tokens <= self.n_predict:
            raise ConfigError(f"num_tokens must be from 1 to n_predict ({self.n_predict}), not {num_tokens}.")
        tokens = [last_token]
        # A generator: the next token is known only when `unroll` has given the output that it is chosen from.
        embedded = (self.embed(tokens[i], i) for i in range(num_tokens))
        for i, output in enumerate(self.unroll(hidden_states.to(self.head_weight(0).dtype), embedded)):
            tokens.append(next_token(output, i))
        return torch.stack(tokens[1:], dim=1)
