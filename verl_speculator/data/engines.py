"""Which engine answers chats, and how many of them: in this process, or shared out by Ray over devices and machines."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl_speculator.base_model.loading import explain_out_of_memory, load_target, read_stop_tokens
from verl_speculator.base_model.settings import LoadSettings
from verl_speculator.data.backends import Backend, HuggingFaceBackend
from verl_speculator.data.conversations import Conversation
from verl_speculator.data.endpoint_backend import EndpointBackend
from verl_speculator.data.regeneration import RegenerationSettings, answer
from verl_speculator.data.vllm_backend import VllmBackend
from verl_speculator.errors import ConfigError

# What an engine takes at a time, in its batches: enough for its batch to stay full, and few to be done again when the
# run is stopped.
_BATCHES_AT_A_TIME = 4
# Of what Ray thinks a machine has, and not of what an engine uses: more engines than cores must be able to start.
_CPUS_OF_AN_ENGINE = 0.01


@dataclass(frozen=True)
class EngineSettings:
    """Each field is the flag of the same name of `verl-speculator regenerate`.

    Attributes:
        backend: "vllm" or "hf".
        endpoint: A server's address, instead.
        num_engines: None: with vLLM as many as the GPUs here, or in the Ray cluster of `RAY_ADDRESS`, are enough for.
    """

    backend: str
    endpoint: str | None = None
    num_engines: int | None = None
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_engines", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.tensor_parallel_size > 1 and (self.endpoint or self.backend != "vllm"):
            raise ConfigError("--tensor-parallel-size is for --backend vllm: leave it out")
        if self.endpoint and self.num_engines:
            raise ConfigError("--num-engines has no meaning with --endpoint, whose server has its own: leave it out")

    @property
    def name(self) -> str:
        return "endpoint" if self.endpoint else self.backend


def answer_with(
    engines: EngineSettings, base: str, load: LoadSettings, tokenizer: Any, settings: RegenerationSettings
) -> Callable[[Sequence[Conversation]], Iterator[Conversation]]:
    """What answers conversations, for `regenerate`; models are loaded when it is called with some."""

    def build() -> Backend:
        how: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "max_new_tokens": settings.max_new_tokens,
            "sampling": settings.sampling,
        }
        if engines.name == "hf":
            with explain_out_of_memory("loading the base model", "use --dtype bfloat16 or a larger device"):
                return HuggingFaceBackend(load_target(base, load, tokenizer).model, tokenizer, **how)
        stops = read_stop_tokens(base, load, tokenizer)
        if engines.endpoint:
            return EndpointBackend(engines.endpoint, base, stops, **how)
        return VllmBackend(base, load, stops, tensor_parallel_size=engines.tensor_parallel_size, **how)

    def answer_all(conversations: Sequence[Conversation]) -> Iterator[Conversation]:
        if not conversations:
            return iter(())
        number = _number_of(engines)
        if number == 1:
            return answer(build(), tokenizer, conversations, settings)
        on_gpus = torch.accelerator.is_available()
        return _answer_on_engines(
            build, tokenizer, conversations, settings, number, engines.tensor_parallel_size if on_gpus else 0
        )

    return answer_all


def _number_of(engines: EngineSettings) -> int:
    if engines.num_engines is not None:
        return engines.num_engines
    if engines.name != "vllm":
        return 1
    gpus = torch.accelerator.device_count()
    if os.environ.get("RAY_ADDRESS"):
        import ray

        _join_ray()
        gpus = int(ray.cluster_resources().get("GPU", 0))
    return max(1, gpus // engines.tensor_parallel_size)


class _Engine:
    """In an actor of Ray's: a backend, and the chats that it is given."""

    def __init__(self, build: Callable[[], Backend], tokenizer: Any, settings: RegenerationSettings) -> None:
        self._backend, self._tokenizer, self._settings = build(), tokenizer, settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        chats = [pickle.loads(chat) for chat in batch["chat"]]
        return {"chat": [pickle.dumps(chat) for chat in answer(self._backend, self._tokenizer, chats, self._settings)]}


def _answer_on_engines(
    build: Callable[[], Backend],
    tokenizer: Any,
    conversations: Sequence[Conversation],
    settings: RegenerationSettings,
    num_engines: int,
    gpus_each: int,
) -> Iterator[Conversation]:
    import ray

    _join_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows_at_once = min(settings.batch_size * _BATCHES_AT_A_TIME, -(-len(conversations) // num_engines))
    # Cut here and not by an operator of Ray Data's: its tasks want a CPU, and engines may hold all there are.
    blocks = -(-len(conversations) // rows_at_once)
    chats = ray.data.from_items([{"chat": pickle.dumps(one)} for one in conversations], override_num_blocks=blocks)
    answered = chats.map_batches(
        _Engine,
        fn_constructor_args=(build, tokenizer, settings),
        batch_size=None,
        concurrency=num_engines,
        num_gpus=gpus_each,
        num_cpus=_CPUS_OF_AN_ENGINE,
    )
    for row in answered.iter_rows():
        yield pickle.loads(row["chat"])


def _join_ray() -> None:
    """The cluster that RAY_ADDRESS names, or one of this machine."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}))
