"""A step for texts that come, go and lie where they like: each goes on as it does alone.

There is no GPU here, so steps are not captured; the kernel that computes their attention there runs
in Triton's interpreter (tests/test_gpu_decode.py has the rest).
"""

import pytest
import tiny
import torch
from tools import model
from transformers import LlamaForCausalLM

from quantkit.runtime import decode
from quantkit.runtime.kernels import attend
from quantkit.runtime.load import load
from quantkit.runtime.rows import NotCaptured, Rows, attempt

PROMPTS = [[5, 17, 3, 90, 41, 8, 23], [60, 2, 33], [9], [*range(3, 15)], [*range(3, 58)]]
SLIDING, EXPERTS = ("mistral", "gemma2", "gemma3_text"), ("mixtral", "qwen3_moe")
# their attention is their own, or does not say where it is
MASKED = ("gptj", "falcon", "falcon_new", "bloom")
# as many heads of keys as of queries, and fewer; wide heads; positions that are added; attention
# with masks
INTERPRETED = ("gpt_neox", "llama", "gemma", "gpt2", *MASKED)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(params=["torch", "kernel"])
def attention(request, monkeypatch):
    """What computes the attention of a step."""
    monkeypatch.setattr(attend, "runs_on", lambda device: request.param == "kernel")
    return request.param


def loaded(name: str):
    return load(str(model(name)), dtype="float32")[0]


def alone(net, prompt: list[int], steps: int) -> list[int]:
    """Greedy tokens, from the whole text every time."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(net(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class Texts:
    """Rows, and what has become of the text in each."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.here = rows, []
        self.made: dict[int, list[int]] = {}

    def join(self, who: list[int], firsts: list[int], piece: int = 99) -> None:
        """Texts that are read together, or in pieces."""
        prompts = [PROMPTS[i] for i in who]
        longest = max(map(len, prompts)) - 1
        for start in range(0, longest, piece):
            self.rows.read([p[:-1][start : start + piece] for p in prompts], start, firsts)
        lengths, last = [len(p) - 1 for p in prompts], [p[-1] for p in prompts]
        self.rows.seat(len(self.here), firsts, lengths, last)
        self.here += who
        self.made |= {i: [] for i in who}

    def keep(self, rows: list[int]) -> None:
        self.rows.keep(rows)
        self.here = [self.here[row] for row in rows]

    def step(self, times: int) -> None:
        for _ in range(times):
            count = len(self.here)
            tokens = self.rows.step(count).argmax(-1)
            self.rows.token[:count] = tokens
            for i, token in zip(self.here, tokens.tolist()):
                self.made[i].append(token)


def rows_of(net, sizes=(1, 2, 4), places=70) -> Rows:
    rows = Rows(net, 4, longest=64, places=places)
    rows.capture(sizes)
    return rows


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name in tiny.ARCHITECTURES
        for attention in ("torch", "kernel")
        if name not in SLIDING + EXPERTS
        # the interpreter takes its time, and the kernel never sees whose queries it is given
        and (attention == "torch" or name in INTERPRETED)
    ],
    indirect=["attention"],
)
def test_texts_come_and_go(name, attention):
    """Two are read together into a used cache, one comes in pieces, the first leaves and another
    takes its row, and a stretch that was used before."""
    net = loaded(name)
    texts = Texts(rows_of(net))
    assert texts.rows.direct == (attention == "kernel" and name not in MASKED)
    for layer in texts.rows.cache.layers:
        layer.keys.fill_(9.0)
        layer.values.fill_(-9.0)
    texts.join([0, 2], [40, 3])
    texts.step(2)
    texts.join([3], [10], piece=5)
    texts.step(3)
    texts.keep([1, 2])
    texts.join([1], [44])
    texts.step(2)
    texts.keep([1])
    texts.step(1)
    assert [len(texts.made[i]) for i in range(4)] == [5, 2, 7, 6]
    for i, made in texts.made.items():
        assert made == alone(net, PROMPTS[i], len(made)), i


def test_a_stretch_is_moved(attention):
    """Also by less than it is long."""
    net = loaded("llama")
    rows = rows_of(net)
    texts = Texts(rows)
    texts.join([0, 3], [5, 30])
    texts.step(2)
    rows.cache.move(30, 26, 13)
    rows.cache.move(5, 50, 8)
    rows.first[:2] = torch.tensor([50, 26])
    texts.step(3)
    for i in (0, 3):
        assert texts.made[i] == alone(net, PROMPTS[i], 5)


def test_nothing_is_written_outside_of_the_stretches(attention):
    """Neither by what texts are filled up with nor by rows that nobody has."""
    net = loaded("gpt_neox")
    texts = Texts(rows_of(net, sizes=(4,)))
    held = [t for layer in texts.rows.cache.layers for t in (layer.keys, layer.values)]
    for one in held:
        one.zero_()
    texts.join([1, 3], [20, 40])
    texts.step(2)
    texts.keep([1])
    texts.step(2)
    written = torch.stack([one.ne(0).any(-1).any(0) for one in held]).any(0)
    assert written.nonzero()[:, 0].tolist() == [*range(20, 24), *range(40, 55), 70]


def test_the_least_size_that_will_do(attention, monkeypatch):
    net = loaded("llama")
    texts = Texts(rows_of(net))
    sizes, advance = [], Rows._advance
    monkeypatch.setattr(Rows, "_advance", lambda s, size: (sizes.append(size), advance(s, size))[1])
    texts.join([0, 1, 2], [0, 20, 30])
    texts.step(1)
    texts.keep([2])
    texts.step(1)
    texts.join([3], [40])
    texts.step(1)
    assert sizes == [4, 1, 2]


def test_a_context_is_filled_to_the_last_token(attention):
    net = loaded("gpt2")  # which has no positions beyond
    texts = Texts(rows_of(net))
    texts.join([4], [6])
    texts.step(10)
    assert texts.made[4] == alone(net, PROMPTS[4], 10)


def test_what_cannot_be_done_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(attend, "runs_on", lambda device: True)
    net = loaded("llama")
    with pytest.raises(NotCaptured, match=r"^out of ink$"), attempt(net):
        rows_of(net)
        assert net.config._attn_implementation == attend.NAME
        raise ValueError("out of ink\nand paper")
    assert net.config._attn_implementation == "sdpa"


def test_attention_that_is_half_the_kernels_is_torchs(monkeypatch):
    """A layer that computes it in its own way would look at all texts at once."""
    monkeypatch.setattr(attend, "runs_on", lambda device: True)
    net = loaded("llama")
    own = net.model.layers[1].self_attn
    monkeypatch.setattr(own, "config", type(net.config)(**net.config.to_dict()))
    own.config._attn_implementation = "sdpa"
    texts = Texts(rows_of(net))
    assert net.config._attn_implementation == attend.NAME and not texts.rows.direct
    texts.join([1, 0], [50, 20])
    texts.step(2)
    assert texts.made == {i: alone(net, PROMPTS[i], 2) for i in (1, 0)}


def test_a_model_that_asks_the_cache_for_positions_is_told_by_it(monkeypatch):
    """What the kernel is told it would not know."""
    monkeypatch.setattr(attend, "runs_on", lambda device: True)

    class Asking(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask, past_key_values, use_cache):
            return super().forward(
                input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache
            )

    net = loaded("llama")
    asking = Asking(net.config).eval()
    asking.load_state_dict(net.state_dict())
    texts = Texts(rows_of(asking, sizes=(1,)))
    assert not texts.rows.direct
    texts.join([0], [30], piece=4)
    texts.step(5)
    assert texts.made[0] == alone(net, PROMPTS[0], 5)


def test_generate_computes_a_batch_with_the_kernel(monkeypatch):
    """Texts side by side, which grow."""
    monkeypatch.setattr(attend, "runs_on", lambda device: True)
    monkeypatch.setattr(decode, "_STEP", 8)
    monkeypatch.setattr(decode, "PREFILL", 4)
    net = loaded("llama")
    step = decode.Captured(net, 3)
    prompts = [list(prompt) for prompt in (PROMPTS[0], PROMPTS[2], PROMPTS[3])]
    logits, made = step.begin(prompts, 2), []
    for _ in range(6):
        made.append(logits.argmax(-1))
        logits = step.step(made[-1])
    assert step._rows.direct and step.room > 16
    found = torch.stack(made, 1).tolist()
    assert found == [alone(net, prompt, 6) for prompt in prompts]
    decode.release(net)
