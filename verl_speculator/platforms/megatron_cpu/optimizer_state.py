"""Checkpoints of torch's AdamW under Megatron's distributed optimizer. Checked with megatron-core 0.16.1.

Megatron was made for apex's and TransformerEngine's Adam. Of torch's it expects a state before the first step, which is
made in the first step; and after loading it leaves all parameters with one step counter, which each of them then
advances, and which does not hold the step that was saved.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from verl_speculator.platforms.megatron_cpu.patches import Patch

_state_dict = DistributedOptimizer.state_dict
_load_state_dict = DistributedOptimizer.load_state_dict
_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def _state_dict_with_state(self: Any) -> dict[str, Any]:
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            state = self.optimizer.state[parameter]
            if not state:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                state.update(step=torch.tensor(0.0), **moments)
    return _state_dict(self)


def _load_state_dict_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
    # Megatron copies into the parameters; of float32 ones it holds views that record gradients.
    with torch.no_grad():
        _load_state_dict(self, state_dict)
    step = state_dict["optimizer"]["param_groups"][0]["step"]
    for state in self.optimizer.state.values():
        state["step"] = torch.tensor(float(step))


def _set_states_but_steps(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    # Megatron asks for all of a parameter's state, and has saved its moments only.
    step = self._get_main_param_and_optimizer_states(model_param)["step"]
    with torch.no_grad():
        _set_states(self, model_param, {"step": step, **tensors})


def optimizer_patches() -> list[Patch]:
    return [
        Patch(DistributedOptimizer, "state_dict", _state_dict_with_state),
        Patch(DistributedOptimizer, "load_state_dict", _load_state_dict_with_own_steps),
        Patch(DistributedOptimizer, "_set_main_param_and_optimizer_states", _set_states_but_steps),
    ]
