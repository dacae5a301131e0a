"""The kernels of the compiled token against torch, and its threads."""

import errno
import os
import platform
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from tools import model, quantized

pytest.importorskip("numba")

from numba import config, njit

from quantkit.errors import QuantkitWarning
from quantkit.runtime import decode_cpu, token_loop
from quantkit.runtime.joined import Dense, Int4
from quantkit.runtime.kernels import cpu_int4, cpu_token, vectors
from quantkit.runtime.load import load

IDS = [5, 17, 99, 3, 250, 31, 8, 120, 64, 77]


def own(width: int) -> cpu_token.Own:
    empty = np.empty(width, np.float32)
    rounded, output = np.empty(width, np.uint16), np.empty(cpu_token.PART, np.float32)
    return cpu_token.Own(empty, rounded, empty.copy(), output, empty, empty, empty, 0)


def multiplied(linear: Int4 | Dense, x: torch.Tensor, y: torch.Tensor, add: bool) -> torch.Tensor:
    """The kernel's product, in a copy of ``y``."""
    loop = token_loop.TokenLoop([linear], [torch.ones(1)], (1, 1, 1), 1e-5)
    turn, found = np.zeros((2, 8), np.int64), y.clone()
    shape, memory = loop._shape._replace(threads=1), own(len(x))
    cpu_token._multiply(turn, loop._products[0], shape, x.numpy(), memory, found.numpy(), add)
    return found


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("out", "width", "group"), [(64, 32, 32), (192, 256, 128), (640, 768, 256)]
)
def test_products_of_int4(dtype, out, width, group):
    torch.manual_seed(out)
    codes = torch.randint(0, 16, (out, width), dtype=torch.uint8)
    scale, zero = torch.rand(out, width // group) + 0.1, torch.randint(0, 16, (out, width // group))
    scales = cpu_int4.scales_and_offsets(scale, zero, None, dtype)
    linear = Int4(cpu_int4.pack(codes), scales, group, torch.randn(out))
    x, y = torch.randn(width), torch.randn(out)
    scale, offset = scales.double().permute(2, 1, 0)
    weight = scale[..., None] * (codes.double() - 8).view(out, -1, group) + offset[..., None]
    exact = x.to(dtype) if vectors.PAIRS else x
    wanted = weight.reshape(out, width) @ exact.double() + linear.bias.double()
    assert apart(multiplied(linear, x, y, False), wanted) < 2e-6
    assert apart(multiplied(linear, x, y, True), wanted + y.double()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (70, 33), (256, 128)])
def test_dense_products(dtype, out, width):
    torch.manual_seed(out)
    weight, x, y = torch.randn(out, width).to(dtype), torch.randn(width), torch.randn(out)
    wanted = weight.double() @ x.double()
    assert apart(multiplied(Dense(weight, None), x, y, False), wanted) < 1e-6
    bias = torch.randn(out)
    wanted += y.double() + bias.double()
    assert apart(multiplied(Dense(weight, bias), x, y, True), wanted) < 1e-6


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 processors")
def test_products_on_an_older_processor():
    """The same with AVX2 and nothing newer: codes in blocks of 32 rows, x in float32."""
    features = ("avx", "avx2", "fma", "f16c", "bmi", "bmi2", "sse", "sse2", "sse3", "ssse3")
    older = {
        "ATEN_CPU_CAPABILITY": "avx2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in (*features, "sse4.1", "sse4.2")),
    }
    file = Path(__file__)
    check = (
        "import pytest\n"
        "from quantkit.runtime.kernels import cpu_int4, vectors\n"
        "assert cpu_int4.block_rows() == 32 and not vectors.PAIRS\n"
        f"raise SystemExit(pytest.main([{str(file)!r}, '-k', 'int4 or dense', '-p', 'no:xdist']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", check], env=os.environ | older, cwd=file.parent, capture_output=True
    )
    assert run.returncode == 0, run.stdout.decode()[-3000:] + run.stderr.decode()[-3000:]


def one(x):
    return x + 1


def test_what_was_compiled_is_kept_until_the_words_change(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def found() -> bool:
        """Whether it was there."""
        compiled = cpu_token._whole(one)
        assert compiled(1) == 2
        return bool(compiled.stats.cache_hits)

    assert [found(), found()] == [False, True]
    changed = tmp_path / "vectors.py"
    changed.write_text(Path(vectors.__file__).read_text("utf-8") + "#", "utf-8")
    monkeypatch.setattr(vectors, "__file__", str(changed))
    assert [found(), found()] == [False, True]


def test_without_room_to_keep_it_a_token_is_computed(monkeypatch):
    compiled = cpu_token.token.compile

    def full(kinds):  # as numba does it
        compiled(kinds)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cpu_token.token, "compile", full)
    state = decode_cpu.LlamaState(load(str(model("llama")), dtype="float32")[0])
    with torch.inference_mode(), pytest.warns(QuantkitWarning, match="No space left"):
        assert state.compute(IDS[:1]).isfinite().all()


def test_exp():
    x = np.concatenate([np.linspace(-87, 87, 997), [-1e9, 1e9, 0.0]]).astype(np.float32)
    found = np.array([cpu_token._exp(number) for number in x])
    wanted = np.exp(x.clip(-87, 87).astype(np.float64))
    assert np.abs(found / wanted - 1).max() < 2e-7
    assert np.isnan(cpu_token._exp(np.float32("nan")))


def test_numbers_are_rounded_as_torch_does():
    @njit
    def rounded(x, out):
        for i in range(len(x)):
            out[i] = vectors.narrow(x[i], out)

    bits = torch.randint(0, 1 << 16, (4096,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.randn(4096), (bits << 15).int().view(torch.float32)])  # and ties
    x = x[x.isfinite()]
    out = np.empty(len(x), np.uint16)
    rounded(x.numpy(), out)
    assert torch.equal(torch.from_numpy(out).view(torch.bfloat16), x.bfloat16())


def test_a_turn_ends_when_all_parts_are_done():
    turn = np.zeros((2, 8), np.int64)
    waiting = Thread(target=cpu_token._meet, args=(turn, 1, 3), daemon=True)
    cpu_token._meet(turn, 0, 0)  # compiled
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    cpu_token._meet(turn, 2, 3)
    waiting.join()
    assert turn[0, 0] == 3


def test_a_token_ends_when_all_who_began_are_done():
    turns = np.zeros((1, 2, 8), np.int64)
    cpu_token.end(np.zeros((1, 2, 8), np.int64))  # compiled
    turns[0, 0, 1:3] = 2, 1
    waiting = Thread(target=cpu_token.end, args=(turns,), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    turns[0, 0, 2] = 2
    waiting.join()


class Never:
    """Helpers that the system has no processor for."""

    def submit(self, function, *given):
        return Future()


class Before(Never):
    """Helpers that are ready before the main thread begins."""

    def submit(self, function, *given):
        function(*given)
        return Never.submit(self, function)


class Interrupted(Never):
    """Ctrl-C as a helper is asked, who comes all the same, but late."""

    def submit(self, function, *given):
        self.come = lambda: function(*given)
        raise KeyboardInterrupt


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("helpers", [None, Never(), Before()])
@pytest.mark.parametrize("source", ["llama", "demo"])
def test_any_threads_compute_the_same(source, helpers, threads):
    if source == "demo":
        loaded, _ = load(str(quantized("demo")), dtype="bfloat16")
    else:
        loaded, _ = load(str(model(source)), dtype="float32")

    def logits() -> list[torch.Tensor]:
        state = decode_cpu.LlamaState(loaded)
        if helpers is not None and torch.get_num_threads() > 1:
            state._loop._helpers = helpers
        with torch.inference_mode():
            return [state.compute([i]) for i in IDS]

    threads(1)
    wanted = logits()
    threads(3)
    for found, expected in zip(logits(), wanted):
        assert torch.equal(found, expected)


def test_an_interrupted_token_is_left_alone(threads):
    threads(2)
    state = decode_cpu.LlamaState(load(str(model("llama")), dtype="float32")[0])
    with torch.inference_mode():
        for i in IDS[:4]:
            state.compute([i])
        state._keys[:, :, 4:] = 0
        state._loop._helpers = helpers = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            state.compute([IDS[4]])
        helpers.come()
    assert not state._keys[:, :, 4:].any()


def test_nobody_helps_to_compile(threads, monkeypatch):
    """A thread that helps would go on for seconds when Ctrl-C came."""
    threads(2)
    state = decode_cpu.LlamaState(load(str(model("llama")), dtype="float32")[0])
    state._loop._helpers = helpers = Interrupted()

    def interrupted(kinds):
        raise RuntimeError("Ctrl-C")

    monkeypatch.setattr(cpu_token.token, "compile", interrupted)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        state.compute(IDS[:1])
    assert not hasattr(helpers, "come")


def test_what_is_not_a_number_is_not_hidden():
    loaded, _ = load(str(model("llama")), dtype="float32")
    with torch.no_grad():
        loaded.model.layers[1].self_attn.q_proj.weight[3, 3] = float("nan")
    state = decode_cpu.LlamaState(loaded)
    with torch.inference_mode():
        assert state.compute([5]).isnan().all()
