"""How long quantizing, measuring and running a model take: operations over speeds.

Every formula counts what the code does, in floating-point operations and bytes; what a machine does
of them in a second is :class:`Speed`. docs/plan.md compares the results with measured ones. They
are estimates: within a factor of two is what they are good for.
"""

from dataclasses import dataclass

from quantkit.core.footprint import Block, Mode, Run, Shapes

# Shares of the nominal speed that are reached. What one step of a column loop costs on a GPU: in
# kernel launches (eight of them at 10 us), or in a kernel that takes 512 columns (measured).
_HALF_SHARE, _SINGLE_SHARE, _MEMORY_SHARE = 0.5, 0.6, 0.6
_COLUMN_ON_GPU, _COLUMN_FUSED = 8e-5, 4e-7
_PARTS = 3  # products of half precision in one of the solver's, where it works so (products.py)
_START = 6.0  # imports, tokenizer, calibration texts
_READING = 1e9  # bytes a second from a disk
_GRAM_SHARE = 36 / 64  # of a gram that is multiplied (stats.py)
_CONSIDERED = 18  # scales that a group's search looks at
_TILE = 128
# Bytes that move for a weight when a quantized linear meets few rows: on older GPUs codes become
# float32 numbers first; kernels of newer ones and of CPUs read them as they are.
_UNPACKED_TRAFFIC = 30
# a block's own Python and launches, a token; or what is left of them in a captured step (measured)
_STEP_ON_GPU, _STEP_CAPTURED, _STEP_ON_CPU = 5e-4, 1.5e-5, 1e-4
_SAMPLES = 8 * 32  # tokens that verify lets both models write


@dataclass(frozen=True)
class Speed:
    """Operations a second in the dtype that models run in, in float32, and in the solver's large
    products; bytes a second of memory and in the solver's caches; seconds of a column's step beside
    its work. ``step``: seconds of a block's launches when a token is made; ``unpacks``: whether
    codes are made numbers in memory then."""

    half: float
    single: float
    products: float
    memory: float
    cached: float
    column: float
    step: float
    unpacks: bool


def of_gpu(half: float, single: float, bandwidth: float, kernels: bool) -> Speed:
    """The speed of a GPU with so many TFLOP/s and GB/s; whether quantkit's kernels run on it."""
    fast, slow = half * 1e12 * _HALF_SHARE, single * 1e12 * _SINGLE_SHARE
    memory = bandwidth * 1e9 * _MEMORY_SHARE
    if kernels:
        return Speed(
            fast, slow, fast / _PARTS, memory, memory, _COLUMN_FUSED, _STEP_CAPTURED, False
        )
    return Speed(fast, slow, slow, memory, memory, _COLUMN_ON_GPU, _STEP_ON_GPU, True)


def of_cpu(half: float, single: float, memory: float, cached: float, column: float) -> Speed:
    """That of a CPU, as it was measured."""
    return Speed(half, single, single, memory, cached, column, _STEP_ON_CPU, False)


def quantizing(
    shapes: Shapes, run: Run, mode: Mode, thinned: int | None, stored: int, speed: Speed
) -> float:
    """Seconds of a quantization by calibration. ``thinned``: tokens per input in the statistics,
    None for all; ``stored``: bytes of the original."""
    blocks = sum(_block(shapes, block, run, mode, thinned, speed) for block in shapes.blocks)
    embedding = 4 * run.tokens * shapes.hidden * run.item / speed.memory
    head = 2 * 2 * run.aside * shapes.hidden * shapes.vocabulary / speed.half
    return _START + stored / _READING + embedding + blocks + head


def _block(
    shapes: Shapes, block: Block, run: Run, mode: Mode, thinned: int | None, speed: Speed
) -> float:
    widest = max(group.width for group in block.groups)
    used = run.tokens if thinned is None else min(run.tokens, max(1, thinned * widest))
    passes = 3 if run.aligned else 1
    forward = 2 * block.active + 2 * shapes.hidden * run.row
    half: float = passes * run.tokens * forward + 2 * run.aside * forward
    writers = [group for group in block.groups if group.writes]
    alone = bool(writers) and all(group.keepable for group in writers)
    if run.aligned and mode.keeps and alone and shapes.exact and block.active == block.linears:
        # the last pass is of these alone (experts are behind them, and run again)
        half -= run.tokens * (forward - 2 * sum(group.numbers for group in writers))
    moved = passes * run.tokens * block.working * run.item
    single = products = cached = columns = 0.0
    for group in block.groups:
        drift = run.aligned and group.writes
        seen = used if group.share == 1 else run.tokens * group.share
        half += 2 * seen * (_GRAM_SHARE * group.width**2 + drift * group.numbers)
        width = group.width if run.group == -1 else run.group
        product = group.numbers * group.width
        single += group.width**3 / 3
        single += 2 * _CONSIDERED * width * group.numbers
        products += 2 * drift * product
        products += 2 * product + 4 * product  # rounding; the error and its scale
        products += 5 * run.rounds * product
        cached += 4 * group.numbers * (_TILE / 2 + 6) * (1 + run.rounds)
        cached += 4 * 6 * _CONSIDERED * group.numbers
        columns += group.width * (1 + run.rounds)
    return (
        half / speed.half
        + moved / speed.memory
        + single / speed.single
        + products / speed.products
        + cached / speed.cached
        + columns * speed.column
    )


def least(block: Block, tokens: int) -> dict[str, float]:
    """Operations that a block's quantization by calibration cannot do without, by the phases of
    ``--profile``: one forward pass, half of each symmetric Hessian, its Cholesky factor, and one
    pass of rounding."""
    groups = block.groups
    return {
        "forward": 2.0 * tokens * block.active,
        "hessian": sum(tokens * group.share * group.width * (group.width + 1) for group in groups),
        "factor": sum(group.width**3 / 3 for group in groups),
        "round": float(sum(group.numbers * group.width for group in groups)),
    }


def rounding(shapes: Shapes, stored: int, speed: Speed) -> float:
    """Seconds of a quantization without calibration: bytes are read, rounded and written."""
    return _START / 2 + stored / _READING + 40 * shapes.numbers / speed.memory


def token(shapes: Shapes, weights: int, quantized: int, speed: Speed) -> float:
    """Seconds of a token when one text is continued. ``weights``: bytes of the model, ``quantized``
    how many weights among them are codes."""
    active = sum(block.active for block in shapes.blocks)
    share = active / sum(block.linears for block in shapes.blocks)
    traffic: float = weights + (_UNPACKED_TRAFFIC * quantized if speed.unpacks else 0)
    step = speed.step
    if share < 1:  # Python asks which experts a token goes to, and the others are not read
        outside = min(weights, 2 * shapes.outside)
        traffic = outside + share * (traffic - outside)
        step = max(step, _STEP_ON_GPU)
    return traffic / speed.memory + step * len(shapes.blocks)


def prompt(shapes: Shapes, tokens: int, speed: Speed) -> float:
    """Seconds until ``tokens`` tokens have gone through the model."""
    linears = sum(block.active for block in shapes.blocks)
    attention = len(shapes.blocks) * 2 * shapes.hidden * tokens
    return tokens * 2 * (linears + attention) / speed.half


def loading(weights: int) -> float:
    """Seconds until a model of so many bytes is in memory."""
    return _START / 2 + weights / _READING


def verifying(
    shapes: Shapes, weights: int, quantized: int, rows: int, row: int, speed: Speed
) -> float:
    """Seconds of verify: both models see ``rows`` rows, and continue a few prompts."""
    head = 2 * 2 * rows * row * shapes.hidden * shapes.vocabulary / speed.half
    unpacking = rows * _UNPACKED_TRAFFIC * quantized / speed.memory
    written = _SAMPLES * 2 * token(shapes, weights, quantized, speed)
    runs = 2 * rows * prompt(shapes, row, speed)
    return loading(weights) + shapes.numbers * 2 / _READING + runs + head + unpacking + written
