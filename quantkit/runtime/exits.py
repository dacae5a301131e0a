"""Ways out of a block: modules that return what a linear inside of them puts out, as it is.

Once a block's last linears are the only ones that changed, all that leads to their inputs would be
computed again as it was. With those inputs kept, such a module's result is one product:

    attention                      output projection          (kept input)
      query, key, value, softmax     -> projection -> return     -> projection -> return
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Exit:
    """``module``, inside of the block, returns a linear's output: alone (``count`` 0), or as the
    first of so many values, of which the others are None."""

    module: str
    count: int

    def returned(self, output: Tensor) -> Any:
        """What the module returns with that output."""
        return (output, *[None] * (self.count - 1)) if self.count else output


@contextmanager
def watched(block: nn.Module, linears: Iterable[str]) -> Iterator[dict[str, Exit]]:
    """While open, note for each of these linears the outermost module that returns what it puts
    out; it is there when the block has run."""
    found: dict[str, Exit] = {}
    outputs: dict[str, Tensor] = {}

    def put(name: str, output: Tensor) -> None:
        outputs[name] = output

    def see(name: str, module: str, result: Any) -> None:
        count = len(result) if type(result) is tuple else 0
        first, *others = result if count else (result,)
        if first is outputs.get(name) and all(other is None for other in others):
            found[name] = Exit(module, count)  # inner modules return before outer ones

    handles = []
    for name in linears:
        handles.append(
            block.get_submodule(name).register_forward_hook(
                lambda _, args, result, name=name: put(name, result)
            )
        )
        parts = name.split(".")[:-1]
        for end in range(len(parts)):
            inside = ".".join(parts[: end + 1])
            handles.append(
                block.get_submodule(inside).register_forward_hook(
                    lambda _, args, result, name=name, inside=inside: see(name, inside, result)
                )
            )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def shortened(block: nn.Module, kept: Mapping[str, tuple[Exit, Tensor]]) -> Iterator[None]:
    """While open, modules return at once what their linear makes of the input that was kept for
    it."""
    modules = []
    for name, (way, x) in kept.items():
        module, linear = block.get_submodule(way.module), block.get_submodule(name)

        def forward(
            *_: Any, way: Exit = way, x: Tensor = x, linear: Any = linear, **__: Any
        ) -> Any:
            return way.returned(linear(x))

        module.forward = forward
        modules.append(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
