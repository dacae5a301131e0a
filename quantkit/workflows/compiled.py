"""Kernels that a run will take, compiled while it reads the model and embeds the first rows."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from quantkit.methods import fused
from quantkit.workflows.plan import Plan


@contextmanager
def compiled_ahead(plan: Plan) -> Iterator[None]:
    """While open, threads compile what takes long, where the plan's device takes any of it. What is
    needed before it is there is compiled by whoever needs it. Raises, in the end, what they do."""
    schemes = {job.scheme for jobs in plan.layout.jobs for job in jobs if not job.rtn}
    device, refines = plan.skeleton.device, bool(plan.method.rounds)
    calls = [call for scheme in schemes for call in fused.slow_to_compile(scheme, refines, device)]
    if not calls:
        yield
        return
    with ThreadPoolExecutor(len(calls), thread_name_prefix="compiling") as pool:
        running = [pool.submit(call) for call in calls]
        yield
        for each in running:
            each.result()
