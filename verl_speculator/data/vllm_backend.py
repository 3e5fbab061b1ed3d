"""vLLM as what answers prompts, in this process. Checked with vLLM 0.28."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import psutil
import torch

from verl_speculator.base_model.settings import LoadSettings
from verl_speculator.data.backends import Answer, Request
from verl_speculator.decoding import SamplingParams
from verl_speculator.errors import ConfigError

_CACHE_SHARE = 0.25  # of a CPU machine's free memory, for the KV cache


class VllmBackend:
    """An engine whose batch is filled up as soon as an answer is finished."""

    name = "vllm"

    def __init__(
        self,
        base: str,
        load: LoadSettings,
        stop_tokens: Collection[int],
        *,
        batch_size: int,
        max_new_tokens: int,
        sampling: SamplingParams,
        tensor_parallel_size: int = 1,
    ) -> None:
        from vllm import LLM

        on_cpu = not torch.accelerator.is_available()
        # LLM itself waits for all of its prompts; the engine below it gives each answer when it is finished.
        try:
            self._engine: Any = LLM(
                base,
                skip_tokenizer_init=True,
                revision=load.revision,
                trust_remote_code=load.trust_remote_code,
                dtype="float32" if load.dtype == "auto" and on_cpu else load.dtype,
                tensor_parallel_size=tensor_parallel_size,
                max_num_seqs=batch_size,
                # Compiling for a CPU takes longer than it saves.
                enforce_eager=on_cpu,
                # Left to itself it wants nearly all of the machine's memory, and fails where other programs have some.
                kv_cache_memory_bytes=int(_CACHE_SHARE * psutil.virtual_memory().available) if on_cpu else None,
            ).llm_engine
        except RuntimeError as error:
            raise ConfigError(
                f"--backend=vllm: vLLM's engine did not start, what it printed says why ({error}); "
                "--backend hf does without it"
            ) from error
        self.capacity = batch_size
        self.context: int | None = self._engine.model_config.max_model_len
        self.stop_tokens = frozenset(stop_tokens)
        self._max_new_tokens, self._sampling = max_new_tokens, sampling

    def submit(self, request: Request) -> None:
        from vllm import SamplingParams as VllmSampling
        from vllm.sampling_params import RequestOutputKind

        sampling = VllmSampling(
            max_tokens=self._max_new_tokens,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=self._sampling.top_k,
            seed=None if self._sampling.is_greedy else request.seed,
            stop_token_ids=sorted(self.stop_tokens),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(str(request.name), {"prompt_token_ids": request.prompt_ids}, sampling)

    def finished(self) -> list[Answer]:
        while not (outputs := [output for output in self._engine.step() if output.finished]):
            pass
        return [Answer(int(output.request_id), list(output.outputs[0].token_ids)) for output in outputs]
