"""A transformers model as an engine: prompts in, tokens out, one text or several at once."""

import inspect
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from quantkit.core.prefix import shared
from quantkit.core.sampling import Sampler, Sampling
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime import decode_cpu
from quantkit.runtime.batch import Batch, refuse_state
from quantkit.runtime.decode_cpu import LlamaState
from quantkit.runtime.tokenizer import Tokenizer, end_ids

_PREFILL = 1024  # tokens of a prompt that are computed together
_UNKNOWN = 1 << 20  # tokens of context, where a model does not say


class TorchEngine(Tokenizer):
    """``model`` and ``tokenizer`` as quantkit.load returns them (or transformers)."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.model = model
        self._decoder = Decoder(model)

    @cached_property
    def context(self) -> int:
        """Tokens that fit."""
        config = self.model.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else _UNKNOWN

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return end_ids(self.own_settings, self.tokenizer)

    @property
    def own_settings(self) -> Mapping[str, object]:
        """The model's generation_config.json."""
        found: dict[str, object] = self.model.generation_config.to_dict()
        return found

    def stream(self, ids: Sequence[int], sampling: Sampling, max_new_tokens: int) -> Iterator[int]:
        """Tokens that follow ``ids``, one by one: up to ``max_new_tokens``, up to the end of the
        context, or up to one of ``end_ids``, which is given out too. What ``ids`` begin with like
        the text before is not computed again."""
        sampler = Sampler(sampling, ids, self.model.device)
        logits = self._decoder.begin(list(ids), self.context)
        for count in range(1, max_new_tokens + 1):
            token = sampler.next(logits)
            yield token
            if token in self.end_ids or count == max_new_tokens:
                return
            if len(self._decoder.held) >= self.context:
                return
            logits = self._decoder.extend([token])

    def batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling], max_new_tokens: int
    ) -> Generator[list[tuple[int, int]], Collection[int] | None, None]:
        """Several texts at once: at every step the (index, token) of those that go on. ``send`` the
        indices of texts that shall end, or None. A text ends as in ``stream``. Raises QuantkitError
        for models that take one text at a time (batch.refuse_state)."""
        refuse_state(self.model)
        longest = max(map(len, prompts))
        if longest > self.context:
            raise _too_long(longest, self.context)
        samplers = [Sampler(s, ids, self.model.device) for s, ids in zip(sampling, prompts)]
        alive, batch = list(range(len(prompts))), Batch(self.model)
        batch.begin(prompts)
        while (logits := batch.read(_PREFILL)) is None:
            pass
        for count in range(1, max_new_tokens + 1):
            found = [(i, samplers[i].next(row)) for i, row in zip(alive, logits)]
            ended = set((yield found) or ())
            ended |= {i for i, token in found if token in self.end_ids}
            ended |= {i for i in alive if len(prompts[i]) + count > self.context}
            keep = [row for row, i in enumerate(alive) if i not in ended]
            if count == max_new_tokens or not keep:
                return
            if len(keep) < len(alive):
                batch.keep(keep)
                alive = [alive[row] for row in keep]
            logits = batch.step([found[row][1] for row in keep])


class Decoder:
    """A model with the keys and values of one text.

    held   the tokens of that text
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.held: list[int] = []
        self._model = model
        self._state: LlamaState | CacheState | None = None  # made when it is needed

    @torch.inference_mode()
    def begin(self, ids: list[int], context: int) -> Tensor:
        """Logits [vocab] behind ``ids``. Raises UsageError when they are none or too many."""
        if not ids:
            raise UsageError("there are no tokens to compute")
        if len(ids) > context:
            raise _too_long(len(ids), context)
        if self._state is None:
            fast = decode_cpu.fits(self._model)
            self._state = LlamaState(self._model) if fast else CacheState(self._model)
        keep = shared(self.held, ids[:-1])
        if keep < len(self.held):
            del self.held[self._state.cut(keep) :]
        return self.extend(ids[len(self.held) :])

    @torch.inference_mode()
    def extend(self, ids: list[int]) -> Tensor:
        """Logits [vocab] behind ``ids`` after what is held."""
        assert self._state is not None
        for start in range(0, len(ids), _PREFILL):
            part = ids[start : start + _PREFILL]
            logits = self._state.compute(part)
            self.held += part
        return logits


class CacheState:
    """Any causal LM of transformers that takes a DynamicCache. Raises QuantkitError for others,
    which would answer the last token alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        known = inspect.signature(model.forward).parameters
        self._name = "past_key_values" if "past_key_values" in known else "cache_params"
        states = all(type(layer) is LinearAttentionLayer for layer in self._cache.layers)
        if self._name not in known or (self._name == "cache_params" and not states):
            raise QuantkitError(
                f"{model.config.model_type} models cannot go on from what they have read",
                "quantkit generates with models that take a cache of transformers",
            )

    def cut(self, keep: int) -> int:
        """Forget all but the first ``keep`` tokens -> how many are kept: none, where the state of a
        model cannot be cut (sliding windows, recurrent layers)."""
        plain = all(type(layer) is DynamicLayer for layer in self._cache.layers)
        if keep and plain:
            self._cache.crop(keep - self._cache.get_seq_length())
            return keep
        self._cache = DynamicCache(config=self._model.config)
        return 0

    def compute(self, ids: list[int]) -> Tensor:
        """Logits [vocab] behind ``ids`` after what is held."""
        out = self._model(
            input_ids=torch.tensor([ids], device=self._model.device),
            use_cache=True,
            logits_to_keep=1,
            **{self._name: self._cache},
        )
        logits: Tensor = out.logits[0, -1]
        return logits


def _too_long(tokens: int, context: int) -> UsageError:
    return UsageError(
        f"the prompt has {tokens} tokens, and the model's context {context}", "shorten it"
    )
