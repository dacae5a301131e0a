"""A file with planned places: any order, any thread, kept by a run that goes on."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from quantkit.core.placed_file import PlacedFile
from quantkit.errors import QuantkitError

HEADER = b"planned"


def test_tensors_go_to_their_places_from_any_thread(tmp_path, request):
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    tensors = [torch.full((1000,), i, dtype=torch.int32) for i in range(50)]
    file = PlacedFile(tmp_path / "f", HEADER, len(HEADER) + 50 * 4000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: file.write(len(HEADER) + 4000 * i, tensors[i]), range(50)))
    for i, tensor in enumerate(tensors):
        found = file.read(len(HEADER) + 4000 * i, 4000)
        assert torch.equal(found.view(torch.int32), tensor)
    file.sync()
    file.close()
    raw = (tmp_path / "f").read_bytes()
    assert raw == HEADER + b"".join(t.numpy().tobytes() for t in tensors)


def test_a_file_with_the_same_plan_is_kept_and_any_other_begun_anew(tmp_path):
    path = tmp_path / "f"
    first = PlacedFile(path, HEADER, 11)
    assert not first.kept
    first.write(7, torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
    first.close()
    again = PlacedFile(path, HEADER, 11)
    assert again.kept and again.read(7, 4).tolist() == [1, 2, 3, 4]
    again.close()
    for header, size in ((b"PLANNED", 11), (HEADER, 12)):
        other = PlacedFile(path, header, size)
        assert not other.kept and other.read(7, size - 7).sum() == 0
        other.close()
        PlacedFile(path, HEADER, 11).close()


def test_what_is_not_contiguous_and_what_is_empty(tmp_path):
    file = PlacedFile(tmp_path / "f", HEADER, 13)
    file.write(7, torch.arange(6, dtype=torch.uint8).reshape(2, 3).T)
    file.write(13, torch.empty(0))
    assert file.read(7, 6).tolist() == [0, 3, 1, 4, 2, 5]
    assert file.read(13, 0).shape == (0,)
    with pytest.raises(QuantkitError, match="ends before"):
        file.read(7, 7)
    file.close()
