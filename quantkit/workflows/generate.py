"""``quantkit generate``: a prompt in, text out as it is made."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from quantkit.core.sampling import chosen
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.load import load
from quantkit.runtime.stream import Streamer


@dataclass(frozen=True)
class Generated:
    """text: what was generated; tokens: how many; seconds: how long it took, prompt included."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float


def generate(
    model: str,
    prompt: str,
    *,
    chat: bool | None = None,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: list[str] | tuple[str, ...] = (),
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    model_basename: str | None = None,
    write: Callable[[str], None] | None = None,
) -> Generated:
    """Continue ``prompt``, or answer it when the model has a chat template (``chat=False``: never,
    ``chat=True``: it must have one).

    Sampling settings that are not given are the model's own; ``temperature=0`` is greedy. ``write``
    receives the text piece by piece.
    """
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    chosen({}, given)  # values out of range are refused before anything is loaded
    if not all(stop):
        raise UsageError("an empty --stop would end every answer at once", "leave it out")
    if max_new_tokens < 1:
        raise UsageError("--max-new-tokens must be at least 1")
    loaded, tokenizer = load(
        model, device=device, dtype=dtype, revision=revision, model_basename=model_basename
    )
    ids = encode_prompt(tokenizer, prompt, chat).to(loaded.device)
    if seed is not None:
        torch.manual_seed(seed)
    settings = chosen(loaded.generation_config.to_dict(), given).arguments()
    if stop:
        settings |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    pieces: list[str] = []

    def passed_on(text: str) -> None:
        pieces.append(text)
        if write is not None:
            write(text)

    started = perf_counter()
    output = loaded.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=Streamer(tokenizer, passed_on),
        pad_token_id=_pad(tokenizer),
        **settings,
    )[0, ids.shape[1] :]
    seconds = perf_counter() - started
    return Generated("".join(pieces), ids.shape[1], len(output), seconds)


def encode_prompt(tokenizer: Any, prompt: str, chat: bool | None) -> torch.Tensor:
    """int64 [1, tokens]. Raises UsageError for an empty prompt, or a chat without a template."""
    if not prompt:
        raise UsageError("the prompt is empty")
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise UsageError(
            "the model has no chat template", "leave out --chat, and write the prompt in its format"
        )
    if has_template and chat is not False:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = tokenizer.encode(prompt)
    if not ids:
        raise QuantkitError("the tokenizer makes no tokens of the prompt")
    return torch.tensor([ids])


def _pad(tokenizer: Any) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
