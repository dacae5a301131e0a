"""Keys and values of several texts in tensors of fixed size, which a captured step needs.

    of each layer    keys, values  [heads, places, width]

A text has a stretch of places, wherever that begins: texts of all lengths share the memory, and
none has to move when another one comes or goes. The last place is nobody's; what is computed for no
text is written there.

Two things are done with the cache. Some more tokens of texts are read, and look at what their text
has before them. Or every text gets one more token; whoever computes its attention knows the
stretches (kernels/attend.py), or is shown what each text has in a tensor of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from quantkit.runtime.kernels import small

Pair = tuple[Tensor, Tensor]  # of keys and values


class Doing(Protocol):
    """What is done with the cache.

    before   tokens before the new ones, as a model may ask the cache
    visible  places of a text that are shown to attention
    """

    @property
    def before(self) -> int | Tensor: ...
    @property
    def visible(self) -> int: ...

    def update(self, held: Pair, new: Pair) -> Pair:
        """Put ``new`` [texts, heads, tokens, width] into ``held`` [heads, places, width] -> what
        attention is shown, [texts, heads, visible, width]."""


@dataclass(frozen=True)
class Reading:
    """``tokens`` of each text are read, from its ``before``-th on, and go to the places ``at``,
    int64 [texts * tokens]. Where something is before them, the stretches of the texts lie side by
    side, ``room`` places each and the first one at ``first``; that of a single text always does."""

    at: Tensor
    before: int
    tokens: int
    first: int
    room: int

    @property
    def visible(self) -> int:
        return self.before + self.tokens

    def update(self, held: Pair, new: Pair) -> Pair:
        for one, more in zip(held, new):
            one.index_copy_(1, self.at, more.transpose(0, 1).flatten(1, 2))
        if self.before == 0:
            return new
        keys, values = (beside(t, self.first, len(new[0]), self.room) for t in held)
        return keys[:, :, : self.visible], values[:, :, : self.visible]


@dataclass(frozen=True)
class Stepping:
    """One token of each text is computed, and goes to its place in ``at``, int64 [texts]. ``show``
    makes of a tensor [heads, places, width] what attention is shown."""

    at: Tensor
    before: Tensor
    visible: int
    show: Callable[[Tensor], Tensor]

    def update(self, held: Pair, new: Pair) -> Pair:
        # a stride of the last dimension would be lost on the kernel
        key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in new)
        small.keep(key, value, *held, self.at)
        return self.show(held[0]), self.show(held[1])


def beside(held: Tensor, first: int, texts: int, room: int) -> Tensor:
    """[texts, heads, room, width] of [heads, places, width]: stretches that lie side by side."""
    some: Tensor = held[:, first : first + texts * room].unflatten(1, (texts, room))
    return some.transpose(0, 1)


class Stretches(Cache):  # type: ignore[misc]
    """The cache of ``model`` with ``places`` places, and the one that is nobody's. The memory is
    taken when something is computed first."""

    def __init__(self, model: PreTrainedModel, places: int) -> None:
        self.places = places
        self._now = _Now()
        count = len(DynamicCache(config=model.config).layers)
        super().__init__(layers=[_Layer(self._now, places) for _ in range(count)])

    @contextmanager
    def during(self, doing: Doing) -> Iterator[None]:
        self._now.doing = doing
        try:
            yield
        finally:
            self._now.doing = None

    @property
    def heads(self) -> int:
        """Of keys in a layer, at most."""
        return max(len(layer.keys) for layer in self.layers)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in (layer.keys, layer.values))

    def move(self, first: int, to: int, count: int) -> None:
        """``count`` places from ``first`` on go to ``to``; the stretches may overlap."""
        for layer in self.layers:
            for held in (layer.keys, layer.values):
                held[:, to : to + count] = held[:, first : first + count].clone()

    def spread(self, texts: int, room: int, wider: int, used: int) -> None:
        """Have ``wider`` places for each of ``texts`` that lie side by side with ``room`` places
        each, of which the first ``used`` stay."""
        self.places = texts * wider
        for layer in self.layers:
            layer.max_cache_len = self.places
            if layer.is_initialized:
                for name in ("keys", "values"):
                    setattr(layer, name, _spread(getattr(layer, name), texts, room, wider, used))


class _Now:
    """What is done at present, for all layers."""

    doing: Doing | None = None


class _Layer(StaticLayer):  # type: ignore[misc]
    """One layer, of the kind that transformers takes for a cache of fixed size."""

    def __init__(self, now: _Now, places: int) -> None:
        super().__init__(max_cache_len=places)
        self._now = now

    @property
    def _doing(self) -> Doing:
        assert self._now.doing is not None, "nobody said what is computed"
        return self._now.doing

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._empty(t) for t in (key_states, value_states))
        self.is_initialized = True

    def _empty(self, like: Tensor) -> Tensor:
        # no NaN may lie where a mask leaves out what is looked at
        return like.new_zeros(like.shape[1], self.max_cache_len + 1, like.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Pair:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._doing.update((self.keys, self.values), (key_states, value_states))

    def get_seq_length(self) -> int | Tensor:
        return self._doing.before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._doing.visible, 0

    def reset(self) -> None:
        """What is there is left out until it is written again."""


def _spread(old: Tensor, texts: int, room: int, wider: int, used: int) -> Tensor:
    new = old.new_zeros(len(old), texts * wider + 1, old.shape[-1])
    beside(new, 0, texts, wider)[:, :, :used] = beside(old, 0, texts, room)[:, :, :used]
    return new
