"""What other engines need of a speculator: file names, keys, tensor names and shapes, and what they cannot serve.

Written from the engines' own loading code: `MLPSpeculator` of vLLM 0.5 to 0.9 and IBM's fms-extras (`ibm`), and
`ArcticMLPSpeculator`, `ArcticLSTMSpeculator` and `ArcticProposer` of Arctic Inference 0.3 (`arctic`). The shapes are
worked out from the `config.json` that is written, as the engine does, and not from the module that wrote it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from verl_speculator.errors import ConfigError
from verl_speculator.models import (
    ArcticLSTMSpeculatorConfig,
    ChainSpeculator,
    ChainSpeculatorConfig,
    MLPSpeculator,
    MLPSpeculatorConfig,
    Speculator,
    SpeculatorConfig,
)
from verl_speculator.models.serialization import PREFIX

Shapes = dict[str, tuple[int, ...]]

GATES = ("forget", "input", "output", "cell")


@dataclass(frozen=True)
class ExportFormat:
    """How to write for an engine.

    `convert` gives the speculator in the form that the engine has, or raises a ConfigError; `config_for` then gives its
    `config.json`, and `shapes_for` the tensors that the engine will look for. Their names in the file have a `prefix`.
    """

    engine: str
    convert: Callable[[Speculator], Speculator]
    config_for: Callable[[SpeculatorConfig], dict[str, Any]]
    shapes_for: Callable[[Mapping[str, Any]], Shapes]
    prefix: str = ""


def with_full_vocabulary(speculator: Speculator) -> Speculator:
    """`speculator` with a row for every token of its base, for engines that know no draft vocabulary.

    The row of a token that it cannot draft is the mean of all others. So its logit is the mean of theirs and never the
    largest: greedy drafts stay what they are.
    """
    if not isinstance(speculator, ChainSpeculator) or speculator.draft_ids is None:
        return speculator
    config = speculator.config
    state = speculator.state_dict()
    del state["d2t"]
    for name, rows in speculator.head.state_dict(prefix="head.").items():
        mean = rows.mean(dim=0, dtype=torch.float64).to(rows.dtype)
        state[name] = mean.repeat(config.vocab_size, 1).index_copy_(0, speculator.draft_ids, rows)
    with torch.device("meta"):
        full = Speculator.from_config(dataclasses.replace(config, draft_vocab_size=None))
    full.load_state_dict(state, assign=True)
    return full


def as_mlp(speculator: Speculator) -> Speculator:
    """`speculator` as an `MLPSpeculator`; a sum_rnn of a single width is the same network under other names."""
    config = speculator.config
    if isinstance(config, MLPSpeculatorConfig):
        return speculator
    if not isinstance(config, ArcticLSTMSpeculatorConfig) or config.method != "sum_rnn":
        kind = getattr(config, "method", config.architectures[0])
        raise ConfigError(f"IBM's format has no {kind} speculator: it can be exported as arctic or hf.")
    stacks = {config.inner_widths, config.emb_widths, config.proj_widths}
    if len(stacks) > 1 or len(config.inner_widths) > 1:
        raise ConfigError(
            "IBM's format holds a sum_rnn speculator only if inner_dim, emb_dim and proj_dim are one and the same "
            f"number, not {config.inner_dim}, {config.emb_dim} and {config.proj_dim}."
        )
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(ChainSpeculatorConfig)}
    mlp = MLPSpeculator(MLPSpeculatorConfig(**shared, inner_dim=config.inner_widths[0]))
    # emb.0.0.weight is emb.0.weight: a stack of one layer and the layer.
    state = {re.sub(r"^(emb|proj|ln)\.(\d+)\.0\.", r"\1.\2.", name): t for name, t in speculator.state_dict().items()}
    mlp.load_state_dict(state, assign=True)
    return mlp


def mlp_shapes(values: Mapping[str, Any]) -> Shapes:
    heads, vocab = values["n_predict"], values["vocab_size"]
    inner = values["inner_dim"] or values["emb_dim"]
    shapes: Shapes = {}
    for i in range(heads):
        shapes[f"emb.{i}.weight"] = shapes[f"head.{i}.weight"] = (vocab, inner)
        shapes[f"proj.{i}.weight"] = (inner, inner if i else values["emb_dim"])
        shapes[f"ln.{i}.weight"] = shapes[f"ln.{i}.bias"] = (inner,)
    return shapes


def as_arctic(speculator: Speculator) -> Speculator:
    """`speculator` itself, once it is known to be one that Arctic Inference computes as it was trained."""
    config = speculator.config
    if isinstance(config, MLPSpeculatorConfig):
        return speculator
    if not isinstance(config, ArcticLSTMSpeculatorConfig):
        raise ConfigError(f"Arctic Inference has no {config.architectures[0]}.")
    inner, emb, proj = config.inner_widths, config.emb_widths, config.proj_widths
    if config.method == "sum_lstm":
        if not config.tie_lstm_embs:
            raise ConfigError("Arctic Inference serves sum_lstm only with tie_lstm_embs true.")
        if len({emb[0], emb[-1], proj[0], inner[0], inner[-1]}) > 1:
            raise ConfigError(
                "Arctic Inference serves sum_lstm only with one common width, "
                f"not inner_dim {config.inner_dim}, emb_dim {config.emb_dim} and proj_dim {config.proj_dim}."
            )
    elif len({*emb, *proj, inner[0]}) > 1:
        raise ConfigError(
            "Arctic Inference serves sum_rnn only if emb_dim, proj_dim and the first inner_dim are one common width, "
            f"not {config.emb_dim}, {config.proj_dim} and {config.inner_dim}."
        )
    return speculator


def mlp_config(config: SpeculatorConfig) -> dict[str, Any]:
    values = config.to_dict()
    # Both engines refuse to tie the weights of a single head, for which it makes no difference.
    return values | {"tie_weights": values["tie_weights"] and values["n_predict"] > 1}


def arctic_config(config: SpeculatorConfig) -> dict[str, Any]:
    if isinstance(config, MLPSpeculatorConfig):
        return mlp_config(config) | {"architectures": ["ArcticMLPSpeculatorPreTrainedModel"]}
    return config.to_dict()


def arctic_shapes(values: Mapping[str, Any]) -> Shapes:
    if values["architectures"] == ["ArcticMLPSpeculatorPreTrainedModel"]:
        return mlp_shapes(values)
    inner, emb, proj = (
        [int(width) for width in values[key].split(".")] for key in ("inner_dim", "emb_dim", "proj_dim")
    )
    heads, vocab, hidden = values["n_predict"], values["vocab_size"], values["input_hidden_dim"]
    shapes: Shapes = {f"head.{i}.weight": (vocab, inner[-1]) for i in range(heads)}
    if values["method"] == "sum_lstm":
        shapes |= {f"{gate}_emb.0.weight": (vocab, emb[0]) for gate in GATES}
        shapes |= {f"{gate}_proj.0.weight": (proj[0], hidden) for gate in GATES}
        shapes |= {f"{gate}_proj.1.weight": (proj[0], inner[-1]) for gate in GATES}
        shapes |= {f"{norm}.0.{leaf}": (inner[0],) for norm in ("cell_ln", "state_ln") for leaf in ("weight", "bias")}
        return shapes
    own = 1 if values["tie_weights"] else heads
    for i in range(own):
        shapes[f"emb.{i}.0.weight"] = (vocab, emb[0])
        shapes |= _stack(f"emb.{i}", emb, norms_first=True)
        shapes[f"ln.{i}.0.weight"] = shapes[f"ln.{i}.0.bias"] = (inner[0],)
        shapes |= _stack(f"ln.{i}", inner, norms_first=False)
    for i in range(min(2, heads) if values["tie_weights"] else heads):
        shapes[f"proj.{i}.0.weight"] = (proj[0], inner[-1] if i else hidden)
        shapes |= _stack(f"proj.{i}", proj, norms_first=True)
    return shapes


def _stack(name: str, widths: list[int], *, norms_first: bool) -> Shapes:
    """The layers after the first of a stack: norm, GELU, linear, or GELU, linear, norm; three indices each."""
    shapes: Shapes = {}
    for step, (before, after) in enumerate(pairwise(widths)):
        norm, linear = (3 * step + 1, 3 * step + 3) if norms_first else (3 * step + 3, 3 * step + 2)
        shapes[f"{name}.{norm}.weight"] = shapes[f"{name}.{norm}.bias"] = (after,)
        shapes[f"{name}.{linear}.weight"] = (after, before)
    return shapes


EXPORT_FORMATS = {
    "ibm": ExportFormat("IBM's MLPSpeculator", as_mlp, mlp_config, mlp_shapes, prefix=PREFIX),
    "arctic": ExportFormat("Arctic Inference", as_arctic, arctic_config, arctic_shapes),
}
