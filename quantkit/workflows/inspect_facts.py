"""What inspect looks at: every quantized linear as its tensors say, and the model around them.

Nothing is judged here (inspect_checks.py does), and nothing here stops at the first thing that is
wrong: what cannot be read is written down by name.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from quantkit import formats
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import Tensors, gptq
from quantkit.runtime.block import is_linear
from quantkit.runtime.opened import Folder
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.walk import find_blocks

if TYPE_CHECKING:
    from quantkit.runtime.gguf_opened import GgufOpened
    from quantkit.runtime.opened import Opened

# what transformers raises for a config.json whose numbers make no model
_UNBUILDABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
)


@dataclass
class Bad:
    """How many numbers, and the linear that has the first of them."""

    count: int = 0
    first: str = ""

    def add(self, found: Tensor, name: str) -> None:
        count = int(found.sum())
        if count and not self.count:
            self.first = name
        self.count += count


@dataclass
class Linears:
    """The quantized linears by their prefix in files.

    shapes       (out, in)
    schemes      as found in the data; where it was not read, as declared
    ordered      those with groups that are not contiguous
    conventions  of GPTQ's zero points, and how many linears have each
    unreadable   why, for those that are
    wrapped      linears with a zero point of 0 in GPTQ's v1 convention
    """

    names: set[str] = field(default_factory=set)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    ordered: list[str] = field(default_factory=list)
    stored_order: bool = False
    conventions: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    wrapped: Bad = field(default_factory=Bad)
    nan: Bad = field(default_factory=Bad)
    infinite: Bad = field(default_factory=Bad)
    zero: Bad = field(default_factory=Bad)
    nbytes: int = 0

    @property
    def weights(self) -> int:
        return sum(out * width for out, width in self.shapes.values())

    @property
    def bits(self) -> Counter[int]:
        return Counter(scheme.bits for scheme in self.schemes.values())

    @property
    def groups(self) -> Counter[int]:
        """Group sizes. A linear that is as narrow as the others' groups has one group, and is no
        exception."""
        usual = self._usual()
        return Counter(
            usual if scheme.group_size == -1 and self.shapes[name][1] <= usual else size
            for name, scheme in self.schemes.items()
            for size in [scheme.group_size]
        )

    def _usual(self) -> int:
        sizes = Counter(s.group_size for s in self.schemes.values() if s.group_size != -1)
        return sizes.most_common(1)[0][0] if sizes else -1

    @property
    def scheme(self) -> Scheme | None:
        """What most of them are; symmetric when all are."""
        if not self.schemes:
            return None
        ((bits, grid), _), *_ = Counter(
            (s.bits, s.grid) for s in self.schemes.values()
        ).most_common(1)
        symmetric = all(s.symmetric for s in self.schemes.values())
        return Scheme(bits, self.groups.most_common(1)[0][0], symmetric, grid)

    @property
    def convention(self) -> str | None:
        return self.conventions.most_common(1)[0][0] if self.conventions else None


def look_at_linears(opened: "Opened", read: bool) -> Linears:
    """All quantized linears: their scales and zero points (the codes are not read), or without
    ``read`` names and shapes alone."""
    if not isinstance(opened, Folder):
        return _look_at_gguf(cast("GgufOpened", opened))
    found = Linears()
    if opened.format == "dense":
        return found
    reader = formats.by_name(opened.format)
    for prefix in reader.linears(opened.tensors, opened.config):
        names = reader.names(opened.tensors, prefix)
        found.names.update(names)
        try:
            out, width, scheme = reader.describe(opened.tensors, prefix, opened.config)
            if read:
                scheme = _read(opened, prefix, found)
        except QuantkitError as error:
            found.unreadable[prefix] = error.message
            continue
        found.shapes[prefix], found.schemes[prefix] = (out, width), scheme
        order = [name for name in names if name.endswith("g_idx")]
        found.stored_order |= bool(order)
        found.nbytes += sum(opened.tensors.spec(n).nbytes for n in names if n not in order)
    return found


def _look_at_gguf(opened: "GgufOpened") -> Linears:
    """A file whose blocks hold scales and codes together, so that all of it is read."""
    found = Linears()
    for prefix, packed in opened.linears.items():
        (name,) = opened.names(prefix)
        found.names.add(name)
        found.shapes[prefix], found.schemes[prefix] = (packed.out, packed.width), packed.scheme
        found.nbytes += opened.tensor(name).nbytes
        _weigh(opened.survey(prefix), prefix, found)
    return found


def _read(opened: Folder, prefix: str, found: Linears) -> Scheme:
    if opened.format == "gptq":
        q, convention = gptq.read_with_convention(
            opened.tensors, prefix, opened.config, codes=False
        )
        found.conventions[convention] += 1
        if convention == "v1" and q.zero is not None:
            found.wrapped.add(q.zero == 0, prefix)
    else:
        q = opened.survey(prefix)
    if q.group_of is not None:
        found.ordered.append(prefix)
    _weigh(q, prefix, found)
    return q.scheme


def _weigh(q: QWeight, prefix: str, found: Linears) -> None:
    """Count the scales (and minimums) that are no numbers to multiply with."""
    for tensor in (q.scale, q.minimum):
        if tensor is not None:
            found.nan.add(tensor.isnan(), prefix)
            found.infinite.add(tensor.isinf(), prefix)
    found.zero.add(q.scale == 0, prefix)


@dataclass
class Structure:
    """The model around the linears, as transformers builds it from config.json.

    dense       linears inside the decoder blocks that are not quantized
    missing     parameters that no tensor of the checkpoint becomes
    unexpected  tensors that become no parameter
    misfit      tensors of another shape than their parameter, or of whole numbers
    head        own: a tensor of its own; quantized: several of its own; tied: the embedding;
                both: it is tied by the configuration and stored; missing
    unknown     why none of this could be found out
    """

    dense: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfit: list[str] = field(default_factory=list)
    head: str = ""
    head_differs: bool = False
    unknown: str | None = None


def look_at_structure(opened: "Opened", linears: Linears) -> Structure:
    """Build the model without weights and hold names against names."""
    dense: Tensors
    if isinstance(opened, Folder):
        # not opened.dense: that one stops at the first linear that cannot be read
        dense, described = opened.tensors.without(linears.names), None
    else:
        dense, described = opened.dense, opened.model_config
    depth = opened.model_config.get("num_hidden_layers")
    count = sum(1 for _ in dense) + len(linears.names)
    if isinstance(depth, int) and depth > count:
        return Structure(unknown=f"config.json says {depth} blocks, and there are {count} tensors")
    try:
        skeleton = Skeleton(opened.source, dense, torch.device("cpu"), torch.float16, described)
    except QuantkitError as error:
        return Structure(unknown=error.message)
    except _UNBUILDABLE as error:
        return Structure(unknown=f"the model cannot be built from config.json ({error})")
    return _compare(skeleton, dense, [*linears.shapes, *linears.unreadable])


def _compare(skeleton: Skeleton, dense: Tensors, packed: list[str]) -> Structure:
    model = skeleton.model
    quantized = {skeleton.live_name(f"{prefix}.weight") for prefix in packed}
    held = quantized | skeleton.disk_names.keys()
    tied = {a: b for a, b in model.all_tied_weights_keys.items() if a in held or b in held}
    found = Structure()
    if len(skeleton.disk_names) == len(skeleton.live_names):  # else some tensors become several
        parameters = model.named_parameters(remove_duplicate=False)
        shared = tied.keys() | set(tied.values())
        found.missing = [n for n, _ in parameters if n not in held and n not in shared]
        found.misfit = list(_misfits(skeleton, dense))
    expected = model.state_dict().keys()
    found.unexpected = [disk for disk, live in skeleton.live_names.items() if live not in expected]
    head = _head_name(skeleton)
    if head is not None:
        found.head = _head(head in held, head in tied)
        if found.head == "own" and head in quantized:
            found.head = "quantized"
        body = tied.get(head)
        if found.head == "both" and body in skeleton.disk_names and head in skeleton.disk_names:
            pair = [dense.get(skeleton.disk_names[name]) for name in (head, body)]
            found.head_differs = not torch.equal(*pair)
    if packed:
        try:
            prefix, blocks = find_blocks(model)
        except QuantkitError as error:
            return Structure(unknown=error.message)
        found.dense = [
            f"{prefix}.{name}"
            for name, module in blocks.named_modules()
            if is_linear(module) and f"{prefix}.{name}.weight" not in quantized
        ]
    return found


def _misfits(skeleton: Skeleton, dense: Tensors) -> Iterator[str]:
    """Tensors that cannot be the parameters that they are named after, with both shapes."""
    for name, tensor in skeleton.model.state_dict().items():
        disk = skeleton.disk_names.get(name)
        if disk is None:
            continue
        spec = dense.spec(disk)
        if tuple(spec.shape) != tuple(tensor.shape):
            yield f"{disk} is {list(spec.shape)}, not {list(tensor.shape)}"
        elif tensor.is_floating_point() and not spec.dtype.is_floating_point:
            yield f"{disk} holds {str(spec.dtype).removeprefix('torch.')}, as packed weights do"


def _head(held: bool, tied: bool) -> str:
    if held:
        return "both" if tied else "own"
    return "tied" if tied else "missing"


def _head_name(skeleton: Skeleton) -> str | None:
    head = skeleton.model.get_output_embeddings()
    names = (name for name, module in skeleton.model.named_modules() if module is head)
    name = next(names, None) if head is not None else None
    return None if name is None else f"{name}.weight"
