"""Texts that grow together are those that grow alone, whenever they join and leave."""

import pytest
import tiny
import torch
from tools import model
from transformers import AutoModelForCausalLM

from quantkit.errors import QuantkitError
from quantkit.runtime.batch import Batch, bytes_per_token, refuse_state

PROMPTS = [[5, 9, 200, 31, 77, 8, 13, 40, 41, 90, 17], [7], [100, 3, 12, 99]]
STEPS = 20  # behind the longest prompt: 31 tokens, beyond the sliding windows of 8


def loaded(name: str):
    return AutoModelForCausalLM.from_pretrained(model(name), dtype=torch.float32).eval()


@torch.no_grad()
def alone(net, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits before each, computed from the whole text every time."""
    ids, seen = list(prompt), []
    for _ in range(steps):
        seen.append(net(torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(seen[-1].argmax()))
    return ids[len(prompt) :], torch.stack(seen)


def read(net, prompts: list[list[int]], piece: int = 512) -> tuple[Batch, torch.Tensor]:
    batch = Batch(net)
    batch.begin(prompts)
    while (logits := batch.read(piece)) is None:
        pass
    return batch, logits


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_rows_that_join_and_leave_are_what_they_are_alone(name):
    net = loaded(name)
    wanted = [alone(net, prompt, STEPS) for prompt in PROMPTS]
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    # 1 runs alone, the longer 0 and 2 join, the longest leaves, 0 goes on in other columns
    batch, logits = read(net, [PROMPTS[1]])
    here = [1]
    for step in range(STEPS):
        if step == 3:
            other, more = read(net, [PROMPTS[0], PROMPTS[2]], piece=3)
            batch.join(other)
            logits, here = torch.cat([logits, more]), [1, 0, 2]
        if step == 9:
            batch.keep([2, 1])
            logits, here = logits[[2, 1]], [2, 0]
        for row, who in enumerate(here):
            seen[who].append(logits[row])
        logits = batch.step([int(row.argmax()) for row in logits])
    for who, logits_of in seen.items():
        found = torch.stack(logits_of)
        assert torch.allclose(found, wanted[who][1][: len(found)], atol=2e-4), name
    assert [len(seen[who]) for who in (0, 1, 2)] == [17, 9, 17]


def test_memory_of_rows_that_left_is_given_back():
    net = loaded("llama")
    batch, _ = read(net, [list(range(1, 41)), [7, 8]])
    assert (batch.rows, batch.columns) == (2, 40)
    batch.keep([1])
    assert (batch.rows, batch.columns) == (1, 2)
    layer = batch._cache.layers[0]
    assert layer.held[0].shape[-2] == layer.keys.shape[-2] == 2
    batch.keep([])
    assert batch.rows == batch.columns == 0


def test_bytes_per_token():
    net = loaded("llama")
    assert (
        bytes_per_token(net) == 3 * 2 * 2 * 16 * 4
    )  # layers, keys and values, heads, width, bytes


def test_a_model_with_a_state_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    net = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32))
    with pytest.raises(QuantkitError, match="state"):
        refuse_state(net)
    for name in ("llama", "gemma2", "mistral"):
        refuse_state(loaded(name))
