"""quantkit: quantize a language model, prove that it is still good, and run it.

    import quantkit
    quantkit.quantize("demo", out="demo-gptq", bits=4, group=128)
    model, tokenizer = quantkit.load("demo-gptq")

Everything is imported when it is first used: ``import quantkit`` alone is instant.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quantkit.runtime.load import load
    from quantkit.workflows.awq import awq
    from quantkit.workflows.convert import convert
    from quantkit.workflows.generate import generate
    from quantkit.workflows.inspect import inspect
    from quantkit.workflows.quantize import quantize
    from quantkit.workflows.verify import verify

_HOMES = {
    "load": "quantkit.runtime.load",
    "awq": "quantkit.workflows.awq",
    "convert": "quantkit.workflows.convert",
    "quantize": "quantkit.workflows.quantize",
    "verify": "quantkit.workflows.verify",
    "generate": "quantkit.workflows.generate",
    "inspect": "quantkit.workflows.inspect",
}
__all__ = ["awq", "convert", "generate", "inspect", "load", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantkit' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
