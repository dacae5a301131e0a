"""The kernels for Hopper: their weights' layout, what they take, and that they compile. What they
compute is tested where there is such a GPU."""

from dataclasses import replace
from importlib.metadata import distributions

import pytest
import torch
from kernels import random_weight

from quantkit.core import cache
from quantkit.core.qweight import Scheme
from quantkit.runtime.kernels import choose, dense, hopper
from quantkit.runtime.kernels import hopper_ways as ways
from quantkit.runtime.kernels.fragments import arrange, restore
from quantkit.runtime.kernels.hopper_ways import Kind
from quantkit.runtime.kernels.support import GPU

H200 = GPU("NVIDIA H200", 132, (9, 0))
WEIGHTS = {
    "4": (Scheme(4), ""),
    "4 wide": (Scheme(4, 128, symmetric=False), "zero"),
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


KIND = Kind(False, 128, 2, False, 8)


def test_few_tokens_take_the_smallest_shape_and_many_any():
    for tokens, meant in ((1, 8), (8, 8), (9, 16), (32, 32), (33, 64), (64, 64)):
        assert [shape.tokens for shape in ways.shapes_for(tokens, KIND)] == [meant]
    assert ways.shapes_for(65, KIND) == ways.shapes_for(5000, KIND) == list(ways.LARGE)
    # scales of small groups leave room for two stages of 256 tokens: too few
    fine = ways.shapes_for(5000, KIND._replace(step=32, zeros=True))
    assert [shape.tokens for shape in fine][-1] == 240


def room_for(programs: int, most: int = 8):
    """How many clusters run at once where there is room for so many programs."""
    return lambda shape, size: programs // size if size <= most else 0


def chosen(tokens, blocks, steps, room, shapes=None):
    way = ways.chosen(shapes or ways.shapes_for(tokens, KIND), tokens, blocks, steps, room)
    return way.shape.tokens, list(way.launches)


def test_a_cluster_has_work():
    assert chosen(1, 2, 3, room_for(396)) == (8, [(2, 3)])  # no more than steps
    assert chosen(1, 1, 7, room_for(396)) == (8, [(1, 4)])  # of eight, one would have none
    assert chosen(1, 2, 300, room_for(396)) == (8, [(2, max(ways.SIZES))])
    assert chosen(1, 2, 300, room_for(396, most=4)) == (8, [(2, 4)])


def test_programs_come_at_once_or_in_full_turns():
    # the linears of a 10B model's block
    for tokens, room, sizes in ((1, THREE, [3, 8, 2, 8]), (64, TWO, [2, 6, 3, 6])):
        for (blocks, steps), size in zip(WORK, sizes):
            launches = chosen(tokens, blocks, steps, lambda _, size, room=room: room[size - 1])[1]
            assert launches == [(blocks, size)]


def test_what_is_left_of_full_turns_is_divided_more():
    assert chosen(256, 152, 38, room_for(132)) == (256, [(132, 1), (20, 6)])
    assert chosen(256, 264, 38, room_for(132)) == (256, [(264, 1)])
    assert chosen(256, 10_001, 30, room_for(132)) == (256, [(10_001, 1)])  # not worth a launch


def test_many_tokens_are_divided_so_that_little_is_left_over():
    assert chosen(300, 1000, 38, room_for(132))[0] == 160  # 320 instead of 512 with 256
    assert chosen(512, 1000, 38, room_for(132))[0] == 256
    # 38 blocks by 3 of 176 are 114 programs, by 2 of 256 they were 76 of 132 that there is room for
    assert chosen(512, 38, 38, room_for(132)) == (176, [(114, 1)])


@pytest.mark.parametrize("tokens", [1, 16, 64, 65, 300, 4096])
def test_all_is_done_once(tokens):
    for blocks, steps in WORK:
        size, launches = chosen(tokens, blocks, steps, lambda _, size: ONE[size - 1])
        assert sum(count for count, _ in launches) == blocks * -(-tokens // size)


def test_more_tokens_come_in_equal_pieces():
    for tokens, meant in ((0, []), (7, [7]), (2048, [2048]), (4097, [1365, 1366, 1366])):
        found = hopper.pieces(tokens)
        assert [piece.stop - piece.start for piece in found] == meant
        assert [i for piece in found for i in range(tokens)[piece]] == list(range(tokens))


@pytest.mark.parametrize("tokens", [0, 5, 3001])
def test_every_piece_has_its_place(tokens, monkeypatch):
    q = weight("4", 64, 128)
    held, bias = arrange(q, blocked=True), torch.randn(64).half()
    given = []

    def matmul(x, weight, bias, way, out):
        given.append(way)
        out.copy_(x.float() @ q.dequantize().T + bias)

    monkeypatch.setattr(hopper, "matmul", matmul)
    monkeypatch.setattr(hopper, "_way", lambda kind, device, *numbers: numbers)
    x = torch.randn(tokens, 128).half()
    found = hopper.product(x, held, bias)
    torch.testing.assert_close(found, (x.float() @ q.dequantize().T + bias).half())
    assert given == {0: [], 5: [(5, 1, 1)], 3001: [(1500, 1, 1), (1501, 1, 1)]}[tokens]


# clusters of 1 to 8 programs that an H200 runs at once, of which so many fit on a processor
THREE = [396, 198, 124, 92, 69, 62, 47, 45]
TWO = [264, 132, 79, 62, 47, 39, 32, 30]
ONE = [132, 66, 39, 30, 22, 17, 15, 15]
WORK = [(114, 38), (38, 38), (152, 38), (38, 152)]  # clusters, steps


@pytest.mark.parametrize("shape", ways.SHAPES, ids=lambda shape: str(shape.tokens))
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("step", [32, 64, 128])
def test_programs_fit_on_a_processor(shape, step, scale, zeros):
    """With 2 KB that are the compiler's."""
    kind = KIND._replace(step=step, scale=scale, zeros=zeros)
    stages, stage = shape.ring(kind)
    if shape not in ways.shapes_for(shape.tokens, kind):
        assert stages == 2
        return
    assert 3 <= stages <= shape.stages
    assert stage == shape.tokens * 256 + 128 * (64 + 128 // step * (scale // 4 * 2 + 2 + 2 * zeros))
    for cluster in ways.SIZES:
        beside = shape.beside(cluster)
        assert shape.resident * (stages * stage + beside + 2048) <= 228 << 10
        # what is sent: the sums of 16 rows for each of a program's warps, by all others
        assert shape.sent(cluster) <= (beside if shape.few else stages * stage)
    assert shape.sent(8) == 7 * 16 * shape.tokens * 4
    assert shape.sent(3) == 3 * 2 * 16 * shape.tokens * 4
    assert shape.sent(1) == 0


@with_nvrtc
@pytest.mark.parametrize("bfloat", [True, False])
@pytest.mark.parametrize("shape", ways.SHAPES, ids=lambda shape: str(shape.tokens))
@pytest.mark.parametrize(
    ("step", "scale", "zeros"), [(128, 2, False), (64, 3, True), (32, 4, True)]
)
def test_they_compile(shape, bfloat, step, scale, zeros, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    text = hopper.source(shape, Kind(bfloat, step, scale, zeros, 8))
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
    bias = torch.randn(1000, device="cuda").to(dtype).float()
    for tokens in (1, 5, 8, 13, 16, 17, 64, 65, 150, 300, 1000, 4097):
        x = torch.randn(tokens, 1536, device="cuda").to(dtype)
        wanted = x.float() @ meant.T + bias
        found, again = (hopper.product(x, held, bias) for _ in range(2))
        assert torch.equal(found, again)
        assert float((found.float() - wanted).norm() / wanted.norm()) < 2e-3


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
@pytest.mark.parametrize("shape", ways.SHAPES, ids=lambda shape: str(shape.tokens))
def test_every_size_of_a_cluster(shape):
    q = weight("4 wide" if shape.tokens == 256 else "4 zero", 1000, 1536).to(torch.device("cuda"))
    held, meant = arrange(q, blocked=True), q.dequantize()
    x = torch.randn(2 * shape.tokens + 3, 1536, device="cuda").half()
    clusters = len(held.words) * -(-len(x) // shape.tokens)
    for size in ways.SIZES:
        way = ways.Way(shape, ((clusters, size),))
        found, again = (torch.empty(len(x), 1000, device="cuda").half() for _ in range(2))
        hopper.matmul(x, held, None, way, found)
        hopper.matmul(x, held, None, way, again)
        assert torch.equal(found, again)
        wanted = x.float() @ meant.T
        assert float((found.float() - wanted).norm() / wanted.norm()) < 1e-3


@on_hopper
@pytest.mark.parametrize("shape", ways.SHAPES, ids=lambda shape: str(shape.tokens))
def test_two_launches_behind_each_other(shape):
    """Of two products, of which the second takes what the first one makes."""
    q = weight("4", 1024, 1024).to(torch.device("cuda"))
    held, meant = arrange(q, blocked=True), q.dequantize()
    x = torch.randn(shape.tokens + 3, 1024, device="cuda").half()
    way = ways.Way(shape, ((9, 1), (7, 4)))
    middle, found = (torch.empty_like(x) for _ in range(2))
    for _ in range(20):
        middle.fill_(torch.nan)
        found.fill_(torch.nan)
        hopper.matmul(x, held, None, way, middle)
        hopper.matmul(middle, held, None, way, found)
        wanted = (x.float() @ meant.T).half().float() @ meant.T
        assert float((found.float() - wanted).norm() / wanted.norm()) < 2e-3


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [100, 700])
def test_programs_that_go_on_to_others(tokens, dtype):
    q = weight("4 zero", 40_000, 512).to(torch.device("cuda"))
    held, meant = arrange(q, blocked=True), q.dequantize()
    bias = torch.randn(40_000, device="cuda").to(dtype).float()
    x = torch.randn(tokens, 512, device="cuda").to(dtype)
    found, again = (hopper.product(x, held, bias) for _ in range(2))
    assert torch.equal(found, again)
    wanted = x.float() @ meant.T + bias
    assert float((found.float() - wanted).norm() / wanted.norm()) < 2e-3


@on_hopper
@pytest.mark.parametrize(
    ("dtype", "least", "most", "inputs"),
    [(torch.bfloat16, -12, 4, 1), (torch.float16, -8, 0, 100)],  # what results in float16 allow
)
def test_scales_of_zero_and_of_any_size(dtype, least, most, inputs):
    """Sums are kept in units of the last group's scale."""
    q = weight("4 zero", 256, 1024).to(torch.device("cuda"))
    powers = torch.rand(q.scale.shape, device="cuda") * (most - least) + least
    scale = q.scale.float() * 10**powers
    scale[::2, 3] = 0
    scale[1::4, -1] = 0
    scale[::3, 5] *= -1
    q = replace(q, scale=scale)
    held, meant = arrange(q, blocked=True), q.dequantize()
    x = (torch.randn(200, 1024, device="cuda") * inputs).to(dtype)
    found, wanted = hopper.product(x, held, None).float(), x.float() @ meant.T
    assert float(((found - wanted).norm(dim=0) / wanted.norm(dim=0)).max()) < 3e-3
