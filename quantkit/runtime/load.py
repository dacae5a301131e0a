"""The one loader: whatever the checkpoint's format, a real transformers model and its tokenizer."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from quantkit.core.source import Source, resolve
from quantkit.errors import QuantkitError
from quantkit.runtime.activation import scale_activations
from quantkit.runtime.device import pick_device, pick_dtype
from quantkit.runtime.linear import QuantLinear, quantized_linear
from quantkit.runtime.opened import open_checkpoint
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.walk import features

if TYPE_CHECKING:
    from quantkit.runtime.opened import Opened


def load(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    model_basename: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """``demo``, a folder, a .gguf file or a Hub repository -> (model, tokenizer), ready for
    ``generate``.

    Opens full-precision checkpoints and every format of formats/; which one it is, is seen from the
    files. Quantized linears stay quantized in memory. ``model_basename`` names the weight file
    without its ending, where a folder has several. Raises QuantkitError when the model cannot be
    loaded, with the reason.
    """
    on = pick_device(device)
    opened = open_checkpoint(resolve(model, revision, model_basename), model_basename)
    tokenizer = opened.tokenizer()
    return put_together(opened, on, pick_dtype(dtype, on)), tokenizer


def load_model(source: Source, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of ``source`` on ``device``; everything that is not quantized is in ``dtype``."""
    return put_together(open_checkpoint(source), device, dtype)


def put_together(opened: "Opened", device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint that was looked at already."""
    source = opened.source
    described = opened.model_config if opened.format == "gguf" else None
    skeleton = Skeleton(source, opened.dense, device, dtype, described)
    model = skeleton.model
    scale_activations(skeleton, opened)
    for prefix in opened.linears:
        _put_linear(skeleton, opened, prefix)
    if opened.linears:
        model.save_pretrained = _refuse_to_save
    skeleton.fill([name for name, _ in model.named_children()])
    model.tie_weights()
    if (source.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # what follows is for us to know, not transformers
    return model


def _put_linear(skeleton: Skeleton, opened: "Opened", prefix: str) -> None:
    """Replace one linear of the model by a quantized one."""
    name = skeleton.live_name(f"{prefix}.weight").removesuffix(".weight")
    parent, _, leaf = name.rpartition(".")
    try:
        old = skeleton.model.get_submodule(name)
    except AttributeError as error:
        raise QuantkitError(
            f"{skeleton.source.name} has a packed weight {prefix}, and the model no such layer"
        ) from error
    q = opened.qweight(prefix)
    new = quantized_linear(q, old.bias is not None, skeleton.device, skeleton.dtype)
    _check_shape(old, new, prefix)
    setattr(skeleton.model.get_submodule(parent), leaf, new)


def _check_shape(old: nn.Module, new: QuantLinear, prefix: str) -> None:
    found = (new.out_features, new.in_features)
    if features(old) != found:
        raise QuantkitError(
            f"{prefix} is a weight of {found}, the model needs {features(old)}",
            "config.json and the weights do not belong together",
        )


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise QuantkitError(
        "a loaded quantized model is in its running form and cannot be saved from there",
        "copy the folder that it was loaded from",
    )
