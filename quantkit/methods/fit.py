"""The same weight in the form that another format has, exactly if that is possible at all.

Between formats only bookkeeping differs, most of the time: where the zero is, how long a group is,
how many bits a code has room for. ``fit`` moves the numbers over without rounding any, and raises
``CannotHold`` with the reason where the form has no place for them. One thing is allowed to round,
and is reported: a minimum, scale * zero, in the dtype of the scales.

``nearest`` is for those who want the weight anyway: it rounds every weight to the form's own grid.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.core.form import Form
from quantkit.core.qweight import QWeight, Scheme
from quantkit.methods import rtn


class CannotHold(ValueError):
    """The form has no place for some number; the message completes 'cannot be held: ...'."""


class Fitted(NamedTuple):
    """``exact``: every weight means the very same number as before."""

    qweight: QWeight
    exact: bool


def fit(q: QWeight, form: Form) -> Fitted:
    """``q`` in ``form``. Raises CannotHold."""
    if q.scheme.grid != "int":
        raise CannotHold(f"the levels of {q.scheme.grid} are not evenly spaced")
    exact = True
    if q.minimum is not None and form.offset != "minimum":
        exact = is_product(q)
        q = zero_pointed(q)
    q = _with_scales(_with_groups(q, form), form)
    if form.offset == "minimum":
        return _with_minimum(q, form)
    return Fitted(_symmetric(q, form) if form.offset == "symmetric" else _with_zero(q, form), exact)


def _with_groups(q: QWeight, form: Form) -> QWeight:
    """In groups of a size that the form has, the largest possible."""
    if q.group_of is not None and form.ordered:
        return q
    width, size = q.shape[1], q.scheme.group_size
    own = size if size != -1 or not form.groups else width
    if form.groups:
        sizes = [g for g in sorted(form.groups, reverse=True) if own % g == 0 or g % own == 0]
    else:
        sizes = [size, *(g for g in (512, 256, 128, 64, 32, 16) if own % g == 0 and g < own)]
    if q.group_of is None and not form.groups:
        return q
    for candidate in sizes:
        found = q.regrouped(candidate)
        if found is not None:
            return found
    if q.group_of is not None:
        raise CannotHold(
            "its groups follow the activations (g_idx), and those of the target do not"
        )
    wanted = " or ".join("a whole row" if g == -1 else str(g) for g in form.groups)
    raise CannotHold(f"its groups of {own} cannot be made groups of {wanted}")


def _with_scales(q: QWeight, form: Form) -> QWeight:
    if q.scale.dtype in form.scales:
        return q
    for dtype in form.scales:
        scale = q.scale.to(dtype)
        minimum = None if q.minimum is None else q.minimum.to(dtype)
        if _same(scale, q.scale) and (minimum is None or _same(minimum, q.minimum)):
            return replace(q, scale=scale, minimum=minimum)
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in form.scales)
    raise CannotHold(f"its scales do not fit into {names} without rounding")


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.equal(a.double(), b.double())


def _room(q: QWeight, form: Form) -> int:
    """The fewest bits that the form has for all codes of ``q``."""
    for bits in form.bits:
        if bits >= q.scheme.bits:
            return bits
    raise CannotHold(f"it has {q.scheme.bits} bits, and the target at most {form.bits[-1]}")


def _symmetric(q: QWeight, form: Form) -> QWeight:
    """Codes about the midpoint, with as many bits as the distances from the zero point need."""
    scheme = q.scheme
    if scheme.symmetric and scheme.bits in form.bits:
        return q
    zero = scheme.midpoint if q.zero is None else q.zero[:, q.group_index()].to(torch.int16)
    levels = q.codes.to(torch.int16) - zero
    for bits in form.bits:
        half = 1 << (bits - 1)
        if int(levels.min()) >= -half and int(levels.max()) < half:
            codes = (levels + half).to(torch.uint8)
            return QWeight(Scheme(bits, scheme.group_size), codes, q.scale, None, q.group_of)
    raise CannotHold(
        f"its codes reach {int(levels.min())} to {int(levels.max())} about the zero point, and the "
        f"target has symmetric codes of {form.bits[-1]} bits"
    )


def _with_zero(q: QWeight, form: Form) -> QWeight:
    bits = _room(q, form)
    if q.zero is not None and int(q.zero.min()) < form.zero_min:
        raise CannotHold("it has zero points of 0, and the target has none (gptq_v2 has)")
    if bits == q.scheme.bits:
        return q
    codes = q.codes
    if q.zero is None:  # the midpoint moves
        codes = codes + ((1 << (bits - 1)) - q.scheme.midpoint)
    return replace(q, scheme=replace(q.scheme, bits=bits), codes=codes)


def _with_minimum(q: QWeight, form: Form) -> Fitted:
    scheme = replace(q.scheme, bits=_room(q, form), symmetric=False)
    if q.minimum is not None:
        return Fitted(replace(q, scheme=scheme), True)
    zero = q.scheme.midpoint if q.zero is None else q.zero.double()
    product = -(q.scale.double() * zero)
    minimum = product.to(q.scale.dtype)
    if not bool(minimum.isfinite().all()):
        raise CannotHold("its minimums, scale * zero, are too large for the dtype of its scales")
    fitted = QWeight(scheme, q.codes, q.scale, None, q.group_of, minimum)
    return Fitted(fitted, _same(minimum, product))


def zero_pointed(q: QWeight) -> QWeight:
    """With a zero point in the place of a minimum, where every minimum is that of a whole one:
    equal to scale * zero, rounded to the minimum's dtype."""
    if q.minimum is None:
        return q
    scale, minimum = q.scale.float(), q.minimum.float()
    zero = torch.where(scale == 0, torch.zeros_like(scale), -minimum / scale).round()
    top = q.scheme.max_code
    again = -(scale * zero)
    if not bool(((zero >= 0) & (zero <= top)).all()) or not torch.equal(
        again.to(q.minimum.dtype).float() + 0.0, minimum + 0.0
    ):
        raise CannotHold("its minimums are not those of whole zero points")
    scheme = q.scheme
    if bool((zero == scheme.midpoint).all()):
        return QWeight(replace(scheme, symmetric=True), q.codes, q.scale, None, q.group_of)
    return QWeight(scheme, q.codes, q.scale, zero.to(torch.uint8), q.group_of)


def is_product(q: QWeight) -> bool:
    """Whether the minimum can be given back as a zero point, and that changes no weight."""
    try:
        pointed = zero_pointed(q)
    except CannotHold:
        return False
    zero = q.scheme.midpoint if pointed.zero is None else pointed.zero.double()
    return _same(-(q.scale.double() * zero), q.minimum)


def with_zeros(q: QWeight) -> QWeight:
    """A symmetric weight with its midpoint as a zero point in every group."""
    zero = torch.full_like(q.scale, q.scheme.midpoint, dtype=torch.uint8)
    return replace(q, scheme=replace(q.scheme, symmetric=False), zero=zero)


def damage(prefix: str, q: QWeight) -> list[str]:
    """What is to be said of a linear whose scales multiply to nothing: they are carried over."""
    sound = q.scale.isfinite().all() and (q.minimum is None or q.minimum.isfinite().all())
    return [] if bool(sound) else [f"{prefix} has scales that are no numbers: it is damaged"]


def nearest_scheme(scheme: Scheme, form: Form) -> Scheme:
    """That of a weight rounded to the form's grid: groups as long as its own or, where the form has
    none such, its shortest."""
    bits = next((b for b in form.bits if b >= scheme.bits), form.bits[-1])
    size = scheme.group_size
    if form.groups and size not in form.groups:
        size = min(form.groups)
    return Scheme(bits, size, form.offset == "symmetric")


def nearest(q: QWeight, form: Form) -> QWeight:
    """Every weight of ``q`` rounded to the form's grid. Scales are in the form's usual dtype: where
    only they have another one they are rounded, and codes stay."""
    scheme = nearest_scheme(q.scheme, form)
    cast = q.scale.to(form.scales[0])
    of_another = q.scale.dtype not in form.scales and q.minimum is None
    if of_another and bool(cast.isfinite().all()):
        try:
            found = fit(replace(q, scale=cast), form).qweight
        except CannotHold:
            pass
        else:
            if (found.scheme.bits, found.scheme.group_size) == (scheme.bits, scheme.group_size):
                return found
    rounded = rtn.quantize(q.dequantize(), scheme, form.zero_min)
    return fit(rounded, form).qweight


def nearest_to(weight: Tensor, form: Form) -> QWeight:
    """A plain weight [out, in] rounded to the form's grid, in its shortest groups."""
    scheme = Scheme(form.bits[-1], min(form.groups), form.offset == "symmetric")
    return fit(rtn.quantize(weight.float(), scheme, form.zero_min), form).qweight


def relative_error(weight: Tensor, rounded: Tensor) -> float:
    """|W - W'|^2 / |W|^2, both float32; 0 when nothing was lost, of nothing too."""
    lost = float((weight - rounded).square().sum())
    return lost / float(weight.square().sum()) if lost else 0.0
