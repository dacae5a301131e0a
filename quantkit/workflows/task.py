"""What a quantization is asked for, and what it has done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.core.calibration import Calibration
from quantkit.core.metrics import Comparison
from quantkit.core.qweight import Scheme
from quantkit.core.rules import Rule
from quantkit.workflows.budget import Budget
from quantkit.workflows.gptq_block import Gptq
from quantkit.workflows.plan import Plan


@dataclass(frozen=True)
class Task:
    """What is asked for, whatever the method: see quantize.py. ``format`` is a name of
    formats.by_name, ``lm_head`` how the output head is solved, None: not at all."""

    model: str
    out: str | Path | None
    scheme: Scheme
    format: str
    calib: tuple[str, ...]
    calib_rows: int
    calib_seqlen: int
    seed: int
    device: str
    dtype: str
    max_shard_size: str
    check: bool
    strict: bool
    overwrite: bool
    dry_run: bool
    revision: str | None
    low_disk: bool = False
    legacy_name: str | None = None
    rules: tuple[Rule, ...] = ()
    budget: Budget | None = None
    lm_head: Gptq | None = None
    max_gpu_memory: str | None = None
    max_memory: str | None = None


@dataclass
class Report:
    """What a quantization did.

    layers     by name on disk: relative output error, damping, dead inputs, method
    fallbacks  every place where something other than the asked-for was done, in words
    backoffs   every time that memory ran out and less was used from then on, in words
    ranks      processes that worked on it
    budget     what was chosen for a target in bits or bytes, and why (budget.Choice)
    measured   the quantized model against the original, on held-out text; None with check=False
    seconds    by phase
    """

    folder: Path
    plan: Plan
    calibration: Calibration
    ranks: int = 1
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    backoffs: list[str] = field(default_factory=list)
    measured: Comparison | None = None
    budget: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    written: bool = False

    def pairs(self) -> list[str]:
        """Where inputs were scaled, by AWQ: every pair of its kind, and in how many blocks."""
        seen: dict[str, list[bool]] = {}
        for block in self.plan.layout.jobs:
            notes = [self.layers.get(job.disk, {}) for job in block]
            told = {note["pair"]: note["scaled"] for note in notes if "pair" in note}
            for pair, scaled in told.items():
                seen.setdefault(pair, []).append(scaled)
        return [f"scaled in {sum(some)} of {len(some)} blocks: {n}" for n, some in seen.items()]

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Add the time that this takes to ``seconds``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
