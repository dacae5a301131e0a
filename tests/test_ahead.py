"""Working ahead keeps the order, bounds what is in flight, and ends with the first error."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantkit.workflows import ahead as module
from quantkit.workflows.ahead import ahead, on_cores


def test_results_come_in_order_whatever_takes_longer():
    def work(name):
        time.sleep(0.02 if name == "a" else 0)
        return name.upper()

    with ahead() as workers:
        assert list(workers.map(work, dict.fromkeys("abcd", 1))) == list(zip("abcd", "ABCD"))


def test_what_is_in_flight_is_bounded_and_the_largest_run_alone(monkeypatch):
    monkeypatch.setattr(module, "_IN_FLIGHT", 10)
    sizes = {"a": 4, "b": 4, "c": 4, "huge": 99, "d": 1}
    running, most = set(), []
    lock = threading.Lock()

    def work(name):
        with lock:
            running.add(name)
            most.append(sum(sizes[n] for n in running))
            assert name != "huge" or running == {"huge"}
        time.sleep(0.01)
        with lock:
            running.discard(name)

    with ahead() as workers:
        assert [name for name, _ in workers.map(work, sizes)] == list(sizes)
    assert max(most) == 99 and sorted(most)[-2] <= 8


def test_an_error_is_raised_and_nothing_is_begun_after_it(monkeypatch):
    monkeypatch.setattr(module, "_WORKERS", 1)
    begun = []

    def work(name):
        begun.append(name)
        if name == "b":
            raise ValueError("spoiled")
        if name == "c":
            time.sleep(0.1)  # may have begun before the error was seen

    with pytest.raises(ValueError, match="spoiled"), ahead() as workers:
        for _ in workers.map(work, dict.fromkeys("abcdef", 1)):
            pass
    assert "d" not in begun


def test_torch_uses_so_many_cores_inside_and_the_old_number_after():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for count in (1, 2, 3):
            with on_cores(count), ThreadPoolExecutor() as pool:
                assert torch.get_num_threads() == count
                assert pool.submit(torch.get_num_threads).result() == count
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), ahead() as workers:
            seen = [n for _, n in workers.map(lambda _: torch.get_num_threads(), {"a": 1, "b": 1})]
            assert seen == [1, 1]
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("processes", "own", "used"), [(1, 3, 3), (1, 1, 1), (1, 9, 4), (2, 1, 4), (3, 1, 2), (9, 1, 1)]
)
def test_cores_of_threads_beside_a_gpu(monkeypatch, processes, own, used):
    """A process by itself has what torch takes; of several each has its part of the machine."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))
    monkeypatch.setattr(torch, "get_num_threads", lambda: own)
    assert module.beside(processes) == used
