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
from quantkit.runtime import decode, decode_cpu
from quantkit.runtime.batch import Batch, refuse_state
from quantkit.runtime.decode_cpu import LlamaState
from quantkit.runtime.follow import follow
from quantkit.runtime.tokenizer import Tokenizer, end_ids


class TorchEngine(Tokenizer):
    """``model`` and ``tokenizer`` as quantkit.load returns them (or transformers)."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.model = model
        self._decoder = Decoder(model)
        decode.forget(model)  # the weights may have changed since another engine read a text

    @cached_property
    def context(self) -> int:
        """Tokens that fit."""
        return decode.context(self.model)

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
        the text before is not computed again. Raises UsageError when they are none or too many."""
        most = min(max_new_tokens, self._room([ids]))
        runner = decode.captured(self.model, [ids], most) or self._decoder
        for (token,) in follow(runner, [ids], [sampling], most):
            yield token
            if token in self.end_ids:
                return

    def batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling], max_new_tokens: int
    ) -> Generator[list[tuple[int, int]], Collection[int] | None, None]:
        """Several texts at once: at every step the (index, token) of those that go on. ``send`` the
        indices of texts that shall end, or None. A text ends as in ``stream``. Raises QuantkitError
        for models that take one text at a time (batch.refuse_state)."""
        refuse_state(self.model)
        most = min(max_new_tokens, self._room(prompts))
        runner = decode.captured(self.model, prompts, most)
        steps = (
            _leaving(self.model, prompts, sampling)
            if runner is None
            else follow(runner, prompts, sampling, most)
        )
        going = list(range(len(prompts)))
        tokens = next(steps)
        for count in range(1, most + 1):
            found = [(i, tokens[i]) for i in going]
            ended = set((yield found) or ())
            ended |= {i for i, token in found if token in self.end_ids}
            ended |= {i for i in going if len(prompts[i]) + count > self.context}
            going = [i for i in going if i not in ended]
            if count == most or not going:
                return
            tokens = steps.send(going)

    def _room(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens that can follow the shortest of the prompts: one more than fit, which nothing is
        computed behind."""
        if not all(prompts):
            raise UsageError("there are no tokens to compute")
        longest = max(map(len, prompts))
        if longest > self.context:
            raise UsageError(
                f"the prompt has {longest} tokens, and the model's context {self.context}",
                "shorten it",
            )
        return self.context - min(map(len, prompts)) + 1


def _leaving(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]
) -> Generator[list[int], Sequence[int], None]:
    """Tokens that follow each of the prompts, step after step; send the indices of the texts that
    go on. The others leave the batch, and nothing more is computed for them."""
    samplers = [Sampler(s, ids, model.device) for s, ids in zip(sampling, prompts)]
    going: Sequence[int] = range(len(prompts))
    tokens, batch = [0] * len(prompts), Batch(model)
    batch.begin(prompts)
    while (logits := batch.read(decode.PREFILL)) is None:
        pass
    while True:
        for i, row in zip(going, logits):
            tokens[i] = samplers[i].next(row)
        stay = yield tokens
        if len(stay) < len(going):
            batch.keep([row for row, i in enumerate(going) if i in stay])
        going = stay
        logits = batch.step([tokens[i] for i in going])


class Decoder:
    """A model that is called for every token of a text (a follow.Runner)."""

    ahead = 0

    def __init__(self, model: PreTrainedModel) -> None:
        self.turn = 0
        self._model = model
        self._text: list[int] = []
        self._length = 0  # tokens of it that are computed
        self._state: LlamaState | CacheState | None = None  # made when it is needed

    @property
    def held(self) -> list[int]:
        """The tokens whose keys and values are there."""
        return self._text[: self._length]

    @torch.inference_mode()
    def begin(self, texts: Sequence[list[int]], more: int = 0) -> Tensor:
        (text,) = texts
        if self._state is None:
            fast = decode_cpu.fits(self._model)
            self._state = LlamaState(self._model) if fast else CacheState(self._model)
        keep = shared(self.held, text[:-1])
        self.turn += 1
        self._text, self._length = text, 0
        self._length = self._state.cut(keep)
        return self.extend(text[self._length :])

    def step(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens.tolist())

    @torch.inference_mode()
    def extend(self, ids: list[int]) -> Tensor:
        """Logits [1, vocab] behind ``ids`` after what is held."""
        assert self._state is not None
        for start in range(0, len(ids), decode.PREFILL):
            part = ids[start : start + decode.PREFILL]
            logits = self._state.compute(part)
            self._length += len(part)
        return logits[None]


class CacheState:
    """Any causal LM of transformers that takes a DynamicCache. Raises QuantkitError for others,
    which would answer the last token alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._length = 0
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
        if keep == self._length:
            return keep
        layers = self._cache.layers
        if keep and all(type(layer) is DynamicLayer for layer in layers):
            for layer in layers:  # each by itself: a computation may have been interrupted
                if layer.get_seq_length() > keep:
                    layer.crop(keep - layer.get_seq_length())
            self._length = keep
        else:
            self._cache, self._length = DynamicCache(config=self._model.config), 0
        return self._length

    def compute(self, ids: list[int]) -> Tensor:
        """Logits [vocab] behind ``ids`` after what is held."""
        before = self._length
        self._length = -1  # what is interrupted in the middle counts for nothing
        out = self._model(
            input_ids=torch.tensor([ids], device=self._model.device),
            use_cache=True,
            logits_to_keep=1,
            **{self._name: self._cache},
        )
        self._length = before + len(ids)
        logits: Tensor = out.logits[0, -1]
        return logits
