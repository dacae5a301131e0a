"""``--target-bits`` and ``--target-size``: a scheme for every part of a model, so that it loses the
least under a budget of bytes.

What each part loses at each scheme is measured (sensitivity.py), and the bytes go where they save
most (methods/allocate.py). The choice becomes rules like those that a user can write, and is kept
in the unfinished output, so that an interrupted run need not measure again.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.core.checkpoint import read_json, write_json
from quantkit.core.progress import Progress
from quantkit.core.qweight import Scheme
from quantkit.core.rules import Rule
from quantkit.core.sizes import size_in_bytes
from quantkit.errors import UsageError
from quantkit.methods import gptq
from quantkit.methods.allocate import Option, allocate
from quantkit.runtime.kernels import cpu_attention
from quantkit.runtime.states import Keeping
from quantkit.runtime.walk import Walk
from quantkit.workflows import sensitivity
from quantkit.workflows.layout import Job, lay_out
from quantkit.workflows.output import CHOICE
from quantkit.workflows.plan import BOOKKEEPING, Plan
from quantkit.workflows.sensitivity import Measured, OriginalsOf

BITS = (2, 3, 4, 8)
_FINER = (128, 64, 32)
# beside the tensors: a header and an entry in the index for each, and its line in the report
_PER_TENSOR, _FILES = 700, 64 << 10


@dataclass(frozen=True)
class Budget:
    """One of: ``bits`` per quantized weight, ``nbytes`` of the whole folder."""

    bits: float | None
    nbytes: int | None

    def __str__(self) -> str:
        return f"{self.bits:g}bit" if self.bits else _shown(self.nbytes or 0)


def wanted(target_bits: float | None, target_size: str | None) -> Budget | None:
    """The budget that the options ask for, if they do. Raises UsageError."""
    if target_bits is None and target_size is None:
        return None
    if target_bits is not None and target_size is not None:
        raise UsageError("there can be one target, in bits or in bytes", "leave one of them out")
    if target_size is not None:
        return Budget(None, size_in_bytes(target_size))
    assert target_bits is not None
    if not BITS[0] < target_bits <= BITS[-1] + 1:
        raise UsageError(f"a target of {target_bits:g} bits is out of range", "use 2.2 to 9")
    return Budget(target_bits, None)


@dataclass(frozen=True)
class Choice:
    """``plan`` with the schemes that were chosen; ``parts`` describes them, for reports."""

    plan: Plan
    parts: list[dict[str, Any]]
    expected: float

    def described(self, budget: Budget) -> dict[str, Any]:
        return {
            "target": str(budget),
            "bits_per_weight": round(self.plan.bits_per_weight, 4),
            "expected_kl": self.expected,
            "parts": self.parts,
        }


def schemes(scheme: Scheme) -> list[Scheme]:
    """What a part may get: the scheme's groups or smaller ones, in any bits."""
    group = scheme.group_size
    groups = [group, *(g for g in _FINER if group == -1 or g < group)]
    return [replace(scheme, bits=bits, group_size=g) for g in groups for bits in BITS]


def check(plan: Plan, budget: Budget, beside: int) -> None:
    """Refuse a format of one scheme, and a budget that not even the fewest bits keep, before
    anything is measured."""
    if not plan.packer.FORM.mixed:
        raise UsageError(
            f"the format {plan.layout.format} has one scheme for all linears, so there is nothing "
            "to choose",
            "use --format gptq or compressed-tensors",
        )
    free = _free(plan)
    if not free:
        raise UsageError("rules speak of every linear, so a target has nothing to choose")
    least = sum(min(option.nbytes for option in _options(plan, budget, [job])) for job in free)
    if least > _left(plan, budget, free, beside):
        fixed = _budget_bytes(plan, budget) - _left(plan, budget, free, beside)
        size, weights = fixed + least, sum(j.out * j.width for j in plan.layout.all_jobs())
        smallest = f"{8 * size / weights:.2f} bits" if budget.bits else _shown(size)
        raise UsageError(
            f"a target of {budget} cannot be met: the least is {smallest}",
            "raise the target" if budget.bits else "raise it; embeddings and head stay in 16 bits",
        )


def choose(
    plan: Plan,
    budget: Budget,
    beside: int,
    rows: list[list[int]],
    keeping: Keeping,
    originals: OriginalsOf,
    options: gptq.Options,
    progress: Progress,
) -> Choice:
    """The best schemes within the budget; deterministic. ``beside``: bytes of the files beside the
    tensors, ``originals`` as for sensitivity.measure."""
    cpu_attention.use(plan.skeleton.model)
    walk = Walk(plan.skeleton)
    free = {job.name for job in _free(plan)}
    found = sensitivity.measure(
        walk,
        rows,
        plan.way.tokens,
        keeping,
        originals,
        [scheme for scheme in schemes(plan.scheme) if _divides(plan, scheme)],
        options,
        progress,
    )
    parts = [
        (one, jobs)
        for one in found
        if (jobs := [j for j in _jobs(plan, one) if j.name in free]) and len(jobs) == len(one.names)
    ]
    offered = [_options(plan, budget, jobs, one) for one, jobs in parts]
    chosen = [job for _, jobs in parts for job in jobs]
    picked = allocate(offered, _left(plan, budget, chosen, beside))
    if picked is None:
        raise UsageError(f"a target of {budget} cannot be met", "raise it")
    rules, described = [], []
    for (one, jobs), options_, index in zip(parts, offered, picked):
        scheme = _candidates(plan, jobs, one)[index]
        rules += [Rule(j.name, bits=scheme.bits, group=scheme.group_size) for j in jobs]
        described.append(
            {
                "block": one.block,
                "linears": [job.name for job in jobs],
                "bits": scheme.bits,
                "group": scheme.group_size,
                "kl_alone": one.kl,
                "expected_kl": options_[index].loss,
            }
        )
    return _chosen(plan, tuple(rules), described)


def kept(folder: Path, fingerprint: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The choice that an interrupted run has left in ``folder``, if it was made for the same."""
    path = folder / CHOICE
    if not path.exists():
        return None
    stored = read_json(path)
    same = stored.get("fingerprint") == fingerprint
    return stored["parts"] if same else None


def keep(folder: Path, fingerprint: dict[str, Any], choice: Choice) -> None:
    """Leave the choice for a run that goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CHOICE, {"fingerprint": fingerprint, "parts": choice.parts})


def again(plan: Plan, parts: list[dict[str, Any]]) -> Choice:
    """The choice that these parts are."""
    rules = [
        Rule(name, bits=part["bits"], group=part["group"])
        for part in parts
        for name in part["linears"]
    ]
    return _chosen(plan, tuple(rules), parts)


def _chosen(plan: Plan, rules: tuple[Rule, ...], parts: list[dict[str, Any]]) -> Choice:
    layout = lay_out(
        plan.skeleton,
        plan.scheme,
        plan.layout.format,
        plan.rules + rules,
        plan.lm_head is not None,
    )
    most = Counter(job.scheme for job in layout.all_jobs()).most_common(1)[0][0]
    made = replace(plan, layout=layout, specs=layout.specs(), chosen=rules, scheme=most)
    return Choice(made, parts, sum(part["expected_kl"] for part in parts))


def _free(plan: Plan) -> list[Job]:
    """Linears of the blocks that no rule speaks of. What the head loses is not measured: it has
    the scheme that was asked for."""
    jobs = plan.layout.block_jobs()
    return [job for job in jobs if not any(rule.matches(job.name) for rule in plan.rules)]


def _divides(plan: Plan, scheme: Scheme) -> bool:
    return all(job.width % scheme.width(job.width) == 0 for job in plan.layout.all_jobs())


def _jobs(plan: Plan, one: Measured) -> list[Job]:
    return [job for job in plan.layout.jobs[one.block] if job.inner in one.names]


def _candidates(plan: Plan, jobs: list[Job], one: Measured | None = None) -> list[Scheme]:
    """Schemes in which the format can hold all of the jobs."""
    known = one.errors if one else [s for s in schemes(plan.scheme) if _divides(plan, s)]
    return [s for s in known if not any(plan.packer.refusal(j.out, j.width, s) for j in jobs)]


def _options(
    plan: Plan, budget: Budget, jobs: list[Job], one: Measured | None = None
) -> list[Option]:
    return [
        Option(
            sum(_packed_bytes(plan, budget, replace(job, scheme=scheme)) for job in jobs),
            one.expected(scheme) if one else 0.0,
        )
        for scheme in _candidates(plan, jobs, one)
    ]


def _packed_bytes(plan: Plan, budget: Budget, job: Job) -> int:
    """What counts as the job's size: for a target in bits what its numbers take, for one in bytes
    everything."""
    skipped = BOOKKEEPING if budget.bits else ()
    packed = plan.layout.packed(job).items()
    return sum(spec.nbytes for suffix, spec in packed if suffix not in skipped)


def _budget_bytes(plan: Plan, budget: Budget) -> int:
    if budget.nbytes is not None:
        return budget.nbytes
    weights = sum(job.out * job.width for job in plan.layout.all_jobs())
    return int((budget.bits or 0) * weights / 8)


def _left(plan: Plan, budget: Budget, free: list[Job], beside: int) -> int:
    """Bytes for the linears ``free`` when everything else has its own."""
    taken = {job.name for job in free}
    fixed = [job for job in plan.layout.all_jobs() if job.name not in taken]
    left = _budget_bytes(plan, budget) - sum(_packed_bytes(plan, budget, job) for job in fixed)
    if budget.bits:
        return left
    packed = sum(s.nbytes for j in plan.layout.all_jobs() for s in plan.layout.packed(j).values())
    return left - (plan.output_bytes - packed) - beside - _FILES - _PER_TENSOR * len(plan.specs)


def _shown(size: int) -> str:
    return f"{size / 1e9:.4g}GB" if size >= 1e9 else f"{size / 1e6:.4g}MB"


def table(parts: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The choice as a table: a column for each kind of part, a row for each block."""
    kinds: dict[tuple[str, ...], None] = {}
    rows: dict[int, dict[tuple[str, ...], str]] = {}
    for part in parts:
        kind = tuple(name.rpartition(".")[2] for name in part["linears"])
        kinds[kind] = None
        group = "row" if part["group"] == -1 else part["group"]
        rows.setdefault(part["block"], {})[kind] = f"{part['bits']}, {group}"
    header = ["block", *("/".join(kind) for kind in kinds)]
    return header, [
        [str(block), *(cells.get(kind, "") for kind in kinds)] for block, cells in rows.items()
    ]
