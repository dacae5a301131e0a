"""Activation functions whose output AWQ divides by a tensor of the checkpoint.

AutoAWQ scales what GELU gives to the MLP's second linear in GPT-NeoX and a few others, where there
is no linear in front that could take the scale up. transformers runs such a model as
``act(x) / scales``, and so does this. quantkit itself writes scales of ones, which readers ask for.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from quantkit.errors import QuantkitError
from quantkit.formats import awq
from quantkit.runtime.skeleton import Skeleton

if TYPE_CHECKING:
    from quantkit.runtime.opened import Opened


class ScaledActivation(nn.Module):
    """act(x) / scales, scales [features]."""

    def __init__(self, act: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(x) / self.scales
        return result


def scale_activations(skeleton: Skeleton, opened: "Opened") -> None:
    """Put the checkpoint's scales behind the model's activation functions. Raises QuantkitError for
    scales of something that the model does not have."""
    for name in awq.activation_scale_names(opened.dense):
        scales = opened.dense.get(name)
        if bool((scales == 1).all()):
            continue
        parent, _, leaf = skeleton.live_name(name).removesuffix(".scales").rpartition(".")
        try:
            module = skeleton.model.get_submodule(parent)
            act = module.get_submodule(leaf)
        except AttributeError as error:
            raise QuantkitError(
                f"{opened.source.name} has {name}, and the model no such activation"
            ) from error
        setattr(module, leaf, ScaledActivation(act, scales.to(skeleton.device, skeleton.dtype)))
