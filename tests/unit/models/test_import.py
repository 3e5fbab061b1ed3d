"""Serving processes import the models alone: nothing of verl, Ray or transformers may come along."""

import json
import subprocess
import sys

PROGRAM = """
import json, sys, time
import torch, safetensors.torch
start = time.perf_counter()
import verl_speculator.models
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in ("transformers", "verl", "ray", "vllm") if name in sys.modules]]))
"""


def test_models_import_is_light():
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    seconds, loaded = json.loads(output)
    assert loaded == []
    assert seconds < 1
