"""Decoding: the tokens of transformers, one text or several, however the cache is kept."""

import pytest
import torch
from kernels import random_weight
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

from quantkit.core.qweight import Scheme
from quantkit.core.sampling import Sampling
from quantkit.errors import UsageError
from quantkit.runtime import decode as decoding
from quantkit.runtime.decode import NONE, Captured, Plain, decode, why_not
from quantkit.runtime.draw import Draw, candidates
from quantkit.runtime.fused import FixedLayer, _agree, fewer_launches
from quantkit.runtime.gpu_linear import GpuLinear
from quantkit.runtime.kernels import small, support, tune

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 17, 3, 90, 41, 8, 23], [60, 2, 33]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def generated(model, prompt, count):
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("chunk", [1024, 2])
def test_the_same_tokens_as_transformers(model, monkeypatch, chunk):
    monkeypatch.setattr(decoding, "PREFILL", chunk)
    found = list(zip(*decode(model, PROMPTS, GREEDY, 12)))
    assert [list(row) for row in found] == [generated(model, p, 12) for p in PROMPTS]


def test_texts_end_on_their_own(model):
    first, second = (generated(model, prompt, 12) for prompt in PROMPTS)
    stop = next(token for token in first if token not in second)
    end = first.index(stop)
    rows = [list(row) for row in zip(*decode(model, PROMPTS, GREEDY, 12, [stop]))]
    assert rows[0] == first[: end + 1] + [NONE] * (11 - end)
    assert rows[1] == second
    alone = list(decode(model, PROMPTS[:1], GREEDY, 12, [stop]))
    assert alone == [[token] for token in first[: end + 1]]


def test_nothing_to_continue(model):
    with pytest.raises(UsageError, match="no tokens"):
        list(decode(model, [[1], []], GREEDY, 3))
    with pytest.raises(UsageError, match="max-new-tokens"):
        list(decode(model, [[1]], GREEDY, 0))


class OnCpu(Captured):
    """A captured step without the capture: its cache, its buffers and its kernels."""

    def __init__(self, model, texts, room):
        Plain.__init__(self, model, StaticCache(config=model.config, max_cache_len=room))
        self.length = torch.zeros((), dtype=torch.long)
        self.cache.layers = [FixedLayer(max_cache_len=room) for _ in self.cache.layers]
        for layer in self.cache.layers:
            layer.cumulative_length = self.length
        self.mask = torch.ones(texts, room, dtype=torch.bool)
        self.places = torch.zeros(texts, 1, dtype=torch.long)

    def step(self, token):
        logits = self._logits(token[:, None], self.places, self.mask)
        self.places += 1
        return logits


@torch.inference_mode()
def test_a_fixed_cache_with_fused_kernels(model, monkeypatch):
    """Prompts of different lengths, in pieces; then other ones in the same cache."""
    monkeypatch.setattr(decoding, "PREFILL", 4)
    used = []
    for name in ("rotary", "keep"):
        real = getattr(small, name)
        monkeypatch.setattr(
            small, name, lambda *args, n=name, f=real: (used.append(n), f(*args))[1]
        )
    fixed = OnCpu(model, 2, 32)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        plain = Plain(model, DynamicCache(config=model.config))
        with fewer_launches(model):
            meant, found = plain.begin(prompts), fixed.begin(prompts)
            assert torch.allclose(found, meant, atol=1e-4)
            for _ in range(3):
                token = meant.argmax(-1)
                meant, found = plain.step(token), fixed.step(token)
                assert torch.allclose(found, meant, atol=1e-4)
    assert {"rotary", "keep"} <= set(used)


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


def test_caches_that_cannot_be_fixed_are_named(model):
    assert why_not(model) is None
    config = LlamaConfig(num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    config.sliding_window = 8

    class Sliding:
        pass

    sliding = Sliding()
    sliding.config = config
    assert "Sliding" in why_not(sliding)


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
    shares, ids = candidates(logits, chosen)
    for row in range(3):
        one, one_ids = sampling.candidates(logits[row], chosen)
        meant, found = torch.zeros(40), torch.zeros(40)
        meant[torch.arange(40) if one_ids is None else one_ids] = one
        found[torch.arange(40) if ids is None else ids[row]] = shares[row]
        assert torch.allclose(found / found.sum(), meant / meant.sum(), atol=1e-6)


def test_draws_follow_the_shares():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(4000, 4)
    drawn = Draw(Sampling(seed=3), [[0]] * 4000, 4, CPU)(logits)
    found = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(found, torch.softmax(logits[0], 0), atol=0.03)


def test_a_seed_gives_the_same_text_and_penalties_count(model):
    settings = Sampling(seed=7, temperature=0.9, top_p=0.95)
    first = list(decode(model, PROMPTS, settings, 8))
    assert first == list(decode(model, PROMPTS, settings, 8))
    assert first != list(decode(model, PROMPTS, Sampling(seed=8), 8))
    penal = Sampling(temperature=0, repetition_penalty=1e9)
    found = [step[0] for step in decode(model, PROMPTS[:1], penal, 20)]
    assert len(set(found + PROMPTS[0])) == 20 + len(PROMPTS[0])
