"""Quantized linears between the plan and the output's files: each is read back once written."""

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.core.checkpoint import ShardWriter, TensorSpec
from quantkit.core.footprint import CHECKS
from quantkit.core.qweight import QWeight
from quantkit.errors import QuantkitError
from quantkit.methods import digest, fit
from quantkit.runtime.block import Block
from quantkit.runtime.ranks import ALONE, Ranks
from quantkit.workflows.layout import Job
from quantkit.workflows.method import Outcome, Solved, put, put_other
from quantkit.workflows.plan import Plan

_CPU = torch.device("cpu")

Tensors = dict[str, Tensor]  # of one linear, by suffix
Packed = tuple[Job, Solved, Tensors]


def packed(plan: Plan, index: int, outcome: Outcome) -> Iterator[Packed]:
    """The linears of a block, and the tensors that hold each in the output, packed where its codes
    are. The largest comes first: to see what was written takes longer than to write it."""
    for job in sorted(plan.layout.jobs[index], key=lambda job: -job.out * job.width):
        solved = outcome.linears[job.inner]
        yield job, solved, pack(plan, job, solved)


def pack(plan: Plan, job: Job, result: Solved) -> Tensors:
    """The tensors of one linear, by suffix."""
    try:
        fitted, _ = fit.fit(result.qweight, plan.packer.FORM)
    except fit.CannotHold as error:
        raise QuantkitError(f"{job.disk} cannot be held: {error}") from error
    tensors = plan.packer.pack(fitted)
    if job.bias:
        assert result.bias is not None
        tensors["bias"] = result.bias
    return tensors


def write(
    plan: Plan,
    index: int,
    outcome: Outcome,
    linears: Iterable[Packed],
    writer: ShardWriter,
) -> dict[str, str]:
    """Write a block, and see that what is in the file unpacks to what was solved -> the digest of
    every linear, by its name on disk."""
    at_once = CHECKS if plan.cuda else 1  # linears; each has a copy of the codes
    digests: dict[str, Future[str]] = {}
    checks: list[Future[None]] = []
    with ThreadPoolExecutor(2 * at_once, "check") as checking:  # others are written meanwhile
        for job, solved, tensors in linears:
            write_linear(job, tensors, writer)
            while len(running := _running(zip(checks, digests.values()))) == at_once:
                wait(set().union(*running), return_when=FIRST_COMPLETED)
            codes = solved.qweight.to(_CPU)
            checks.append(checking.submit(check, plan, job, codes, writer))
            digests[job.disk] = checking.submit(digest.of, codes)
        for name, tensor in outcome.others.items():
            _put(writer, plan.disk_name(index, name), tensor)
        writer.sync()
    for each in checks:
        each.result()
    return {name: found.result() for name, found in digests.items()}


def _running(pairs: Iterable[tuple[Future[Any], ...]]) -> list[set[Future[Any]]]:
    """What is left of those that are not done."""
    left = [{each for each in pair if not each.done()} for pair in pairs]
    return [some for some in left if some]


def write_linear(job: Job, tensors: Tensors, writer: ShardWriter) -> None:
    """Write the tensors of one linear."""
    for suffix, tensor in tensors.items():
        _put(writer, f"{job.disk}.{suffix}", tensor)


def check(plan: Plan, job: Job, solved: QWeight, writer: ShardWriter) -> None:
    """Raise QuantkitError when a linear in the file is not what was ``solved``, on the CPU. Leaves
    a GPU alone, which has better things to do."""
    if not read(plan, job, writer).identical(solved):
        raise QuantkitError(f"{job.disk} was written, but reads back differently")


def _put(writer: ShardWriter, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        damaged = bool(tensor.isnan().any())
        wrong = "holds numbers that are none" if damaged else f"does not fit into {_short(tensor)}"
        hint = "check that the original itself generates sensible text" if damaged else None
        raise QuantkitError(f"{name} {wrong}", hint)
    writer.write(name, tensor)


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def read(plan: Plan, job: Job, writer: ShardWriter, device: torch.device = _CPU) -> QWeight:
    """A linear out of the output's files, unpacked on ``device``, in the scheme of its job: shapes
    do not tell one group from a whole row, nor zero points in the middle from none."""
    said = plan.configuration()["quantization_config"]
    q = plan.packer.read(_Written(plan, job, writer, device), job.disk, said)
    if q.scheme.symmetric and not job.scheme.symmetric:
        q = fit.with_zeros(q)
    if q.scheme.group_size != job.scheme.group_size:
        q = q.regrouped(job.scheme.group_size) or q
    return q


def finished(
    plan: Plan, job: Job, writer: ShardWriter, device: torch.device = _CPU
) -> tuple[QWeight, Tensor | None]:
    """A linear's weight and bias out of the output's files, on ``device``."""
    bias = writer.read(f"{job.disk}.bias", device) if job.bias else None
    return read(plan, job, writer, device), bias


def put_finished(
    plan: Plan,
    index: int,
    block: Block,
    writer: ShardWriter | None,
    others: list[str],
    ranks: Ranks = ALONE,
) -> None:
    """Give the block what an earlier, interrupted run has written: its quantized weights, and the
    parameters ``others`` that it changed. Only the first rank has a ``writer``."""
    on = plan.skeleton.device
    for job in plan.layout.jobs[index]:
        put(block, job.inner, *ranks.share(finished(plan, job, writer, on) if writer else None))
    for name in others:
        tensor = writer.read(plan.disk_name(index, name)) if writer else None
        put_other(block, name, ranks.share(tensor))


@dataclass(frozen=True)
class _Written:
    """The packed tensors of a job as a format reads them."""

    plan: Plan
    job: Job
    writer: ShardWriter
    device: torch.device

    def __contains__(self, name: str) -> bool:
        return name in list(self)

    def __iter__(self) -> Iterator[str]:
        return (f"{self.job.disk}.{suffix}" for suffix in self.plan.layout.packed(self.job))

    def spec(self, name: str) -> TensorSpec:
        return self.plan.specs[name]

    def get(self, name: str) -> Tensor:
        return self.writer.read(name, self.device)
