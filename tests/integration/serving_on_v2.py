"""Run as a script: vLLM's Model Runner V2 on CPU, by Triton's interpreter, without and with speculators.

usage: serving_on_v2.py FOLDER     trains tiny speculators in FOLDER, serves them and writes FOLDER/report.json

Tens of times slower than on a GPU, so few tokens are asked for.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

# Before Triton and vLLM are loaded.
os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_CI_ENV": "1",
}

import torch
from transformers import AutoModelForCausalLM

from tests.integration import serving_world
from verl_speculator.decoding import generate, speculative_generate
from verl_speculator.models import Speculator
from verl_speculator.models.importing import import_code

NEW_TOKENS = 14
PROMPTS = 3
HEADS = serving_world.N_PREDICT
PAGE = Path(__file__).parents[2] / "docs" / "adding_an_algorithm.md"
TEMPERATURE, DRAWS = 1.5, 400
KINDS = ("mlp", "rnn_drafts", "lstm", "medusa")


def write_world(folder: Path) -> None:
    """A base, a speculator of each kind trained on its text, and what our own decoding makes of them."""
    torch.set_num_threads(1)
    serving_world.write_base(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    prompts = serving_world.make_prompts()[2 : 2 + PROMPTS]
    inputs = serving_world.padded(prompts)
    answers = generate(base, *inputs, max_new_tokens=40).tokens
    said = torch.bincount(torch.cat([torch.tensor(answer) for answer in answers]), minlength=serving_world.VOCAB_SIZE)
    torch.manual_seed(6)
    speculators = serving_world.make_speculators((said > 0).nonzero().squeeze(1))
    (folder / "medusa.py").write_text(re.search("```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    medusa = import_code(str(folder / "medusa.py"), "--import").MedusaConfig(**serving_world.COMMON)
    speculators = {name: speculators[name] for name in KINDS[:-1]} | {"medusa": Speculator.from_config(medusa)}
    serving_world.train(base, speculators, prompts, answers)
    reference: dict[str, Any] = {"prompts": prompts, "counts": {}}
    for name, speculator in speculators.items():
        speculator.save_pretrained(folder / name)
        result = speculative_generate(base, speculator.eval(), *inputs, max_new_tokens=NEW_TOKENS)
        reference["tokens"] = result.tokens
        reference["counts"][name] = dataclasses.asdict(result.counts)
    eagle = Speculator.get_class("eagle3").from_training_args(
        base.config, target_layer_ids=[0, 1, 2], verifier_name_or_path=str(folder / "base"),
        verifier_architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    eagle.load_verifier_weights(base.get_input_embeddings().weight, base.lm_head.weight)
    eagle.save_pretrained(folder / "eagle3")
    serving_world.write_scorer(folder / "scorer", base)
    stop, rule = reference["tokens"][1][-4], f"scorer:{folder / 'scorer'}@0.4"
    strict, lossy = (
        serving_world.decode_lossily(base, speculators["lstm"], accept, prompts, NEW_TOKENS, stop)
        for accept in ("strict", rule)
    )
    kept = sum(map(len, lossy.lossy_tokens or []))
    reference["lossy"] = {
        "stop": stop, "accept": rule, "tokens": lossy.tokens, "strict": strict.tokens, "lossy_accepted": kept,
    }  # fmt: skip
    (folder / "reference.json").write_text(json.dumps(reference))


class Engine:
    """An `LLM` on Model Runner V2 with a request more than slots."""

    def __init__(self, folder: Path, speculative: dict[str, Any] | None) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(folder / "base"),
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=PROMPTS - 1,
            kv_cache_memory_bytes=2**24,
            disable_log_stats=False,
            speculative_config=speculative,
        )

    def generate(self, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        from vllm import SamplingParams

        given = [{"prompt_token_ids": ids} for ids in prompts]
        params = SamplingParams(**{"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, **settings})
        return [list(output.outputs[0].token_ids) for output in self.llm.generate(given, params, use_tqdm=False)]

    def counters(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for metric in self.llm.get_metrics():
            name = metric.name.removeprefix("vllm:spec_decode_")
            if name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "lossy_accepted"):
                found[name] = metric.value
            elif name == "num_accepted_tokens_per_pos":
                found["accepted_per_position"] = list(metric.values)
        return found

    @property
    def config(self) -> Any:
        return self.llm.llm_engine.vllm_config

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def describe(engine: Engine) -> dict[str, Any]:
    return {
        "runner": type(engine.runner).__mro__[1].__module__,
        "speculator": type(getattr(engine.runner, "speculator", None)).__name__,
        "asynchronous": engine.config.scheduler_config.async_scheduling,
    }


def serve(folder: Path) -> dict[str, Any]:
    prompts = json.loads((folder / "reference.json").read_text())["prompts"]
    engines: dict[str, dict[str, Any] | None] = {"none": None}
    engines |= {name: {"model": str(folder / name)} for name in KINDS}
    engines["eagle3"] = {"model": str(folder / "eagle3"), "method": "eagle3", "num_speculative_tokens": 2}
    report: dict[str, Any] = {}
    for name, speculative in engines.items():
        engine = Engine(folder, speculative)
        report[name] = {"tokens": engine.generate(prompts), "counters": engine.counters()} | describe(engine)
        if name == "mlp":
            report["reloaded"] = reload(engine, folder, prompts)
        engine.close()
    engine = Engine(folder, {"model": str(folder / "lstm"), "draft_sample_method": "probabilistic"})
    report["probabilistic"] = probabilistic(engine, prompts)
    engine.close()
    schedule = [(1, 1, HEADS), (2, PROMPTS, 1)]
    engine = Engine(folder, {"model": str(folder / "lstm"), "num_speculative_tokens_per_batch_size": schedule})
    report["adaptive"] = {"tokens": engine.generate(prompts), "counters": engine.counters()}
    engine.close()
    reference = json.loads((folder / "reference.json").read_text())["lossy"]
    engine = Engine(folder, {"model": str(folder / "lstm"), "accept": reference["accept"], "lossy": True})
    stopping = {"stop_token_ids": [reference["stop"]]}
    report["lossy"] = {"tokens": engine.generate(prompts, **stopping), "counters": engine.counters()}
    report["lossy"]["strict"] = engine.generate(prompts[1:], **stopping, extra_args={"lossy": False})
    report["lossy"]["after"] = engine.counters()
    engine.close()
    return report


def reload(engine: Engine, folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """What comes after weights that know nothing, and after the old ones again, put in place in a running engine."""
    chain = engine.runner.get_draft_model()
    trained = {name: tensor.clone() for name, tensor in chain.speculator.export_state_dict().items()}
    report: dict[str, Any] = {}
    for name, weights in {"zero": {key: torch.zeros_like(t) for key, t in trained.items()}, "old": trained}.items():
        chain.load_weights(weights.items())
        before = engine.counters()
        report[name] = {"tokens": engine.generate(prompts)}
        after = engine.counters()
        report[name]["accepted"] = after["num_accepted_tokens"] - before["num_accepted_tokens"]
    return report


def probabilistic(engine: Engine, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy text, what vLLM is left to verify drafts with, and drafts drawn at a temperature.

    vLLM's kernel that draws in a rejected draft's place does not run in the interpreter, so no text is sampled.
    """
    greedy = engine.generate(prompts[:1])
    drafter = engine.runner.speculator
    loop, slot = drafter.loop, int(drafter.idx_mapping[0])
    kept: list[torch.Tensor] = []

    def keep(row: torch.Tensor, head_index: int) -> torch.Tensor:
        kept.append(row[0])
        return loop.drafts[:1, head_index]

    with torch.inference_mode():
        loop.chain.draft(loop.hidden[:1], loop.token[:1], HEADS, keep)
        difference = float((torch.stack(kept) - drafter.draft_logits[slot]).abs().max())
        drafter.temperature[slot] = TEMPERATURE
        drawn = []
        for position in range(DRAWS):
            drafter.positions[0] = position
            drawn.append(loop.run(1, 1).item())
    expected = (kept[0] / TEMPERATURE).softmax(-1).tolist()
    return {"tokens": greedy, "largest_difference": difference, "drawn": drawn, "probabilities": expected}


def main(folder: Path) -> None:
    import triton.backends
    import triton.runtime.interpreter

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    # vLLM takes V2 where Triton has a device, and its interpreter has none of its own.
    triton.backends.backends["cpu"] = type("Backend", (), {"driver": Driver, "compiler": None})
    # The interpreter makes numbers of a vector of truths and a single one, and then stores with truths only.
    builder = triton.runtime.interpreter.InterpreterBuilder
    store = builder.create_masked_store

    def store_where_true(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, ptrs, value, mask, *args)

    builder.create_masked_store = store_where_true
    write_world(folder)
    os.environ["VERL_SPECULATOR_IMPORT"] = str(folder / "medusa.py")
    (folder / "report.json").write_text(json.dumps(serve(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
