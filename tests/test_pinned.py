"""Bytes that go by way of a pinned piece, part by part: here through memory that is not pinned, and
between tensors of the CPU. On a GPU: test_gpu_quantize.py."""

import threading

import pytest
import torch

from quantkit.core import pinned

SIZE = 24


@pytest.fixture(autouse=True)
def piece(monkeypatch):
    """The piece, and how often it was waited for."""
    found, waited = torch.empty(SIZE, dtype=torch.uint8), []
    monkeypatch.setattr(pinned, "_PIECE", SIZE)
    monkeypatch.setattr(pinned, "_piece", lambda: found)
    monkeypatch.setattr(pinned, "_wait", lambda device: waited.append(device))
    return waited


TENSORS = [
    torch.arange(64.0).reshape(8, 8),
    torch.arange(64.0).reshape(8, 8).T,  # not contiguous
    torch.arange(6.0),  # one piece exactly
    torch.tensor(7, dtype=torch.int64),
    torch.empty(0, 4),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=str)
def test_what_leaves_arrives(tensor, piece):
    raw = b"".join(part.numpy().tobytes() for part in pinned.leaving(tensor))
    assert raw == tensor.contiguous().numpy().tobytes()
    assert len(piece) == -(-len(raw) // SIZE)
    there = torch.zeros(tensor.shape, dtype=tensor.dtype)
    source = torch.frombuffer(bytearray(raw or b" "), dtype=torch.uint8)
    pinned.fill(there, lambda part, start: part.copy_(source[start : start + len(part)]))
    assert torch.equal(there, tensor)


def test_nothing_is_copied_where_it_is_already():
    assert pinned.carried(TENSORS[0], torch.device("cpu")) is TENSORS[0]


def test_an_error_of_what_fills_it_is_told():
    def fails(part, start):
        raise EOFError("no more")

    with pytest.raises(EOFError):
        pinned.fill(torch.empty(4), fails)


def test_each_thread_has_a_piece_of_its_own(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch, "empty", lambda *given, **named: object())
    found = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.extend([pinned._piece(), pinned._piece()]))
        thread.start()
        thread.join()
    assert found[0] is found[1] is not found[2] is found[3]


def test_a_gpu_is_waited_for_before_its_numbers_are_copied(piece):
    class There:
        is_cuda, device = True, "there"

        def tolist(self):
            assert piece == ["there"]
            return [1, 2]

    assert pinned.numbers(There()) == [1, 2]
    assert pinned.numbers(torch.tensor(True)) is True and len(piece) == 1
