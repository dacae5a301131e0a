"""A model's shapes, found by running it without numbers: what core/footprint.py needs to know.

Nothing but config.json is needed. What surrounds the decoder blocks runs on zeros that take no
memory and records how blocks are called; each block then runs on torch's ``meta`` device, where
tensors have shapes and no data. Linears whose inputs are one and the same object share it, and the
storage that is alive at any moment is counted, so that no architecture has to be known by name.
"""

import weakref
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantkit.core.footprint import Block, Group, Shapes
from quantkit.errors import QuantkitError
from quantkit.runtime import exits
from quantkit.runtime.block import features, is_linear
from quantkit.runtime.experts import routed
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.walk import find_blocks, find_head

_TOKENS = 64  # in the row that is run; working memory is proportional to them
_ATTENTION = "quantkit_outline"


class _Stop(Exception):
    """Every block has been called."""


def outlined(skeleton: Skeleton) -> Shapes:
    """The shapes of a model; the skeleton stays as it is. A block that cannot be run without
    numbers is guessed at: each of its linears has an input of its own. Raises QuantkitError when
    the forward pass does not go through the decoder blocks."""
    model = deepcopy(skeleton.model)
    text = skeleton.config.get_text_config()
    if model.config._attn_implementation == "sdpa":
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, _no_mask)
        model.set_attn_implementation(_ATTENTION)
    prefix, blocks = find_blocks(model)
    inside = {id(parameter) for parameter in blocks.parameters()}
    outside = {id(p): p.numel() for p in model.parameters() if id(p) not in inside}
    known: dict[tuple[Any, ...], Block] = {}
    kinds: list[tuple[Any, ...]] = []
    exact = True
    with torch.no_grad():
        for block, call in zip(blocks, _calls(model, prefix, blocks)):
            kinds.append(tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
            if kinds[-1] not in known:
                try:
                    known[kinds[-1]] = _outlined(block, *call, text.hidden_size)
                except (RuntimeError, TypeError, ValueError):
                    known[kinds[-1]], exact = _guessed(block, text.hidden_size), False
    keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        hidden=text.hidden_size,
        vocabulary=features(find_head(model)[1])[0],
        outside=sum(outside.values()),
        tied=bool(model.all_tied_weights_keys),
        cache=2 * keys * width,
        blocks=tuple(known[kind] for kind in kinds),
        exact=exact,
    )


def _calls(model: PreTrainedModel, prefix: str, blocks: nn.ModuleList) -> list[tuple[Any, Any]]:
    """What each block is called with, its hidden states included, all on ``meta``."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not name.startswith(f"{prefix}."):
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[key] = nn.Parameter(zeros, requires_grad=False)
    found: list[tuple[Any, Any]] = []

    def recorder(*args: Any, **kwargs: Any) -> Any:
        found.append(tree_map(_on_meta, (args, kwargs)))
        if len(found) == len(blocks):
            raise _Stop
        return args[0] if args else kwargs["hidden_states"]

    for block in blocks:
        block.forward = recorder
    try:
        model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False)
    except _Stop:
        return found
    finally:
        for block in blocks:
            del block.forward
    raise QuantkitError("the model's forward pass does not go through its decoder blocks")


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _outlined(block: nn.Module, args: Any, kwargs: Any, hidden: int) -> Block:
    block = block.to("meta")
    linears = {name: m for name, m in block.named_modules() if is_linear(m)}
    inputs: list[Tensor] = []
    members: list[list[str]] = []

    def note(name: str, x: Tensor) -> None:
        for known, names in zip(inputs, members):
            if known is x:
                names.append(name)
                return
        inputs.append(x)
        members.append([name])

    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))
        for name, module in linears.items()
    ]
    with exits.watched(block, linears) as ways:
        block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    experts = routed(block)
    groups = [
        Group(
            tuple(names),
            features(linears[names[0]])[1],
            tuple(features(linears[name])[0] for name in names),
            writes=len(names) == 1
            and names[0] not in experts
            and features(linears[names[0]])[0] == hidden,
            share=min(1.0, x.numel() / x.shape[-1] / _TOKENS),
        )
        for names, x in zip(members, inputs)
    ]
    writers = {group.names[0] for group in groups if group.writes}
    first = writers & ways.keys() - _reached(block, args, kwargs, writers)
    groups = [replace(group, keepable=group.names[0] in first) for group in groups]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    alive = _Alive([*block.parameters(), *block.buffers(), *given])
    with alive:
        block(*args, **kwargs)
    numbers = sum(parameter.numel() for parameter in block.parameters())
    return Block(numbers, tuple(groups), alive.most / _TOKENS / inputs[0].dtype.itemsize)


def _guessed(block: nn.Module, hidden: int) -> Block:
    """At most what it takes, about: no input is shared, and every output stays."""
    sizes = {name: features(m) for name, m in block.named_modules() if is_linear(m)}
    groups = [
        Group((name,), width, (out,), writes=out == hidden, keepable=out == hidden)
        for name, (out, width) in sizes.items()
    ]
    working = sum(out for out, _ in sizes.values()) + 4 * hidden
    return Block(sum(p.numel() for p in block.parameters()), tuple(groups), working)


def _reached(block: nn.Module, args: Any, kwargs: Any, writers: set[str]) -> set[str]:
    """Those of these linears into whose inputs outputs of others of them come."""
    found: set[str] = set()
    made = _Made()

    def look(name: str, x: Tensor) -> None:
        if made.of(x) - {name}:
            found.add(name)

    handles = []
    for name in writers:
        module = block.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0])),
            module.register_forward_hook(lambda _, given, out, name=name: made.mark(out, name)),
        ]
    with made:
        block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


class _Made(TorchDispatchMode):
    """Follows marks of tensors to all that is made of them while this is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marks: dict[int, set[str]] = {}
        self._held: list[Any] = []  # so that no other takes the place of a storage

    def of(self, tensor: Tensor) -> set[str]:
        return self._marks.get(tensor.untyped_storage()._cdata, set())

    def mark(self, tensor: Tensor, *marks: str) -> None:
        storage = tensor.untyped_storage()
        self._held.append(storage)
        self._marks.setdefault(storage._cdata, set()).update(marks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        marks = set[str]().union(*map(self.of, given))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.mark(tensor, *marks)
        return result


class _Alive(TorchDispatchMode):
    """``most``: bytes of tensors beside ``given`` that were alive at once while this was open."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held.keys() | self._given:
                    self._held[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._held.pop, storage._cdata)
        self.most = max(self.most, sum(self._held.values()))
        return result


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface, in the memory of a kernel that keeps no scores."""
    rows, heads, tokens = query.shape[:3]
    return value.new_empty(rows, tokens, heads, value.shape[-1]), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None
