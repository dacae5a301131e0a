"""The kernels for Hopper: their weights' layout, what they take, and that they compile. What they
compute is tested where there is such a GPU."""

from importlib.metadata import distributions

import pytest
import torch
from kernels import random_weight

from quantkit.core import cache
from quantkit.core.qweight import Scheme
from quantkit.runtime.kernels import choose, dense, hopper
from quantkit.runtime.kernels.fragments import arrange, restore
from quantkit.runtime.kernels.support import GPU

H200 = GPU("NVIDIA H200", 132, (9, 0))
WEIGHTS = {
    "4": (Scheme(4), ""),
    "4 zero": (Scheme(4, 32, symmetric=False), "zero"),
    "3 a row": (Scheme(3, -1), ""),
    "2 zero": (Scheme(2, 256, symmetric=False), "zero"),
}
each_weight = pytest.mark.parametrize("name", WEIGHTS)


def installed(name: str) -> bool:
    return any(found.metadata["Name"] == name for found in distributions(name=name))


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)

with_nvrtc = pytest.mark.skipif(
    not installed("cuda-bindings") or not (torch.version.cuda or installed("nvidia-cuda-nvrtc")),
    reason="needs NVRTC, a part of CUDA that needs no GPU",
)


def weight(name, out=200, width=512):
    scheme, kind = WEIGHTS[name]
    return random_weight(scheme, out, width, kind)


@each_weight
def test_layout_is_undone(name):
    q = weight(name)
    found = restore(arrange(q, blocked=True))
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.scale, q.scale)
    assert q.zero is None or torch.equal(found.zero, q.zero)


@each_weight
def test_the_weight_itself(name):
    q = weight(name).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    held = arrange(q, blocked=True)
    assert torch.equal(dense.dequantize(held, torch.float32), q.dequantize())
    assert torch.equal(dense.dequantize(held, torch.float32, 2, 3), q.dequantize()[64:160])


def test_a_lane_holds_what_the_instruction_wants():
    """m64n8k16 and m16n8k16 want of lane 4 g + t, in four registers, the inputs 2 t, 2 t + 1 of row
    g, of row g + 8, and the inputs 2 t + 8, 2 t + 9 of both. A word holds row 8 w + g, and its
    pairs 2 j and 2 j + 1 are for the j-th 16 inputs of 32."""
    q = weight("4", 256, 256)
    words = arrange(q, blocked=True).words
    assert words.shape == (2, 2, 4, 4, 32, 4)
    for block, step, tile, part, lane, w in (
        (0, 0, 0, 0, 0, 0),
        (1, 1, 3, 2, 13, 2),
        (0, 1, 2, 3, 31, 1),
    ):
        held = int(words[block, step, tile, part, lane, w])
        g, t = divmod(lane, 4)
        row, first = 128 * block + 32 * tile + 8 * w + g, 128 * step + 32 * part + 2 * t
        for pair in range(4):
            column = first + 16 * (pair // 2) + 8 * (pair % 2)
            two = held >> 4 * pair & 15, held >> 4 * pair + 16 & 15
            assert two == tuple(q.codes[row, column : column + 2].tolist())


def test_scales_of_a_copy_lie_together():
    q = weight("4 zero", 256, 256)
    held = arrange(q, blocked=True)
    assert held.scale.shape == held.offset.shape == (2, 8, 4, 8, 4)
    assert held.scale[1, 5, 2, 6, 3] == q.scale[128 + 2 * 32 + 3 * 8 + 6, 5]


@pytest.mark.parametrize(
    ("scheme", "out", "width", "minimum", "takes"),
    [
        (Scheme(4), 4864, 4864, False, True),
        (Scheme(3, 64, symmetric=False), 64, 128, False, True),
        (Scheme(4, -1), 64, 384, False, True),
        (Scheme(8), 64, 128, False, False),  # eight bits
        (Scheme(4, 32, symmetric=False), 64, 128, True, False),  # minimums
        (Scheme(4, 32), 64, 160, False, False),  # not in whole steps
        (Scheme(4, 16), 64, 128, False, False),
        (Scheme(4, 96), 64, 384, False, False),
        (Scheme(4, 64, grid="nf4"), 64, 128, False, False),
        (Scheme(4), 60, 128, False, False),  # 16 bytes of outputs
    ],
)
def test_what_they_take(scheme, out, width, minimum, takes):
    assert hopper.fits(scheme, out, width, minimum) is takes


def test_where_they_run(monkeypatch):
    assert "Hopper" in hopper.why_not(GPU("NVIDIA A100", 108, (8, 0)))
    assert "Hopper" in hopper.why_not(GPU("NVIDIA B200", 148, (10, 0)))
    monkeypatch.setattr(hopper, "find_spec", lambda name: None)
    assert "cuda-bindings" in hopper.why_not(H200)
    monkeypatch.setattr(hopper, "find_spec", lambda name: object())
    assert hopper.why_not(H200) is None


def test_shapes():
    assert [hopper.shape_of(tokens).tokens for tokens in (1, 8, 9, 32, 33, 65, 97)] == [
        8, 8, 16, 32, 64, 96, 128,
    ]  # fmt: skip
    # more than one program's: as few as can be, and none of them half empty
    assert [hopper.shape_of(tokens).tokens for tokens in (129, 192, 193, 257, 5000)] == [
        96, 96, 128, 96, 128,
    ]  # fmt: skip


def clusters_of(programs: int, most: int = 8):
    """How many run at once where there is room for so many programs."""
    return lambda size: programs // size if size <= most else 0


def test_a_cluster_has_work():
    assert hopper.divided(2, 3, clusters_of(396)) == [(2, 3)]  # no more than steps
    assert hopper.divided(2, 300, clusters_of(396)) == [(2, max(hopper.SIZES))]
    assert hopper.divided(2, 300, clusters_of(396, most=4)) == [(2, 4)]


def test_programs_come_at_once_or_in_full_turns():
    # the linears of a 10B model's block, by programs of 128 rows
    for room, sizes in ((THREE, [3, 8, 2, 8]), (TWO, [2, 6, 3, 6])):
        for (clusters, steps), size in zip(WORK, sizes):
            launches = hopper.divided(clusters, steps, lambda size, room=room: room[size - 1])
            assert launches == [(clusters, size)]


def test_what_is_left_of_full_turns_is_divided_more():
    assert hopper.divided(152, 38, clusters_of(132)) == [(132, 1), (20, 6)]
    assert hopper.divided(264, 38, clusters_of(132)) == [(264, 1)]
    assert hopper.divided(10_001, 30, clusters_of(132)) == [(10_001, 1)]  # not worth a launch


# clusters of 1 to 8 programs that an H200 runs at once, of which three or two fit on a processor
THREE = [396, 198, 124, 92, 69, 62, 47, 45]
TWO = [264, 132, 79, 62, 47, 39, 32, 30]
WORK = [(114, 38), (38, 38), (152, 38), (38, 152)]  # clusters, steps


@pytest.mark.parametrize("shape", hopper.SHAPES, ids=lambda shape: str(shape.tokens))
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("step", [32, 64, 128])
def test_programs_fit_on_a_processor(shape, step, scale, zeros):
    """With 2 KB that are the compiler's."""
    stages, stage = shape.ring(step, scale, zeros)
    assert 2 <= stages <= shape.stages
    assert stage == shape.tokens * 256 + shape.rows * (
        64 + 128 // step * (scale // 4 * 2 + 2 + 2 * zeros)
    )
    for cluster in hopper.SIZES:
        beside = shape.beside(cluster)
        assert shape.resident * (stages * stage + beside + 2048) <= 228 << 10
        # what is sent: the sums of 16 rows for each of a program's warps, by all others
        assert shape.sent(cluster) <= (beside if shape.few else stages * stage)
    assert shape.sent(8) == shape.rows // 16 // 8 * 7 * 16 * shape.tokens * 4
    assert shape.sent(3) == (3 if shape.rows == 128 else 6) * 2 * 16 * shape.tokens * 4
    assert shape.sent(1) == 0


@with_nvrtc
@pytest.mark.parametrize("bfloat", [True, False])
@pytest.mark.parametrize("shape", hopper.SHAPES, ids=lambda shape: str(shape.tokens))
@pytest.mark.parametrize(
    ("step", "scale", "zeros"), [(128, 2, False), (64, 3, True), (32, 4, True)]
)
def test_they_compile(shape, bfloat, step, scale, zeros, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    text = hopper.source(shape, bfloat, step, scale, zeros, 8)
    code = hopper._compiled(text)
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcCompileProgram", None)
    assert hopper._compiled(text) == code  # nothing is compiled again


@with_nvrtc
def test_what_does_not_compile_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    with pytest.raises(RuntimeError, match="nonsense"):
        hopper._compiled("nonsense")


@on_hopper
@each_weight
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products(name, dtype):
    q = weight(name, 1000, 1536)
    q = q.to(torch.device("cuda"))
    assert choose.blocked(q, torch.device("cuda"))
    held, meant = arrange(q, blocked=True), q.dequantize()
    bias = torch.randn(1000, device="cuda")
    for tokens in (1, 5, 8, 13, 16, 17, 64, 65, 300, 1000, 3000):
        x = torch.randn(tokens, 1536, device="cuda").to(dtype)
        wanted = x.float() @ meant.T + bias
        found, again = (hopper.product(x, held, bias) for _ in range(2))
        assert torch.equal(found, again)
        assert float((found.float() - wanted).norm() / wanted.norm()) < 3e-3


@on_hopper
def test_inputs_that_do_not_lie_as_the_copy_engine_wants():
    q = weight("4", 256, 512).to(torch.device("cuda"))
    held, meant = arrange(q, blocked=True), q.dequantize()
    whole = torch.randn(3 * 512 + 1, device="cuda").half()
    for x in (whole[1:].reshape(3, 512), torch.randn(512, 3, device="cuda").half().T):
        found = hopper.product(x, held, None)
        wanted = x.float() @ meant.T
        assert float((found.float() - wanted).norm() / wanted.norm()) < 1e-3


@on_hopper
@pytest.mark.parametrize("shape", hopper.SHAPES, ids=lambda shape: str(shape.tokens))
def test_every_size_of_a_cluster(shape):
    q = weight("4 zero", 1000, 1536).to(torch.device("cuda"))
    held, meant = arrange(q, blocked=True), q.dequantize()
    x = torch.randn(2 * shape.tokens + 3, 1536, device="cuda").half()
    for size in hopper.SIZES:
        found, again = (hopper.matmul(x, held, None, shape, size) for _ in range(2))
        assert torch.equal(found, again)
        wanted = x.float() @ meant.T
        assert float((found.float() - wanted).norm() / wanted.norm()) < 1e-3
