"""Ask a server started with `verl-speculator serve` and see how well its speculator drafted.

    python client.py http://localhost:8000 "Write a haiku about trains."

Needs the package openai, which vLLM brings along.
"""

from __future__ import annotations

import sys
import time
import urllib.request

from openai import OpenAI

PREFIX = "vllm:spec_decode_"


def counters(address: str) -> dict[str, float]:
    """The server's totals since its start; those for each draft position carry the position in their name."""
    with urllib.request.urlopen(f"{address}/metrics") as page:
        lines = [line for line in page.read().decode().splitlines() if line.startswith(PREFIX)]
    totals = {}
    for line in lines:
        name, value = line.removeprefix(PREFIX).rsplit(" ", 1)
        labels = name.partition("{")[2]
        position = labels.partition('position="')[2].partition('"')[0]
        totals[name.partition("{")[0].removesuffix("_total") + (f"_{position}" if position else "")] = float(value)
    return totals


def main(address: str, question: str) -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key="unused")
    model = client.models.list().data[0].id
    before, start = counters(address), time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=128,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    tokens = 0
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    seconds = time.perf_counter() - start

    # Others may use the server at the same time: then these are their drafts too.
    spent = {name: value - before.get(name, 0) for name, value in counters(address).items()}
    drafts, accepted = spent.get("num_drafts", 0), spent.get("num_accepted_tokens", 0)
    print(f"\n\n{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s")
    if drafts:
        print(f"{drafts:.0f} drafts, {accepted:.0f} of {spent['num_draft_tokens']:.0f} drafted tokens accepted")
        print(f"{1 + accepted / drafts:.2f} tokens per step of the base model")
    else:
        print("no drafts: was the server started with a speculator? 0 tokens accepted")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://localhost:8000", " ".join(sys.argv[2:]) or "Hello")
