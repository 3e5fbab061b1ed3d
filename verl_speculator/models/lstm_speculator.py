"""The speculators of Snowflake's Arctic Training: a small RNN (`sum_rnn`) or LSTM (`sum_lstm`) over draft tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from verl_speculator.errors import ConfigError
from verl_speculator.models.base import Speculator, State, register_speculator
from verl_speculator.models.config import SpeculatorConfig, parse_width, require_bool, require_one_of
from verl_speculator.models.layers import RMSNorm, bridge, embedding, embedding_scale, for_head, linear

METHODS = ("sum_rnn", "sum_lstm")
WIDTH_FIELDS = ("inner_dim", "emb_dim", "proj_dim")
GATES = ("forget", "input", "cell", "output")


@dataclass(kw_only=True)
class ArcticLSTMSpeculatorConfig(SpeculatorConfig):
    """Adds the widths of state, token embeddings and projections, each an integer or `"1024.2048"` for a stack."""

    architectures: ClassVar[tuple[str, ...]] = (
        "ArcticLSTMSpeculatorPreTrainedModel",
        "MLPVariantSpeculatorPreTrainedModel",
    )

    inner_dim: int | str = "1024"
    emb_dim: int | str = "1024"
    proj_dim: int | str = "1024"
    method: str = "sum_rnn"
    tie_lstm_embs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in WIDTH_FIELDS:
            setattr(self, name, ".".join(map(str, parse_width(getattr(self, name), name))))

    def validate(self) -> None:
        super().validate()
        for name in WIDTH_FIELDS:
            parse_width(getattr(self, name), name)
        require_one_of(self.method, METHODS, "method")
        require_bool(self.tie_lstm_embs, "tie_lstm_embs")
        if self.method == "sum_lstm" and not self.tie_weights:
            raise ConfigError("tie_weights must be true for method 'sum_lstm'; 'sum_rnn' can do without.")

    @property
    def inner_widths(self) -> tuple[int, ...]:
        return parse_width(self.inner_dim, "inner_dim")

    @property
    def emb_widths(self) -> tuple[int, ...]:
        return parse_width(self.emb_dim, "emb_dim")

    @property
    def proj_widths(self) -> tuple[int, ...]:
        return parse_width(self.proj_dim, "proj_dim")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "method": self.method, "tie_lstm_embs": self.tie_lstm_embs}

    def _width_entries(self) -> dict[str, Any]:
        widths = {name: getattr(self, name) for name in WIDTH_FIELDS}
        return {"input_hidden_dim": self.input_hidden_dim, **widths}


@register_speculator(ArcticLSTMSpeculatorConfig)
class ArcticLSTMSpeculator(Speculator):
    """Snowflake's Arctic speculator; names, shapes and outputs are the reference's wherever the reference can run.

    `sum_rnn`: `s = GELU(LN_i(P_i s + a·E_i x))`. Embedding and projection stacks repeat norm, GELU, linear; the norm
    stack repeats GELU, linear, norm. Where stacks meet with different widths, `emb_bridge.i` and `proj_bridge.i` lead
    from the last embedding and projection width to the first inner width.

    `sum_lstm`: gates `f, in, o = σ(P s + a·E x)`, `g = GELU(LN_c(P_c s + a·E_c x))`, `c = c·f + g·in`,
    `s = GELU(LN_s(c))·o`. As in the reference a further width adds no layer where it equals the one before. Where
    widths differ, `{gate}_emb_bridge` and `{gate}_proj_bridge` lead through their widths to the first inner width, at
    which cell and gates live, and `state_bridge` from there through the inner widths to the state.
    """

    config: ArcticLSTMSpeculatorConfig

    def __init__(self, config: ArcticLSTMSpeculatorConfig) -> None:
        super().__init__(config)
        if config.method == "sum_lstm":
            self._build_sum_lstm()
        else:
            self._build_sum_rnn()
        heads = 1 if config.tie_weights else config.n_predict
        self.head = nn.ModuleList(linear(config.inner_widths[-1], config.vocab_size) for _ in range(heads))
        self.embedding_scale = embedding_scale(config.n_predict, config.emb_widths[-1])
        self.reset_parameters()

    def begin(self, hidden_states: torch.Tensor) -> State:
        state = super().begin(hidden_states)
        if self.config.method == "sum_lstm":
            cell = hidden_states.new_zeros(*hidden_states.shape[:-1], self.cell_width)
            return (*state, cell)
        return state

    def step(self, state: State, tokens: torch.Tensor, head_index: int) -> tuple[State, torch.Tensor]:
        if self.config.method == "sum_lstm":
            return self._step_sum_lstm(state, tokens, head_index)
        return self._step_sum_rnn(state, tokens, head_index)

    def init_std(self, weight: torch.Tensor) -> float:
        return 1 / math.sqrt(min(weight.shape))

    def tied_copies(self) -> dict[str, str]:
        copies = super().tied_copies()
        if self.config.method == "sum_lstm" and self.config.tie_lstm_embs:
            copies |= {f"{gate}_emb": "forget_emb" for gate in GATES[1:]}
        return copies

    def file_only_tensors(self) -> dict[str, tuple[int, ...]]:
        if self.config.method != "sum_lstm" or self.n_predict > 1:
            return {}
        # The reference always makes a second projection, which a single head never reaches.
        shape = (self.config.proj_widths[0], self.config.inner_widths[-1])
        return {f"{gate}_proj.1.weight": shape for gate in GATES}

    def _build_sum_rnn(self) -> None:
        config = self.config
        own = 1 if config.tie_weights else config.n_predict
        own_proj = min(2, config.n_predict) if config.tie_weights else config.n_predict
        emb, proj, inner = config.emb_widths, config.proj_widths, config.inner_widths
        self.emb = nn.ModuleList(_input_stack(embedding(config.vocab_size, emb[0]), emb) for _ in range(own))
        self.proj = nn.ModuleList(
            _input_stack(linear(inner[-1] if i else config.input_hidden_dim, proj[0]), proj) for i in range(own_proj)
        )
        self.ln = nn.ModuleList(_norm_stack(inner) for _ in range(own))
        self.emb_bridge = nn.ModuleList(bridge((emb[-1], inner[0])) for _ in range(own))
        self.proj_bridge = nn.ModuleList(bridge((proj[-1], inner[0])) for _ in range(own_proj))

    def _step_sum_rnn(self, state: State, tokens: torch.Tensor, head_index: int) -> tuple[State, torch.Tensor]:
        (hidden,) = state
        output = F.gelu(for_head(self.ln, head_index)(self._mix("", hidden, tokens, head_index)))
        return (output,), output

    def _build_sum_lstm(self) -> None:
        config = self.config
        emb, proj, inner = config.emb_widths, config.proj_widths, config.inner_widths
        emb_path, proj_path, state_path = (*emb, inner[0]), (*proj, inner[0]), inner
        if emb[0] == proj[0] == inner[0] == inner[-1]:
            # The reference runs here and looks at no width in between.
            emb_path = proj_path = state_path = inner[:1]
        for gate in GATES[:1] if config.tie_lstm_embs else GATES:
            self.add_module(f"{gate}_emb", nn.ModuleList([embedding(config.vocab_size, emb[0])]))
            self.add_module(f"{gate}_emb_bridge", nn.ModuleList([bridge(emb_path)]))
        inputs = (config.input_hidden_dim, inner[-1])[: config.n_predict]
        for gate in GATES:
            self.add_module(f"{gate}_proj", nn.ModuleList(linear(width, proj[0]) for width in inputs))
            self.add_module(f"{gate}_proj_bridge", nn.ModuleList(bridge(proj_path) for _ in inputs))
        self.cell_width = inner[0]
        self.cell_ln = nn.ModuleList([RMSNorm(inner[0])])
        self.state_ln = nn.ModuleList([RMSNorm(inner[0])])
        self.state_bridge = nn.ModuleList([bridge(state_path)])

    def _step_sum_lstm(self, state: State, tokens: torch.Tensor, head_index: int) -> tuple[State, torch.Tensor]:
        hidden, cell = state
        forget, write, candidate, read = (self._mix(f"{gate}_", hidden, tokens, head_index) for gate in GATES)
        candidate = F.gelu(for_head(self.cell_ln, head_index)(candidate))
        cell = cell * torch.sigmoid(forget) + candidate * torch.sigmoid(write)
        hidden = F.gelu(for_head(self.state_ln, head_index)(cell)) * torch.sigmoid(read)
        output = for_head(self.state_bridge, head_index)(hidden)
        return (output, cell), output

    def _mix(self, prefix: str, hidden: torch.Tensor, tokens: torch.Tensor, head_index: int) -> torch.Tensor:
        """`P s + a·E x` at the first inner width, with the modules whose names begin with `prefix`."""
        emb_prefix = "forget_" if prefix and self.config.tie_lstm_embs else prefix
        embedded = self._bridged(f"{emb_prefix}emb", tokens, head_index)
        projected = self._bridged(f"{prefix}proj", hidden, head_index)
        return torch.add(projected, embedded, alpha=self.embedding_scale)

    def _bridged(self, name: str, x: torch.Tensor, head_index: int) -> torch.Tensor:
        layers = cast(nn.ModuleList, self.get_submodule(name))
        bridges = cast(nn.ModuleList, self.get_submodule(f"{name}_bridge"))
        return for_head(bridges, head_index)(for_head(layers, head_index)(x))


def _input_stack(first: nn.Module, widths: tuple[int, ...]) -> nn.Sequential:
    """`first`, then norm, GELU and linear for each further width; indices are part of the checkpoint's names."""
    layers = [first]
    for before, after in pairwise(widths):
        layers += [RMSNorm(before), nn.GELU(), linear(before, after)]
    return nn.Sequential(*layers)


def _norm_stack(widths: tuple[int, ...]) -> nn.Sequential:
    """A norm, then GELU, linear and norm for each further width; the caller applies the last GELU."""
    layers: list[nn.Module] = [RMSNorm(widths[0])]
    for before, after in pairwise(widths):
        layers += [nn.GELU(), linear(before, after), RMSNorm(after)]
    return nn.Sequential(*layers)
