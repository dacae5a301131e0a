"""How the search for the best division of a product is made and kept."""

import json

import pytest
import torch
from kernels import random_weight

from quantkit.core import cache
from quantkit.core.qweight import Scheme
from quantkit.runtime.kernels import tune
from quantkit.runtime.kernels.fragments import arrange
from quantkit.runtime.kernels.skinny import Config

CONFIG = Config(split=4, step=32)


@pytest.fixture
def weight(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tune._known.cache_clear()
    yield arrange(random_weight(Scheme(4, 32), 32, 256))
    tune._known.cache_clear()


def counting(monkeypatch, best):
    """A clock by which ``best`` shares are the fastest; the shares that were tried."""
    tried = []

    def seconds(launch):
        tried.append(launch())
        return abs(tried[-1] - best)

    monkeypatch.setattr(tune, "seconds", seconds)
    return tried


def found(weight):
    run = lambda config: config.split  # noqa: E731
    return tune.tuned(weight, [CONFIG], torch.float16, "NVIDIA H200", run).split


def test_measured_once_and_kept(weight, monkeypatch):
    tried = counting(monkeypatch, best=6)
    assert found(weight) == 6
    assert sorted(tried) == [2, 3, 4, 5, 6, 8]
    assert found(weight) == 6
    assert len(tried) == 6
    tune._known.cache_clear()  # another process
    assert found(weight) == 6
    assert len(tried) == 6
    assert json.loads(cache.read(tune.KIND, "NVIDIA-H200.json"))


@pytest.mark.parametrize("content", [b'{"a": ', b"[]", b'{"a": "b"}', b'{"a": {"b": 1}}'])
def test_a_spoiled_file_is_measured_again(weight, monkeypatch, content):
    cache.write(tune.KIND, "NVIDIA-H200.json", content)
    counting(monkeypatch, best=2)
    assert found(weight) == 2


def test_nothing_is_measured_while_a_graph_is_captured(weight, monkeypatch):
    tried = counting(monkeypatch, best=6)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert found(weight) == CONFIG.split
    assert not tried
