"""Answers by real engines: several of them under Ray, and vLLM, give what one model of transformers gives."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import REPOSITORY
from tests.support.tiny import write_base_model, write_chats
from verl_speculator import cli

pytestmark = pytest.mark.slow

COLUMNS = ["row", "sample", "input_ids", "loss_mask", "messages", "tokenizer"]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    # vLLM has no attention heads below 32 on a CPU.
    write_base_model(folder / "base", family="llama", seed=3, head_dim=32)
    write_chats(folder / "chats.parquet", 11, seed=2)
    regenerate(folder, "expected", "--backend", "hf")
    return folder


def regenerate(folder: Path, name: str, *more: str) -> str:
    files = ["--data", str(folder / "chats.parquet"), "--output", str(folder / f"{name}.parquet")]
    settings = ["--base", str(folder / "base"), "--max-new-tokens", "8", *more]
    assert cli.main(["regenerate", *files, *settings]) == 0
    return name


def rows(folder: Path, name: str) -> list[dict]:
    return pq.read_table(folder / f"{name}.parquet", columns=COLUMNS).to_pylist()


def test_engines_under_ray_share_the_chats_out(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    regenerate(folder, "ray", "--backend", "hf", "--num-engines", "2", "--batch-size", "2")
    assert rows(folder, "ray") == rows(folder, "expected")


@needs_vllm
def test_vllm_gives_the_same_and_goes_on_with_what_another_backend_began(folder, monkeypatch):
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)
    from verl_speculator.data import regeneration

    done = 0
    add = regeneration.FinishedChats.add

    def add_three(self, chat, conversation, backend):
        nonlocal done
        if done == 3:
            raise KeyboardInterrupt
        done += 1
        add(self, chat, conversation, backend)

    with monkeypatch.context() as patch:
        patch.setattr(regeneration.FinishedChats, "add", add_three)
        with pytest.raises(KeyboardInterrupt):
            regenerate(folder, "mixed", "--backend", "hf", "--batch-size", "3")
    assert os.listdir(folder / "mixed.parquet.parts")
    regenerate(folder, "mixed")
    assert rows(folder, "mixed") == rows(folder, "expected")
    origins = pq.read_table(folder / "mixed.parquet")["origin"].to_pylist()
    assert sum('"backend": "hf"' in origin for origin in origins) == 3
    assert sum('"backend": "vllm"' in origin for origin in origins) == 8


@needs_vllm
def test_vllm_in_one_process_of_rays_finishes_a_scorers_windows(folder, monkeypatch):
    """As the rollout of a scorer's training starts it, on CPU; the other backend says what is right."""
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    import ray
    from omegaconf import OmegaConf

    from verl_speculator.scorer.spd_rollout import start_completions

    texts = [[40, 41, 42], [7, 300], [9, 9, 9, 9, 9], [40, 41, 42]]
    answers = {}
    try:
        for backend in ("hf", "vllm"):
            custom = {"target_model_path": str(folder / "base"), "max_new_tokens": 8}
            config = {
                "actor": {"fsdp_config": {"model_dtype": "fp32"}},
                "model": {"trust_remote_code": False, "quantization": {}},
                "rollout": {"custom": custom | {"completion": {"backend": backend, "batch_size": 2}}},
            }
            completions = start_completions(OmegaConf.create(config))
            answers[backend] = completions.answers(texts, [2, 1, 4, 3])
    finally:
        ray.shutdown()
    assert answers["vllm"] == answers["hf"]
    assert all(1 <= len(answer) <= 8 for answer in answers["vllm"])
