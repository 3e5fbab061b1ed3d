"""The speculators of Snowflake's Arctic Training: a small RNN (`sum_rnn`) or LSTM (`sum_lstm`) over draft tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from verl_speculator.errors import ConfigError
from verl_speculator.models.chain import ChainSpeculator, ChainSpeculatorConfig, State
from verl_speculator.models.config import SpeculatorConfig, parse_width, require_bool, require_one_of
from verl_speculator.models.layers import RMSNorm, bridge, embedding, embedding_scale, for_head, linear
from verl_speculator.models.speculator import Fused, Speculator

METHODS = ("sum_rnn", "sum_lstm")
WIDTH_FIELDS = ("inner_dim", "emb_dim", "proj_dim")
# The order in which fused weights hold them: what goes through the sigmoid lies together.
GATES = ("forget", "input", "output", "cell")


@SpeculatorConfig.register("lstm")
@dataclass(kw_only=True)
class ArcticLSTMSpeculatorConfig(ChainSpeculatorConfig):
    """Adds the widths of state, token embeddings and projections, each an integer or `"1024.2048"` for a stack."""

    speculators_model_type: ClassVar[str] = "lstm"
    architectures: ClassVar[tuple[str, ...]] = (
        "ArcticLSTMSpeculatorPreTrainedModel",
        "MLPVariantSpeculatorPreTrainedModel",
    )

    inner_dim: int | str = field(default="1024", metadata={"help": "width of the state, or of a stack: 1024.2048"})
    emb_dim: int | str = field(default="1024", metadata={"help": "width of the token embedding, likewise"})
    proj_dim: int | str = field(default="1024", metadata={"help": "width of the projection, likewise"})
    method: str = field(default="sum_rnn", metadata={"help": "sum_rnn or sum_lstm"})
    tie_lstm_embs: bool = field(default=False, metadata={"help": "sum_lstm: one embedding for the four gates"})

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


@Speculator.register("lstm")
class ArcticLSTMSpeculator(ChainSpeculator):
    """Snowflake's Arctic speculator; names and shapes in files and outputs are the reference's where that can run.

    `sum_rnn`: `s = GELU(LN_i(P_i s + a·E_i x))`. Embedding and projection stacks repeat norm, GELU, linear; the norm
    stack repeats GELU, linear, norm. Where stacks meet with different widths, `emb_bridge.i` and `proj_bridge.i` lead
    from the last embedding and projection width to the first inner width.

    `sum_lstm`: gates `f, in, o = σ(P s + a·E x)`, `g = GELU(LN_c(P_c s + a·E_c x))`, `c = c·f + g·in`,
    `s = GELU(LN_s(c))·o`. As in the reference a further width adds no layer where it equals the one before. Where
    widths differ, `{gate}_emb_bridge` and `{gate}_proj_bridge` lead through their widths to the first inner width, at
    which cell and gates live, and `state_bridge` from there through the inner widths to the state. The four gates'
    embeddings are one table here, side by side, and their projections one matrix: a step then has one gradient of a
    table's size, and one matrix product where the file format's four tensors would have four.
    """

    config: ArcticLSTMSpeculatorConfig

    def __init__(self, config: ArcticLSTMSpeculatorConfig) -> None:
        super().__init__(config)
        self.is_lstm = config.method == "sum_lstm"
        if self.is_lstm:
            self._build_sum_lstm()
        else:
            self._build_sum_rnn()
        heads = 1 if config.tie_weights else config.n_predict
        self.head = nn.ModuleList(linear(config.inner_widths[-1], config.head_rows) for _ in range(heads))
        self.embedding_scale = embedding_scale(config.n_predict, config.emb_widths[-1])
        self.reset_parameters()

    @property
    def embeddings_are_tied(self) -> bool:
        return len(self.emb) == 1

    def embed(self, tokens: torch.Tensor, head_index: int) -> torch.Tensor:
        """`E x` at the first inner width: [..., width] for `sum_rnn`; for `sum_lstm` [..., 4 gates or 1, width]."""
        embedded = for_head(self.emb, head_index)(tokens)
        if self.is_lstm:
            return self._through_bridges("emb", embedded.unflatten(-1, (len(self.emb_gates), -1)), 0)
        return for_head(self.emb_bridge, head_index)(embedded)

    def step(self, state: State, embedded: torch.Tensor, head_index: int) -> tuple[State, torch.Tensor]:
        projected = for_head(self.proj, head_index)(state[0])
        if not self.is_lstm:
            projected = for_head(self.proj_bridge, head_index)(projected)
            mixed = torch.add(projected, embedded, alpha=self.embedding_scale)
            output = F.gelu(for_head(self.ln, head_index)(mixed))
            return (output,), output

        projected = self._through_bridges("proj", projected.unflatten(-1, (len(GATES), -1)), head_index)
        mixed = torch.add(projected, embedded, alpha=self.embedding_scale)
        forget, write, read = torch.sigmoid(mixed[..., :3, :]).unbind(-2)
        cell = F.gelu(self.cell_ln[0](mixed[..., 3, :])) * write
        if head_index:  # the first cell is zero
            cell = torch.addcmul(cell, state[1], forget)
        output = self.state_bridge[0](F.gelu(self.state_ln[0](cell)) * read)
        return (output, cell), output

    def first_projection(self) -> torch.Tensor | None:
        config = self.config
        if len({*config.emb_widths, *config.proj_widths, *config.inner_widths}) > 1 or len(config.proj_widths) > 1:
            return None
        if self.is_lstm:
            # Of the gates, the one whose content is not squashed into a factor.
            return self.get_parameter("proj.0.weight").chunk(len(GATES))[GATES.index("cell")]
        return self.get_parameter("proj.0.0.weight")

    def init_std(self, weight: torch.Tensor) -> float:
        return 1 / math.sqrt(min(weight.shape))

    def tied_copies(self) -> dict[str, str]:
        copies = super().tied_copies()
        if self.is_lstm and self.config.tie_lstm_embs:
            copies |= {f"{gate}_emb": f"{GATES[0]}_emb" for gate in GATES[1:]}
        return copies

    def fused_tensors(self) -> dict[str, Fused]:
        if not self.is_lstm:
            return {}
        fused = {"emb.0.weight": Fused(tuple(f"{gate}_emb.0.weight" for gate in self.emb_gates), dim=1)}
        for i in range(len(self.proj)):
            fused[f"proj.{i}.weight"] = Fused(tuple(f"{gate}_proj.{i}.weight" for gate in GATES), dim=0)
        return fused

    def file_only_tensors(self) -> dict[str, tuple[int, ...]]:
        if not self.is_lstm or self.n_predict > 1:
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

    def _build_sum_lstm(self) -> None:
        config = self.config
        emb, proj, inner = config.emb_widths, config.proj_widths, config.inner_widths
        emb_path, proj_path, state_path = (*emb, inner[0]), (*proj, inner[0]), inner
        if emb[0] == proj[0] == inner[0] == inner[-1]:
            # The reference runs here and looks at no width in between.
            emb_path = proj_path = state_path = inner[:1]
        self.emb_gates = GATES[:1] if config.tie_lstm_embs else GATES
        inputs = (config.input_hidden_dim, inner[-1])[: config.n_predict]
        self.emb = nn.ModuleList([embedding(config.vocab_size, len(self.emb_gates) * emb[0])])
        self.proj = nn.ModuleList(linear(width, len(GATES) * proj[0]) for width in inputs)
        for gate in self.emb_gates:
            self.add_module(f"{gate}_emb_bridge", nn.ModuleList([bridge(emb_path)]))
        for gate in GATES:
            self.add_module(f"{gate}_proj_bridge", nn.ModuleList(bridge(proj_path) for _ in inputs))
        self.cell_ln = nn.ModuleList([RMSNorm(inner[0])])
        self.state_ln = nn.ModuleList([RMSNorm(inner[0])])
        self.state_bridge = nn.ModuleList([bridge(state_path)])

    def _through_bridges(self, name: str, x: torch.Tensor, head_index: int) -> torch.Tensor:
        """Each gate's part of `x` [..., gates, width] through its own bridge, where widths differ."""
        gates = self.emb_gates if name == "emb" else GATES
        bridges = [for_head(getattr(self, f"{gate}_{name}_bridge"), head_index) for gate in gates]
        if not list(bridges[0].children()):
            return x
        return torch.stack([bridge(part) for bridge, part in zip(bridges, x.unbind(-2), strict=True)], dim=-2)


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
