"""The one loader: whatever the checkpoint's format, a real transformers model and its tokenizer."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from quantkit.core.source import Source, resolve
from quantkit.errors import QuantkitError
from quantkit.runtime.device import pick_device, pick_dtype
from quantkit.runtime.opened import open_checkpoint
from quantkit.runtime.quant_skeleton import QuantSkeleton

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
    # transformers' own experts are faster, where nothing in them is packed
    skeleton = QuantSkeleton(opened, device, dtype, apart=bool(opened.linears))
    model = skeleton.model
    if opened.linears:
        model.save_pretrained = _refuse_to_save
    skeleton.fill([name for name, _ in model.named_children()])
    model.tie_weights()
    if (source.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # what follows is for us to know, not transformers
    return model


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise QuantkitError(
        "a loaded quantized model is in its running form and cannot be saved from there",
        "copy the folder that it was loaded from",
    )
