"""The mistakes that a user can make with a speculator in vLLM, and engines that moved: what each is answered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import vllm
from vllm.config import speculative
from vllm.engine.arg_utils import EngineArgs

from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig
from verl_speculator.serving.v1 import runner_hook


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return str(error)
    return "no error"


def main(world: Path) -> dict[str, str]:
    sizes = {"hidden": (32, 384), "vocabulary": (64, 100)}
    for name, (hidden, vocabulary) in sizes.items():
        config = MLPSpeculatorConfig(input_hidden_dim=hidden, vocab_size=vocabulary, n_predict=3)
        MLPSpeculator(config).save_pretrained(world / f"wrong_{name}")
    good = world / "mlp" / "global_step_60"
    broken = shutil.copytree(good / "speculator", world / "wrong_config")
    values = json.loads((broken / "config.json").read_text()) | {"n_predict": 0}
    (broken / "config.json").write_text(json.dumps(values))

    def configure(folder: Path, pipeline: int = 1, **settings: Any) -> str:
        args = EngineArgs(
            model=str(world / "base"),
            dtype="float32",
            max_model_len=256,
            pipeline_parallel_size=pipeline,
            speculative_config={"model": str(folder), **settings},
        )
        return message(args.create_engine_config)

    messages = {
        "good": configure(good),
        "too_many": configure(good, num_speculative_tokens=4),
        "hidden": configure(world / "wrong_hidden"),
        "vocabulary": configure(world / "wrong_vocabulary"),
        "broken_config": configure(broken),
        "no_effect": configure(good, draft_sample_method="probabilistic"),
        "pipeline": configure(good, pipeline=2),
    }
    messages |= {
        "lossy_unsaid": configure(good, accept="accept-all"),
        "lossy_alone": configure(good, lossy=True),
        "no_rule": configure(good, accept="acept-all", lossy=True),
        "no_scorer": configure(good, accept=f"scorer:{good}", lossy=True),
        "synthetic": configure(
            good, accept="accept-all", lossy=True, rejection_sample_method="synthetic", synthetic_acceptance_length=2.0
        ),
        "not_ours": configure(world / "base", accept="accept-all", lossy=True, num_speculative_tokens=2),
    }
    with mock.patch.object(vllm, "__version__", "0.27.1"):
        messages["old_engine"] = configure(good)
    with mock.patch.object(speculative, "SpeculativeMethod", None):
        messages["no_custom_class"] = configure(good)

    def renamed(self: Any, scheduler_output: Any, hidden: Any, spec_decode_metadata: Any) -> None: ...

    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    with mock.patch.object(GPUModelRunner, "propose_draft_token_ids", renamed):
        messages["runner_moved"] = message(runner_hook.install)
    return messages
