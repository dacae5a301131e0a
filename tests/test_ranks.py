"""Several processes quantize one model: the same as one, up to the order of sums; and when one of
them is lost, or fails, all end with one message, and the run goes on with any number."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from several import Started, together
from test_stats import OUT, batches, deltas, near
from tools import QUICK, QUICK_OPTIONS, command, model, read_json, sentence

from quantkit.cli import main as cli
from quantkit.core.metrics import Comparison
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.core.stats import InputStats
from quantkit.errors import QuantkitError, UsageError
from quantkit.methods import factor
from quantkit.runtime import gather, states
from quantkit.runtime import ranks as ranks_module
from quantkit.runtime.block import InputGroup
from quantkit.runtime.opened import open_checkpoint
from quantkit.runtime.ranks import ALONE, Ranks, join
from quantkit.workflows import check, portions, several
from quantkit.workflows import quantize as whole
from quantkit.workflows.awq import quantize_awq
from quantkit.workflows.calibrate import shared
from quantkit.workflows.method import Originals, Solved
from quantkit.workflows.portions import CPU, GPU, cost, divided, joined, share
from quantkit.workflows.quantize import quantize

SMALL = {**QUICK, "group": 32, "dtype": "float32", "device": "cpu"}


# statistics in parts


@pytest.mark.parametrize("centred", [False, True])
def test_sums_about_different_means_are_added(centred):
    """As ranks do it: each has its own first batch, and so its own shift."""
    xs, ds = batches(300), deltas()
    whole = InputStats(300, "cpu", OUT, 1000)
    parts = [InputStats(300, "cpu", OUT, 1000) for _ in xs]
    for x, d, part in zip(xs, ds, parts):
        for stats in (whole, part):
            stats.add(x, d)
    first = parts[0]
    for part in parts[1:]:
        part.move(first.shift)
        for mine, theirs in zip(first.sums, part.sums):
            mine += theirs
        first.count += part.count
    found, expected = first.moments(centred), whole.moments(centred)
    for name in ("gram", "mean", "cross", "drift"):
        near(getattr(found, name), getattr(expected, name).double(), 1e-6)


def test_thinned_statistics_in_parts_are_of_the_same_tokens():
    xs = [torch.randn(1, 40, 24) for _ in range(7)]
    whole = InputStats(24, "cpu", None, 7, 3)
    parts = [InputStats(24, "cpu", None, 7, 3, first) for first in (0, 4)]
    for i, x in enumerate(xs):
        whole.add(x)
        parts[i >= 4].add(x)
    parts[1].move(parts[0].shift)
    assert sum(part.count for part in parts) == whole.count
    near(parts[0].sums[0] + parts[1].sums[0], whole.sums[0].double(), 1e-6)


# who does what


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 31, 64, 100, 4864])
def test_every_row_is_solved_once(rows, parts):
    bounds = [Fraction(at, parts) for at in range(parts + 1)]
    found = [share(rows, start, stop) for start, stop in pairwise(bounds)]
    assert [row for some in found for row in some] == [*range(rows)]
    assert max(map(len, found)) <= rows / parts + 32


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_thing_is_in_one_part(size):
    for count in range(size, 20):
        parts = [[*range(count)][Ranks(rank, size).part(count)] for rank in range(size)]
        assert [i for part in parts for i in part] == [*range(count)] and all(parts)


def loads(rows, shares, ranks, pace):
    """What each rank has to do, for what it has any rows of."""

    def load(group, part):
        return cost(group, rows[group] * part, pace) + (pace.shared if part < 1 else 0)

    return [sum(load(g, shares[g][rank]) for g in rows if shares[g][rank]) for rank in range(ranks)]


def groups(**sizes):
    """(width, rows) by name -> rows by group."""
    return {InputGroup((name,), width): rows for name, (width, rows) in sizes.items()}


NEOX = {"qkv": (4864, 14592), "up": (4864, 19456)}
GATED = {"qkv": (8192, 10240), "gate": (8192, 44032)}
WRITERS = {"attention": (4864, 4864), "mlp": (19456, 4864)}
EXPERTS = {f"expert{i}": (64 + i % 2, 500 + i) for i in range(200)}


@pytest.mark.parametrize("pace", [CPU, GPU])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("sizes", [NEOX, GATED, WRITERS, NEOX | WRITERS, EXPERTS], ids=len)
def test_rows_are_divided_so_that_all_ranks_end_together(sizes, ranks, pace):
    rows = groups(**sizes)
    shares = divided(rows, ranks, pace)
    assert all(sum(some) == 1 and min(some) >= 0 and len(some) == ranks for some in shares.values())
    most = max(loads(rows, shares, ranks, pace))
    alike = dict.fromkeys(rows, [Fraction(1, ranks)] * ranks)
    assert most <= max(loads(rows, alike, ranks, pace))
    by_one = sum(cost(group, count, pace) for group, count in rows.items())
    assert most >= by_one / ranks
    if sizes is EXPERTS:
        assert most < by_one / ranks * 1.02
        assert sum(1 in some for some in shares.values()) > 190


def test_two_ranks_take_a_linear_each_where_columns_wait():
    """Half of the rows take a GPU much more than half of the time."""
    assert [*divided(groups(**NEOX), 2, GPU).values()] == [[1, 0], [0, 1]]
    small, large = divided(groups(**WRITERS), 2, GPU).values()
    assert small == [1, 0] and 0 < large[0] < large[1]


def test_a_group_that_is_alone_is_divided():
    rows = groups(mlp=(19456, 4864))
    for pace in (CPU, GPU):
        assert [*divided(rows, 4, pace).values()] == [[Fraction(1, 4)] * 4]


@pytest.mark.parametrize("loaded", [[0, 0, 0], [5, 0, 1], [100, 3, 0], [4, 4, 90]])
def test_work_is_levelled(loaded):
    shares = portions._levelled([*map(Fraction, loaded)], 12)
    after = [load + 12 * share for load, share in zip(loaded, shares)]
    assert sum(shares) == 1 and min(shares) >= 0
    working = {load for load, share in zip(after, shares) if share}
    assert len(working) == 1
    assert all(load >= max(working) for load, share in zip(after, shares) if not share)


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_done_together_comes_first(turned, monkeypatch):
    """Or a rank would wait for the others until they have done what is theirs alone."""
    rows = {name: out for name, (_, out) in WRITERS.items()}
    monkeypatch.setattr(portions, "features", lambda linear: (linear, 64))
    block = SimpleNamespace(linear=rows.__getitem__)
    ranks = Ranks(0, 2)
    ranks._device = torch.device("cuda")
    sizes = dict(reversed(WRITERS.items())) if turned else WRITERS
    found = portions.Portions(block, groups(**sizes), ranks)
    assert [group.names for group in found.order] == [("mlp",), ("attention",)]
    assert [found.owners[group] for group in found.order] == [[0, 1], [0]]


def test_who_has_no_rows_owns_nothing(monkeypatch):
    """40 rows are two grains, of 32 and 8, for three ranks."""
    monkeypatch.setattr(portions, "features", lambda linear: (40, 64))
    group = InputGroup(("mlp",), 64)
    found = portions.Portions(SimpleNamespace(linear=str), [group], Ranks(0, 3))
    assert found.owners == {group: [1, 2]}


def test_micro_batches_are_those_of_one_process_unless_there_are_too_few():
    rows = [[1] * 64 for _ in range(16)]
    assert [len(b) for b in shared(rows, 128, 4)] == [2] * 8
    assert [len(b) for b in shared(rows, 1024, 1)] == [16]
    assert [len(b) for b in shared(rows, 1024, 3)] == [2] * 8
    odd = [[1] * 60, [1] * 5, [1] * 64, [1] * 64]
    assert [b.shape for b in shared(odd, 1024, 3)] == [(1, 60), (1, 5), (1, 64), (1, 64)]


def solved(rows, error, energy, index=None, damp=0.01):
    codes = torch.randint(0, 16, (rows, 32), dtype=torch.uint8)
    scheme = Scheme(4, 16)
    q = QWeight(scheme, codes, torch.rand(rows, 2).half(), group_of=index)
    told = (torch.tensor(x, dtype=torch.float64) for x in (error, energy))
    return Solved(q, torch.rand(rows).half(), *told, damp, 1, "gptq")


def test_parts_become_whole():
    parts = [solved(32, 0.1, 3.0), solved(7, 0.4, 1.0, damp=0.1)]
    found = joined(parts)
    assert torch.equal(found.qweight.codes[32:], parts[1].qweight.codes)
    assert torch.equal(found.bias, torch.cat([part.bias for part in parts]))
    assert float(found.error) == pytest.approx((0.3 + 0.4) / 4) and found.energy == 4
    assert (found.damp, found.dead) == (0.1, 1)
    assert joined(parts[:1]) is parts[0]


def test_parts_must_agree_where_inputs_belong():
    index = torch.arange(32, dtype=torch.int32) // 16
    joined([solved(32, 0.1, 3.0, index), solved(32, 0.1, 3.0, index.clone())])
    with pytest.raises(QuantkitError, match="different groups"):
        joined([solved(32, 0.1, 3.0, index), solved(32, 0.1, 3.0, index.flip(0))])


# how processes agree


# how small a tensor has to be to go with others, how much goes together, and how often is sent
@pytest.mark.parametrize(
    ("small", "bundle", "times"), [(1, 99, 9), (31, 99, 3), (31, 35, 5), (1 << 20, 1 << 20, 1)]
)
def test_what_is_shared_is_the_same_everywhere(tmp_path, monkeypatch, small, bundle, times):
    monkeypatch.setattr(ranks_module, "_SMALL", small)
    monkeypatch.setattr(ranks_module, "_BUNDLE", bundle)
    tensors = [
        torch.randn(5, 3).bfloat16(),
        torch.randn(4, 6).T,
        torch.tensor(7),
        torch.tensor([True, False]),
        torch.empty(0, 4),
    ]
    value = {"a": tensors, "b": [solved(3, 0.5, 1.0), "text"], "c": None}

    def work(rank):
        ranks = join()
        ranks.connect("cpu")
        late = ranks.from_first(lambda: (time.sleep(0.5), os.getpid())[1])
        order = ranks.first_on_host(lambda: (time.sleep(0.2 * (rank == 0)), time.time())[1])
        sent, broadcast = [], torch.distributed.broadcast
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "broadcast", lambda t, r: sent.append(broadcast(t, r)))
            found = ranks.share(value if rank == 1 else None, 1)
        told = ranks.everyone((rank, torch.full((2,), rank)))
        ranks.leave()
        return found, [number for number, _ in told], told[2][1], late, order, len(sent)

    results = together(3, work, tmp_path)
    for found, numbers, last, late, _, sent in results:
        assert sent == times
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found["a"], tensors))
        assert found["b"][0].qweight.identical(value["b"][0].qweight)
        assert found["b"][1] == "text"
        assert numbers == [0, 1, 2] and last.tolist() == [2, 2]
        assert late == results[0][3]
    assert results[0][4] < min(result[4] for result in results[1:])


def test_processes_that_share_a_machine(tmp_path):
    def work(rank):
        os.environ["GROUP_RANK"] = str(rank // 2)
        ranks = join()
        ranks.connect("cpu")
        found = ranks.here()
        ranks.leave()
        return found

    assert together(3, work, tmp_path) == [2, 2, 1]


def test_messages_are_as_long_as_they_need_to_be(tmp_path):
    """Also where what goes at once is just full, one byte too short, or far too short."""
    full = ranks_module._SHORT - len(ranks_module._packed("b" * 1000, [])) + 1000
    short, longer = ["a", "b" * full, "c"], ["a" * full, "b" * (full + 1), ""]
    texts = [short, longer, ["", "a" * 10**6, "b" * 99]]

    def work(rank):
        ranks = join()
        ranks.connect("cpu")
        found = [ranks.everyone(some[rank]) for some in texts]
        seconds = [ranks.share(some[1] if rank == 1 else None, 1) for some in texts]
        ranks.leave()
        return found, seconds

    for found, seconds in together(3, work, tmp_path):
        assert found == texts and seconds == [some[1] for some in texts]


@pytest.mark.parametrize("width", [48, 300])  # the second one's in strips
def test_statistics_are_added_where_they_are_wanted(tmp_path, width):
    """Also on a rank that has seen nothing: not all tokens reach every expert."""
    xs = batches(width)

    def work(rank):
        ranks = join()
        ranks.connect("cpu")
        found = [InputStats(width, "cpu", None, 3) for _ in range(2)]
        for stats in found:
            for x in {0: [], 1: xs[:1], 2: xs[1:]}[rank]:
                stats.add(x)
        ranks.merge(zip(found, ([0, 1, 2], [2])))
        ranks.leave()
        return [stats.moments(True).gram for stats in found]

    expected = InputStats(width, "cpu", None, 3)
    for x in xs:
        expected.add(x)
    expected = expected.moments(True).gram.double()
    results = together(3, work, tmp_path)
    for everywhere, _ in results:
        near(everywhere, expected, 1e-6)
    near(results[2][1], expected, 1e-6)


def test_processes_tell_each_other_once_what_they_have():
    asked = []

    def everyone(own):
        asked.append(own)
        return [[40], own, [60, 20]]

    ranks = SimpleNamespace(rank=1, everyone=everyone)
    hidden = states.States([torch.empty(2, 10, 4), torch.empty(2, 40, 4)])
    assert gather.calls(hidden, ranks) == (5, 1)
    assert gather.spacing(hidden, 5, 4, ranks) == 11  # 220 tokens
    assert gather.calls(hidden, ranks) == (5, 1) and asked == [[20, 80]]


@pytest.mark.parametrize("lowest", [0.02, -0.05])  # the second takes more damping, everywhere
def test_a_hessian_is_factored_together(tmp_path, monkeypatch, lowest):
    monkeypatch.setattr(factor, "_BLOCK", 24)  # in steps: 100 inputs would be one
    basis, _ = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))
    hessian = basis * torch.linspace(lowest, 3, 100).double() @ basis.T
    hessian = (hessian + hessian.T) / 2

    def found(team):
        whole = hessian.clone()
        with factor.factored(whole, 0.01, team) as (energy, damp):
            unit = whole.triu(1)
        return unit, energy, damp, whole

    def work(rank):
        ranks = join()
        ranks.connect("cpu")
        own = found(ranks)
        ranks.leave()
        return own

    unit, energy, damp, _ = found(factor.BY_ITSELF)
    results = together(3, work, tmp_path)
    for a, b, same, restored in results:
        torch.testing.assert_close(a, unit)
        torch.testing.assert_close(b, energy)
        assert same == damp
        assert torch.equal(restored, hessian)
        assert torch.equal(a, results[0][0])
    assert (damp > 0.01) == (lowest < 0)


@pytest.mark.parametrize(("outs", "together"), [((96, 200), True), ((96, 64), False)])
def test_a_hessian_is_shared_where_everyone_needs_it(outs, together, monkeypatch):
    """A rank without rows of a linear never comes to its factor: the others would wait for it."""
    names = dict(zip("ab", outs))
    monkeypatch.setattr(portions, "features", lambda linear: (linear, 64))
    block = SimpleNamespace(linear=names.__getitem__)
    originals = Originals({}, lambda name: torch.zeros(names[name], 64), lambda name: None, None)
    teams = set()
    for rank in range(3):
        ranks = Ranks(rank, 3)
        group = InputGroup(tuple(names), 64)
        portion = portions.Portions(block, [group], ranks).of(group, originals)
        teams.add(portion.team is ranks)
    assert teams == {together}


# whole runs


def on_ranks(size, tmp_path, out, carry=quantize, source=None, **settings):
    """Quantize with so many processes -> the reports' written."""
    source = str(source or model("gpt_neox"))
    found = together(
        size,
        lambda rank: carry(source, out, **{**SMALL, **settings}).written,
        tmp_path,
    )
    assert found == [rank == 0 for rank in range(size)]


def rows(folder: Path, *shapes: tuple[int, int]) -> str:
    """Rows of random tokens, so many of such a length, as calibration text."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 8000, shape, generator=generator).tolist() for shape in shapes]
    file = folder / "rows.jsonl"
    lines = [json.dumps({"input_ids": row}) + "\n" for some in ids for row in some]
    file.write_text("".join(lines))
    return str(file)


def compared(one: Path, other: Path) -> tuple[float, list[float]]:
    """The share of equal codes, and how much larger the errors of the other are."""
    a, b = (open_checkpoint(Source(folder.name, folder)) for folder in (one, other))
    assert list(a.linears) == list(b.linears)
    pairs = [(a.qweight(name).codes, b.qweight(name).codes) for name in a.linears]
    equal = sum(int((p == q).sum()) for p, q in pairs) / sum(p.numel() for p, _ in pairs)
    before, after = (read_json(folder / "quantkit.json")["layers"] for folder in (one, other))
    return equal, [after[name]["error"] / before[name]["error"] - 1 for name in before]


def same_files(one: Path, other: Path) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def near_enough(one: Path, other: Path, codes: float = 0.999, error: float = 1e-3) -> None:
    same_files(one, other)
    equal, errors = compared(one, other)
    assert equal > codes
    assert max(map(abs, errors)) < error


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    quantize(str(model("gpt_neox")), out, **SMALL)
    return out


def test_three_processes_and_four_rows(tmp_path, alone):
    on_ranks(3, tmp_path, tmp_path / "out", calib=QUICK["calib"])
    near_enough(alone, tmp_path / "out")
    record = read_json(tmp_path / "out" / "quantkit.json")
    assert record["machine"].startswith("3 processes on ")
    assert record["calibration"] == read_json(alone / "quantkit.json")["calibration"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_groups_that_are_not_divided(tmp_path, alone, monkeypatch):
    """As on GPUs, where less is gained by it: each of the four goes to one process."""

    def whole(rows, ranks, pace):
        shares = divided(rows, ranks, GPU)
        assert len(rows) == 4 and all(1 in some for some in shares.values())
        return shares

    monkeypatch.setattr(portions, "divided", whole)
    on_ranks(2, tmp_path, tmp_path / "out")
    near_enough(alone, tmp_path / "out")


def test_groups_that_follow_the_activations(tmp_path):
    settings = {"act_order": "group", "sym": False}
    quantize(str(model("llama")), tmp_path / "one", **SMALL, **settings)
    on_ranks(2, tmp_path, tmp_path / "out", source=model("llama"), **settings)
    near_enough(tmp_path / "one", tmp_path / "out")


def test_aligned_and_measured(tmp_path, monkeypatch):
    """A rounding that falls to the other side changes the inputs of what comes behind it, so single
    codes differ, as they do in one process with other micro-batches; quality does not."""
    few = lambda tokenizer, tokens: check.held_out(tokenizer, 3, 64)  # noqa: E731
    monkeypatch.setattr(whole, "held_out", few)
    settings = {"fast": False, "check": True, "refine": 1}
    quantize("demo", tmp_path / "one", **{**SMALL, **settings})
    on_ranks(2, tmp_path, tmp_path / "out", source="demo", **settings)
    same_files(tmp_path / "one", tmp_path / "out")
    equal, errors = compared(tmp_path / "one", tmp_path / "out")
    assert equal > 0.7
    assert abs(sum(errors) / len(errors)) < 5e-3
    before, after = (read_json(tmp_path / n / "quantkit.json")["measured"] for n in ("one", "out"))
    assert abs(after["kl"] - before["kl"]) < before["kl_error"]
    assert list(after["sets"]) == list(before["sets"])
    for label, one in after["sets"].items():
        assert one["reference_perplexity"] == pytest.approx(
            before["sets"][label]["reference_perplexity"], rel=1e-5
        )
        assert (one["rows"], one["tokens"]) == (3, before["sets"][label]["tokens"])


def test_rows_of_several_comparisons_in_one():
    logits = torch.randn(4, 2, 9, 30)
    ids = torch.randint(0, 30, (4, 9))
    one, parts = Comparison(), [Comparison(), Comparison()]
    for i, (label, part) in enumerate([("en", 0), ("ja", 0), ("ja", 1), ("code", 1)]):
        for some in (one, parts[part]):
            some.add(label, ids[i], *logits[i])
    assert Comparison.of(parts).described() == one.described()


def test_awq(tmp_path):
    """Rows enough for the same micro-batches: so the same scales are tried on the same samples.
    Each process has micro-batches of a shape that the other one has not."""
    settings = {"calib": (rows(tmp_path, (64, 64), (128, 32)),), "refine": "none"}
    settings |= {"calib_rows": 192}
    settings = {name: value for name, value in {**SMALL, **settings}.items() if name != "fast"}
    source = str(model("gpt_neox"))
    quantize_awq(source, tmp_path / "one", **settings)

    def work(rank):
        return quantize_awq(source, tmp_path / "out", **settings).pairs()

    pairs, others = together(2, work, tmp_path)
    assert pairs == others == read_json(tmp_path / "one" / "quantkit.json")["scaled"]
    near_enough(tmp_path / "one", tmp_path / "out", codes=0.9999)


def test_the_head_and_a_budget(tmp_path):
    settings = {"lm_head": True, "target_bits": 5, "check": True}
    quantize(str(model("gpt_neox")), tmp_path / "one", **{**SMALL, **settings})
    on_ranks(2, tmp_path, tmp_path / "out", **settings)
    near_enough(tmp_path / "one", tmp_path / "out")
    one, other = (read_json(tmp_path / name / "quantkit.json") for name in ("one", "out"))
    assert [p["bits"] for p in one["budget"]["parts"]] == [
        p["bits"] for p in other["budget"]["parts"]
    ]
    assert other["measured"]["kl"] == pytest.approx(one["measured"]["kl"], rel=0.05)


def test_more_processes_than_rows(tmp_path):
    def work(rank):
        with pytest.raises(UsageError, match=r"3 processes need at least 3 rows of .* not 2"):
            quantize("demo", tmp_path / "out", **{**SMALL, "calib": ("bundled:en=2",)})

    together(3, work, tmp_path)
    assert not (tmp_path / "out.partial").exists()


# when it does not go well


def run(arguments):
    """``quantkit`` with these arguments, as the command does it -> the work of a process."""

    def work(rank):
        sys.argv = ["quantkit", *map(str, arguments)]
        cli.run()

    return work


OPTIONS = ["gptq", "demo", "--dtype", "float32", *QUICK_OPTIONS]


def finished(out: Path) -> list[str]:
    book = out.with_name(out.name + ".partial") / "ledger.json"
    return list(read_json(book)["done"]) if book.exists() else []


def until_solved(out: Path, going: Started | subprocess.Popen, blocks: int = 1) -> None:
    """Wait for the first blocks to be in the ledger (the first entry is for the dense tensors)."""
    for _ in range(6000):
        if len(finished(out)) > blocks:
            return
        time.sleep(0.01)
    raise AssertionError("nothing was solved")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_all_and_any_number_goes_on(tmp_path, lost):
    out = tmp_path / "out"
    started = Started(3, run([*OPTIONS, "--out", out]), tmp_path)
    until_solved(out, started)
    started.kill(lost)
    begun = time.monotonic()
    codes = started.wait(20)
    assert time.monotonic() - begun < 15
    assert codes == [-signal.SIGKILL if rank == lost else 1 for rank in range(3)]
    if lost:  # without torchrun the first one keeps the store that the others would agree by
        message, hint = sentence(started.said().rpartition("M weights")[2] or started.said())
        assert "has ended" in message and "the same command again" in hint
    solved = len(finished(out))
    assert not out.exists() and 2 <= solved < 5
    if lost:
        assert command(*OPTIONS, "--out", out) == 0
    else:
        again = Started(2, run([*OPTIONS, "--out", out]), tmp_path)
        assert again.wait() == [0, 0], again.said()
        assert f"going on: {solved - 1} block" in again.said()
        assert again.said().count("warning") == again.said().count("fewer than the 768 inputs")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]
    assert (out / "quantkit.json").exists()


def test_no_way_between_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    started = Started(2, run([*OPTIONS, "--out", tmp_path / "out"]), tmp_path)
    assert started.wait(30) == [1, 1]
    message, hint = sentence(started.said())
    assert "cannot be reached" in message and "nowhere0" in message
    assert "GLOO_SOCKET_IFNAME" in hint


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("step", ["observe", "merge"])
def test_what_one_process_has_to_tell_is_told_once(tmp_path, monkeypatch, failing, step):
    run_step = getattr(gather, step)

    def failed(block, *given):
        if join().rank == failing and block.name.endswith(".2"):
            raise QuantkitError("the inputs are not finite", "use --dtype float32")
        return run_step(block, *given)

    monkeypatch.setattr(gather, step, failed)
    started = Started(3, run([*OPTIONS, "--out", tmp_path / "out"]), tmp_path)
    assert started.wait(30) == [1, 1, 1]
    errors = [line for line in started.said().splitlines() if line.startswith("error: ")]
    assert errors == ["error: the inputs are not finite"]
    assert "Traceback" not in started.said()


@pytest.mark.parametrize("other", [["--damp", "0.5"], ["--dry-run"], ["--calib-rows", "3"]])
def test_processes_with_different_options_are_refused(tmp_path, other):
    def work(rank):
        run([*OPTIONS, "--out", tmp_path / "out", *(other if rank else [])])(rank)

    started = Started(2, work, tmp_path)
    assert started.wait(30) == [2, 2]
    errors = [line for line in started.said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "were given different options" in errors[0]


def test_a_full_disk_of_another_process_is_a_sentence(tmp_path, monkeypatch):
    def full(folder, count, dtype):
        if join().rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return torch.empty(count, dtype=dtype)

    monkeypatch.setattr(states, "_mapped", full)
    options = [*OPTIONS, "--max-memory", "1MB", "--out", tmp_path / "out"]
    started = Started(2, run(options), tmp_path)
    assert started.wait(30) == [1, 1]
    assert "error: the disk is full while writing" in started.said()
    assert "Traceback" not in started.said()


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("fast", [True, False])
def test_infinities_of_one_process_are_told_by_all(tmp_path, monkeypatch, failing, fast):
    """Others get them with the sums; they must not solve with them, and find that they cannot."""
    observe, not_finite = gather.observe, gather._not_finite

    def poisoned(block, hidden, *given):
        if join().rank == failing and block.name.endswith(".1"):
            x = hidden[0].clone()
            x[0, 3] = torch.inf
            hidden.put(0, x)
        return observe(block, hidden, *given)

    def late(*given):  # it looks through a block's parameters first, which may be many
        time.sleep(0.3 * (join().rank == failing))
        return not_finite(*given)

    monkeypatch.setattr(portions, "CPU", portions.GPU)  # groups go whole to one process
    monkeypatch.setattr(gather, "observe", poisoned)
    monkeypatch.setattr(gather, "_not_finite", late)
    options = ["gptq", model("qwen3_moe"), "--group", 32, "--dtype", "float32", *QUICK_OPTIONS]
    options += [] if fast else ["--align", 0.5]
    started = Started(2, run([*options, "--out", tmp_path / "out"]), tmp_path)
    assert started.wait(60) == [1, 1]
    errors = [line for line in started.said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "are not finite during calibration" in errors[0]


def test_what_all_processes_have_to_tell_is_told_once(tmp_path):
    for arguments, code, told in (
        ([*OPTIONS, "--bits", "5", "--out", tmp_path / "out"], 2, "error: 5 bits are not"),
        (["gptq", "demo", "--nonsense"], 2, "no such option"),
        (["verify", tmp_path], 2, "error: 'quantkit verify' does not share its work"),
        (["gptq", "--help"], 0, "Quantize MODEL to GPTQ"),
    ):
        for path in tmp_path.iterdir():
            path.unlink()
        started = Started(2, run(arguments), tmp_path)
        assert started.wait() == [code, code]
        assert (started.said("out") + started.said()).count(told) == 1


def test_what_the_first_has_to_tell_while_the_others_wait(tmp_path):
    missing = ["--calib", tmp_path / "missing.jsonl", "--out", tmp_path / "out"]
    started = Started(3, run(["gptq", "demo", *missing]), tmp_path)
    codes = started.wait(15)
    assert 0 not in codes and -signal.SIGKILL not in codes
    message, _ = sentence(started.said())
    assert "missing.jsonl" in message


def test_a_process_that_waits_in_vain_can_be_stopped(tmp_path):
    """Python's own signal handlers would run when the collective returns, which it does not."""
    out = tmp_path / "out"
    started = Started(2, run([*OPTIONS, "--out", out]), tmp_path)
    until_solved(out, started)
    os.kill(started.processes[1].pid, signal.SIGSTOP)
    time.sleep(3)
    assert started.processes[0].is_alive()
    os.kill(started.processes[0].pid, signal.SIGTERM)
    started.processes[0].join(10)
    started.kill(1)
    assert started.wait() == [1, -signal.SIGKILL]
    assert "one of the processes has ended, or was told to" in started.said()


def test_ctrl_c(tmp_path):
    out = tmp_path / "out"
    started = Started(2, run([*OPTIONS, "--out", out]), tmp_path)
    until_solved(out, started)
    for process in started.processes:
        os.kill(process.pid, signal.SIGINT)
    assert set(started.wait(20)) <= {130, 1}
    message, hint = sentence("\n".join(started.said().splitlines()[5:]))
    assert message == "stopped" and "again" in hint


def test_torchrun(tmp_path):
    """The real thing: a process is killed, torchrun stops the others, one process goes on."""
    out = tmp_path / "out"
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    line += ["-m", "quantkit", *OPTIONS, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "err").open("w") as err:
        going = subprocess.Popen(line, stdout=err, stderr=err, env=environment)
    until_solved(out, going)
    workers = psutil.Process(going.pid).children(recursive=True)
    (victim,) = [one for one in workers if one.environ().get("RANK") == "1"]
    victim.kill()
    assert going.wait(30) == 1
    said = (tmp_path / "err").read_text()
    assert said.count("error: one of the ") == 1
    assert command(*OPTIONS, "--out", out) == 0


# processes that cannot work together


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one = Ranks(1, 4, 1)
    assert one._own(torch.device("cuda"), "auto") == torch.device("cuda", 1)
    assert one._own(torch.device("cpu"), "cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="4 processes cannot all run on cuda:1"):
        one.connect("cuda:1")
    with pytest.raises(UsageError, match="has 2 GPUs, and more processes"):
        Ranks(2, 4, 2).connect("auto")


def test_others_that_do_not_come(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    join.cache_clear()
    with pytest.raises(QuantkitError, match=r"cannot be reached .*MASTER_PORT"):
        join()


def test_one_process_needs_none_of_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    join.cache_clear()
    assert join() is ALONE
    assert ALONE.share("x") == "x" and ALONE.everyone("x") == ["x"]
    assert ALONE.from_first(lambda: 5) == ALONE.first_on_host(lambda: 5) == 5
    assert several.tells() and several.tells()
