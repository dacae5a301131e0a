"""A transformers model without weights, and the way weights get in and out of its parts.

The model is built with every parameter on the ``meta`` device; parts of it are filled by name from
a checkpoint when they are needed and emptied again. Names on disk and names in memory differ for
some architectures (GPT-NeoX calls its head ``embed_out`` on disk, ``lm_head`` in memory; some
experts are apart on disk and fused in memory): transformers' own conversion tables are used for
that, and nothing else.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from quantkit.core import hub, pinned
from quantkit.core.source import Source
from quantkit.errors import QuantkitError
from quantkit.formats import Tensors
from quantkit.runtime.experts import take_apart

# what transformers raises over values that no model has
_NONSENSE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_config(source: Source, described: dict[str, Any] | None = None) -> PretrainedConfig:
    """The model's configuration, from config.json or, if it is given, from ``described``. Raises
    QuantkitError when there is none, when it needs code from the repository, or when the model is
    not a causal LM that transformers knows."""
    raw = source.read_json("config.json") if described is None else described
    if raw is None:
        raise QuantkitError(
            f"{source.name} has no config.json", "is this the folder of a transformers model?"
        )
    if raw.get("auto_map"):
        raise QuantkitError(
            f"{source.name} needs Python code from its repository, which quantkit does not run",
            "use a version of the model that transformers supports by itself",
        )
    kind = raw.get("model_type")
    architectures = raw.get("architectures") or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if (
        not isinstance(kind, str | None)
        or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or (architectures and not known.intersection(architectures))
    ):
        what = architectures[0] if architectures else f"model_type {kind!r}"
        raise QuantkitError(
            f"{source.name} is not a causal language model that transformers knows ({what})",
            "quantkit works on AutoModelForCausalLM architectures",
        )
    try:
        if described is not None:
            return AutoConfig.for_model(**described)
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (*_NONSENSE, hub.unsound()) as error:
        raise _unusable(source, error) from error


def _unusable(source: Source, error: Exception) -> QuantkitError:
    said = " ".join(f"{type(error).__name__}: {error}".split())  # some say it in two lines
    return QuantkitError(f"the config.json of {source.name} is not usable ({said})")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While a model is built, parameters keep their shape only; buffers (masks, rotary tables) are
    computed as always, since no checkpoint holds them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Skeleton:
    """``model``: a transformers causal LM in eval mode, empty until filled.

    ``dtype`` is what floating-point tensors become when they are filled in; ``device`` where.
    ``staged`` tensors, by their names on disk, were read already (see staging.py).
    ``described`` stands for config.json where the source has none (GGUF). ``apart``: experts are
    modules of their own (experts.py) if they lie so in the checkpoint, whose packed weights, if it
    has any, are called ``packed``.
    """

    def __init__(
        self,
        source: Source,
        checkpoint: Tensors,
        device: torch.device,
        dtype: torch.dtype,
        described: dict[str, Any] | None = None,
        apart: bool = True,
        packed: Iterable[str] = (),
    ) -> None:
        self.source, self.checkpoint = source, checkpoint
        self.device, self.dtype = device, dtype
        self.staged: dict[str, Tensor] = {}
        self.config = read_config(source, described)
        try:
            with _parameters_on_meta():
                model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        except _NONSENSE as error:
            raise _unusable(source, error) from error
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._conversions = get_model_conversion_mapping(self.model)
        if apart:
            self._conversions = take_apart(model, self._conversions, [*checkpoint, *packed])

    @cached_property
    def live_names(self) -> dict[str, str]:
        """Name on disk -> name in the model, for every tensor of the checkpoint. Tensors that
        the model has no place for keep their name."""
        return {name: self._live(name)[0] for name in self.checkpoint}

    @cached_property
    def disk_names(self) -> dict[str, str]:
        """Name in the model -> name on disk, where one tensor on disk is one in the model."""
        pairs = {}
        for name in self.checkpoint:
            live, pattern = self._live(name)
            if pattern is None:
                pairs[live] = name
        return pairs

    def live_name(self, disk: str) -> str:
        """Name in the model of a tensor called ``disk`` in files, whether it is there or not."""
        return self._live(disk)[0]

    def _live(self, name: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(
            name,
            [c for c in self._conversions if isinstance(c, WeightRenaming)],
            [c for c in self._conversions if isinstance(c, WeightConverter)],
            self.model.base_model_prefix,
            self._expected,
        )
        return found

    @cached_property
    def _expected(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.model.state_dict()
        return found

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Parameter that the checkpoint does not hold -> the one that is in its place too (head ->
        embedding, or the other way round)."""
        held = set(self.live_names.values())
        pairs = self.model.all_tied_weights_keys.items()
        forth = {head: body for head, body in pairs if head not in held and body in held}
        return forth | {body: head for head, body in pairs if body not in held and head in held}

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint by its name on disk: on the device, if it was read ahead."""
        staged = self.staged.get(name)
        return self.checkpoint.get(name) if staged is None else staged

    def _place(self, name: str) -> bool:
        """Put a tensor into the model that is one of its parameters, if only under another name;
        whether it is."""
        live = self.live_names[name]
        parent, _, leaf = live.rpartition(".")
        try:
            module = self.model.get_submodule(parent)
        except AttributeError:
            return False
        place = module._parameters.get(leaf)
        if place is None or self.disk_names.get(live) != name:
            return False
        tensor = self.read(name)
        if tensor.shape != place.shape:
            raise _misfit(name, tensor.shape, place.shape)
        tensor = pinned.carried(tensor, self.device).to(place.dtype)  # a GPU casts it by itself
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        return True

    def names_below(self, prefix: str) -> list[str]:
        """Names on disk of what belongs to the module ``prefix``."""
        return [d for d, live in self.live_names.items() if live.startswith(prefix + ".")]

    def fill(self, prefixes: Iterable[str]) -> None:
        """Give every parameter below ``prefixes`` its weights. Raises QuantkitError when the
        checkpoint lacks one, or holds one of another shape."""
        wanted = tuple(prefixes)
        tied = {place: source for place, source in self._tied.items() if under(place, wanted)}
        names = [
            disk
            for disk, live in self.live_names.items()
            if under(live, wanted) or live in tied.values()
        ]
        if rest := {name: self.read(name) for name in names if not self._place(name)}:
            load(self.model, rest, self.device, self.dtype, self._conversions)
        for place, source in tied.items():
            parent, _, leaf = place.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.model.get_parameter(source))
        self._refuse_missing(
            name
            for name, parameter in self.model.named_parameters()
            if under(name, wanted) and parameter.device.type == "meta"
        )

    def check(self) -> None:
        """Raise now what ``fill`` would raise later, as far as names and shapes tell it."""
        for live, disk in self.disk_names.items():
            found = self.checkpoint.spec(disk).shape
            if live in self._expected and found != tuple(self._expected[live].shape):
                raise _misfit(disk, found, self._expected[live].shape)
        if len(self.disk_names) == len(self.live_names):  # else conversions make up some names
            held = self.disk_names.keys() | self._tied.keys()
            parameters = self.model.named_parameters(remove_duplicate=False)
            self._refuse_missing(name for name, _ in parameters if name not in held)

    def _refuse_missing(self, names: Iterable[str]) -> None:
        missing = list(names)
        if missing:
            raise QuantkitError(
                f"{self.source.name} lacks the tensor {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                "the download may be incomplete, or config.json may belong to another model",
            )

    def empty(self, module: nn.Module) -> None:
        """Drop the weights of ``module``."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(
                        torch.empty_like(parameter, device="meta"), requires_grad=False
                    )


def under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether ``name`` is one of the modules ``prefixes``, or of what is in them."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def load(
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    conversions: list[Any],
) -> None:
    """Put tensors with their names on disk into ``model``, through transformers' conversions."""
    with _quiet():
        info, _ = convert_and_load_state_dict_in_model(
            model,
            tensors,
            LoadStateDictConfig(
                device_map={"": device}, dtype=dtype, weight_mapping=list(conversions)
            ),
            None,
        )
    if info.mismatched_keys:
        raise _misfit(*min(info.mismatched_keys))
    if info.conversion_errors or info.error_msgs:
        detail = [*info.conversion_errors.values(), *info.error_msgs][0]
        raise QuantkitError(f"the weights do not fit the model ({detail})")


def _misfit(name: str, found: Iterable[int], wanted: Iterable[int]) -> QuantkitError:
    return QuantkitError(
        f"tensor {name} has the shape {tuple(found)}, the model needs {tuple(wanted)}",
        "config.json and the weights do not belong together",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No 'Loading weights' bar: blocks are loaded one by one, and quantkit shows its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
