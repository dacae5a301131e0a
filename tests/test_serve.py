"""The server in the hands of OpenAI's own client, LangChain's, and plain HTTP."""

import json
import time
from dataclasses import replace

import openai
import pytest
from serving import demo, running

from quantkit.runtime import templates
from quantkit.workflows.generate import generate

PROMPT = "昔々、ある村に"
QUESTION = [{"role": "user", "content": "日本の首都はどこですか。"}]
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 24}
BROKEN = "\ufffd"


@pytest.fixture(scope="module")
def server():
    with running(demo()) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def wanted() -> str:
    """What ``quantkit generate`` makes of the same."""
    return generate(
        "demo", PROMPT, chat=False, temperature=0, max_new_tokens=24, dtype="float32"
    ).text


def completed(client, **settings):
    return client.completions.create(prompt=PROMPT, **{**GREEDY, **settings})


# answers


def test_a_completion_is_what_generate_makes(client, wanted):
    found = completed(client)
    assert found.choices[0].text == wanted
    assert found.choices[0].finish_reason == "length"
    assert (found.object, found.model) == ("text_completion", "demo")
    assert found.usage.completion_tokens == 24
    assert found.usage.total_tokens == 24 + found.usage.prompt_tokens


def test_a_chat_uses_the_template_and_ends_where_the_model_ends(client):
    found = client.chat.completions.create(messages=QUESTION, **GREEDY)
    alone = generate("demo", QUESTION[0]["content"], temperature=0, dtype="float32")
    assert found.choices[0].message.content == alone.text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "stop"
    # transformers counts the end token, which is no text
    assert found.usage.completion_tokens == alone.tokens - 1
    assert found.usage.prompt_tokens == alone.prompt_tokens


def test_messages_may_be_parts_and_of_a_developer(client):
    plain = [{"role": "system", "content": "短く。"}, *QUESTION]
    parts = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "短"}, {"type": "text", "text": "く。"}],
        },
        *QUESTION,
    ]
    answers = {
        client.chat.completions.create(messages=one, **GREEDY).choices[0].message.content
        for one in (plain, parts)
    }
    assert len(answers) == 1


def test_streams_join_to_the_whole(client, wanted):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = completed(client, **options)
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "".join(texts) == wanted
    assert len(texts) > 5
    assert BROKEN not in "".join(texts)
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 24

    whole = client.chat.completions.create(messages=QUESTION, **GREEDY)
    *chunks, last = client.chat.completions.create(messages=QUESTION, **GREEDY, **options)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage == whole.usage


def test_events_on_the_wire_are_whole_characters(server):
    """Every event is JSON of its own, in UTF-8, and the last one says so."""
    body = {**GREEDY, "prompt": "🐟鰯𠮷", "stream": True, "temperature": 1.9, "seed": 5}
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = b"".join(response.iter_raw())
    events = raw.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    for one in events[:-2]:
        text = json.loads(one.removeprefix(b"data: ").decode("utf-8"))["choices"][0]["text"]
        assert BROKEN not in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_is_not_in_it(client, wanted, stream):
    stop = wanted[7:10]  # several tokens
    at = wanted.index(stop)
    found = completed(client, stop=["no such text", stop], stream=stream, logprobs=0)
    parts = list(found) if stream else [found]
    choices = [one.choices[0] for one in parts]
    assert "".join(choice.text for choice in choices) == wanted[:at]
    assert choices[-1].finish_reason == "stop"
    offsets = [o for c in choices if c.logprobs for o in c.logprobs.text_offset]
    assert offsets and max(offsets) < at, "the numbers tell of the stop string"


def test_seeds_repeat_and_choices_differ(client):
    settings = {"temperature": 1.2, "n": 3, "max_tokens": 12}
    first = [c.text for c in completed(client, seed=7, **settings).choices]
    again = [c.text for c in completed(client, seed=7, **settings).choices]
    alone = completed(client, seed=7, **{**settings, "n": 1}).choices[0].text
    other = [c.text for c in completed(client, seed=-8, **settings).choices]
    assert first == again != other
    assert len(set(first)) == 3
    assert first[0] == alone
    streamed = ["", "", ""]
    for chunk in completed(client, seed=7, stream=True, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == first


def test_several_prompts_and_token_ids(client, server):
    ids = server.models[0].vocabulary.tokenizer.encode(PROMPT)
    one = completed(client)
    several = client.completions.create(prompt=[PROMPT, "The"], **GREEDY)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == one.choices[0].text
    assert client.completions.create(prompt=ids, **GREEDY).choices[0].text == one.choices[0].text
    other = client.completions.create(prompt="The", **GREEDY)
    assert several.choices[1].text == other.choices[0].text
    for name in ("prompt_tokens", "completion_tokens"):
        parts = [getattr(found.usage, name) for found in (one, other)]
        assert getattr(several.usage, name) == sum(parts)


@pytest.mark.parametrize(
    "setting",
    [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"temperature": 1e-40}],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_leave_one_token_are_greedy(client, wanted, setting):
    direct = {name: value for name, value in setting.items() if name == "top_p"}
    extra = {name: value for name, value in setting.items() if name != "top_p"}
    found = completed(client, **{**direct, "temperature": 1.0}, extra_body=extra)
    assert found.choices[0].text == wanted


def test_a_penalty_changes_what_is_repeated(client):
    free = completed(client, max_tokens=60).choices[0].text
    extra = {"repetition_penalty": 2.0}
    found = completed(client, max_tokens=60, extra_body=extra).choices[0].text
    assert len(set(found)) > len(set(free))


def test_logprobs(client):
    found = client.chat.completions.create(
        messages=QUESTION, logprobs=True, top_logprobs=3, **GREEDY
    ).choices[0]
    numbers = found.logprobs.content
    assert "".join(one.token for one in numbers) == found.message.content
    for one in numbers:
        assert one.logprob == one.top_logprobs[0].logprob  # greedy
        assert [t.logprob for t in one.top_logprobs] == sorted(
            (t.logprob for t in one.top_logprobs), reverse=True
        )
        assert bytes(one.bytes).decode() == one.token
    completion = completed(client, logprobs=2).choices[0]
    assert "".join(completion.logprobs.tokens) == completion.text
    offsets = completion.logprobs.text_offset
    assert [completion.text[o] for o in offsets] == [t[0] for t in completion.logprobs.tokens]


def test_texts_that_run_together_are_those_that_run_alone(server):
    """Streams that begin one after the other, of different lengths, read at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    prompts = [f"{n}番目の村に、" * (1 + n % 3) for n in range(10)]

    def ask(prompt: str) -> str:
        body = {**GREEDY, "prompt": prompt, "max_tokens": 10 + len(prompt)}
        return server.post("/v1/completions", **body).json()["choices"][0]["text"]

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == alone


# what else there is


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").max_model_len == 2048
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_several_models():
    with running(demo("one"), demo("two", context=64)) as both:
        for name in ("one", "two"):
            body = both.post("/v1/completions", model=name, prompt="a", max_tokens=2).json()
            assert body["model"] == name
        refused = both.post("/v1/completions", model="two", prompt="a", max_tokens=64)
        assert "maximum context length is 64 tokens" in refused.json()["error"]["message"]


def test_a_template_in_the_place_of_the_models_own(client):
    """Chats go through it; texts are left as they are."""
    settings = {"template": "synthia", "temperature": 0, "max_new_tokens": 24, "dtype": "float32"}
    body = {"temperature": 0, "max_tokens": 24}
    alone = generate("demo", QUESTION[0]["content"], **settings)
    with running(demo("other", template="synthia")) as other:
        with other.client() as http:
            about = http.get("/v1/models/other").json()["quantkit"]
        assert about["chat_template"] == "SYSTEM: {system}\nUSER: {prompt}\nASSISTANT:"
        chat = other.post("/v1/chat/completions", messages=QUESTION, **body).json()
        assert chat["choices"][0]["message"]["content"] == alone.text
        assert chat["usage"]["prompt_tokens"] == alone.prompt_tokens
        text = other.post("/v1/completions", prompt=PROMPT, **body).json()
        assert text["choices"][0]["text"] == completed(client).choices[0].text
        said = [*QUESTION, {"role": "assistant", "content": "東京"}]
        refused = other.post("/v1/chat/completions", messages=said, **body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("stream", [False, True])
def test_a_template_ends_an_answer_but_no_text(monkeypatch, stream):
    alpaca = templates.BUILT_IN["alpaca-ja"]
    monkeypatch.setitem(templates.BUILT_IN, "short", replace(alpaca, stop=("most",)))
    settings = {"template": "alpaca-ja", "temperature": 0, "dtype": "float32"}
    whole = generate("demo", QUESTION[0]["content"], **settings).text
    assert "most" in whole
    with running(demo(template="short")) as short:
        client = openai.OpenAI(base_url=f"{short.url}/v1", api_key="none", max_retries=0)
        chat = client.chat.completions.create(messages=QUESTION, stream=stream, **GREEDY)
        shown = (
            "".join(event.choices[0].delta.content or "" for event in chat)
            if stream
            else chat.choices[0].message.content
        )
        assert shown == whole.partition("most")[0]
        text = client.completions.create(prompt=alpaca.render(QUESTION, {}), **GREEDY)
        assert text.choices[0].text == whole


def test_metrics_count(server):
    def value(name: str) -> float:
        with server.client() as http:
            lines = http.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name)))

    tokens = 'quantkit_generation_tokens_total{model="demo"}'
    answers = 'quantkit_requests_total{path="/v1/completions",status="200"}'
    server.post("/v1/completions", prompt="a", max_tokens=1, temperature=0)
    before, served = value(tokens), value(answers)
    server.post("/v1/completions", prompt=PROMPT, max_tokens=7, temperature=0)
    assert value(tokens) == before + 7
    assert value(answers) == served + 1
    assert value("quantkit_running") == 0
    assert value("process_resident_memory_bytes") > 1e8


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = langchain.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="demo", temperature=0, max_tokens=24
    )
    question = QUESTION[0]["content"]
    whole = model.invoke(question)
    assert whole.content == generate("demo", question, temperature=0, dtype="float32").text
    assert whole.usage_metadata["input_tokens"] > 0
    streamed = list(model.stream(question, stop=["."]))
    assert "".join(one.content for one in streamed) == whole.content.partition(".")[0]


# refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", -0.1),
        ("temperature", 3),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", 2**40),
        ("n", 0),
        ("n", 17),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", [1]),
        ("stream", "yes"),
        ("stream", 1),
        ("logprobs", 21),
        ("echo", True),
        ("best_of", 2),
        ("suffix", "x"),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("response_format", {"type": "json_object"}),
        ("max_completion_tokens", 2**40),
        ("prompt", ""),
        ("prompt", None),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [-1]),
        ("prompt", [8192]),
        ("prompt", [2**70]),
        ("prompt", {"a": 1}),
        ("model", 5),
    ],
)
def test_a_field_that_cannot_be_is_named(server, field, value):
    response = server.post("/v1/completions", **{"prompt": "a", "max_tokens": 1, field: value})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "tool", "content": "a"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("max_completion_tokens", 0),
        ("response_format", {"type": "json_object"}),
        ("tool_choice", "required"),
        ("logprobs", 3),
        ("top_logprobs", 21),
    ],
)
def test_the_same_for_chats(server, field, value):
    body = {"messages": QUESTION, "max_tokens": 1, "logprobs": True, field: value}
    response = server.post("/v1/chat/completions", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"prompt"',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "\xff"}',
    ],
    ids=["empty", "list", "null", "cut", "nan", "inf", "digits", "surrogate", "deep", "latin"],
)
def test_bodies_that_are_no_request(server, body):
    with server.client() as http:
        headers = {"content-type": "application/json"}
        response = http.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["message"]
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "start", "wrong", "end"),
    [
        ("completions", b'{"prompt": [', b"-1", b"]}"),
        ("completions", b'{"prompt": "a", "stop": [', b"1", b"]}"),
        ("chat/completions", b'{"messages": [', b"{}", b"]}"),
        ("chat/completions", b'{"messages": [{"role": "user", "content": [', b"{}", b"]}]}"),
    ],
    ids=["ids", "stop", "messages", "parts"],
)
def test_a_body_that_is_wrong_a_million_times_is_refused_as_soon(server, path, start, wrong, end):
    """Nobody else is answered while a body is looked at."""
    content = start + b",".join([wrong] * 1_300_000) + end
    started = time.monotonic()
    with server.client() as http:
        headers = {"content-type": "application/json"}
        response = http.post(f"/v1/{path}", content=content, headers=headers)
    assert response.status_code == 400
    assert time.monotonic() - started < 5


def test_more_than_the_context_is_refused_with_the_numbers(server, client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(prompt=[5] * 2048, **GREEDY)
    assert "2048 tokens" in refused.value.message and "prompt has 2048" in refused.value.message
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"asked for 2124 \(2024 in the prompt, 100"):
        client.completions.create(prompt=[5] * 2024, **{**GREEDY, "max_tokens": 100})


def test_fields_that_nobody_knows_are_ignored(server, wanted):
    body = {**GREEDY, "prompt": PROMPT, "user": "me", "tools": [], "metadata": {"a": [1]}}
    assert server.post("/v1/completions", **body).json()["choices"][0]["text"] == wanted


def test_a_body_that_is_too_large(server):
    content = json.dumps({"prompt": "a" * (5 << 20)}).encode()
    headers = {"content-type": "application/json"}
    with server.client() as http:
        response = http.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "invalid_request_error"
        # without a length nobody knows beforehand
        chunked = http.post("/v1/completions", content=iter([content]), headers=headers)
        assert chunked.status_code == 413
