"""The blocks of a model, one after the other, from the checkpoint into the finished folder.

Hidden states of the calibration rows go from block to block; each block is read, solved, written
and left behind. On a GPU the next one is read, and the last one written, while this one computes.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from quantkit.core import durations, pinned, profile, sound
from quantkit.core.checkpoint import ShardWriter
from quantkit.core.counted import counted
from quantkit.core.ledger import Ledger
from quantkit.core.progress import Progress, Step
from quantkit.errors import QuantkitError
from quantkit.methods import digest
from quantkit.runtime import gather
from quantkit.runtime.block import Block
from quantkit.runtime.kernels import cpu_attention
from quantkit.runtime.ranks import Ranks
from quantkit.runtime.staging import Staging, staging
from quantkit.runtime.states import Keeping
from quantkit.runtime.walk import Walk
from quantkit.workflows import head as heading
from quantkit.workflows import stored
from quantkit.workflows.ahead import beside, on_cores, one_behind
from quantkit.workflows.calibrate import shared
from quantkit.workflows.check import RideAlong
from quantkit.workflows.compiled import compiled_ahead
from quantkit.workflows.layout import Job
from quantkit.workflows.method import Originals, Outcome
from quantkit.workflows.plan import Plan
from quantkit.workflows.task import Report

_DENSE = "dense"  # the part of the ledger that says so of what is not quantized


@dataclass(frozen=True)
class Files:
    """Where results go, and what says which of them are there."""

    writer: ShardWriter
    ledger: Ledger


class Blocks:
    """The way of a plan through all blocks. Each rank walks it with its part of the rows; the first
    one has ``files``.

    states    where hidden states are kept
    rides     rows by set that are compared along the way (check.py)
    strict    raise where a linear takes more damping than asked for, or has no Hessian
    """

    def __init__(
        self,
        plan: Plan,
        states: Keeping,
        files: Files | None,
        report: Report,
        rides: dict[str, list[list[int]]],
        strict: bool,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self._plan, self._files, self._report, self._strict = plan, files, report, strict
        self._progress, self._ranks, self._rides = progress, ranks, rides
        self._writer = files.writer if files else None
        reports = {part: files.ledger.report(part) for part in files.ledger} if files else None
        self._finished: dict[str, dict[str, Any]] = ranks.share(reports)
        self._walk = Walk(plan.skeleton)
        self._parts = len(self._walk) + (plan.layout.head is not None)
        self._states = states
        self._ending: Callable[[], None] | None = None  # of a block, which is not told of yet

    def run(self) -> None:
        """Raises what solving a block raises; what is finished by then stays so, but for the last
        block where it is written late."""
        cpu_attention.use(self._plan.skeleton.model)
        skeleton, threaded = self._plan.skeleton, self._plan.threaded
        reading = staging(skeleton, threaded)
        writing = one_behind(threaded, skeleton.device)
        cores = on_cores(beside(self._ranks.here())) if threaded else nullcontext()
        with cores, compiled_ahead(self._plan), writing as self._behind, reading as ahead:
            with self._report.timing("copy"):
                self._behind(self._copy_dense)
            self._embed()
            self._tell_finished()
            self._progress.begin("quantizing", self._parts)
            self._since = time.perf_counter()
            for index in range(len(self._walk)):
                self._block(index, ahead)
            self._end()
            if self._plan.layout.head:
                self._head(self._plan.layout.head)
            self._progress.end()
            self._compare()
            with self._report.timing("write"):
                self._behind.finish()

    def _tell_finished(self) -> None:
        names = [self._walk.block_name(index) for index in range(len(self._walk))]
        if solved := sum(name in self._finished for name in names):
            once = "it is" if solved == 1 else "they are"
            known = f"{counted(solved, 'block')} solved already"
            self._progress.note(f"going on: {known}, {once} only run")

    def _copy_dense(self) -> None:
        """Embeddings, norms, head: as they are, but float32 becomes float16."""
        plan, files = self._plan, self._files
        if files is None or _DENSE in files.ledger:
            return
        for name, spec in plan.layout.dense.items():
            files.writer.write(name, sound.written(name, plan.checkpoint.get(name), spec.dtype))
        for name, spec in plan.layout.ones.items():
            files.writer.write(name, torch.ones(spec.shape, dtype=spec.dtype))
        files.writer.sync()
        self._plan.checkpoint.release()
        files.ledger.finish(_DENSE, {})

    def _embed(self) -> None:
        """Hidden states in front of the first block."""
        plan = self._plan
        everyone = shared(self._report.calibration.rows, plan.way.tokens, self._ranks.size)
        self._rows = everyone[self._ranks.part(len(everyone))]
        self._ride = RideAlong(self._rides, plan.tokens_compared, self._ranks)
        batches = [*self._rows, *self._ride.batches, *_other_shapes(everyone, self._rows)]
        keep = self._states.keep
        with self._report.timing("embed"), closing(self._walk.embedding(batches)) as hidden:
            own = islice(hidden, len(self._rows))
            self._full = keep(own, [batch.shape for batch in self._rows])
            aside = islice(hidden, len(self._ride.batches))
            self._ride.start(keep(aside, [batch.shape for batch in self._ride.batches]))
            for _ in hidden:  # other shapes are only made known
                pass
            self._quantized = self._full.copy() if plan.method.aligned else None

    def _block(self, index: int, ahead: Staging | None) -> None:
        report = self._report
        part, last = self._walk.block_name(index), index + 1 == len(self._walk)
        if ahead:
            with report.timing("read"):
                ahead.arrived(part)
        with self._walk.block(index) as block:
            if ahead and not last:
                ahead.begin(self._walk.block_name(index + 1))
            with report.timing("check"):
                self._ride.before(block)
            done = self._finished.get(part)
            seen = self._look(block) if done is None else None
            self._end()
            kept: gather.Kept = {}
            if done is not None:
                self._replay(index, block, part, done)
            else:
                kept = self._solve(index, block, seen, part)
            if not self._plan.threaded:
                self._end()
            if self._quantized is not None and not last:
                with report.timing("propagate"):
                    gather.advance(block, self._quantized, kept)
            with report.timing("check"):
                self._ride.after(block)
        self._plan.checkpoint.release()

    def _end(self) -> None:
        """Write and tell of the last block that was solved. A GPU has to be waited for to do so:
        where threads write, that is put off until the next one has been looked at, which waits for
        it by itself where something is aligned."""
        ending, self._ending = self._ending, None
        if ending:
            ending()

    def _replay(self, index: int, block: Block, part: str, done: dict[str, Any]) -> None:
        """A block that is solved already."""
        with self._report.timing("replay"):
            gather.advance(block, self._full)
            others = done["others"]
            stored.put_finished(self._plan, index, block, self._writer, others, self._ranks)
        self._ending = partial(self._told, index + 1, part, self._plan.layout.jobs[index], done)

    def _look(self, block: Block) -> Any:
        """What the method has to know of the block, on all ranks."""
        ranks, method = self._ranks, self._plan.method
        with self._report.timing("solve"), profile.phase("trace"):
            return ranks.share(method.look(block, self._full[0]) if ranks.first else None)

    def _solve(self, index: int, block: Block, seen: Any, part: str) -> gather.Kept:
        """A block by the method: inputs that are kept."""
        plan = self._plan
        with self._report.timing("solve"):
            found = originals(plan, index, block)
            keep = plan.way.keeps and index + 1 < len(self._walk)
            outcome = plan.method.solve(
                block, seen, found, self._full, self._quantized, self._ranks, keep
            )
            linears: Iterable[stored.Packed] = stored.packed(plan, index, outcome)
            if plan.threaded and self._files:
                with profile.phase("pack"):  # here, and not beside what the next block computes
                    linears = list(linears)
        if measured := profile.running():
            tokens = sum(batch.numel() for batch in self._rows)
            measured.add(durations.least(plan.shapes.blocks[index], tokens))
        self._ending = partial(self._finish, index, part, outcome, linears)
        return outcome.kept

    def _finish(
        self, index: int, part: str, outcome: Outcome, linears: Iterable[stored.Packed]
    ) -> None:
        """Begin to write a block that was solved, and tell of it."""
        jobs = self._plan.layout.jobs[index]
        done = _described(jobs, outcome) | {"tokens": self._plan.way.tokens}
        with self._report.timing("write"):
            self._behind(self._keep, index, outcome, linears, part, done)
        self._told(index + 1, part, jobs, done)

    def _keep(
        self,
        index: int,
        outcome: Outcome,
        linears: Iterable[stored.Packed],
        part: str,
        done: dict[str, Any],
    ) -> None:
        """A block into the output's files and then into the ledger, while the next one computes."""
        if self._files:
            found = stored.write(self._plan, index, outcome, linears, self._files.writer)
            for name, its_digest in found.items():
                done["layers"][name]["digest"] = its_digest
            self._files.ledger.finish(part, done)

    def _head(self, job: Job) -> None:
        """The last part: behind all blocks is what the original model gives its final norm."""
        with self._report.timing("write"):  # the files are used here now
            self._behind.finish()
        done = self._finished.get(job.name)
        if done is None:
            done = self._solve_head(job)
        self._told(self._parts, job.name, [job], done)

    def _solve_head(self, job: Job) -> dict[str, Any]:
        plan, files = self._plan, self._files
        with self._report.timing("solve"):
            outcome = heading.solve(plan, job, self._walk, self._rows, self._full, self._ranks)
        done = _described([job], outcome)
        if files:
            with self._report.timing("write"):
                solved = outcome.linears[job.inner]
                stored.write_linear(job, stored.pack(plan, job, solved), files.writer)
                codes = solved.qweight.to("cpu")
                stored.check(plan, job, codes, files.writer)
                done["layers"][job.disk]["digest"] = digest.of(codes)
                files.writer.sync()
            files.ledger.finish(job.name, done)
        return done

    def _compare(self) -> None:
        """What the held-out rows that rode along say."""
        if not self._rides:
            return
        job = self._plan.layout.head
        with self._report.timing("check"):
            head = heading.written(self._plan, job, self._writer, self._ranks) if job else None
            self._report.measured = self._ride.finish(self._walk, head)

    def _told(self, count: int, part: str, jobs: list[Job], done: dict[str, Any]) -> None:
        """Take a finished part into the report, and to whoever watches."""
        layers = done["layers"]
        self._report.layers |= layers
        self._count_fallbacks(jobs, layers)
        errors = [layers[job.disk]["error"] for job in jobs]
        loss = sum(errors) / len(errors) if errors else None
        now = time.perf_counter()
        self._progress.step(Step(count, self._parts, part, loss, now - self._since))
        self._since = now

    def _count_fallbacks(self, jobs: list[Job], layers: dict[str, dict[str, Any]]) -> None:
        found = []
        for job in jobs:
            layer = layers[job.disk]
            if layer["damp"] > self._plan.method.damp:
                found.append(
                    f"{job.disk} needed a damping of {layer['damp']:g} (statistics are exact with "
                    "--dtype float32)"
                )
            if layer["method"] == "rtn" and not job.rtn:
                found.append(f"{job.disk} was only rounded: no calibration token reached it")
            if not isfinite(layer["error"]):
                raise QuantkitError(f"{job.disk} has an error that is not a number")
        if found and self._strict:
            raise QuantkitError(f"--strict: {found[0]}", "leave out --strict to allow it")
        for text in found:
            self._progress.warn(text)
        self._report.fallbacks += found


def _other_shapes(everyone: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    """A micro-batch of every shape that only other ranks have."""
    known = {batch.shape for batch in own}
    found = {batch.shape: batch for batch in everyone if batch.shape not in known}
    return [*found.values()]


def originals(plan: Plan, index: int, block: Block) -> Originals:
    """A block's weights as the checkpoint has them."""
    skeleton = plan.skeleton
    jobs = {job.inner: job for job in plan.layout.jobs[index]}

    def get(disk: str) -> Tensor:
        # in two steps: in one, the CPU would make a float32 copy first
        return pinned.carried(skeleton.read(disk), skeleton.device).float()

    def weight(name: str) -> Tensor:
        tensor = get(f"{jobs[name].disk}.weight")
        return tensor.T.contiguous() if isinstance(block.linear(name), Conv1D) else tensor

    def bias(name: str) -> Tensor | None:
        return get(f"{jobs[name].disk}.bias") if jobs[name].bias else None

    def other(name: str) -> tuple[Tensor, torch.dtype]:
        disk = plan.disk_name(index, name)
        return get(disk), plan.specs[disk].dtype

    schemes = {name: job.scheme for name, job in jobs.items()}
    plain = {name for name, job in jobs.items() if job.rtn}
    return Originals(schemes, weight, bias, other, plain)


def _described(jobs: list[Job], outcome: Outcome) -> dict[str, Any]:
    """A finished block in the ledger. Here it is waited for what a GPU has computed."""
    results = [outcome.linears[job.inner] for job in jobs]
    lost = [solved.error for solved in results]
    errors = pinned.numbers(torch.stack(lost)) if lost else []
    layers = {
        job.disk: {
            "error": error,
            "damp": solved.damp,
            "dead": solved.dead,
            "method": solved.method,
            **solved.notes,
        }
        for job, solved, error in zip(jobs, results, errors)
    }
    return {"layers": layers, "others": list(outcome.others)}
