"""How long two models write the same, greedily."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# (language, beginning of a text)
PROMPTS = (
    ("en", "In the early morning, the old fisherman"),
    ("en", "The three most important causes of the war were"),
    ("en", "To make good bread at home, you first need"),
    ("ja", "日本で一番高い山は"),
    ("ja", "昔々、ある小さな村に"),
    ("ja", "健康のために毎日続けたいことは、"),
    ("code", "def read_lines(path):\n"),
    ("code", "# compute the average of a list of numbers\ndef average(numbers):\n"),
)
TOKENS = 32
Write = Callable[[list[int]], list[int]]  # the greedy continuation of some tokens


@dataclass(frozen=True)
class Sample:
    """Greedy continuations of one prompt. ``same``: tokens until the first difference, of
    ``tokens`` (the longer of the two)."""

    prompt: str
    language: str
    original: str
    quantized: str
    same: int
    tokens: int


def continued(write: Write, tokenizer: Any) -> list[list[int]]:
    """What is written behind every prompt, in tokens."""
    return [write(tokenizer.encode(prompt)) for _, prompt in PROMPTS]


def compared(original: list[list[int]], quantized: list[list[int]], tokenizer: Any) -> list[Sample]:
    found = []
    for (language, prompt), before, after in zip(PROMPTS, original, quantized):
        same = 0
        while same < min(len(before), len(after)) and before[same] == after[same]:
            same += 1
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, after)]
        longer = max(len(before), len(after))
        found.append(Sample(prompt, language, texts[0], texts[1], same, longer))
    return found


def summary(samples: list[Sample]) -> dict[str, Any] | None:
    """mean: tokens that were the same, over prompts; identical: prompts with no difference."""
    if not samples:
        return None
    return {
        "prompts": len(samples),
        "mean": sum(sample.same for sample in samples) / len(samples),
        "identical": sum(sample.same == sample.tokens for sample in samples),
        "tokens": max(sample.tokens for sample in samples),
    }


def greedy(model: Any, tokenizer: Any) -> Write:
    """How a model of transformers continues tokens."""

    def write(ids: list[int]) -> list[int]:
        given = torch.tensor([ids], device=model.device)
        output = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        found: list[int] = output[0, len(ids) :].tolist()
        return found

    return write
