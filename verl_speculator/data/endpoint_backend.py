"""A server with OpenAI's interface as what answers prompts: token ids go in and come out, as with `vllm serve`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from typing import Any

import httpx

from verl_speculator.data.backends import Answer, Request
from verl_speculator.decoding import SamplingParams
from verl_speculator.errors import ConfigError

# Seconds before the next attempt: twice as many each time.
_FIRST_WAIT, _ATTEMPTS = 1.0, 8
_KEY_VARIABLE = "OPENAI_API_KEY"


class EndpointBackend:
    """Requests are sent at once, as many as `batch_size`; those that fail on the way are sent again."""

    name = "endpoint"

    def __init__(
        self,
        url: str,
        base: str,
        stop_tokens: Collection[int],
        *,
        batch_size: int,
        max_new_tokens: int,
        sampling: SamplingParams,
        first_wait: float = _FIRST_WAIT,
    ) -> None:
        """Ask the server what it serves.

        Raises:
            ConfigError: It cannot be reached, or serves several models and none under the base's name.
        """
        self.capacity = batch_size
        self.stop_tokens = frozenset(stop_tokens)
        self._first_wait = first_wait
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Answer]] = set()
        key = os.environ.get(_KEY_VARIABLE)
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1") + "/v1/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # An answer takes as long as it takes; the server is there or not at once.
            timeout=httpx.Timeout(None, connect=30),
            limits=httpx.Limits(max_connections=batch_size),
        )
        served = {model["id"]: model for model in self._loop.run_until_complete(self._send("GET", "models"))["data"]}
        name = base if base in served else next(iter(served), None)
        if name is None or (name != base and len(served) > 1):
            raise ConfigError(
                f"--endpoint: {url} serves {', '.join(served) or 'no model'}, and not --base={base}: serve it under "
                "that name, as with `vllm serve --served-model-name`"
            )
        self.context: int | None = served[name].get("max_model_len")
        self._body: dict[str, Any] = {
            "model": name,
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            "stop_token_ids": sorted(stop_tokens),
            "return_token_ids": True,
        }

    def submit(self, request: Request) -> None:
        self._tasks.add(self._loop.create_task(self._ask(request)))

    def finished(self) -> list[Answer]:
        done, self._tasks = self._loop.run_until_complete(
            asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        )
        return [task.result() for task in done]

    async def _ask(self, request: Request) -> Answer:
        body = {**self._body, "prompt": request.prompt_ids, "seed": request.seed}
        tokens = (await self._send("POST", "completions", body))["choices"][0].get("token_ids")
        if not tokens:
            raise ConfigError(
                "--endpoint: the server's answer has no token_ids, and text would have to be taken apart again: use "
                "one that returns them, such as `vllm serve`"
            )
        return Answer(request.name, tokens)

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        reason = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(self._first_wait * 2 ** (attempt - 1))
            try:
                response = await self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                continue
            if response.is_success:
                return response.json()
            reason = f"status {response.status_code}: {' '.join(response.text.split())[:300]}"
            # Too many requests, or something that may pass; anything else stays wrong.
            if response.status_code != 429 and response.status_code < 500:
                break
        raise ConfigError(f"--endpoint: {self._client.base_url}{path} does not answer ({reason})")
