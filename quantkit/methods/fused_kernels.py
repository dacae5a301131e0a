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


# Columns of a tile go STEP by STEP: these few stay in registers, where picking one of them and
# passing its error on to the others takes a fraction of what it takes among 128. What all columns
# before have to pass on is a product, and comes first. Everything is in units of levels there, so
# that a step is as short as it can be: each waits for the one before.


@triton.jit
def round_tile(
    passed, columns, unit, scale, low, high, levels, errors,
    out, stride, first, at,
    tile: tl.constexpr, RANGED: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Round the columns of one tile, from ``first`` on, in order. ``unit`` [in, in], rows
    ``stride`` apart: what an error (row) does to the columns behind it. One group: ``scale`` is
    [out]. What the tile is to take up is in ``passed`` from row ``at`` on."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out
    near, index = tl.arange(0, STEP), tl.arange(0, TILE)
    step = tl.load(scale + rows, inside, other=1.0)
    inverse = (1 / step)[None, :]
    least, most = _bounds(low, high, rows, inside, RANGED)
    for start in range(0, tile, STEP):
        own = first + start + near
        present = start + near < tile
        there = present[:, None] & inside[None, :]
        place = own[:, None] * out + rows[None, :]
        column = tl.load(columns + place, there, other=0.0)
        wanted = tl.load(passed + place + (at - first) * out, there, other=0.0) + column
        if start:
            done = index < start
            share = tl.load(
                unit + (first + index)[None, :] * stride + own[:, None],
                done[None, :] & present[:, None],
                other=0.0,
            )
            before = tl.load(
                errors + (first + index)[:, None] * out + rows[None, :],
                done[:, None] & inside[None, :],
                other=0.0,
            )
            wanted += tl.dot(share, before, input_precision="tf32")
        wanted *= inverse
        meant = column * inverse
        level = wanted
        for j in tl.static_range(STEP):
            here = _whole(_within(_row(wanted, near, j), least, most))
            lost = _row(meant, near, j) - here
            level = tl.where(near[:, None] == j, here[None, :], level)
            behind = (near > j) & present
            share = tl.load(unit + (first + start + j) * stride + own, behind, other=0.0)
            wanted += share[:, None] * lost[None, :]
        tl.store(levels + place, level, there)
        tl.store(errors + place, column - level * step[None, :], there)
        tl.debug_barrier()


@triton.jit
def polish_block(
    pulls, hessian, scale, low, high, levels, changes,
    out, stride, first, width,
    ONE: tl.constexpr, block: tl.constexpr, RANGED: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Coordinate descent over the columns first..first+block of groups that are ``width`` wide;
    ONE: STEP columns are always of one. ``hessian`` [in, in], rows ``stride`` apart; ``scale``
    [groups, out]; ``pulls``, which is used up, and ``changes`` [block, out]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out
    near, index = tl.arange(0, STEP), tl.arange(0, TILE)
    for start in range(0, block, STEP):
        own = first + start + near
        present = start + near < block
        there = present[:, None] & inside[None, :]
        here = (start + near)[:, None] * out + rows[None, :]
        if start:
            passed = tl.zeros([STEP, ROWS], tl.float32)
            for begin in range(0, start, TILE):
                before = begin + index
                done = before < start
                share = tl.load(
                    hessian + own[:, None] * stride + (first + before)[None, :],
                    done[None, :] & present[:, None],
                    other=0.0,
                )
                change = tl.load(
                    changes + before[:, None] * out + rows[None, :],
                    done[:, None] & inside[None, :],
                    other=0.0,
                )
                passed = tl.dot(share, change, passed, input_precision="tf32")
            passed += tl.load(pulls + here, there, other=0.0)
            # through memory: else the steps below would change between the product's layout and
            # one in which rows can be picked, each of them
            tl.store(pulls + here, passed, there)
            tl.debug_barrier()
        pull = tl.load(pulls + here, there, other=0.0)
        if ONE:
            place = ((first + start) // width) * out + rows
            step = tl.load(scale + place, inside, other=1.0)[None, :]
            least, most = _bounds(low, high, place, inside, RANGED)
        else:
            place = (own // width)[:, None] * out + rows[None, :]
            step = tl.load(scale + place, there, other=1.0)
        give = 1 / tl.load(hessian + own * (stride + 1), present, other=1.0)
        place_of_levels = own[:, None] * out + rows[None, :]
        old = tl.load(levels + place_of_levels, there, other=0.0)
        wanted = old + pull * give[:, None] / step
        level = wanted
        for j in tl.static_range(STEP):
            if not ONE:
                place = ((first + start + j) // width) * out + rows
                least, most = _bounds(low, high, place, inside & (start + j < block), RANGED)
            new = _whole(_within(_row(wanted, near, j), least, most))
            moved = _row(old, near, j) - new
            level = tl.where(near[:, None] == j, new[None, :], level)
            behind = (near > j) & present
            share = tl.load(hessian + (first + start + j) * stride + own, behind, other=0.0) * give
            if ONE:
                wanted += share[:, None] * moved[None, :]
            else:
                wanted += share[:, None] * (moved * _row(step, near, j))[None, :] / step
        tl.store(levels + place_of_levels, level, there)
        tl.store(changes + here, (old - level) * step, there)
        tl.debug_barrier()


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
    factor, direction, x, root, floor, reach, best, shrink, side, middle, top, zero_min,
    SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """The best of the candidates so far and one more, for every row: its cost, factor and sign."""
    s, least, most = _candidate(floor, reach, factor, direction, middle, top, zero_min, SYMMETRIC)
    level = _whole(_within(x * (1 / s)[:, None], least[:, None], most[:, None]))
    lost = tl.dot(level * s[:, None] - x, root, input_precision="tf32")
    cost = tl.sum(lost * lost, 1)
    better = cost < best
    best = tl.where(better, cost, best)
    return best, tl.where(better, factor, shrink), tl.where(better, direction, side)


@triton.jit
def search(
    target, root, scale, low,
    out, middle, top, zero_min, start, step,
    FINE_0: tl.constexpr, FINE_1: tl.constexpr, FINE_2: tl.constexpr, FINE_3: tl.constexpr,
    COARSE: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The scale [out] (and the lowest level [out]) with the least |R e|^2 of every row, among the
    candidates of search._search. ``target`` [group, out], ``root`` R [group, group]. Rows of the
    weight are rows here, too: errors then go into the product from where they are computed."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out
    index = tl.arange(0, GROUP)
    x = tl.trans(tl.load(target + index[:, None] * out + rows[None, :], inside[None, :], other=0.0))
    r = tl.trans(tl.load(root + index[:, None] * GROUP + index[None, :]))
    if SYMMETRIC:
        floor = tl.zeros([ROWS], tl.float32)
        reach = tl.max(tl.abs(x), 1)
    else:
        floor = tl.minimum(tl.min(x, 1), 0.0)
        reach = tl.maximum(tl.max(x, 1), 0.0)
    one = tl.full([ROWS], 1.0, tl.float32)
    best, shrink, side = one * float("inf"), one, one
    for i in range(COARSE):
        factor = one * (start + i * step)
        best, shrink, side = _consider(
            factor, one, x, r, floor, reach, best, shrink, side, middle, top, zero_min,
            SYMMETRIC,
        )  # fmt: skip
        if SYMMETRIC:
            best, shrink, side = _consider(
                factor, -one, x, r, floor, reach, best, shrink, side, middle, top, zero_min,
                SYMMETRIC,
            )  # fmt: skip
    centre = shrink
    for i in tl.static_range(4):
        offset = FINE_0 if i == 0 else FINE_1 if i == 1 else FINE_2 if i == 2 else FINE_3
        best, shrink, side = _consider(
            centre + offset * step, side, x, r, floor, reach, best, shrink, side, middle, top,
            zero_min, SYMMETRIC,
        )  # fmt: skip
    s, least, _ = _candidate(floor, reach, shrink, side, middle, top, zero_min, SYMMETRIC)
    tl.store(scale + rows, s, inside)
    tl.store(low + rows, least, inside)


@triton.jit
def equations(
    high, low, levels, system,
    out, width, stride, first, count,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """L_g^T H L_h [groups, groups, out] for one g and all h up to it. ``levels`` [out, width];
    ``high`` + ``low`` are the rows of H of ``count`` groups from ``first`` on, ``stride`` apart;
    all bfloat16. Rows of the weight are rows here, too: then what is added up at the end lies
    within a warp."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out
    turn = count - 1 - tl.program_id(1)  # those with the most to do begin
    g = first + turn
    index = tl.arange(0, GROUP)
    line = levels + rows[:, None] * width
    own = tl.load(line + (g * GROUP + index)[None, :], inside[:, None], other=0.0)
    for h in tl.range(0, g + 1, num_stages=STAGES):
        others = h * GROUP + index
        place = (turn * GROUP + index)[:, None] * stride + others[None, :]
        pull = tl.dot(own, tl.load(high + place))
        pull = tl.dot(own, tl.load(low + place), pull)
        other = tl.load(line + others[None, :], inside[:, None], other=0.0)
        total = tl.sum(pull * other.to(tl.float32), 1)
        tl.store(system + (g * GROUPS + h) * out + rows, total, inside)
        tl.store(system + (h * GROUPS + g) * out + rows, total, inside)


@triton.jit
def split(
    x, high, low,
    rows, columns, stride, stride_of_parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] as a sum of two parts of fewer digits; rows of x, and of both parts, are so
    far apart."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    row = row.to(tl.int64)
    given = tl.load(x + row * stride + column, inside, other=0.0)
    first = given.to(high.dtype.element_ty)
    rest = (given - first.to(tl.float32)).to(low.dtype.element_ty)
    place = row * stride_of_parts + column
    tl.store(high + place, first, inside)
    tl.store(low + place, rest, inside)
