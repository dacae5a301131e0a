"""Moments gathered batch by batch equal those of all tokens at once in float64."""

import pytest
import torch

from quantkit.core.stats import InputStats
from quantkit.runtime import gather
from quantkit.runtime.states import States

OUT = 10


def batches(width, dtype=torch.float32, seed=0):
    """Inputs with a mean and energies of their own, [rows, tokens, width]."""
    g = torch.Generator().manual_seed(seed)
    energy = torch.exp(torch.randn(width, generator=g))
    return [
        ((torch.randn(*shape, width, generator=g) + 0.5) * energy).to(dtype)
        for shape in ((2, 17), (3, 40), (1, 5))
    ]


def deltas(seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, OUT, generator=g) + 0.2 for shape in ((2, 17), (3, 40), (1, 5))]


def together(parts):
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double()


def gathered(xs, ds=None, centred=False, calls=1000):
    """As if there were many batches, unless told otherwise."""
    stats = InputStats(xs[0].shape[-1], "cpu", None if ds is None else OUT, calls)
    for i, x in enumerate(xs):
        stats.add(x, None if ds is None else ds[i])
    return stats.moments(centred)


def near(found, expected, tolerance=1e-5):
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm()) < tolerance * float(expected.norm())


# one strip, two, three, four unequal ones
@pytest.mark.parametrize("width", [16, 128, 129, 300, 515, 640])
def test_gram_and_mean(width):
    xs = batches(width)
    found, x = gathered(xs), together(xs)
    near(found.gram, x.T @ x / len(x))
    near(found.mean, x.mean(0))
    assert torch.equal(found.gram, found.gram.T)
    assert found.cross is None
    assert found.drift is None


@pytest.mark.parametrize("width", [16, 300])
def test_cross_and_drift(width):
    xs, ds = batches(width), deltas()
    found, x, d = gathered(xs, ds), together(xs), together(ds)
    near(found.cross, d.T @ x / len(x))
    near(found.drift, d.mean(0))


def test_centred_moments_are_those_about_the_mean():
    xs, ds = batches(64), deltas()
    found, x, d = gathered(xs, ds, centred=True), together(xs), together(ds)
    x0, d0 = x - x.mean(0), d - d.mean(0)
    near(found.gram, x0.T @ x0 / len(x))
    near(found.cross, d0.T @ x0 / len(x), 1e-4)
    near(found.mean, x.mean(0))
    near(found.drift, d.mean(0))


def test_centring_without_drift():
    found = gathered(batches(64), centred=True)
    x = together(batches(64))
    near(found.gram, (x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    assert found.cross is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_close(dtype):
    """On a CPU a batch's product is rounded to the inputs' dtype before it is added."""
    xs = batches(300, dtype)
    ds = [d.to(dtype) for d in deltas()]
    found, x, d = gathered(xs, ds), together(xs), together(ds)
    near(found.gram, x.T @ x / len(x), 5e-3)
    near(found.cross, d.T @ x / len(x), 5e-3)
    near(found.mean, x.mean(0), 2e-3)
    near(found.drift, d.mean(0))


def test_half_precision_sums_do_not_stop_growing():
    """Many equal batches: a bfloat16 sum would stick at 256 times the first."""
    x = torch.ones(1, 4).bfloat16()
    stats = InputStats(4, out_features=1, calls=600)
    for _ in range(600):
        stats.add(x, torch.ones(1, 1).bfloat16())
    assert stats.count == 600
    found = stats.moments(centred=False)
    for tensor in (found.gram, found.mean, found.cross, found.drift):
        assert torch.equal(tensor, torch.ones_like(tensor))


def test_how_tokens_are_cut_into_batches_does_not_matter():
    xs = batches(200)
    near(gathered(xs).gram, gathered([together(xs).float()[None]]).gram.double())


def test_batches_are_left_as_they_are():
    xs, ds = batches(64), deltas()
    before = [x.clone() for x in xs], [d.clone() for d in ds]
    gathered(xs, ds)
    assert all(torch.equal(a, b) for a, b in zip(xs + ds, before[0] + before[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_mean_does_not_drown_the_spread(dtype):
    """The mean adds 10 000 times the spread's energy to the gram: subtracting it at the end would
    leave nothing but rounding errors, and an indefinite matrix."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(96, 512, generator=g)
    xs = [
        (100 + torch.randn(512, 96, generator=g) @ base / 10).to(dtype).reshape(2, 256, 512)
        for _ in range(6)
    ]
    found, x = gathered(xs, centred=True), together(xs)
    x0 = x - x.mean(0)
    near(found.gram, x0.T @ x0 / len(x), 1e-3 if dtype == torch.float32 else 5e-3)
    damped = found.gram + 0.01 * found.gram.diagonal().mean() * torch.eye(512)
    assert float(torch.linalg.eigvalsh(damped).min()) > 0


def test_few_batches_are_multiplied_exactly():
    """Rounded to bfloat16 and not averaged, the gram of one short batch would be indefinite."""
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(1, 64, 512, generator=g).bfloat16()]
    x0 = together(xs) - together(xs).mean(0)

    def least(calls):
        gram = gathered(xs, centred=True, calls=calls).gram
        return float(torch.linalg.eigvalsh(gram).min() / gram.diagonal().mean())

    assert least(1) > -1e-3 > least(1000)
    near(gathered(xs, centred=True, calls=1).gram, x0.T @ x0 / len(x0), 5e-3)


@pytest.mark.parametrize("centred", [False, True])
def test_thinned_statistics_are_those_of_every_third_token(centred):
    xs, ds = batches(24), deltas()
    stats = InputStats(24, "cpu", OUT, 1000, every=3)
    for x, d in zip(xs, ds):
        stats.add(x, d)

    def picked(parts):  # the first token taken moves on by one from call to call
        return [part.reshape(-1, part.shape[-1])[i::3] for i, part in enumerate(parts)]

    found, expected = stats.moments(centred), gathered(picked(xs), picked(ds), centred)
    for name in ("gram", "mean", "cross", "drift"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert stats.count == 12 + 40 + 1


def test_spacing_leaves_enough_tokens_for_the_width():
    hidden = States([torch.empty(2, 50, 8)] * 10)  # 1000 tokens
    assert gather.spacing(hidden, 20, None) == 1
    assert gather.spacing(hidden, 20, 10) == 5
    assert gather.spacing(hidden, 20, 11) == 4
    assert gather.spacing(hidden, 2000, 10) == 1  # never more than there are
    short = States([*hidden, torch.empty(1, 3, 8)])
    assert gather.spacing(short, 20, 10) == 3  # and one of every batch
