"""The kernels of fused.py. Tensors are contiguous float32 [in, out] unless said otherwise; ``low``
and ``high``, the bounds of levels, are [groups, out] where RANGED, else one number each."""

import triton
import triton.language as tl


@triton.jit
def _whole(x):
    """The nearest whole number, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _rounded(x):
    """To the 11 bits of TF32, of which products only cut off the rest: errors of one direction add
    up over all columns that pass something on."""
    return (x.to(tl.int32, bitcast=True) + 4096).to(tl.float32, bitcast=True)


@triton.jit
def _within(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _bounds(low, high, place, inside, RANGED: tl.constexpr):
    if RANGED:
        return tl.load(low + place, inside, other=0.0), tl.load(high + place, inside, other=0.0)
    else:
        return tl.load(low), tl.load(high)


# Columns go STEP by STEP: these few are vectors of their own in registers, of one row to a thread,
# and what a column waits for is the one before: everything that a step reads is read before, and
# what it leaves is written behind it. What all columns before have to pass on is a product, and
# comes first.


@triton.jit
def _vectors(matrix, stride, inside, count, STEP: tl.constexpr):
    """STEP rows of a matrix, of which there are ``count``."""
    found = ()
    for j in tl.static_range(STEP):
        found = found + (tl.load(matrix + j * stride, inside & (j < count), other=0.0),)
    return found


@triton.jit
def _shares(matrix, stride, count, STEP: tl.constexpr):
    """What is above the diagonal of a matrix [STEP, STEP], row by row: numbers."""
    found = ()
    for j in tl.static_range(STEP):
        for k in tl.static_range(j + 1, STEP):
            found = found + (tl.load(matrix + j * stride + k, k < count, other=0.0),)
    return found


@triton.jit
def _passed_on(lost, wanted, shares, j: tl.constexpr, STEP: tl.constexpr):
    """``wanted`` after column j has passed on what it ``lost`` to those behind it."""
    found = wanted[: j + 1]
    for k in tl.static_range(j + 1, STEP):
        share = shares[j * (2 * STEP - j - 1) // 2 + k - j - 1]
        found = found + (wanted[k] + share * lost,)
    return found


@triton.jit
def _take_up(
    sums, matrix, changes, start, count, out, stride, rows, inside,
    TILE: tl.constexpr, STAGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Add to STEP rows of ``sums`` what ``start`` rows of ``changes`` pass on to them, by as many
    rows of ``matrix``."""
    near, index = tl.arange(0, STEP), tl.arange(0, TILE)
    place = near[:, None] * out + rows[None, :]
    there = (near < count)[:, None] & inside[None, :]
    found = tl.load(sums + place, there, other=0.0)
    for begin in tl.range(0, start, TILE, num_stages=STAGES):
        before = begin + index
        done = before < start
        share = tl.load(
            matrix + before[None, :] * stride + near[:, None],
            done[None, :] & (near < count)[:, None],
            other=0.0,
        )
        change = tl.load(
            changes + before[:, None] * out + rows[None, :],
            done[:, None] & inside[None, :],
            other=0.0,
        )
        found = tl.dot(share, change, found, input_precision="tf32")
    # through memory: what comes next wants a row to be a vector
    tl.store(sums + place, found, there)
    tl.debug_barrier()


@triton.jit
def _round(
    passed, columns, unit, scale, low, high, levels, errors,
    out, stride, rows, inside,
    tile: tl.constexpr, RANGED: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Round so many columns of one group, in order, for some rows; all pointers are to the first
    of them."""
    step = tl.load(scale + rows, inside, other=1.0)
    inverse = 1 / step
    least, most = _bounds(low, high, rows, inside, RANGED)
    for start in range(0, tile, STEP):
        count, own = tile - start, start * out
        taken, square = passed + own, unit + start * (stride + 1)
        _take_up(
            taken, unit + start, errors, start, count, out, stride, rows, inside, TILE, STAGES,
            STEP,
        )  # fmt: skip
        column = _vectors(columns + own + rows, out, inside, count, STEP)
        wanted = _vectors(taken + rows, out, inside, count, STEP)
        shares = _shares(square, stride, count, STEP)
        level = ()
        for j in tl.static_range(STEP):
            level = level + (_whole(_within((column[j] + wanted[j]) * inverse, least, most)),)
            wanted = _passed_on(column[j] - level[j] * step, wanted, shares, j, STEP)
        for j in tl.static_range(STEP):
            place, there = own + j * out + rows, inside & (j < count)
            tl.store(levels + place, level[j], there)
            tl.store(errors + place, column[j] - level[j] * step, there)
        tl.debug_barrier()


@triton.jit
def round_tile(
    passed, columns, unit, scale, low, high, levels, errors,
    out, stride, first, at,
    tile: tl.constexpr, RANGED: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round the columns of one tile, from ``first`` on, in order. ``unit`` [in, in], rows
    ``stride`` apart: what an error (row) does to the columns behind it. One group: ``scale`` is
    [out]. What the tile is to take up is in ``passed`` from row ``at`` on, and is used up."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ahead, taken = tl.cast(first, tl.int64), tl.cast(at, tl.int64)
    _round(
        passed + taken * out, columns + ahead * out, unit + ahead * (stride + 1), scale, low, high,
        levels + ahead * out, errors + ahead * out, out, stride, rows, rows < out,
        tile, RANGED, TILE, STAGES, STEP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["block"])
def polish_block(
    pulls, hessian, scale, low, high, levels, changes,
    out, stride, first, width, block,
    SHARED: tl.constexpr, RANGED: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Coordinate descent over the columns first..first+block of groups that are ``width`` wide;
    SHARED columns, from multiples of that on, are always of one. ``hessian`` [in, in], rows
    ``stride`` apart; ``scale`` [groups, out]; ``pulls``, which is used up, and ``changes`` [block,
    out]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out
    ahead = tl.cast(first, tl.int64)
    hessian, levels = hessian + ahead * (stride + 1), levels + ahead * out
    for start in range(0, block, STEP):
        count, own = block - start, start * out
        pulled, square = pulls + own, hessian + start * (stride + 1)
        _take_up(
            pulled, hessian + start, changes, start, count, out, stride, rows, inside, TILE, STAGES,
            STEP,
        )  # fmt: skip
        pull = _vectors(pulled + rows, out, inside, count, STEP)
        old = _vectors(levels + own + rows, out, inside, count, STEP)
        shares = _shares(square, stride, count, STEP)
        step, least, most, give = (), (), (), ()
        for j in tl.static_range(STEP):
            if j % SHARED == 0:
                place, there = (first + start + j) // width * out + rows, inside & (j < count)
                its_step = tl.load(scale + place, there, other=1.0)
                its_least, its_most = _bounds(low, high, place, there, RANGED)
            step, least, most = step + (its_step,), least + (its_least,), most + (its_most,)
            stiff = tl.load(square + j * (stride + 1), j < count, other=1.0)
            give = give + (1 / (stiff * its_step),)
        change = ()
        for j in tl.static_range(STEP):
            level = _whole(_within(old[j] + pull[j] * give[j], least[j], most[j]))
            change = change + ((old[j] - level) * step[j],)
            old = old[:j] + (level,) + old[j + 1 :]
            pull = _passed_on(change[j], pull, shares, j, STEP)
        for j in tl.static_range(STEP):
            place, there = own + j * out + rows, inside & (j < count)
            tl.store(levels + place, old[j], there)
            tl.store(changes + place, change[j], there)
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
def _search(
    x, r, scale, low, high,
    middle, top, zero_min, least_factor, step, rows, inside,
    FINE_0: tl.constexpr, FINE_1: tl.constexpr, FINE_2: tl.constexpr, FINE_3: tl.constexpr,
    COARSE: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """The scale (and the bounds of levels) with the least |R e|^2 of every row of x [rows, group],
    among the candidates of search._search, which begin at ``least_factor``. ``r`` is R^T [group,
    group]. Rows of the weight are rows here, too: errors then go into the product from where they
    are computed."""
    if SYMMETRIC:
        floor = tl.zeros([x.shape[0]], tl.float32)
        reach = tl.max(tl.abs(x), 1)
    else:
        floor = tl.minimum(tl.min(x, 1), 0.0)
        reach = tl.maximum(tl.max(x, 1), 0.0)
    one = tl.full([x.shape[0]], 1.0, tl.float32)
    best, shrink, side = one * float("inf"), one, one
    # loops that are not unrolled: these are most of what is compiled
    SIGNS: tl.constexpr = 2 if SYMMETRIC else 1
    for i in range(SIGNS * COARSE):
        factor = one * (least_factor + i // SIGNS * step)
        best, shrink, side = _consider(
            factor, one - 2 * (i % SIGNS), x, r, floor, reach, best, shrink, side, middle, top,
            zero_min, SYMMETRIC,
        )  # fmt: skip
    centre = shrink
    for i in range(4):
        offset = tl.where(i < 2, tl.where(i == 0, FINE_0, FINE_1), tl.where(i == 2, FINE_2, FINE_3))
        best, shrink, side = _consider(
            centre + offset * step, side, x, r, floor, reach, best, shrink, side, middle, top,
            zero_min, SYMMETRIC,
        )  # fmt: skip
    s, least, most = _candidate(floor, reach, shrink, side, middle, top, zero_min, SYMMETRIC)
    tl.store(scale + rows, s, inside)
    if not SYMMETRIC:
        tl.store(low + rows, least, inside)
        tl.store(high + rows, most, inside)


@triton.jit
def search(
    columns, root, scale, low, high,
    out, middle, top, zero_min, least_factor, step,
    FINE_0: tl.constexpr, FINE_1: tl.constexpr, FINE_2: tl.constexpr, FINE_3: tl.constexpr,
    COARSE: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The best scales of every group, and where they are not SYMMETRIC the bounds of levels: all
    [groups, out]. ``root`` R [groups, group, group]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, group = rows < out, tl.cast(tl.program_id(1), tl.int64)
    index = tl.arange(0, GROUP)
    columns += (group * GROUP + index)[:, None] * out + rows[None, :]
    root += group * GROUP * GROUP + index[:, None] * GROUP + index[None, :]
    x = tl.trans(tl.load(columns, inside[None, :], other=0.0))
    of_bounds = 0 if SYMMETRIC else group * out
    _search(
        x, tl.trans(tl.load(root)), scale + group * out, low + of_bounds, high + of_bounds,
        middle, top, zero_min, least_factor, step, rows, inside,
        FINE_0, FINE_1, FINE_2, FINE_3, COARSE, SYMMETRIC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["groups"])
def round_block(
    passed, columns, unit, inverse, root, scale, low, high, levels, errors,
    out, stride, first, groups, middle, top, zero_min, least_factor, step,
    FINE_0: tl.constexpr, FINE_1: tl.constexpr, FINE_2: tl.constexpr, FINE_3: tl.constexpr,
    COARSE: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """So many groups from column ``first`` on, one after the other: what columns since ``first``
    pass on to it is added to ``passed``, scales are searched for what it is then, seen through
    ``inverse`` (gptq._Rounding._choose_grid), and it is rounded. ``root`` and ``inverse`` are
    [.., group, group], ``scale`` and bounds [.., out], ``passed`` [.., out], all from the first of
    these groups on; the others are of all columns, ``unit`` [in, in] with rows ``stride`` apart."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, index = rows < out, tl.arange(0, GROUP)
    of_columns = index[:, None] * out + rows[None, :]
    square = index[:, None] * GROUP + index[None, :]
    ahead = tl.cast(first, tl.int64)
    unit += ahead * (stride + 1)
    columns, levels, errors = columns + ahead * out, levels + ahead * out, errors + ahead * out
    for group in range(groups):
        start = group * GROUP
        own = start * out
        taken = tl.trans(tl.load(passed + own + of_columns, inside[None, :], other=0.0))
        for begin in tl.range(0, start, GROUP, num_stages=1):
            lost = tl.load(errors + begin * out + of_columns, inside[None, :], other=0.0)
            share = tl.load(unit + (begin + index)[:, None] * stride + (start + index)[None, :])
            lost, share = _rounded(tl.trans(lost)), _rounded(share)
            taken = tl.dot(lost, share, taken, input_precision="tf32")
        tl.store(passed + own + of_columns, tl.trans(taken), inside[None, :])
        x = tl.trans(tl.load(columns + own + of_columns, inside[None, :], other=0.0))
        turn = tl.load(inverse + group * GROUP * GROUP + square)
        x = tl.dot(taken, turn, x, input_precision="tf32x3")
        r = tl.trans(tl.load(root + group * GROUP * GROUP + square))
        of_grid = group * out
        of_bounds = 0 if SYMMETRIC else of_grid
        _search(
            x, r, scale + of_grid, low + of_bounds, high + of_bounds,
            middle, top, zero_min, least_factor, step, rows, inside,
            FINE_0, FINE_1, FINE_2, FINE_3, COARSE, SYMMETRIC,
        )  # fmt: skip
        tl.debug_barrier()
        _round(
            passed + own, columns + own, unit + start * (stride + 1), scale + of_grid,
            low + of_bounds, high + of_bounds, levels + own, errors + own, out, stride, rows,
            inside, GROUP, not SYMMETRIC, TILE, STAGES, STEP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "count", "groups"])
def equations(
    high, low, levels, system,
    out, width, stride, first, count, groups,
    GROUP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
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
        tl.store(system + (g * groups + h) * out + rows, total, inside)
        tl.store(system + (h * groups + g) * out + rows, total, inside)


@triton.jit
def split(
    x, high, low,
    rows, columns, stride, stride_of_parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] as a sum of two parts: rounded to their dtype, or cut off to TF32's digits
    where that is float32, and the rest. Rows of x, and of both parts, are so far apart."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    row = row.to(tl.int64)
    given = tl.load(x + row * stride + column, inside, other=0.0)
    if high.dtype.element_ty == tl.float32:
        first = (given.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    else:
        first = given.to(high.dtype.element_ty)
    rest = (given - first.to(tl.float32)).to(low.dtype.element_ty)
    place = row * stride_of_parts + column
    tl.store(high + place, first, inside)
    tl.store(low + place, rest, inside)
