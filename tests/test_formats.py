"""What all formats have in common, whichever there are: packing never rounds, reading gives back
what was packed, and nobody claims what somebody else packed."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit import formats
from quantkit.core.checkpoint import TensorSpec
from quantkit.core.qweight import BITS, QWeight, Scheme
from quantkit.errors import QuantkitError
from quantkit.formats import gguf

FOLDER = Path(formats.__file__).parent
NAME = "model.layers.3.mlp.down_proj"
BY = "quantkit:test"


def _found():
    """A file of formats/ that packs and reads linears; gguf.py has tensors of its own, and packs
    and unpacks bytes."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    modules = {name: importlib.import_module(f"quantkit.formats.{name}") for name in names}
    return {n: m for n, m in modules.items() if hasattr(m, "pack") and hasattr(m, "read")}


FORMATS = _found()
# gptq_v2 is gptq with other zero points, which only a configuration can tell
READERS = {name: "gptq" if name == "gptq_v2" else name for name in FORMATS}
GROUPS = (16, 32, 48, 64, 128, 512, -1)
SHAPES = ((32, 128), (96, 256), (40, 384), (8, 64), (24, 96), (33, 512), (5, 160), (64, 1024))
ZEROS = ("none", "midpoint", "0", "max", "random")


class Held(dict):
    """Tensors (or what is known of them) in memory, in the way of a Checkpoint."""

    def spec(self, name):
        found = self[name]
        return found if isinstance(found, TensorSpec) else TensorSpec.of(found)

    def get(self, name):
        return self[name]


def held(packed, prefix=NAME):
    return Held({f"{prefix}.{suffix}": tensor for suffix, tensor in packed.items()})


def make(scheme, out, width, zeros="none", dtype=torch.float16, ordered=False, seed=0):
    """Random codes, scales of both signs, and zero points of one kind, or minimums. "random" ones
    are never 0, which some have no place for."""
    g = torch.Generator().manual_seed(seed)
    groups = scheme.groups(width)

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=g).to(torch.uint8)

    scale = torch.randn(out, groups, generator=g).to(dtype)
    zero = minimum = None
    if zeros == "minimum":
        minimum = torch.randn(out, groups, generator=g).to(dtype)
    elif zeros != "none":
        top = scheme.max_code
        low, high = {"midpoint": (scheme.midpoint,) * 2, "0": (0, 0), "max": (top, top)}.get(
            zeros, (1, top)
        )
        zero = integers(low, high, out, groups)
    order = None
    if ordered:
        order = (torch.randperm(width, generator=g) // scheme.width(width)).to(torch.int32)
    scheme = replace(scheme, symmetric=zeros == "none")
    codes = integers(0, scheme.max_code, out, width)
    return QWeight(scheme, codes, scale, zero, order, minimum)


def config_of(form, scheme):
    """What a checkpoint of such linears says of itself, as a reader gets it."""
    written = {"config.json": form.configuration(scheme, ["lm_head"], BY)}
    return formats.declared(written.get)


def holds(form, q, zeros):
    """Whether the format's FORM has a place for these numbers."""
    f = form.FORM
    if q.scheme.bits not in f.bits or q.scale.dtype not in f.scales:
        return False
    width = q.shape[1]
    if f.groups and q.scheme.width(width) not in [width if g == -1 else g for g in f.groups]:
        return False
    if q.group_of is not None and not f.ordered:
        return False
    if zeros == "minimum":
        return f.offset == "minimum"
    if q.zero is None:
        return True
    return f.offset == "zero" and int(q.zero.min()) >= f.zero_min


def assert_same(found, q):
    """The same numbers. Only three things may be told in another way: one group is one scale a row,
    zero points at the midpoint are none, and a wider dtype may hold the same scales."""
    if q.zero is not None and bool((q.zero == q.scheme.midpoint).all()):
        q = replace(q, scheme=replace(q.scheme, symmetric=True), zero=None)
    assert found.shape == q.shape
    assert found.scheme.width(q.shape[1]) == q.scheme.width(q.shape[1])
    assert replace(found.scheme, group_size=-1) == replace(q.scheme, group_size=-1)
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.scale.double(), q.scale.double())
    for a, b in ((found.zero, q.zero), (found.minimum, q.minimum)):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert torch.equal(found.group_index(), q.group_index())
    assert torch.equal(found.dequantize(), q.dequantize())


def round_trip(form, q):
    """Through everything that a format offers."""
    out, width = q.shape
    packed = form.pack(q)
    planned = form.specs(out, width, q.scheme, q.scale.dtype)
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in packed.items()} == planned
    assert all(tensor.is_contiguous() for tensor in packed.values())
    tensors = held(packed)
    tensors[f"{NAME}.bias"] = torch.ones(out)
    tensors["model.norm.weight"] = torch.ones(width)
    config = config_of(form, q.scheme)
    assert form.linears(tensors, config) == [NAME]
    assert sorted(form.names(tensors, NAME)) == sorted(f"{NAME}.{suffix}" for suffix in packed)
    out_, width_, scheme = form.describe(tensors, NAME, config)
    assert (out_, width_) == (out, width)
    assert (scheme.bits, scheme.grid) == (q.scheme.bits, q.scheme.grid)
    assert scheme.width(width) == q.scheme.width(width)
    found = form.read(tensors, NAME, config)
    assert_same(found, q)
    without = form.read(tensors, NAME, config, codes=False)
    assert without.shape == found.shape and int(without.codes.sum()) == 0
    assert replace(without, codes=found.codes).identical(found)


def test_all_formats_are_found():
    assert set(formats.TARGETS) | set(formats.SAFETENSORS) == FORMATS.keys()
    assert set(formats.SAFETENSORS) == set(READERS.values())


@pytest.mark.parametrize("zeros", [*ZEROS, "minimum"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_fits_is_read_as_it_was_packed_and_nothing_else_is_packed(name, bits, zeros):
    form, count = FORMATS[name], 0
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for i, (out, width) in enumerate(SHAPES):
        for j, group in enumerate(GROUPS):
            if width % (width if group == -1 else group):
                continue
            q = make(Scheme(bits, group), out, width, zeros, dtypes[(i + j) % 3])
            if form.refusal(out, width, q.scheme) is None and holds(form, q, zeros):
                round_trip(form, q)
                count += 1
            elif not lucky(form, q):
                with pytest.raises(ValueError):
                    form.pack(q)
    possible = bits in form.FORM.bits and zeros in PLACES[form.FORM.offset]
    if possible and not (zeros == "0" and form.FORM.zero_min):
        assert count >= 2
    else:
        assert count == 0


PLACES = {"symmetric": ("none",), "zero": ZEROS, "minimum": ("none", "minimum")}


def lucky(form, q):
    """Zero points may be minimums, or the scales other numbers, that another form happens to have;
    packing them is right then, if they are read back as the same weight."""
    try:
        packed = form.pack(q)
    except ValueError:
        return False
    found = form.read(held(packed), NAME, config_of(form, q.scheme))
    # bitsandbytes' scales are divided by 127 when they are read, in a wider dtype
    found = replace(found, scale=found.scale.to(q.scale.dtype))
    assert torch.equal(exactly(found), exactly(q))
    return True


def exactly(q):
    """scale * (code - zero) in float64."""
    index = q.group_index()
    zero = q.scheme.midpoint if q.zero is None else q.zero.double()[:, index]
    if q.minimum is not None:
        return q.codes.double() * q.scale.double()[:, index] + q.minimum.double()[:, index]
    return (q.codes.double() - zero) * q.scale.double()[:, index]


@pytest.mark.parametrize("grid", ["nf4", "fp4"])
@pytest.mark.parametrize("name", FORMATS)
def test_tables_of_levels(name, grid):
    form, count = FORMATS[name], 0
    for out, width in SHAPES:
        for group in (32, 64, 128):
            if width % group:
                continue
            q = make(Scheme(4, group, grid=grid), out, width, dtype=torch.float32)
            q = replace(q, scheme=replace(q.scheme, grid=grid))
            if form.refusal(out, width, q.scheme) is None:
                count += 1
                assert_table(form, q)
            else:
                with pytest.raises(ValueError):
                    form.pack(q)
    assert (count > 0) == (name == "bnb")


def assert_table(form, q):
    packed = form.pack(q)
    planned = form.specs(*q.shape, q.scheme, q.scale.dtype)
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in packed.items()} == planned
    tensors, config = held(packed), config_of(form, q.scheme)
    assert form.describe(tensors, NAME, config)[2] == q.scheme
    found = form.read(tensors, NAME, config)
    assert found.identical(q)
    without = form.read(tensors, NAME, config, codes=False)
    assert replace(without, codes=found.codes).identical(found)


@pytest.mark.parametrize("zeros", ["none", "random"])
@pytest.mark.parametrize("name", FORMATS)
def test_groups_out_of_order(name, zeros):
    form = FORMATS[name]
    for bits in form.FORM.bits:
        group = form.FORM.groups[0] if form.FORM.groups else 32
        q = make(Scheme(bits, group), 96, 256, zeros, ordered=group != -1)
        if form.FORM.ordered:
            round_trip(form, q)
        elif q.group_of is not None:
            with pytest.raises(ValueError):
                form.pack(q)


@pytest.mark.parametrize("name", FORMATS)
def test_refusals_agree_with_the_form(name):
    """convert fits numbers to FORM, so a weight in it must not be refused for its scheme."""
    form = FORMATS[name]
    symmetric = form.FORM.offset == "symmetric"
    for bits in BITS:
        for group in form.FORM.groups or (16, 128, 1024, -1):
            reason = form.refusal(1024, 1024, Scheme(bits, group, symmetric))
            assert (reason is None) == (bits in form.FORM.bits), reason
            assert reason is None or str(bits) in reason or name == "bnb"
    for group in {16, 32, 64, 128, 1024, -1} - set(form.FORM.groups) if form.FORM.groups else ():
        bits = form.FORM.bits[-1]
        assert form.refusal(1024, 512, Scheme(bits, group, symmetric)) is not None


def examples():
    """Linears of every format, square and narrow ones too, by what names and shapes tell."""
    for name, form in FORMATS.items():
        schemes = [Scheme(bits, group) for bits in BITS for group in (16, 32, 64, 128, -1)]
        schemes += [Scheme(4, group, True, grid) for group in (32, 64) for grid in ("nf4", "fp4")]
        for scheme in schemes:
            for out, width in ((32, 128), (64, 64), (128, 128), (256, 32), (128, 1024), (512, 512)):
                if width % scheme.width(width) or form.refusal(out, width, scheme) is not None:
                    continue
                symmetric = (True, False) if form.FORM.offset == "zero" else (True,)
                for kind in symmetric:
                    yield name, form, out, width, replace(scheme, symmetric=kind)


def test_every_format_claims_its_own_linears_and_no_others():
    seen = dict.fromkeys(FORMATS, 0)
    for name, form, out, width, scheme in examples():
        dtype = torch.float32 if scheme.grid != "int" else torch.float16
        tensors = held(form.specs(out, width, scheme, dtype))
        tensors[f"{NAME}.bias"] = TensorSpec(dtype, (out,))
        tensors["model.embed_tokens.weight"] = TensorSpec(dtype, (10, width))
        tensors["model.norm.weight"] = TensorSpec(dtype, (width,))
        for config in ({}, config_of(form, scheme)):
            claims = {r: FORMATS[r].linears(tensors, config) for r in formats.SAFETENSORS}
            expected = {r: [NAME] if r == READERS[name] else [] for r in claims}
            assert claims == expected, (name, out, width, scheme)
        seen[name] += 1
    assert min(seen.values()) >= 6


@pytest.mark.parametrize("first", FORMATS)
def test_linears_of_two_formats_are_told_apart(first):
    own = {name: spec for name, _, *spec in reversed(list(examples()))}
    for second in FORMATS:
        tensors = Held()
        for prefix, name in (("a.x", first), ("b.y", second)):
            out, width, scheme = own[name]
            dtype = torch.float32 if scheme.grid != "int" else torch.float16
            tensors |= held(FORMATS[name].specs(out, width, scheme, dtype), prefix)
        tensors = Held(tensors)
        for reader in formats.SAFETENSORS:
            expected = [p for p, n in (("a.x", first), ("b.y", second)) if READERS[n] == reader]
            assert FORMATS[reader].linears(tensors, {}) == expected


def test_dense_models_are_nobodys():
    dense = Held(
        {
            f"{NAME}.weight": TensorSpec(torch.float16, (64, 64)),
            f"{NAME}.bias": TensorSpec(torch.float16, (64,)),
            "model.layers.0.mlp.act.scales": TensorSpec(torch.float16, (64,)),
            "lm_head.weight": TensorSpec(torch.bfloat16, (64, 64)),
        }
    )
    for name, form in FORMATS.items():
        assert form.linears(dense, {}) == [], name


@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_that_lacks_a_tensor_is_refused_by_name(name):
    form = FORMATS[name]
    group = form.FORM.groups[0] if form.FORM.groups else 32
    q = make(Scheme(form.FORM.bits[-1], group), 96, 256)
    packed, config = form.pack(q), config_of(form, q.scheme)
    optional = {"g_idx", "weight_format"}
    for suffix in packed.keys() - optional:
        tensors = held({s: t for s, t in packed.items() if s != suffix})
        if NAME not in form.linears(tensors, config):
            continue  # without it, it is a linear of nobody
        with pytest.raises(QuantkitError, match=NAME):
            form.describe(tensors, NAME, config)


def test_the_containers_own_types_are_packed_as_their_forms_say():
    """GGUF has no tensors by suffix, but forms as the others have."""
    for type, form in gguf.FORMS.items():
        (bits,), (group,) = form.bits, form.groups
        q = make(Scheme(bits, group), 40, 256, "none" if form.offset == "symmetric" else "minimum")
        raw = gguf.pack(q, type)
        assert raw.nbytes == gguf.nbytes(q.shape, type)
        assert gguf.unpack(raw, type, q.shape).identical(q)


def test_what_is_declared_comes_from_config_json_first():
    first, other = {"quant_method": "gptq", "bits": 4}, {"bits": 3}
    files = {"config.json": {"quantization_config": first}, "quantize_config.json": other}
    assert formats.declared(files.get) == first
    assert formats.declared({"config.json": {"quantization": first}}.get) == first
    assert formats.declared({"config.json": {}, "quantize_config.json": other}.get) == other
    assert formats.declared({"quant_config.json": other}.get) == other
    assert formats.declared({"config.json": {"quantization_config": [1]}}.get) == {}
    assert formats.declared({}.get) == {}
