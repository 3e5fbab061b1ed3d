"""What verl mixes into vLLM's workers, with the speculator's weights told apart. Checked on verl 0.9.1, vLLM 0.28.

Named by `actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls`. Every transfer of the policy's weights
carries the speculator's too, and vLLM's loader of the policy would not know their names.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_speculator.errors import ConfigError
from verl_speculator.models.serialization import PREFIX
from verl_speculator.platforms import vllm_cpu
from verl_speculator.serving.served_chain import ServedChain


class SpeculatorWorkerExtension(vLLMColocateWorkerExtension):
    """Copies the speculator's weights over those that are served, in place; all others go verl's way."""

    def __new__(cls, **kwargs: Any) -> SpeculatorWorkerExtension:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            vllm_cpu.keep_linear_weights()
        return super().__new__(cls, **kwargs)

    def _update_weights(self, weights: list[tuple[str, Tensor]], peft_config: Any, base_sync_done: bool) -> None:
        own = [(name, tensor) for name, tensor in weights if name.startswith(PREFIX)]
        if own:
            self._served_speculator().load_weights(own)
        others = [(name, tensor) for name, tensor in weights if not name.startswith(PREFIX)]
        if others:
            super()._update_weights(others, peft_config, base_sync_done)

    def _served_speculator(self) -> ServedChain:
        # On Model Runner V1 the proposer holds it, on V2 the runner does.
        chain = getattr(getattr(self.model_runner, "drafter", None), "chain", None)
        if chain is None:
            chain = self.model_runner.get_draft_model()
        if chain is None:
            raise ConfigError(
                "the actor sends a speculator and rollout drafts with none: name it in "
                "actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config"
            )
        if not isinstance(chain, ServedChain):
            raise ConfigError(
                f"vLLM drafts with a {type(chain).__name__} by itself, which takes no new weights while it runs: name "
                "a chain of heads (MLP, LSTM) in actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config"
            )
        return chain
