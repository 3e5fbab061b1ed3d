"""A speculator's way to the hub: its model card, and an upload to a server that stands for the hub."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants

from verl_speculator import cli

EVALUATION = {
    "acceptance_length": {"mean": 1.856, "low": 1.8, "high": 1.9},
    "identical_outputs": True,
    "num_prompts": 48,
    "settings": {"temperature": 0.0, "max_new_tokens": 64},
    "speculators": [{"num_draft_tokens": 3}],
}


class Hub(BaseHTTPRequestHandler):
    """The calls of huggingface_hub's upload of small files: which repository, how each file comes, and a commit."""

    files: dict[str, bytes]
    repositories: list[dict]
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_secret" or self.refuse:
            return self._answer({"error": "You have no right to do that"}, 403)
        if self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            return self._answer({"url": f"{self.address}/owner/name"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            return self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"commitUrl": f"{self.address}/owner/name/commit/1", "commitOid": "1", "success": True})
        return self._answer({}, 200 if "validate-yaml" in self.path else 404)

    def do_GET(self) -> None:
        self._answer({"sha": "0", "id": "owner/name", "siblings": []})

    def _answer(self, value: dict, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("ThisHub", (Hub,), {"files": {}, "repositories": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", handler.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def export(*arguments: object) -> int:
    return cli.main(["export", "--format", "hf", *map(str, arguments)])


def test_push_uploads_the_folder_with_its_card(hub, make_speculator, tmp_path, capsys) -> None:
    _, folder = make_speculator("mlp")
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION))
    facts = ["--base", "owner/base", "--data", "owner/chats", "--license", "apache-2.0"]
    assert export(folder, tmp_path / "out", "--push", "owner/name", "--eval", tmp_path / "eval.json", *facts) == 0
    assert f"Uploaded it to {hub.address}/owner/name" in capsys.readouterr().out
    assert [repository["name"] for repository in hub.repositories] == ["name"]
    assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "verl_speculator",
        "base_model": "owner/base",
        "license": "apache-2.0",
        "datasets": ["owner/chats"],
    }
    assert "verl-speculator serve owner/base --speculator" in card
    assert "| acceptance length (95 % over prompts) | 1.86 (1.80 to 1.90) |" in card
    assert "| outputs equal to plain decoding's | all |" in card


def test_a_hub_that_refuses_is_one_sentence(hub, make_speculator, tmp_path, capsys) -> None:
    hub.refuse = True
    _, folder = make_speculator("mlp")
    assert export(folder, tmp_path / "out", "--push", "owner/name") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: --push: 'owner/name' could not be uploaded (")
    assert "hf_secret" not in printed.out + printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "hf", "--push", "name"], "--push: 'name' is no name on the hub; it has the form owner/name"),
        (["--format", "hf", "--base", "/home/me/base"], "--base: '/home/me/base' is no name on the hub"),
        (["--format", "hf", "--license", "mit\nbase_model: evil/base"], "--license: "),
        (["--format", "hf", "--data", "chats`id`"], "--data: "),
        (["--format", "hf", "--eval", "absent.json"], "--eval: there is no file 'absent.json'"),
        (["--format", "hf", "--eval", "{tmp}/other.json"], "is no eval.json"),
        (["--format", "ibm", "--push", "owner/name"], "--push is for --format hf"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(options, message, make_speculator, tmp_path, capsys) -> None:
    (tmp_path / "other.json").write_text('{"acceptance_length": 2}')
    _, folder = make_speculator("mlp")
    options = [option.format(tmp=tmp_path) for option in options]
    assert cli.main(["export", *options, str(folder), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
