"""Decoding with a captured step: the tokens of a plain one, whoever takes turns in its cache.

There is no GPU here, so nothing is captured: the step is called on the same fixed cache, with the
same masks and counters and the same steps running ahead (tests/test_gpu_decode.py captures it).
"""

import gc
import warnings
import weakref
from dataclasses import fields

import pytest
import tiny
import torch
from kernels import random_weight
from tools import model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

from quantkit.core.qweight import Scheme
from quantkit.core.sampling import Sampler, Sampling
from quantkit.errors import QuantkitWarning, UsageError
from quantkit.runtime import decode, fused, stretches
from quantkit.runtime.decode import Captured, captured, forget, release, why_not
from quantkit.runtime.draw import Draw, Limits, candidates
from quantkit.runtime.follow import follow
from quantkit.runtime.fused import _agree, _Ours, _rms_norms, fewer_launches
from quantkit.runtime.gpu_linear import GpuLinear
from quantkit.runtime.kernels import small, support, tune
from quantkit.runtime.load import load
from quantkit.runtime.rows import Rows
from quantkit.runtime.stream import Answer
from quantkit.runtime.torch_engine import TorchEngine
from quantkit.workflows.conversation import Conversation
from quantkit.workflows.generate import Wanted, stream_generate

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 17, 3, 90, 41, 8, 23], [60, 2, 33]]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Caches that soon have to grow."""
    monkeypatch.setattr(decode, "_STEP", 8)
    monkeypatch.setattr(decode, "_FIRST", 4)


@pytest.fixture
def capturing(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(support, "device_why_not", lambda device: None)


class Ids:
    """A tokenizer as far as tokens need one."""

    eos_token_id = None


@pytest.fixture
def net():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def engine(net):
    return TorchEngine(net, Ids())


def generated(net, prompt, count):
    """By transformers."""
    ids = torch.tensor([prompt])
    found = net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].tolist()


def together(engine, prompts, sampling, count):
    texts = [[] for _ in prompts]
    for step in engine.batch(prompts, sampling, count):
        for i, token in step:
            texts[i].append(token)
    return texts


def in_cache(net) -> Captured:
    return decode._held[net]


# the same tokens

SLIDING, EXPERTS = ("mistral", "gemma2", "gemma3_text"), ("mixtral", "qwen3_moe")
FIXED = [name for name in tiny.ARCHITECTURES if name not in SLIDING + EXPERTS]


@pytest.mark.parametrize("name", FIXED)
def test_the_same_tokens_as_without(name, capturing):
    """One text, then one that begins alike, then two of different lengths."""
    loaded, _ = load(str(model(name)), dtype="float32")
    engine = TorchEngine(loaded, Ids())
    prompts = [*PROMPTS, [*PROMPTS[0], 7, 7]]
    meant = [generated(loaded, prompt, 6) for prompt in prompts]
    for i in (0, 2):
        assert list(engine.stream(prompts[i], GREEDY, 6)) == meant[i]
    assert together(engine, prompts[:2], [GREEDY] * 2, 6) == meant[:2]
    assert in_cache(loaded).texts == 2 and in_cache(loaded).room == 16


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text"])
def test_caches_that_cannot_be_fixed_are_named(name, capturing):
    loaded, _ = load(str(model(name)), dtype="float32")
    assert "Sliding" in why_not(loaded)
    with pytest.warns(QuantkitWarning, match="Sliding"):
        assert list(TorchEngine(loaded, Ids()).stream(PROMPTS[0], GREEDY, 4)) == generated(
            loaded, PROMPTS[0], 4
        )


def test_models_that_take_no_cache_of_fixed_size_are_left_alone(capturing):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 128}
    config = AutoConfig.for_model("gpt_neo", attention_types=[[["global"], 2]], **sizes)
    assert "fixed size" in why_not(AutoModelForCausalLM.from_config(config))
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=128)
    assert "LinearAttention" in why_not(AutoModelForCausalLM.from_config(config))


def test_on_a_cpu_nothing_is_captured(net, engine, recwarn):
    assert "GPU" in why_not(net)
    list(engine.stream(PROMPTS[0], GREEDY, 2))
    assert captured(net, PROMPTS) is None
    assert net not in decode._held and not recwarn


@torch.inference_mode()
def test_a_fixed_cache_with_fused_kernels(net, monkeypatch):
    """Prompts of different lengths, in pieces; then other ones in the same cache."""
    monkeypatch.setattr(decode, "PREFILL", 4)
    used = []
    ours = {"rotary", "keep", "rms_norm", "elementwise"}
    for name in ours:
        real = getattr(small, name)
        monkeypatch.setattr(
            small, name, lambda *args, n=name, f=real, **kw: (used.append(n), f(*args, **kw))[1]
        )
    fixed = Captured(net, 2)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        texts = [list(prompt) for prompt in prompts]
        with fewer_launches(net):
            found = fixed.begin(texts, 1)
            for _ in range(4):
                rows = [net(torch.tensor([text]), use_cache=False).logits[0, -1] for text in texts]
                meant = torch.stack(rows)
                assert torch.allclose(found, meant, atol=1e-4)
                token = meant.argmax(-1)
                for text, one in zip(texts, token.tolist()):
                    text.append(one)
                found = fixed.step(token)
    assert ours <= set(used)
    used.clear()
    net(torch.tensor([[1]]))
    assert not used  # the model is as it was


# one text after another


def computed(monkeypatch):
    """How many tokens each call of the model has; those that are for nobody are left out."""
    calls, read, step = [], Rows.read, Rows.step

    def reading(self, parts, before, firsts):
        tokens = max(map(len, parts))
        if firsts != [self.cache.places]:
            calls.append(tokens)
        read(self, parts, before, firsts)

    def stepping(self, count):
        calls.append(1)
        return step(self, count)

    monkeypatch.setattr(Rows, "read", reading)
    monkeypatch.setattr(Rows, "step", stepping)
    return calls


def test_what_texts_begin_with_alike_is_kept_when_one_was_left_early(
    net, engine, capturing, monkeypatch
):
    calls = computed(monkeypatch)
    tokens = engine.stream(PROMPTS[0], GREEDY, 20)
    made = [next(tokens) for _ in range(5)]
    assert made == generated(net, PROMPTS[0], 5)
    tokens.close()
    ran = len(calls) - 1
    assert ran > 5  # some ran ahead
    assert in_cache(net).held == PROMPTS[0] + made
    for prompt, new in (
        ([*PROMPTS[0], *made[:3], 9, 9], [1]),  # not as it went on; the last token is for a step
        ([*PROMPTS[0], *made[:3], 9, 9], []),  # nothing new
        (PROMPTS[0], []),
        (PROMPTS[1], [2]),
    ):
        calls.clear()
        assert list(engine.stream(prompt, GREEDY, 6)) == generated(net, prompt, 6)
        assert calls == new + [1] * 6


def test_a_text_that_was_not_closed_does_not_harm_the_next(net, engine, capturing):
    left = engine.stream(PROMPTS[0], GREEDY, 20)
    next(left)
    assert list(engine.stream(PROMPTS[1], GREEDY, 8)) == generated(net, PROMPTS[1], 8)


@pytest.mark.parametrize("ahead", [0, 3])
def test_texts_take_turns(net, engine, capturing, ahead, monkeypatch):
    """Two engines of a model, and a batch in between; each goes on where it was, and its draws
    too."""
    monkeypatch.setattr(Captured, "ahead", ahead)
    other = TorchEngine(net, Ids())
    chance = Sampling(seed=4)
    alone = [list(engine.stream(prompt, chance, 12)) for prompt in PROMPTS]
    streams = [one.stream(p, chance, 12) for one, p in zip((engine, other), PROMPTS)]
    pairs = []
    for step in range(12):
        pairs.append([next(stream) for stream in streams])
        if step == 5:
            batched = together(engine, PROMPTS, [GREEDY] * 2, 4)
            assert batched == [generated(net, prompt, 4) for prompt in PROMPTS]
        if step == 8:
            release(net)
    assert [list(row) for row in zip(*pairs)] == alone


def test_a_model_has_one_step_at_a_time(net, engine, capturing, monkeypatch):
    """A text and a batch, token by token: neither leaves its memory with the other."""
    made, init = [], Captured.__init__

    def noted(self, *arguments):
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Captured, "__init__", noted)
    one, several = engine.stream(PROMPTS[0], GREEDY, 8), engine.batch(PROMPTS, [GREEDY] * 2, 8)
    pairs = []
    for _ in range(8):
        pairs.append((next(one), next(several)[1][1]))
        assert [step.texts for step in made if step.room] == [in_cache(net).texts]
    assert [list(row) for row in zip(*pairs)] == [generated(net, p, 8) for p in PROMPTS]


def test_the_host_takes_turns_too(net, engine):
    streams = [engine.stream(prompt, GREEDY, 9) for prompt in PROMPTS]
    found = [list(row) for row in zip(*zip(*streams))]
    assert found == [generated(net, prompt, 9) for prompt in PROMPTS]


def test_chat_reads_only_what_is_new(capturing, monkeypatch):
    """The same conversation as without, also after an answer that a stop string has ended."""
    turns = ["日本の首都はどこですか。", "海はありますか。", "山は?"]
    loaded, tokenizer = load("demo", dtype="float32")

    def talk(stop):
        chat = Conversation(
            TorchEngine(loaded, tokenizer), Wanted(temperature=0, max_new_tokens=10, stop=stop)
        )
        prompts = []
        for turn in turns:
            calls.clear()
            list(chat.say(turn))
            prompts.append((len(chat.answer.prompt), sum(n for n in calls if n > 1)))
        return [message["content"] for message in chat.messages], prompts

    calls = computed(monkeypatch)
    wholes, prompts = talk(())
    assert all(new < whole / 2 for whole, new in prompts[1:]), prompts
    stop = (wholes[1][3:5],)
    stopped, _ = talk(stop)
    assert stopped[1] == wholes[1][: wholes[1].index(stop[0])].strip() != wholes[1]
    monkeypatch.setattr(support, "device_why_not", lambda device: support.NO_GPU)
    calls.clear()
    release(loaded)
    assert (talk(())[0], talk(stop)[0]) == (wholes, stopped)
    assert not calls


def test_a_text_ends_with_its_last_token(net, engine, capturing):
    whole = generated(net, PROMPTS[0], 12)
    end = whole[4]
    engine.end_ids = frozenset([end])
    first = whole[: whole.index(end) + 1]
    assert list(engine.stream(PROMPTS[0], GREEDY, 12)) == first
    other = generated(net, PROMPTS[1], 12)
    if end in other:
        other = other[: other.index(end) + 1]
    assert together(engine, PROMPTS, [GREEDY] * 2, 12) == [first, other]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["plain", "captured"])
def test_a_context_is_filled_to_the_last_token(name, way, request):
    """And not beyond: gpt2 has no positions there. The shorter text goes on when the other ends."""
    if way == "captured":
        request.getfixturevalue("capturing")
    loaded, _ = load(str(model(name)), dtype="float32")
    engine = TorchEngine(loaded, Ids())
    assert engine.context == 64
    prompts = [list(range(3, 63)), list(range(3, 55))]
    for prompt in prompts:
        assert len(list(engine.stream(prompt, GREEDY, 99))) == 65 - len(prompt)
    assert [len(text) for text in together(engine, prompts, [GREEDY] * 2, 99)] == [5, 13]
    with pytest.raises(UsageError, match="65 tokens"):
        next(engine.stream([3] * 65, GREEDY, 1))
    for nothing in ([], [[1], []]):
        with pytest.raises(UsageError, match="no tokens"):
            next(
                engine.batch(nothing, [GREEDY] * 2, 1) if nothing else engine.stream([], GREEDY, 1)
            )


# the step that a model has


def test_a_cache_grows_and_keeps_what_is_in_it(net, engine, capturing, monkeypatch):
    calls, rooms, reserve = computed(monkeypatch), [], Captured.reserve

    def noted(self, tokens):
        reserve(self, tokens)
        rooms.append(self.room)

    monkeypatch.setattr(Captured, "reserve", noted)
    assert list(engine.stream(PROMPTS[0], GREEDY, 40)) == generated(net, PROMPTS[0], 40)
    assert sorted(set(rooms)) == [16, 24, 40, 64]
    assert calls == [6] + [1] * 40
    for prompts in (PROMPTS, PROMPTS[::-1]):
        found = together(engine, prompts, [GREEDY] * 2, 30)
        assert found == [generated(net, prompt, 30) for prompt in prompts]


def test_one_step_serves_all_engines_and_none_reads_what_another_did(net, capturing, monkeypatch):
    calls = computed(monkeypatch)
    list(TorchEngine(net, Ids()).stream(PROMPTS[0], GREEDY, 3))
    step = in_cache(net)
    calls.clear()
    net.model.embed_tokens.weight.mul_(0.5)  # trained on, say
    found = list(TorchEngine(net, Ids()).stream(PROMPTS[0], GREEDY, 3))
    assert found == generated(net, PROMPTS[0], 3)
    assert in_cache(net) is step and calls[0] == len(PROMPTS[0]) - 1


def test_other_weights_are_captured_again(net, engine, capturing):
    list(engine.stream(PROMPTS[0], GREEDY, 3))
    step = in_cache(net)
    net.model.layers[0].mlp.up_proj = nn.Linear(64, 96, bias=False)
    assert list(engine.stream(PROMPTS[0], GREEDY, 3)) == generated(net, PROMPTS[0], 3)
    assert in_cache(net) is not step and step.room == 0


def test_memory_is_let_go(net, engine, capturing):
    list(engine.stream(PROMPTS[0], GREEDY, 3))
    layer = in_cache(net)._rows.cache.layers[0]
    keys = weakref.ref(layer.keys)
    del layer
    release(net)
    assert keys() is None
    forget(net)
    release(net)  # there is nothing, and that is fine


def test_a_step_goes_with_its_model(capturing):
    loaded, tokenizer = load("demo", dtype="float32")
    list(stream_generate(loaded, tokenizer, "a", max_new_tokens=2))
    step = weakref.ref(in_cache(loaded)._rows)
    del loaded
    gc.collect()
    assert step() is None


@pytest.mark.parametrize("trouble", [RuntimeError, ValueError])
def test_a_step_that_cannot_be_captured(net, engine, capturing, monkeypatch, trouble):
    """The reason is told once, the tokens are the same, and the model is as it was."""

    def fails(self, tokens):
        raise trouble("out of ink\nand paper")

    before = net.config._attn_implementation
    monkeypatch.setattr(Captured, "reserve", fails)
    with pytest.warns(QuantkitWarning, match="LlamaForCausalLM .* slower: out of ink$"):
        found = list(engine.stream(PROMPTS[0], GREEDY, 6))
    assert found == generated(net, PROMPTS[0], 6)
    assert net.config._attn_implementation == before
    with warnings.catch_warnings(action="error"):
        assert together(engine, PROMPTS, [GREEDY] * 2, 6)[0] == found
    monkeypatch.undo()
    monkeypatch.setattr(support, "device_why_not", lambda device: None)
    assert captured(net, PROMPTS) is None
    release(net)
    assert captured(net, PROMPTS) is not None


def test_an_interruption_leaves_nothing_half_read(net, engine, capturing, monkeypatch):
    list(engine.stream(PROMPTS[0], GREEDY, 3))
    run, calls = Rows._call, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return run(self, *arguments)

    longer = [*PROMPTS[0], *range(20, 40)]
    monkeypatch.setattr(decode, "PREFILL", 8)
    monkeypatch.setattr(Rows, "_call", interrupted)
    for at in (1, 2, 3, 5):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            list(engine.stream(longer, GREEDY, 9))
        at = 0
        calls.clear()
        assert list(engine.stream(longer, GREEDY, 9)) == generated(net, longer, 9)
        forget(net)


def test_growing_that_fails_leaves_a_step_that_serves_again(net, engine, capturing, monkeypatch):
    spread, grown = stretches._spread, []

    def full(*arguments):
        if len(grown) == 3:  # in the second layer
            raise torch.OutOfMemoryError("no memory is left")
        grown.append(1)
        return spread(*arguments)

    longer = [*PROMPTS[0], *range(20, 40)]
    list(engine.stream(PROMPTS[0], GREEDY, 3))
    with monkeypatch.context() as changed:
        changed.setattr(stretches, "_spread", full)
        with pytest.raises(torch.OutOfMemoryError):
            list(engine.stream(longer, GREEDY, 9))
    assert in_cache(net).room == 0 and in_cache(net).held == []  # nothing half made counts
    assert list(engine.stream(longer, GREEDY, 9)) == generated(net, longer, 9)
    assert in_cache(net).held[: len(longer)] == longer


@pytest.mark.parametrize("name", ["gpt_neox", "mistral"])
def test_a_computation_that_was_interrupted_between_layers(name):
    """Some layers know a token more than others then; on a CPU, without a captured step."""
    loaded, _ = load(str(model(name)), dtype="float32")
    engine = TorchEngine(loaded, Ids())
    prompt = list(range(3, 20))
    meant = generated(loaded, prompt, 8)
    tokens = engine.stream(prompt, GREEDY, 8)
    assert [next(tokens), next(tokens)] == meant[:2]

    def interrupted(*_):
        raise KeyboardInterrupt

    hook = loaded.base_model.layers[1].register_forward_pre_hook(interrupted)
    with hook, pytest.raises(KeyboardInterrupt):
        next(tokens)
    longer = prompt + meant[:2]
    assert list(engine.stream(longer, GREEDY, 6)) == meant[2:]


# kernels and layers


def test_rotary_functions_that_pair_other_columns_are_left_alone():
    assert _agree(halves, CPU, torch.float32)
    assert not _agree(interleaved, CPU, torch.float32)
    assert not _agree(lambda q, k: (q, k), CPU, torch.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias):
    x, weight = torch.randn(3, 100), torch.randn(100)
    shift = torch.randn(100) if bias else None
    meant = torch.nn.functional.layer_norm(x, (100,), weight, shift, 1e-5)
    assert torch.allclose(small.layer_norm(x, weight, shift, 1e-5), meant, atol=1e-5)


@pytest.mark.parametrize("offset", [True, False])
def test_rms_norm(offset):
    x, weight = torch.randn(2, 3, 100), torch.randn(100)
    meant = torch.nn.functional.rms_norm(x, (100,), weight + offset, 1e-5)
    assert torch.allclose(small.rms_norm(x, weight, 1e-5, offset=offset), meant, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "gemma", "gemma2", "qwen3", "phi3", "olmo2", "cohere", "gpt_neox"]
)
def test_rms_norms_are_told_apart_by_numbers(name):
    """Whatever is answered in place of a module must be what the module says."""
    if name not in tiny.ARCHITECTURES:
        pytest.skip("not among the tiny models")
    loaded, _ = load(str(model(name)), dtype="float32")
    norms = [m for m in loaded.modules() if type(m).__name__.endswith("RMSNorm")]
    found = _rms_norms(loaded)
    assert set(found) == set(norms)
    for module, ours in found.items():
        with torch.no_grad():
            module.weight.normal_()
            x = torch.randn(2, 1, len(module.weight))
            assert torch.allclose(ours(x), module(x), atol=1e-5)


class ThirdRMSNorm(torch.nn.Module):
    """One that neither of the two is."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.randn(8)), 1e-6

    def forward(self, x):
        return functional.rms_norm(x, (8,), self.weight + 0.5, self.eps)


def test_other_norms_are_left_alone():
    third = ThirdRMSNorm()
    assert _rms_norms(third) == {}


@torch.inference_mode()
@pytest.mark.parametrize(
    "compute",
    [
        lambda a, b: a + b,
        lambda a, b: a * b,
        lambda a, b: torch.add(a, b),
        lambda a, b: functional.gelu(a),
        lambda a, b: functional.silu(b),
        lambda a, b: functional.layer_norm(a, (70,), b[0], b[1], 1e-5),
        lambda a, b: functional.linear(a[:1, None], b),
    ],
)
def test_one_launch_instead_of_torch(compute, monkeypatch):
    a, b = torch.randn(20, 70), torch.randn(20, 70)
    meant = compute(a, b)
    monkeypatch.setattr(fused, "_HEAD", 20)
    monkeypatch.setattr(small, "torch", None)  # ours are called, or this would not be noticed
    with pytest.raises(AttributeError), _Ours(CPU):
        compute(a, b)
    monkeypatch.setattr(small, "torch", torch)
    with _Ours(CPU):
        assert torch.allclose(compute(a, b), meant, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    "compute",
    [
        lambda a: a + 1,
        lambda a: a + a[0],
        lambda a: a.T * a.T,
        lambda a: torch.add(a, a, alpha=2),
        lambda a: functional.gelu(a, approximate="tanh"),
        lambda a: a.double() + a.double(),
        lambda a: a.long() + a.long(),
        lambda a: functional.linear(a[:1], a[:10]),
        lambda a: functional.linear(a[:2], a),
        lambda a: functional.linear(a[:1], a, a[:, 0]),
    ],
)
def test_what_does_not_fit_is_left_to_torch(compute, monkeypatch):
    a = torch.randn(20, 70)
    meant = compute(a)
    monkeypatch.setattr(fused, "_HEAD", 20)
    monkeypatch.setattr(small, "torch", None)
    with _Ours(CPU):
        assert torch.equal(compute(a), meant)


def test_a_gpu_layer(monkeypatch):
    """Both ways of a product, and inputs in another order."""
    monkeypatch.setattr(support, "of", lambda device: support.GPU("A100", 8, (8, 0)))
    monkeypatch.setattr("quantkit.runtime.kernels.choose.FEW", 4)
    monkeypatch.setattr(tune, "tuned", lambda weight, ways, *others: ways[0])
    q = random_weight(Scheme(4, 32, symmetric=False), 64, 64, "zero")
    layer = GpuLinear(q, False, CPU, torch.float16)
    for tokens in (3, 5):
        x = torch.randn(2, tokens, 64).half()[:1]
        meant = x.float() @ q.dequantize().T
        assert float((layer(x).float() - meant).norm() / meant.norm()) < 1e-3
    assert torch.equal(layer.weight_as(torch.float32), q.dequantize())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.1},
        {"min_p": 0.2, "temperature": 1.5},
    ],
    ids=str,
)
def test_shares_are_those_of_one_text(settings):
    """Rows of a batch get what ``core.sampling`` gives a single text."""
    from quantkit.core import sampling

    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * 2
    chosen = Sampling(**settings)
    shares, ids = candidates(logits, Limits.of([chosen] * 3, CPU))
    for row in range(3):
        one, one_ids = sampling.candidates(logits[row], chosen)
        meant, found = torch.zeros(40), torch.zeros(40)
        meant[torch.arange(40) if one_ids is None else one_ids] = one
        found[torch.arange(40) if ids is None else ids[row]] = shares[row]
        assert torch.allclose(found / found.sum(), meant / meant.sum(), atol=1e-6)


SETTINGS = [
    Sampling(temperature=0),
    Sampling(seed=1),
    Sampling(seed=2, top_k=5),
    Sampling(seed=3, top_p=0.7, temperature=0.8),
    Sampling(seed=4, min_p=0.2, repetition_penalty=1.5),
    Sampling(temperature=0, repetition_penalty=2.0),
    Sampling(seed=5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=0.8),
    Sampling(seed=6, top_k=1),
]


def test_draw_knows_every_setting():
    """A new one must be known here."""
    known = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
    assert {field.name for field in fields(Sampling)} == known


def test_settings_of_each_text_are_its_own():
    """What is drawn beside others, which come and go, is what is drawn alone."""
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 8, 60, generator=random) * 2

    def prompt(i):
        return range(i, 9 + i)

    def alone(i, steps):
        draw = Draw([SETTINGS[i]], [prompt(i)], CPU)
        return [int(draw(one[None, i])) for one in steps]

    draw, here = (
        Draw([SETTINGS[i] for i in range(4)], [prompt(i) for i in range(4)], CPU),
        [*range(4)],
    )
    found = {i: [] for i in range(8)}
    for step, one in enumerate(logits):
        if step == 3:
            draw.join([SETTINGS[i] for i in range(4, 8)], [prompt(i) for i in range(4, 8)])
            here += range(4, 8)
        if step == 7:
            draw.keep([6, 1, 4, 2])
            here = [6, 1, 4, 2]
        for i, token in zip(here, draw(one[here]).tolist()):
            found[i].append(token)
    for i, tokens in found.items():
        begun = 0 if i < 4 else 3
        assert tokens == alone(i, logits[begun : begun + len(tokens)]), SETTINGS[i]
    assert [len(tokens) for tokens in found.values()] == [7, 12, 12, 7, 9, 4, 9, 4]


def test_logits_are_left_as_they_are():
    """Others still want to know the model's own distribution."""
    logits = torch.randn(2, 30)
    before = logits.clone()
    Draw([SETTINGS[4], SETTINGS[5]], [[3], [4]], CPU)(logits)
    assert torch.equal(logits, before)


def test_draws_follow_the_shares():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(2000, 4)
    drawn = Draw([Sampling(seed=seed) for seed in range(2000)], [[0]] * 2000, CPU)(logits)
    found = torch.bincount(drawn, minlength=4) / 2000
    assert torch.allclose(found, torch.softmax(logits[0], 0), atol=0.04)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_penalties_are_those_of_the_host(penalty):
    settings = Sampling(temperature=0, repetition_penalty=penalty)
    random = torch.Generator().manual_seed(2)
    draw = Draw([settings] * 2, PROMPTS, CPU)
    hosts = [Sampler(settings, prompt) for prompt in PROMPTS]
    for _ in range(30):
        logits = torch.randn(2, 100, generator=random) + 0.5
        assert draw(logits).tolist() == [one.next(row) for one, row in zip(hosts, logits)]


def test_a_seed_gives_the_same_text_alone_and_beside_others(net, engine, capturing):
    settings = [Sampling(seed=seed, temperature=0.9, top_p=0.95) for seed in (7, 8)]
    alone = [list(engine.stream(p, one, 8)) for p, one in zip(PROMPTS, settings)]
    assert alone == [list(engine.stream(p, one, 8)) for p, one in zip(PROMPTS, settings)]
    assert together(engine, PROMPTS, settings, 8) == alone
    assert list(engine.stream(PROMPTS[0], settings[1], 8)) != alone[0]
    several = Sampling(temperature=0.9)
    assert len({tuple(engine.stream(PROMPTS[0], several, 8)) for _ in range(5)}) > 1


def test_texts_with_settings_of_their_own_share_a_step(net, engine, capturing):
    settings = [GREEDY, Sampling(temperature=0, repetition_penalty=1e9)]
    greedy, penal = together(engine, PROMPTS, settings, 10)
    assert greedy == generated(net, PROMPTS[0], 10)
    assert len({*penal, *PROMPTS[1]}) == 10 + len(PROMPTS[1])
    assert in_cache(net).texts == 2


def test_follow_reads_no_step_more_than_asked_for(net, capturing, monkeypatch):
    calls = computed(monkeypatch)
    runner = captured(net, PROMPTS[:1])
    for most in (1, 2, 7):
        forget(net)
        calls.clear()
        assert len(list(follow(runner, PROMPTS[:1], [GREEDY], most))) == most
        assert calls == [6] + [1] * most


def test_an_answer_in_text(capturing):
    loaded, tokenizer = load("demo", dtype="float32")
    engine = TorchEngine(loaded, tokenizer)
    answer = Answer(engine, engine.encode("昔々"), Sampling(seed=3), 12, ("。",))
    text = "".join(answer)
    assert text == "".join(Answer(engine, engine.encode("昔々"), Sampling(seed=3), 12, ("。",)))
    assert "。" not in text and answer.reason in ("stop", "length", "end")
