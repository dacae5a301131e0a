"""The linears of a plain checkpoint: which tensors they are, and which way round they lie."""

from dataclasses import dataclass

import torch
from transformers.pytorch_utils import Conv1D

from quantkit.errors import QuantkitError
from quantkit.runtime.block import features, is_linear
from quantkit.runtime.opened import Opened
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.walk import find_blocks
from quantkit.workflows.layout import refuse_coded, refuse_unpackable


@dataclass(frozen=True)
class Linear:
    """``transposed``: stored as [in, out]."""

    out: int
    width: int
    transposed: bool


def find(opened: Opened) -> tuple[dict[str, Linear], list[str]]:
    """The linears of the decoder blocks by prefix, and tensors that the model has no use for."""
    described = opened.model_config if opened.format == "gguf" else None
    skeleton = Skeleton(opened.source, opened.dense, torch.device("cpu"), torch.float32, described)
    prefix, blocks = find_blocks(skeleton.model)
    refuse_unpackable(prefix, blocks.named_parameters())
    skeleton.check()
    found = {}
    for inner, module in blocks.named_modules():
        if not is_linear(module):
            continue
        name = skeleton.disk_names.get(f"{prefix}.{inner}.weight")
        if name is None:
            raise QuantkitError(
                f"the weight of {prefix}.{inner} is not one tensor in the checkpoint",
                "please report the architecture",
            )
        refuse_coded(name, opened.dense.spec(name).dtype)
        out, width = features(module)
        found[name.removesuffix(".weight")] = Linear(out, width, isinstance(module, Conv1D))
    if not found:
        raise QuantkitError("the model has no linear that could be quantized")
    expected = skeleton.model.state_dict().keys()
    return found, [disk for disk, live in skeleton.live_names.items() if live not in expected]
