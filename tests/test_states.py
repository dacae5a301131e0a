"""Models that remember by a state of fixed size, and those that quantkit cannot make remember."""

import json

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.core.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.runtime.load import load
from quantkit.runtime.torch_engine import TorchEngine
from quantkit.workflows.answers import answer_file
from quantkit.workflows.generate import generate

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_a_model_with_a_state_goes_on_from_it(kind):
    engine = TorchEngine(untrained(kind), Ending())
    for prompt in ([3, 9, 27, 4], [3, 9, 5]):
        ids = list(prompt)
        for _ in range(6):  # from the whole text every time
            logits = engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
        assert list(engine.stream(prompt, GREEDY, 6)) == ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["openai-gpt", "rwkv", "xlstm"])
def test_a_model_that_would_forget_the_text_is_refused(kind):
    engine = TorchEngine(untrained(kind), Ending())
    with pytest.raises(QuantkitError, match=f"{kind} models cannot go on"):
        next(engine.stream([3, 9], GREEDY, 2))


class Ending:
    """A tokenizer as far as tokens need one."""

    eos_token_id = None


def untrained(kind: str):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "num_heads": 2}
    if kind == "mamba2":
        sizes |= {"num_heads": 4, "head_dim": 16, "n_groups": 1}
    if kind == "openai-gpt":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    tiny.randomize(net)
    net.generation_config.eos_token_id = None
    return net.requires_grad_(False)


def test_rows_of_a_file_are_answered_one_by_one(tmp_path):
    """Texts cannot share a batch there; the file is answered nevertheless."""
    config = AutoConfig.for_model(
        "lfm2",
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tiny.DEMO_VOCABULARY,
        layer_types=["conv", "full_attention"],
        block_multiple_of=16,
    )
    net = AutoModelForCausalLM.from_config(config)
    source = str(tiny.save(net, tmp_path / "state", tokenizer=True))
    texts, out = ["昔々", "The history of the city"], tmp_path / "answers.jsonl"
    (tmp_path / "questions.txt").write_text("\n".join(texts), "utf-8")
    settings = {"temperature": 0, "max_new_tokens": 4, "dtype": "float32", "chat": False}
    answer_file(source, tmp_path / "questions.txt", out, **settings)
    made = [json.loads(line)["answer"] for line in out.read_text("utf-8").splitlines()]
    assert made == [generate(source, text, **settings).text.strip() for text in texts]
    with pytest.raises(QuantkitError, match="share a batch"):
        next(TorchEngine(*load(source)).batch([[1], [2]], [GREEDY] * 2, 1))
