"""A GGUF file behind the same server, run by llama.cpp."""

import pytest
from serving import demo, running, until
from tools import command

from quantkit.workflows.generate import generate

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
QUESTION = [{"role": "user", "content": "日本の首都はどこですか。"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "demo"
    assert command("convert", "demo", "--to", "gguf:f32", "--out", out) == 0
    with running(demo("gguf", str(next(out.glob("*.gguf"))))) as found:
        yield found


def test_it_is_chosen_and_answers_as_torch_does(server):
    assert server.models[0].engine.name == "llama.cpp"
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 24}
    found = server.post("/v1/chat/completions", **body).json()
    wanted = generate("demo", QUESTION[0]["content"], temperature=0, dtype="float32")
    assert found["choices"][0]["message"]["content"] == wanted.text
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["prompt_tokens"] == wanted.prompt_tokens


def test_texts_wait_for_each_other_and_a_client_that_goes_makes_room(server):
    body = {"prompt": "The history of", "temperature": 0, "max_tokens": 1500, "stream": True}
    load = server.models[0].engine.load
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: without it the response is closed
        next(lines)
        assert load().running == 1
    until(lambda: load().running == 0, 5)
    short = server.post("/v1/completions", prompt="a", max_tokens=3, temperature=0)
    assert short.json()["usage"]["completion_tokens"] <= 3


def test_logprobs_are_refused(server):
    refused = server.post("/v1/completions", prompt="a", logprobs=1)
    assert refused.status_code == 400
    assert "logprobs" in refused.json()["error"]["message"]
