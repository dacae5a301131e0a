"""A GGUF file behind the same server, run by llama.cpp."""

import pytest
from serving import demo, running, until
from tools import command

from quantkit.errors import QuantkitError
from quantkit.runtime.llamacpp import LlamaCpp
from quantkit.workflows.generate import generate
from quantkit.workflows.serve_models import Settings, open_model

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
QUESTION = [{"role": "user", "content": "日本の首都はどこですか。"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "demo"
    assert command("convert", "demo", "--to", "gguf:f32", "--out", out) == 0
    return next(out.glob("*.gguf"))


@pytest.fixture(scope="module")
def server(file):
    with running(demo("gguf", str(file))) as found:
        yield found


def test_it_is_chosen_and_answers_as_torch_does(server):
    assert server.models[0].engine.name == "llama.cpp"
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 24}
    found = server.post("/v1/chat/completions", **body).json()
    wanted = generate("demo", QUESTION[0]["content"], temperature=0, dtype="float32")
    assert found["choices"][0]["message"]["content"] == wanted.text
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["prompt_tokens"] == wanted.prompt_tokens


def test_it_reads_and_writes_by_its_own_tokenizer_as_generate_does(server, file):
    """One that reads differently from transformers' would give other prompts, and other answers."""
    tokenizer = server.models[0].vocabulary.tokenizer
    assert isinstance(tokenizer, LlamaCpp) and tokenizer.path == file
    body = {"prompt": " The  history\nof 東京", "temperature": 0, "max_tokens": 24}
    found = server.post("/v1/completions", **body).json()
    wanted = generate(
        str(file), body["prompt"], chat=False, engine="llama.cpp", temperature=0, max_new_tokens=24
    )
    assert found["choices"][0]["text"] == wanted.text
    assert found["usage"]["prompt_tokens"] == wanted.prompt_tokens


def test_what_llamacpp_cannot_open_goes_to_torch_and_this_is_said(file, monkeypatch):
    def fails(path, context):
        raise QuantkitError("llama.cpp does not open it")

    monkeypatch.setattr("quantkit.runtime.engine.LlamaCpp", fails)
    told = []
    model = open_model(str(file), "gguf", Settings(), told.append)
    model.engine.close()
    assert model.engine.name == "torch"
    assert "engine torch (GGUF, and llama.cpp does not open it)" in told[0]
    with pytest.raises(QuantkitError, match="does not open it"):
        open_model(str(file), "gguf", Settings(engine="llama.cpp"), told.append)


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
