"""Kernels that a run will take, compiled while it reads the model and embeds the first rows."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from quantkit.methods import fused
from quantkit.workflows.plan import Plan

_AT_ONCE = 2  # those of one scheme


@contextmanager
def compiled_ahead(plan: Plan) -> Iterator[None]:
    """While open, threads compile what takes long, where the plan's device takes any of it, in the
    order in which it is needed. Their errors are those of whoever needs a kernel, and compiles it
    then."""
    schemes = dict.fromkeys(job.scheme for jobs in plan.layout.jobs for job in jobs if not job.rtn)
    device, refines = plan.skeleton.device, bool(plan.method.rounds)
    calls = [call for scheme in schemes for call in fused.slow_to_compile(scheme, refines, device)]
    if not calls:
        yield
        return
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="compiling") as pool:
        for call in calls:
            pool.submit(call)
        try:
            yield
        finally:
            pool.shutdown(cancel_futures=True)
