"""How much memory a whole model takes while it is measured, or writes: see core/footprint.py."""

from dataclasses import dataclass

from quantkit.core import footprint
from quantkit.core.footprint import Phase, Shapes

_UNPACKED = 9  # bytes a weight while QuantLinear turns codes into numbers: uint8, float32 twice


@dataclass(frozen=True)
class Loaded:
    """A model in memory as runtime/load.py has it.

    weights   bytes of all parameters and buffers
    mapped    those that are pages of files on a CPU
    largest   weights of the largest quantized linear, 0 where there are none
    """

    weights: int
    mapped: int
    largest: int
    item: int
    cuda: bool


def verifying(shapes: Shapes, model: Loaded, rows: int, row: int) -> list[Phase]:
    """Measuring ``model`` against its original on ``rows`` rows of ``row`` tokens
    (workflows/verify.py): of both, one block at a time, its weights multiplied out."""
    states = 2 * rows * row * shapes.hidden * model.item
    block = max(block.numbers for block in shapes.blocks)
    outs = max(sum(group.outs) for kind in shapes.blocks for group in kind.groups)
    layer = {"a block of each": 2 * block * model.item, "outputs compared": 24 * row * outs}
    embedding = 0 if model.mapped else shapes.embedding * model.item  # a page for each token
    head = {
        "embedding and head of each": 2
        * (embedding + shapes.hidden * shapes.vocabulary * model.item),
        "logits": footprint.logits(shapes, row, model.item),
    }
    return [
        _running(shapes, model, name, row, {"activations of both": states, **parts})
        for name, parts in (("layers", layer), ("predictions", head))
    ]


def generating(shapes: Shapes, model: Loaded, context: int, sequences: int = 1) -> list[Phase]:
    """``sequences`` texts of ``context`` tokens, prompt included, at once; the whole context may be
    the prompt."""
    cache = sequences * context * shapes.cache * len(shapes.blocks) * model.item
    whole = {"model": model.weights - (0 if model.cuda else model.mapped)}
    parts = whole | {"keys and values": cache}
    return [_running(shapes, model, "prompt", context, parts)]


def _running(shapes: Shapes, model: Loaded, name: str, tokens: int, parts: dict[str, int]) -> Phase:
    """``parts``, and what else is there while ``tokens`` tokens go through a block."""
    working = max(block.working for block in shapes.blocks)
    parts = {
        **parts,
        "micro-batch": int(tokens * (working + shapes.hidden) * model.item),
    }
    if model.largest:
        # a CPU turns few rows into numbers at a time
        extra = _UNPACKED if model.cuda else 0
        parts["unpacked weight"] = model.largest * (model.item + extra)
    if not model.cuda:
        return Phase(name, {}, {"program": footprint.PROCESS, **parts})
    parts["pieces between tensors"] = int(footprint.FRAGMENTS * sum(parts.values()))
    ram = {
        "program": footprint.PROCESS + footprint.CUDA_RAM,
        "weights on their way": model.largest * model.item,
    }
    return Phase(name, {"CUDA": footprint.CUDA_CONTEXT, **parts}, ram)
