"""The kernels of fused.py. Tensors are contiguous float32 [in, out] unless said otherwise; ``low``
and ``high``, the bounds of levels, are [groups, out] where RANGED, else one number each."""

import triton
import triton.language as tl


@triton.jit
def _whole(x):
    """The nearest whole number, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _within(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _row(matrix, index, j):
    """Row j of a matrix in registers."""
    return tl.sum(tl.where(index[:, None] == j, matrix, 0.0), 0)


@triton.jit
def _bounds(low, high, place, inside, RANGED: tl.constexpr):
    if RANGED:
        return tl.load(low + place, inside, other=0.0), tl.load(high + place, inside, other=0.0)
    else:
        return tl.load(low), tl.load(high)


@triton.jit
def round_tile(
    running, columns, lower, scale, low, high, levels, errors,
    out,
    tile: tl.constexpr, RANGED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round the columns of one tile in order. ``lower`` [tile, tile]: what an error (column) does
    to the columns behind it (rows); one group, so ``scale`` is [out]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out
    index = tl.arange(0, TILE)
    both = (index < tile)[:, None] & inside[None, :]
    wanted = tl.load(running + index[:, None] * out + rows[None, :], both, other=0.0)
    step = tl.load(scale + rows, inside, other=1.0)
    inverse = 1 / step
    least, most = _bounds(low, high, rows, inside, RANGED)
    for j in range(tile):
        level = _within(_row(wanted, index, j) * inverse, least, most)
        level = _whole(level)
        column = tl.load(columns + j * out + rows, inside, other=0.0)
        error = column - level * step
        tl.store(levels + j * out + rows, level, inside)
        tl.store(errors + j * out + rows, error, inside)
        passed = tl.load(lower + index * tile + j, (index > j) & (index < tile), other=0.0)
        wanted += passed[:, None] * error[None, :]


@triton.jit
def polish_tile(
    pulls, own, inverse_stiffness, scale, low, high, levels, changes,
    out, first, width,
    tile: tl.constexpr, RANGED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Coordinate descent over the columns first..first+tile of groups that are ``width`` wide.
    ``own`` [tile, tile] is the tile's part of the Hessian; ``scale`` [groups, out]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out
    index = tl.arange(0, TILE)
    both = (index < tile)[:, None] & inside[None, :]
    pull = tl.load(pulls + index[:, None] * out + rows[None, :], both, other=0.0)
    for j in range(tile):
        place = ((first + j) // width) * out + rows
        step = tl.load(scale + place, inside, other=1.0)
        least, most = _bounds(low, high, place, inside, RANGED)
        before = tl.load(levels + j * out + rows, inside, other=0.0)
        move = _row(pull, index, j) * tl.load(inverse_stiffness + j) / step
        level = _whole(_within(before + move, least, most))
        change = (before - level) * step
        tl.store(levels + j * out + rows, level, inside)
        tl.store(changes + j * out + rows, change, inside)
        passed = tl.load(own + j * tile + index, (index > j) & (index < tile), other=0.0)
        pull += passed[:, None] * change[None, :]


@triton.jit
def _stored(scale):
    """scales.stored"""
    kept = _within(scale, -65504.0, 65504.0).to(tl.float16).to(tl.float32)
    return tl.where(kept == 0, 6.103515625e-05, kept)


@triton.jit
def _candidate(
    floor, reach, factor, direction, middle, top, zero_min, SYMMETRIC: tl.constexpr
):  # fmt: skip
    """scales.Range.grid: scale, low, high"""
    if SYMMETRIC:
        scale = _stored(reach * factor * direction / (middle - 0.5))
        low = -middle + 0.0 * scale
    else:
        scale = _stored((reach - floor) * factor / top)
        low = _within(floor * factor / scale, -top, -zero_min)
        low = _whole(low)
    return scale, low, low + top


@triton.jit
def _consider(
    factor, direction, x, k, floor, reach, best, shrink, side, middle, top, zero_min,
    SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """The best of the candidates so far and one more, for every row: its cost, factor and sign."""
    s, least, most = _candidate(floor, reach, factor, direction, middle, top, zero_min, SYMMETRIC)
    level = _whole(_within(x / s[None, :], least[None, :], most[None, :]))
    error = level * s[None, :] - x
    cost = tl.sum(tl.dot(k, error, input_precision="tf32x3") * error, 0)
    better = cost < best
    best = tl.where(better, cost, best)
    return best, tl.where(better, factor, shrink), tl.where(better, direction, side)


@triton.jit
def search(
    target, curvature, scale, low,
    out, middle, top, zero_min, start, step,
    FINE_0: tl.constexpr, FINE_1: tl.constexpr, FINE_2: tl.constexpr, FINE_3: tl.constexpr,
    COARSE: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The scale [out] (and the lowest level [out]) with the least e^T K e of every row, among the
    candidates of search._search. ``target`` [group, out], ``curvature`` [group, group]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out
    index = tl.arange(0, GROUP)
    x = tl.load(target + index[:, None] * out + rows[None, :], inside[None, :], other=0.0)
    k = tl.load(curvature + index[:, None] * GROUP + index[None, :])
    if SYMMETRIC:
        floor = tl.zeros([ROWS], tl.float32)
        reach = tl.max(tl.abs(x), 0)
    else:
        floor = tl.minimum(tl.min(x, 0), 0.0)
        reach = tl.maximum(tl.max(x, 0), 0.0)
    one = tl.full([ROWS], 1.0, tl.float32)
    best, shrink, side = one * float("inf"), one, one
    for i in range(COARSE):
        factor = one * (start + i * step)
        best, shrink, side = _consider(
            factor, one, x, k, floor, reach, best, shrink, side, middle, top, zero_min,
            SYMMETRIC,
        )  # fmt: skip
        if SYMMETRIC:
            best, shrink, side = _consider(
                factor, -one, x, k, floor, reach, best, shrink, side, middle, top, zero_min,
                SYMMETRIC,
            )  # fmt: skip
    centre = shrink
    for i in tl.static_range(4):
        offset = FINE_0 if i == 0 else FINE_1 if i == 1 else FINE_2 if i == 2 else FINE_3
        best, shrink, side = _consider(
            centre + offset * step, side, x, k, floor, reach, best, shrink, side, middle, top,
            zero_min, SYMMETRIC,
        )  # fmt: skip
    s, least, _ = _candidate(floor, reach, shrink, side, middle, top, zero_min, SYMMETRIC)
    tl.store(scale + rows, s, inside)
    tl.store(low + rows, least, inside)


@triton.jit
def equations(
    high, low, levels, system,
    out, stride, first,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """L_g^T H L_h [groups, groups, out] for one g and all h up to it. ``levels`` [width, out];
    ``high`` + ``low`` are the columns of H from group ``first`` on, rows ``stride`` apart; all
    bfloat16."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out
    g = first + tl.program_id(1)
    index = tl.arange(0, GROUP)
    columns = tl.program_id(1) * GROUP + index
    at = (g * GROUP + index)[:, None] * out + rows[None, :]
    own = tl.load(levels + at, inside[None, :], other=0.0)
    for h in range(GROUPS):
        if h <= g:
            others = h * GROUP + index
            place = others[:, None] * stride + columns[None, :]
            pull = tl.dot(tl.load(high + place), own)
            pull = tl.dot(tl.load(low + place), own, pull)
            at = others[:, None] * out + rows[None, :]
            other = tl.load(levels + at, inside[None, :], other=0.0)
            total = tl.sum(pull * other.to(tl.float32), 0)
            tl.store(system + (g * GROUPS + h) * out + rows, total, inside)
            tl.store(system + (h * GROUPS + g) * out + rows, total, inside)
