"""The output head, the last part of a quantization that asks for it (``--lm-head``).

Its Hessian is that of the final norm's outputs in the original model. It has as many rows as there
are tokens, so that they are solved in pieces; rows do not depend on each other.
"""

import torch
from torch import Tensor, nn

from quantkit.core.checkpoint import ShardWriter
from quantkit.core.qweight import QWeight, stacked
from quantkit.core.stats import InputStats
from quantkit.errors import QuantkitError
from quantkit.runtime import gather
from quantkit.runtime.states import States
from quantkit.runtime.walk import InputGroup, Walk
from quantkit.workflows import stored
from quantkit.workflows.gptq_block import Gptq, corrects, solve_group
from quantkit.workflows.layout import Job
from quantkit.workflows.method import Originals, Outcome, Solved
from quantkit.workflows.plan import Plan

_ROWS = 8192


def solve(plan: Plan, job: Job, walk: Walk, rows: list[Tensor], full: States) -> Outcome:
    """Quantize the head. ``full``: the hidden states of ``rows`` behind the last block of the
    original model. Raises QuantkitError when what reaches the head is not finite."""
    assert plan.lm_head is not None
    settings = plan.lm_head
    every = gather.spacing(full, job.width, settings.tokens_per_input)
    stats = InputStats(job.width, plan.skeleton.device, None, len(full), every)
    for x in walk.head_inputs(rows, full):
        stats.add(x)
    if not stats.finite:
        raise QuantkitError(
            f"the inputs of {job.name} are not finite during calibration",
            "run with --dtype float32, and check that the model itself generates sensible text",
        )
    return Outcome({job.inner: _solved(plan, job, stats, settings)})


def _solved(plan: Plan, job: Job, stats: InputStats, settings: Gptq) -> Solved:
    group = InputGroup((job.inner,), job.width)
    pieces = [
        _originals(plan, job, start, min(start + _ROWS, job.out))
        for start in range(0, job.out, _ROWS)
    ]
    moments = stats.moments(centred=corrects(group, pieces[0], settings))
    found: list[Solved] = []
    energies: list[float] = []
    for piece in pieces:
        solved = solve_group(group, piece, moments, settings, settings.rounding, "gptq")
        found.append(solved[job.inner])
        weight = piece.weight(job.inner)
        energies.append(float((weight @ moments.gram).mul_(weight).sum()))
    lost = sum(one.error * energy for one, energy in zip(found, energies))
    biases = [one.bias for one in found if one.bias is not None]
    return Solved(
        stacked((one.qweight for one in found), job.out),
        torch.cat(biases) if biases else None,
        lost / sum(energies),
        found[0].damp,
        found[0].dead,
        found[0].method,
    )


def _originals(plan: Plan, job: Job, start: int, stop: int) -> Originals:
    """The outputs start..stop of the head, as the checkpoint has them."""
    device = plan.skeleton.device

    def part(leaf: str) -> Tensor:
        tensor = plan.skeleton.checkpoint.get(f"{job.disk}.{leaf}")
        return tensor[start:stop].to(device, torch.float32)

    return Originals(
        {job.inner: job.scheme},
        lambda name: part("weight"),
        lambda name: part("bias") if job.bias else None,
        lambda name: (part(name), plan.specs[f"{job.disk}.{name}"].dtype),
        {job.inner} if job.rtn else (),
    )


def written(plan: Plan, job: Job, writer: ShardWriter) -> dict[str, nn.Parameter]:
    """The head's parameters as the output's files have them, for the running model."""
    q: QWeight = stored.read(plan, job, writer)
    found = {"weight": q.dequantize()}
    if job.bias:
        found["bias"] = writer.read(f"{job.disk}.bias")
    on, dtype = plan.skeleton.device, plan.skeleton.dtype
    return {
        leaf: nn.Parameter(tensor.to(on, dtype), requires_grad=False)
        for leaf, tensor in found.items()
    }
