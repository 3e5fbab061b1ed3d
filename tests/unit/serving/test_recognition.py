"""What counts as a speculator, where it may lie, and whether it fits."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.serving.conftest import HEADS, HIDDEN, VOCAB
from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.models import ArcticLSTMSpeculatorConfig, MLPSpeculatorConfig, SpeculatorConfig
from verl_speculator.models.config import config_class_named
from verl_speculator.serving.recognition import (
    find_speculator,
    known_architectures,
    number_of_drafts,
)


def test_architectures_of_all_publishers() -> None:
    # Others that are registered in this process, such as a user's own, count too.
    assert known_architectures() >= {
        "MLPSpeculatorPreTrainedModel",
        "ArcticMLPSpeculatorPreTrainedModel",
        "ArcticLSTMSpeculatorPreTrainedModel",
        "MLPVariantSpeculatorPreTrainedModel",
    }


@pytest.mark.parametrize("inside", ["", "speculator", "global_step_7/speculator"])
def test_folder_and_checkpoint(inside: str, make_speculator, tmp_path) -> None:
    _, folder = make_speculator("mlp")
    place = tmp_path / "run" / inside
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)
    named = place.parent if inside else place
    found = find_speculator(str(named))
    assert found is not None
    assert found.folder() == place
    assert isinstance(found.config, MLPSpeculatorConfig)
    assert (found.config.n_predict, found.config.input_hidden_dim) == (HEADS, HIDDEN)


def test_a_worker_without_the_folder_says_which_and_where(make_speculator, tmp_path, monkeypatch) -> None:
    _, folder = make_speculator("mlp")
    found = find_speculator(str(folder))
    assert found is not None
    folder.rename(tmp_path / "elsewhere")
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    with pytest.raises(MissingFileError, match=rf"the speculator '{folder}' is not on node7, where a worker of vLLM"):
        found.folder()


def test_config_as_ibm_publishes_it(tmp_path) -> None:
    """As in the config.json of a published llama3-8b-accelerator; the weights are not needed to recognise it."""
    values = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "emb_dim": 4096,
        "inner_dim": 3072,
        "model_type": "mlp_speculator",
        "n_candidates": 5,
        "n_predict": 4,
        "scale_input": True,
        "tie_weights": True,
        "top_k_tokens_per_head": [4, 3, 2, 2],
        "torch_dtype": "float16",
        "transformers_version": "4.38.2",
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = find_speculator(str(tmp_path))
    assert found is not None
    assert found.config == MLPSpeculatorConfig(
        input_hidden_dim=4096,
        inner_dim=3072,
        vocab_size=128256,
        n_predict=4,
        scale_input=True,
        tie_weights=True,
        torch_dtype="float16",
    )


def test_config_as_snowflake_publishes_it(tmp_path) -> None:
    values = {
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
        "base_model_archs": ["LlamaForCausalLM"],
        "emb_dim": "4096",
        "inner_dim": "4096",
        "proj_dim": "4096",
        "input_hidden_dim": 4096,
        "method": "sum_lstm",
        "model_type": "mlp_speculator",
        "n_candidates": 3,
        "n_predict": 3,
        "scale_input": True,
        "tie_lstm_embs": True,
        "tie_weights": True,
        "top_k_tokens_per_head": [1, 1, 1],
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = find_speculator(str(tmp_path))
    assert found is not None
    assert isinstance(found.config, ArcticLSTMSpeculatorConfig)
    assert (found.config.method, found.config.tie_lstm_embs) == ("sum_lstm", True)


@pytest.mark.parametrize(
    "text",
    ['{"architectures": ["LlamaForCausalLM"]}', '{"architectures": null}', "{}", "[]", "not json"],
)
def test_other_models_are_left_to_vllm(text: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert find_speculator(str(tmp_path)) is None


@pytest.mark.parametrize(
    "name", ["ngram", "pkg.module.Class", "/absent/folder", "./absent", "s3://bucket/model", "a/b/c"]
)
def test_names_that_cannot_be_on_the_hub_are_not_looked_up(name: str, monkeypatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert find_speculator(name) is None


def test_hub_name_in_the_cache(make_speculator, monkeypatch) -> None:
    import huggingface_hub

    _, folder = make_speculator("sum_rnn")
    asked = []

    def download(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    found = find_speculator("owner/speculator", "v2")
    assert asked == [("owner/speculator", "config.json", "v2")]
    assert found is not None
    assert found.folder() == Path(folder)


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub for `owner/speculator`."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body, commit = b"", "0" * 40
        files = list(self.folder.iterdir())
        if self.path.startswith("/api/models/owner/speculator/tree/"):
            tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in files]
            body = json.dumps(tree).encode()
        elif self.path.startswith("/api/models/owner/speculator"):
            siblings = [{"rfilename": file.name} for file in files]
            body = json.dumps({"id": "owner/speculator", "sha": commit, "siblings": siblings}).encode()
        elif self.path.startswith("/owner/speculator/resolve/"):
            body = (self.folder / self.path.rpartition("/")[2]).read_bytes()
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None: ...


def test_hub_name_is_downloaded_by_the_hubs_own_client(make_speculator, tmp_path) -> None:
    """In a process of its own: the client reads the hub's address when it is imported."""
    _, Hub.folder = make_speculator("sum_rnn")
    (Hub.folder / "training_data.bin").write_bytes(b"large")
    code = (
        "from verl_speculator.serving.recognition import find_speculator\n"
        "print(find_speculator('owner/speculator').folder(), find_speculator('owner/other'))"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        server.shutdown()
    assert result.returncode == 0, result.stderr
    folder, other = result.stdout.split()
    assert other == "None"
    assert {file.name for file in Path(folder).iterdir()} == {"config.json", "model.safetensors", "pytorch_model.bin"}
    assert (Path(folder) / "config.json").read_bytes() == (Hub.folder / "config.json").read_bytes()


def test_hub_that_does_not_answer_leaves_it_to_vllm(monkeypatch) -> None:
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert find_speculator("owner/model") is None


def test_speculator_with_an_impossible_value(make_speculator) -> None:
    _, folder = make_speculator("mlp")
    values = json.loads((folder / "config.json").read_text()) | {"n_predict": 0}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="n_predict must be a positive integer, not 0"):
        find_speculator(str(folder))


def test_number_of_drafts() -> None:
    config = MLPSpeculatorConfig(input_hidden_dim=HIDDEN, vocab_size=VOCAB, n_predict=HEADS)
    assert number_of_drafts(config, None) == HEADS
    assert number_of_drafts(config, 1) == 1
    for wanted in (0, HEADS + 1):
        with pytest.raises(ConfigError, match=rf"from 1 to the speculator's n_predict \({HEADS}\), not {wanted}"):
            number_of_drafts(config, wanted)


def test_what_vllm_drafts_with_by_itself_is_left_to_it(tmp_path) -> None:
    """Whether or not this process has loaded our class of it."""
    values = {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert find_speculator(str(tmp_path)) is None
    assert SpeculatorConfig in config_class_named("eagle3").__mro__
    assert "Eagle3Speculator" not in known_architectures()
    for name in ("dflash", "no such"):
        (tmp_path / "config.json").write_text(json.dumps({"speculators_model_type": name}))
        assert find_speculator(str(tmp_path)) is None
