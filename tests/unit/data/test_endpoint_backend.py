"""A server of token ids, as `vllm serve` is one: what it is sent, and what becomes of its failures."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from verl_speculator.data.backends import Answer, Request
from verl_speculator.data.endpoint_backend import EndpointBackend
from verl_speculator.decoding import SamplingParams
from verl_speculator.errors import ConfigError


@dataclasses.dataclass
class Server:
    """Answers a prompt with its reverse and a stop token, when so many requests have come in or been failed."""

    url: str = ""
    models: list[dict] = dataclasses.field(default_factory=lambda: [{"id": "base", "max_model_len": 128}])
    bodies: list[dict] = dataclasses.field(default_factory=list)
    headers: list[str | None] = dataclasses.field(default_factory=list)
    failures: list[int] = dataclasses.field(default_factory=list)  # status of the next requests; 0 hangs up
    with_tokens: bool = True
    gate: threading.Barrier | None = None

    def answer(self, body: dict) -> dict:
        tokens = [*reversed(body["prompt"]), body["stop_token_ids"][0]]
        return {"choices": [{"text": "", **({"token_ids": tokens} if self.with_tokens else {})}]}


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            state.headers.append(self.headers["Authorization"])
            self.reply(200, {"data": state.models})

        def do_POST(self) -> None:
            assert self.path == "/v1/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.bodies.append(body)
            if state.failures:
                status = state.failures.pop(0)
                if status:
                    self.reply(status, {"error": "not now"})
                else:
                    self.connection.close()
                return
            if state.gate is not None:
                state.gate.wait(timeout=30)
            self.reply(200, state.answer(body))

        def reply(self, status: int, value: dict) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}"
        yield state
        running.shutdown()


def connect(server: Server, base: str = "base", suffix: str = "", **changes) -> EndpointBackend:
    settings = {"batch_size": 3, "max_new_tokens": 5, "sampling": SamplingParams(), "first_wait": 0.01, **changes}
    return EndpointBackend(server.url + suffix, base, [7], **settings)


def collect(backend: EndpointBackend, requests: list[Request]) -> list[Answer]:
    for request in requests:
        backend.submit(request)
    answers: list[Answer] = []
    while len(answers) < len(requests):
        answers += backend.finished()
    return sorted(answers, key=lambda answer: answer.name)


REQUESTS = [Request(0, [1, 2], 11), Request(1, [3], 12), Request(2, [4, 5, 6], 13)]
ANSWERS = [Answer(0, [2, 1, 7]), Answer(1, [3, 7]), Answer(2, [6, 5, 4, 7])]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_tokens_go_in_and_come_out(server, suffix, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    backend = connect(server, suffix=suffix, sampling=SamplingParams(0.5, 0.9, 4))
    assert backend.context == 128
    assert server.headers == ["Bearer secret"]
    assert collect(backend, REQUESTS) == ANSWERS
    body = next(body for body in server.bodies if body["prompt"] == [3])
    assert body == {
        "model": "base", "prompt": [3], "seed": 12, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 4,
        "stop_token_ids": [7], "return_token_ids": True,
    }  # fmt: skip


def test_requests_are_sent_at_once(server):
    # None is answered before all three are there.
    server.gate = threading.Barrier(3)
    assert collect(connect(server), REQUESTS) == ANSWERS


def test_what_fails_on_the_way_is_sent_again(server):
    server.failures = [503, 0, 429, 500]
    assert collect(connect(server), REQUESTS) == ANSWERS
    assert len(server.bodies) == len(REQUESTS) + 4


@pytest.mark.parametrize(
    ("failures", "with_tokens", "words"),
    [
        ([400], True, r'/v1/completions does not answer \(status 400: {"error": "not now"}\)'),
        ([500] * 8, True, "does not answer .status 500"),
        ([], False, "the server's answer has no token_ids"),
    ],
)
def test_what_stays_wrong_is_one_sentence(server, failures, with_tokens, words):
    server.failures, server.with_tokens = failures, with_tokens
    backend = connect(server, first_wait=0.001)
    with pytest.raises(ConfigError, match=rf"^--endpoint: .*{words}") as caught:
        collect(backend, REQUESTS[:1])
    assert "\n" not in str(caught.value)


def test_the_server_must_serve_the_base(server):
    # The only model is taken for the base under another name.
    server.models = [{"id": "other"}]
    backend = connect(server)
    assert backend.context is None
    assert collect(backend, REQUESTS[:1]) == ANSWERS[:1]
    assert server.bodies[0]["model"] == "other"
    server.models = [{"id": "other"}, {"id": "third"}]
    with pytest.raises(ConfigError, match="serves other, third, and not --base=base: serve it under that name"):
        connect(server)


def test_no_server():
    with pytest.raises(ConfigError, match=r"^--endpoint: http://127\.0\.0\.1:1/v1/models does not answer"):
        connect(Server("http://127.0.0.1:1"), first_wait=0.001)
