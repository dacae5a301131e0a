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
    from quantkit.workflows.awq import quantize_awq
    from quantkit.workflows.bnb import quantize_bnb
    from quantkit.workflows.compare import compare
    from quantkit.workflows.convert import convert
    from quantkit.workflows.evaluate import evaluate
    from quantkit.workflows.generate import generate, stream_generate
    from quantkit.workflows.gguf import quantize_gguf
    from quantkit.workflows.inspect import inspect
    from quantkit.workflows.push import push
    from quantkit.workflows.quantize import quantize
    from quantkit.workflows.rtn import quantize_rtn
    from quantkit.workflows.verify import verify

_HOMES = {
    "load": "quantkit.runtime.load",
    "compare": "quantkit.workflows.compare",
    "convert": "quantkit.workflows.convert",
    "push": "quantkit.workflows.push",
    "quantize": "quantkit.workflows.quantize",
    "quantize_awq": "quantkit.workflows.awq",
    "quantize_bnb": "quantkit.workflows.bnb",
    "quantize_gguf": "quantkit.workflows.gguf",
    "quantize_rtn": "quantkit.workflows.rtn",
    "verify": "quantkit.workflows.verify",
    "evaluate": "quantkit.workflows.evaluate",
    "generate": "quantkit.workflows.generate",
    "stream_generate": "quantkit.workflows.generate",
    "inspect": "quantkit.workflows.inspect",
}
__all__ = [
    "compare",
    "convert",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "push",
    "quantize",
    "quantize_awq",
    "quantize_bnb",
    "quantize_gguf",
    "quantize_rtn",
    "stream_generate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantkit' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
