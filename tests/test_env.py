"""``quantkit env``: versions, the device, and why a faster kernel is not used."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from quantkit.cli.main import main
from quantkit.core.qweight import Scheme
from quantkit.runtime import token_loop
from quantkit.runtime.kernels import hopper, support
from quantkit.workflows import env


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["env", *arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_versions_and_device(capsys):
    found = json.loads(shown(capsys, "--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["vllm"] is None
    assert found["device"]["device"] == "cpu"
    assert {choice["scheme"] for choice in found["kernels"]} == {str(s) for s in env.SCHEMES}
    text = shown(capsys)
    assert "not installed" in text
    assert found["decoding"]["kernel"] in text
    assert found["cache"] in text


def test_how_a_cpu_decodes(capsys, monkeypatch):
    numba = SimpleNamespace(config=SimpleNamespace(DISABLE_JIT=0))
    monkeypatch.setitem(sys.modules, "numba", numba)
    monkeypatch.setattr(token_loop, "version", lambda name: "0.62.1")
    found = json.loads(shown(capsys, "--json"))["decoding"]
    assert "compiled" in found["kernel"] and found["reason"] is None
    monkeypatch.setattr(token_loop, "version", lambda name: "0.61.2")
    assert "0.61.2 is too old" in shown(capsys)
    monkeypatch.setattr(token_loop, "version", lambda name: "0.62.1")
    numba.config.DISABLE_JIT = 1
    assert "NUMBA_DISABLE_JIT" in shown(capsys)
    monkeypatch.setitem(sys.modules, "numba", None)  # as with a numpy that it does not take
    found = json.loads(shown(capsys, "--json"))["decoding"]
    assert "torch" in found["kernel"] and "0.62.1 does not load" in found["reason"]

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(token_loop, "version", missing)
    found = json.loads(shown(capsys, "--json"))["decoding"]
    assert "torch" in found["kernel"] and "quantkit[cpu]" in found["reason"]


def test_what_is_not_fast_has_its_reason():
    found = {choice.scheme: choice for choice in env.environment().kernels}
    assert "4 bits" in found[str(Scheme(8))].reason
    assert "torch" in found[str(Scheme(4, 64, grid="nf4"))].kernel


def test_reasons_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(support, "gpu", lambda index: support.GPU("Tesla T4", 40, (7, 5)))
    assert "8.0" in env._choice(Scheme(4), gpu).reason
    assert "8.0" in env._decoding(gpu).reason
    monkeypatch.setattr(support, "gpu", lambda index: support.GPU("RTX 4090", 128, (8, 9)))
    assert "Triton" in env._choice(Scheme(4), gpu).kernel
    assert "Hopper" in env._choice(Scheme(4), gpu).reason
    monkeypatch.setattr(support, "gpu", lambda index: support.GPU("H200", 132, (9, 0)))
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert "Triton" in env._choice(Scheme(4), gpu).reason
    monkeypatch.setattr(support, "find_spec", lambda name: object())
    monkeypatch.setattr(hopper, "find_spec", lambda name: None)
    assert "cuda-bindings" in env._choice(Scheme(4), gpu).reason
    monkeypatch.setattr(hopper, "find_spec", lambda name: object())
    assert env._choice(Scheme(4), gpu).reason is None
    assert "Hopper" in env._choice(Scheme(4), gpu).kernel
    assert "Triton" in env._choice(Scheme(8), gpu).kernel
    assert "four bits" in env._choice(Scheme(8), gpu).reason
    assert env._decoding(gpu).reason is None and "replayed" in env._decoding(gpu).kernel
    assert "nf4" in env._choice(Scheme(4, 64, grid="nf4"), gpu).reason


def test_unknown_device(capsys):
    with pytest.raises(SystemExit) as end:
        main(["env", "--device", "tpu"])
    assert end.value.code == 2
    assert "not a device" in capsys.readouterr().err
