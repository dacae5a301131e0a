"""quantkit bench: what is counted, and that it comes out."""

import xml.etree.ElementTree as ElementTree

import gguf_tools
import pytest
import torch
from tools import command, model, quantized, read_json, sentence

from quantkit import data
from quantkit.core.checkpoint import Checkpoint
from quantkit.runtime import llamacpp
from quantkit.runtime.load import load
from quantkit.runtime.torch_engine import TorchEngine
from quantkit.workflows import bench as workflow
from quantkit.workflows.bench import bench, step_bytes

FAST = {"batch": [1, 3], "context": [8, 16], "new": 4, "repeats": 1}


def bytes_in(folder) -> int:
    checkpoint = Checkpoint(folder)
    return sum(checkpoint.get(name).numel() for name in checkpoint)


def test_a_step_reads_every_weight_once_and_keys_and_values():
    engine = TorchEngine(*load("demo", dtype="float32"))
    config = engine.model.config
    weights = step_bytes(engine, 1, 0)
    assert config.tie_word_embeddings
    assert weights == 4 * bytes_in(data.demo())  # the embedding is the head, and read once
    width = config.hidden_size // config.num_attention_heads
    held = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * width
    assert step_bytes(engine, 3, 10) - weights == 30 * held


def test_an_embedding_that_is_not_the_head_is_not_read():
    engine = TorchEngine(*load(str(model("gpt_neox")), dtype="float32"))
    embedding = engine.model.get_input_embeddings().weight
    assert step_bytes(engine, 1, 0) == 4 * (bytes_in(model("gpt_neox")) - embedding.numel())


def test_4_bits_are_a_half_byte():
    dense, packed = (
        step_bytes(TorchEngine(*load(name, dtype="bfloat16")), 1, 0)
        for name in ("demo", str(quantized()))
    )
    linears = [
        m.weight.numel()
        for m in load("demo")[0].model.layers.modules()
        if hasattr(m, "in_features")
    ]
    saved = (dense - packed) / sum(linears)
    assert 2 - 0.5 - 0.1 < saved < 2 - 0.5  # scales of groups of 128: 4 bytes each


def test_it_measures_what_was_asked_for():
    torch.manual_seed(0)
    found = bench("demo", **FAST)
    assert [(r.batch, r.context) for r in found.rows] == [(1, 8), (1, 16), (3, 8), (3, 16)]
    assert all(r.prefill > 0 and r.decode > 0 for r in found.rows)
    for row in found.rows:
        assert row.bandwidth == pytest.approx(row.step_bytes * row.decode / row.batch)
    assert found.peak_bytes > 1e8 and found.load_seconds > 0 and found.copy_bandwidth > 1e8


def test_random_text_never_ends_early(monkeypatch):
    made = []
    run = workflow._run

    def counted(engine, batch, context, new, seed):
        made.append(len(list(engine.stream([1] * context, workflow._GREEDY, new))))
        return run(engine, batch, context, new, seed)

    monkeypatch.setattr(workflow, "_run", counted)
    bench("demo", batch=[1], context=[4], new=60, repeats=1)
    assert made == [60, 60]


@pytest.mark.skipif(not llamacpp.installed(), reason="llama-cpp-python is not installed")
def test_a_gguf_file(tmp_path):
    file = gguf_tools.write(data.demo(), tmp_path / "demo.gguf", "F16")
    found = bench(str(file), **{**FAST, "batch": [1]})
    assert found.engine == "llama.cpp"
    assert 2 * bytes_in(data.demo()) < found.rows[0].step_bytes < 2.2 * bytes_in(data.demo())
    with pytest.raises(workflow.UsageError, match="one text at a time"):
        bench(str(file), **FAST)


def test_the_command(tmp_path, capsys):
    given = [
        "bench",
        "demo",
        "--batch",
        "1,2",
        "--context",
        "4,8",
        "--new",
        3,
        "--repeats",
        1,
        "-q",
    ]
    files = ["--json", tmp_path / "b.json", "--plot", tmp_path / "b.svg"]
    assert command(*given, *files) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert len(read_json(tmp_path / "b.json")["rows"]) == 4
    drawing = ElementTree.fromstring((tmp_path / "b.svg").read_text("utf-8"))
    texts = [one.text for one in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert "batch 2" in texts and "tokens/s" in texts
    for options, problem in (
        (["--batch", "x"], "--batch x"),
        (["--batch", "0"], "1 or more"),
        (["--new", 1], "--new"),
        (["--context", 10**7], "do not fit"),
        (["--plot", "b.png"], "not an .svg"),
        (["--json", tmp_path], "is a folder"),
    ):
        assert command("bench", "demo", *options) == 2
        assert problem in sentence(capsys.readouterr().err)[0]
