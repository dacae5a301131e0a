"""The captured step on a real GPU: the text of a plain one, whoever takes turns in its cache.

    QUANTKIT_TEST_GPU=1 python -m pytest tests/test_gpu_decode.py

Everywhere else nothing is captured, and tests/test_decode.py checks the same on a CPU. In float32 a
text is the same to the token; in the dtype of a GPU its logits are compared.
"""

import os
import warnings

import pytest
import torch
from backends import alone, asked, served
from backends import turn as turned

from quantkit.core.sampling import Sampling
from quantkit.errors import QuantkitWarning
from quantkit.runtime import decode
from quantkit.runtime.load import load
from quantkit.runtime.torch_engine import CacheState, TorchEngine
from quantkit.serve.engines import captured
from quantkit.serve.engines.captured import CapturedBackend
from quantkit.workflows.conversation import Conversation
from quantkit.workflows.generate import Wanted, stream_generate

pytestmark = pytest.mark.skipif(
    not os.environ.get("QUANTKIT_TEST_GPU") or not torch.cuda.is_available(),
    reason="QUANTKIT_TEST_GPU is not set, or there is no GPU",
)

GREEDY = Sampling(temperature=0)
TEXTS = ["日本の首都はどこですか。", "The history of the city is", "海"]


@pytest.fixture(scope="module")
def loaded():
    return load("demo", device="cuda", dtype="float32")


@pytest.fixture(autouse=True)
def told():
    """That nothing could be captured would pass for a text that is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantkitWarning)
        yield


@pytest.fixture
def engine(loaded):
    decode.release(loaded[0])
    found = TorchEngine(*loaded)
    vars(found)["end_ids"] = frozenset()
    return found


@pytest.fixture
def plainly(loaded, monkeypatch):
    """Runs something without a captured step, with torch's attention."""

    def run(what):
        decode.release(loaded[0])
        before = loaded[0].config._attn_implementation
        loaded[0].set_attn_implementation("sdpa")
        with monkeypatch.context() as changed:
            changed.setattr(decode, "captured", lambda *arguments: None)
            found = what()
        loaded[0].set_attn_implementation(before)
        return found

    return run


def together(engine, prompts, sampling, count):
    texts = [[] for _ in prompts]
    for step in engine.batch(prompts, sampling, count):
        for i, token in step:
            texts[i].append(token)
    return texts


def replayed(model) -> bool:
    held = decode._held.get(model)
    return isinstance(held, decode.Captured) and bool(held._rows._graphs)


def test_text_alone_and_in_a_batch(engine, plainly):
    prompts = [engine.encode(text) for text in TEXTS]
    meant = plainly(lambda: [list(engine.stream(ids, GREEDY, 48)) for ids in prompts])
    assert [list(engine.stream(ids, GREEDY, 48)) for ids in prompts] == meant
    assert replayed(engine.model)
    assert together(engine, prompts, [GREEDY] * 3, 48) == meant
    assert replayed(engine.model)


def test_a_cache_grows_in_the_middle_of_a_text(engine, plainly, monkeypatch):
    monkeypatch.setattr(decode, "_STEP", 16)
    monkeypatch.setattr(decode, "_FIRST", 4)
    monkeypatch.setattr(decode, "PREFILL", 5)
    ids = engine.encode(TEXTS[0])
    meant = plainly(lambda: list(engine.stream(ids, GREEDY, 90)))
    assert list(engine.stream(ids, GREEDY, 90)) == meant
    assert decode._held[engine.model].room >= len(ids) + 89
    two = [ids, engine.encode(TEXTS[1])]
    meant = plainly(lambda: together(engine, two, [GREEDY] * 2, 60))
    assert together(engine, two, [GREEDY] * 2, 60) == meant


def test_a_text_that_was_left_early_is_gone_on_from(engine, plainly):
    ids = engine.encode(TEXTS[0])
    meant = plainly(lambda: list(engine.stream(ids, GREEDY, 24)))
    tokens = engine.stream(ids, GREEDY, 24)
    made = [next(tokens) for _ in range(6)]
    tokens.close()
    assert made == meant[:6]
    held = decode._held[engine.model].held
    assert held == ids + made
    longer = ids + made[:4] + engine.encode(TEXTS[2])
    wanted = plainly(lambda: list(engine.stream(longer, GREEDY, 24)))
    list(engine.stream(ids, GREEDY, 6))
    assert list(engine.stream(longer, GREEDY, 24)) == wanted
    assert list(engine.stream(ids, GREEDY, 24)) == meant


def test_chat_and_stop_strings(loaded, plainly):
    def talk(stop=()):
        chat = Conversation(
            TorchEngine(*loaded), Wanted(temperature=0, max_new_tokens=24, stop=stop)
        )
        for text in TEXTS:
            list(chat.say(text))
        return [message["content"] for message in chat.messages]

    meant = plainly(talk)
    assert talk() == meant and replayed(loaded[0])
    stop = (meant[1][2:4],)
    assert talk(stop) == plainly(lambda: talk(stop)) != meant


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 20, "min_p": 0.05}],
    ids=str,
)
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_seeds(engine, settings, penalty):
    ids = engine.encode(TEXTS[1])
    one, other = (Sampling(seed=s, repetition_penalty=penalty, **settings) for s in (5, 6))
    first = list(engine.stream(ids, one, 40))
    assert list(engine.stream(ids, one, 40)) == first
    assert list(engine.stream(ids, other, 40)) != first
    decode.release(engine.model)
    assert list(engine.stream(ids, one, 40)) == first
    assert together(engine, [ids, engine.encode(TEXTS[0])], [one, other], 40)[0] == first


def test_texts_take_turns(engine, loaded):
    other = TorchEngine(*loaded)
    vars(other)["end_ids"] = frozenset()
    prompts = [engine.encode(text) for text in TEXTS[:2]]
    alone = [list(engine.stream(ids, Sampling(seed=2), 20)) for ids in prompts]
    streams = [one.stream(ids, Sampling(seed=2), 20) for one, ids in zip((engine, other), prompts)]
    assert [list(row) for row in zip(*zip(*streams))] == alone


def test_from_python_and_after_the_weights_have_changed():
    """In their place, and for others: the graph knows where the old ones were."""
    model, tokenizer = load("demo", device="cuda", dtype="float32")

    def text():
        settings = {"max_new_tokens": 16, "temperature": 0}
        return "".join(stream_generate(model, tokenizer, TEXTS[1], **settings))

    first = text()
    assert replayed(model) and text() == first
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1.5)
    changed = text()
    assert changed != first
    layer = model.model.layers[1].mlp
    old = layer.down_proj
    layer.down_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    layer.down_proj.weight = torch.nn.Parameter(old.weight.detach() / -1.5, requires_grad=False)
    del old
    torch.cuda.empty_cache()
    assert text() == first


def test_memory_comes_back():
    model, tokenizer = load("demo", device="cuda", dtype="bfloat16")
    engine = TorchEngine(model, tokenizer)
    list(engine.stream([5, 6, 7], GREEDY, 8))  # workspaces, and what is compiled
    decode.release(model)
    before = torch.cuda.memory_allocated()
    list(engine.stream([5, 6, 7], GREEDY, 600))
    held = torch.cuda.memory_allocated()
    decode.release(model)
    after = torch.cuda.memory_allocated()
    config = model.config
    width = config.head_dim * config.num_key_value_heads * config.num_hidden_layers
    assert held - before >= 512 * 2 * 2 * width  # keys and values of the first room
    assert after - before < (held - before) / 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_in_the_dtype_of_a_gpu(dtype):
    """As near to float32 as transformers' own way is."""
    model, tokenizer = load("demo", device="cuda", dtype=dtype)
    exact, _ = load("demo", device="cuda", dtype="float32")
    ids = tokenizer.encode(TEXTS[0] * 8)
    at = len(ids) - 12
    with torch.inference_mode():
        meant = exact(torch.tensor([ids], device="cuda")).logits[0, at - 1 :]
        state = CacheState(model)
        usual = [state.compute(ids[:at]), *(state.compute([i]) for i in ids[at:])]
        step = decode.captured(model, [ids[:at]])
        assert step is not None and replayed(model)
        found = [step.begin([ids[:at]], 12)[0].clone()]
        for token in ids[at:]:
            found += step.step(torch.tensor([token], device="cuda")).clone()

    def apart(rows):
        return float((torch.stack(rows).float() - meant).norm() / meant.norm())

    assert apart(found) < 1.5 * apart(usual) + 1e-4


def test_texts_with_settings_of_their_own(engine):
    """Share a step, and are what they are alone."""
    prompts = [engine.encode(text) for text in TEXTS]
    settings = [GREEDY, Sampling(seed=3, top_p=0.8), Sampling(seed=4, repetition_penalty=1.3)]
    each = zip(prompts, settings)
    lonely = [list(engine.stream(ids, one, 30)) for ids, one in each]
    assert together(engine, prompts, settings, 30) == lonely


# serving

LENGTHS = [1, 7, 60, 200, 16, 3, 450, 33, 128, 5, 90, 2, 65, 64, 300, 11, 24, 180, 1, 77]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(captured, "PIECE", 128)


def backend_of(model, **more) -> CapturedBackend:
    settings = {"context": 1024, "rows": 12, "places": 4000} | more
    backend = CapturedBackend(model, frozenset(), **settings)
    assert backend._step.direct and backend._step._graphs.keys() == {1, 2, 4, 8, 12}
    return backend


def test_served_texts_are_what_they_are_alone(loaded, small_pieces):
    """More than there are rows, of all lengths; prompts in pieces, rows and places used again."""
    readers = [asked(n, 20 + 13 * i % 60, i) for i, n in enumerate(LENGTHS)]
    backend = backend_of(loaded[0])
    for _ in range(2):
        again = [asked(n, 20 + 13 * i % 60, i) for i, n in enumerate(LENGTHS)]
        served(backend, again)
        for reader in again:
            assert reader.ids == alone(loaded[0], reader.job), len(reader.job.prompt)
    for reader in readers[:5]:
        served(backend, [reader])  # with the graphs of few
        assert reader.ids == alone(loaded[0], reader.job)
    assert backend.load().kv_used == 0


def test_places_are_brought_together_while_texts_run(loaded):
    backend = backend_of(loaded[0], places=1100)
    short = [asked(50, 150, seed) for seed in range(2)]
    between = [asked(40, 260, 2), asked(100, 200, 3)]
    for reader in (short[0], between[0], short[1], between[1]):
        backend.add(reader)
    for _ in range(20):
        turned(backend)
    for reader in short:
        reader.cancelled = True
    turned(backend)
    late = asked(30, 400, 4)
    assert backend.admits(late.job)
    served(backend, [late])
    for reader in (*between, late):
        assert reader.ids == alone(loaded[0], reader.job)


def test_served_seeds_and_logprobs(loaded, small_pieces):
    settings = [
        Sampling(seed=n, temperature=0.6 + n / 20, top_p=0.9 if n % 2 else 1.0, top_k=n % 3 * 10)
        for n in range(10)
    ]

    def readers():
        return [asked(20 + 9 * n, 40, n, one, logprobs=n % 4) for n, one in enumerate(settings)]

    together, lonely = readers(), readers()
    served(backend_of(loaded[0]), together)
    backend = backend_of(loaded[0])
    for reader in lonely:
        served(backend, [reader])
    for one, other in zip(together, lonely):
        assert one.ids == other.ids
        for a, b in zip(one.tokens, other.tokens):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert [i for i, _ in a.top] == [i for i, _ in b.top]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_served_in_the_dtype_of_a_gpu(dtype, small_pieces):
    """Tokens that are the likeliest, or nearly, as float32 sees it: a text that looked at another
    one's keys would soon take what is out of the question."""
    model, _ = load("demo", device="cuda", dtype=dtype)
    exact, _ = load("demo", device="cuda", dtype="float32")
    readers = [asked(n, 60, i) for i, n in enumerate(LENGTHS)]
    served(backend_of(model), readers)
    first = 0
    for reader in readers:
        ids = torch.tensor([reader.job.prompt + reader.ids], device="cuda")
        with torch.inference_mode():
            logits = exact(ids).logits[0, len(reader.job.prompt) - 1 : -1]
        taken = logits.gather(1, ids[0, len(reader.job.prompt) :, None])[:, 0]
        short = logits.amax(-1) - taken
        assert float(short.max()) < 0.5
        first += int((short == 0).sum())
    assert first > 0.97 * 60 * len(readers)


def test_memory_of_a_server_comes_back(loaded):
    served(backend_of(loaded[0]), [asked(9, 9)])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    backend = backend_of(loaded[0], places=12000)
    held = torch.cuda.memory_allocated() - before
    assert held >= backend._step.cache.bytes
    backend.close()
    del backend
    assert torch.cuda.memory_allocated() - before < held / 4
