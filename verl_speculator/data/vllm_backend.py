"""vLLM as what answers prompts, in this process. Checked with vLLM 0.28."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import torch

from verl_speculator.base_model.settings import LoadSettings
from verl_speculator.data.backends import Answer, Request
from verl_speculator.decoding import SamplingParams
from verl_speculator.errors import ConfigError

_CACHE_SHARE = 0.25  # of a CPU machine's free memory, for the KV cache
# vLLM leaves a core to its scheduler, which here only waits for the worker. With this few cores that is a lot: of two,
# the engine wrote 82 tokens/s on the other one, and 147 on both.
_FEW_CORES = 4
_THREADS_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"


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
            with _all_cores() if on_cpu and tensor_parallel_size == 1 else nullcontext():
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
                    # Left to itself it wants nearly all of the machine's memory, and fails where others have some.
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


@contextmanager
def _all_cores() -> Iterator[None]:
    """The engine that is started here computes on every core that this process may use, if these are few.

    What the user says in a variable stands.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not 1 < len(cores) <= _FEW_CORES or {_THREADS_VARIABLE, "OMP_NUM_THREADS"} & set(os.environ):
        yield
        return
    os.environ[_THREADS_VARIABLE] = ",".join(map(str, cores))
    try:
        yield
    finally:
        del os.environ[_THREADS_VARIABLE]
