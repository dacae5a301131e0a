"""The output head, the last part of a quantization that asks for it (``--lm-head``).

Its Hessian is that of the final norm's outputs in the original model. It has as many rows as there
are tokens, so that they are solved in pieces; rows do not depend on each other.
"""

from fractions import Fraction

from torch import Tensor, nn

from quantkit.core import pinned
from quantkit.core.checkpoint import ShardWriter
from quantkit.core.stats import InputStats
from quantkit.errors import QuantkitError
from quantkit.runtime import gather
from quantkit.runtime.block import InputGroup
from quantkit.runtime.ranks import ALONE, Ranks
from quantkit.runtime.states import States
from quantkit.runtime.walk import Walk
from quantkit.workflows import stored
from quantkit.workflows.gptq_block import Gptq, corrects, solve_group
from quantkit.workflows.layout import Job
from quantkit.workflows.method import Originals, Outcome, Solved
from quantkit.workflows.plan import Plan
from quantkit.workflows.portions import Portion, joined, share

_ROWS = 8192


def solve(
    plan: Plan,
    job: Job,
    walk: Walk,
    rows: list[Tensor],
    full: States,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Quantize the head. ``full``: the hidden states of ``rows`` behind the last block of the
    original model. Raises QuantkitError when what reaches the head is not finite."""
    assert plan.lm_head is not None
    settings = plan.lm_head
    every = gather.spacing(full, job.width, settings.tokens_per_input, ranks)
    calls, first = gather.calls(full, ranks)
    stats = InputStats(job.width, plan.skeleton.device, None, calls, every, first)
    for x in walk.head_inputs(rows, full):
        stats.add(x)
    if not stats.finite:
        raise QuantkitError(
            f"the inputs of {job.name} are not finite during calibration",
            "run with --dtype float32, and check that the model itself generates sensible text",
        )
    ranks.merge([(stats, range(ranks.size))])
    found = ranks.everyone(_solved(plan, job, stats, settings, ranks))
    return Outcome({job.inner: joined([part for parts in found for part in parts])})


def _solved(plan: Plan, job: Job, stats: InputStats, settings: Gptq, ranks: Ranks) -> list[Solved]:
    """This rank's share of the head's rows, in pieces."""
    group = InputGroup((job.inner,), job.width)
    centred = corrects(group, _originals(plan, job, 0, 1), settings)
    moments = stats.moments(centred)
    own = share(job.out, *(Fraction(rank, ranks.size) for rank in (ranks.rank, ranks.rank + 1)))
    found = []
    for start in range(own.start, own.stop, _ROWS):
        rows = slice(start, min(start + _ROWS, own.stop))
        piece = Portion({job.inner: rows}, _originals(plan, job, rows.start, rows.stop))
        solved = solve_group(piece, moments, settings, settings.rounding, "gptq")
        found.append(solved[job.inner])
    return found


def _originals(plan: Plan, job: Job, start: int, stop: int) -> Originals:
    """The outputs start..stop of the head, as the checkpoint has them."""
    device = plan.skeleton.device

    def part(leaf: str) -> Tensor:
        tensor = plan.skeleton.checkpoint.get(f"{job.disk}.{leaf}")
        return pinned.carried(tensor[start:stop], device).float()

    return Originals(
        {job.inner: job.scheme},
        lambda name: part("weight"),
        lambda name: part("bias") if job.bias else None,
        lambda name: (part(name), plan.specs[f"{job.disk}.{name}"].dtype),
        {job.inner} if job.rtn else (),
    )


def written(
    plan: Plan, job: Job, writer: ShardWriter | None, ranks: Ranks = ALONE
) -> dict[str, nn.Parameter]:
    """The head's parameters as the output's files have them, for the running model."""
    q, bias = ranks.share(stored.finished(plan, job, writer) if writer else None)
    found = {"weight": q.dequantize()} | ({} if bias is None else {"bias": bias})
    on, dtype = plan.skeleton.device, plan.skeleton.dtype
    return {
        leaf: nn.Parameter(tensor.to(on, dtype), requires_grad=False)
        for leaf, tensor in found.items()
    }
