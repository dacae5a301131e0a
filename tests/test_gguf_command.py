"""quantkit gguf: GPTQ in the file's own blocks, rounding, plain files; K types by llama.cpp."""

import time
from importlib.util import find_spec

import pytest
import torch
from tools import QUICK, command, model, read_json, sentence

from quantkit.core.checkpoint import Checkpoint
from quantkit.core.gguf_file import GgufFile
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import imatrix
from quantkit.methods import rtn
from quantkit.runtime.load import load
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows import gguf as workflow
from quantkit.workflows.gguf import quantize_gguf
from quantkit.workflows.importance import importance
from quantkit.workflows.quantize import quantize


def opened(folder):
    return open_checkpoint(resolve(str(folder)))


def types(folder):
    return {name: t.type for name, t in GgufFile(next(folder.glob("*.gguf"))).tensors.items()}


@pytest.mark.parametrize("kind, sym", [("q4_0", True), ("q4_1", False)])
def test_gptq_is_carried_over_block_by_block(kind, sym, tmp_path):
    """The file holds the very codes that GPTQ chose in groups of 32."""
    source = str(model("llama"))
    result = quantize_gguf(source, tmp_path / "out", type=kind, **QUICK)
    quantize(source, tmp_path / "gptq", group=32, sym=sym, **QUICK)
    found, wanted = opened(tmp_path / "out"), opened(tmp_path / "gptq")
    assert len(found.linears) == 21 and result.written
    for prefix in found.linears:
        a, b = found.qweight(prefix), wanted.qweight(prefix)
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "scratch" not in names and "ledger.json" not in names
    record = read_json(tmp_path / "out" / "quantkit.json")
    assert record["method"] == "gptq" and record["conversion"]["to"] == f"gguf:{kind}"
    assert record["calibration"]["rows"] == 4
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        logits = [
            load(str(tmp_path / f), device="cpu", dtype="float32")[0](ids).logits
            for f in ("out", "gptq")
        ]
    # Q4_1 rounds scale * zero point to float16
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < (1e-5 if sym else 5e-3)


@pytest.mark.parametrize("kind", ["q5_0", "q8_0"])
def test_rounding_is_the_default_where_it_is_enough(kind, tmp_path):
    source = model("llama")
    result = quantize_gguf(str(source), tmp_path, type=kind, overwrite=True)
    prefix = "model.layers.1.mlp.down_proj"
    weight = Checkpoint(source).get(f"{prefix}.weight")
    q = opened(result.folder).qweight(prefix)
    assert q.identical(rtn.quantize(weight, q.scheme, signed=True))


def test_size_and_time_are_those_of_the_whole(tmp_path, monkeypatch):
    solved = workflow.quantize
    spent = []

    def timed(*args, **options):
        started = time.perf_counter()
        solved(*args, **options)
        spent.append(time.perf_counter() - started)

    monkeypatch.setattr(workflow, "quantize", timed)
    result = quantize_gguf(str(model("llama")), tmp_path / "out", type="q4_0", **QUICK)
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert result.bytes == file.stat().st_size
    assert spent and result.seconds > spent[0]


def test_types_of_embedding_and_head(tmp_path):
    source = model("llama")
    out = tmp_path / "out"
    quantize_gguf(str(source), out, calib="none", embedding_type="q8_0", output_type="f32")
    found = types(out)
    assert (found["token_embd.weight"], found["output.weight"]) == ("Q8_0", "F32")
    assert found["blk.0.attn_q.weight"] == "Q4_0" and found["blk.0.attn_norm.weight"] == "F32"
    dense, plain = opened(out).dense, Checkpoint(source)
    embedding = plain.get("model.embed_tokens.weight")
    error = (dense.get("model.embed_tokens.weight") - embedding).norm() / embedding.norm()
    assert 0 < float(error) < 0.01
    plainly = quantize_gguf(str(source), tmp_path / "plain", calib="none")
    assert types(plainly.folder)["token_embd.weight"] == "F16"


def test_plain_files(tmp_path):
    source = model("llama")
    quantize_gguf(str(source), tmp_path / "out", type="f32")
    found, plain = opened(tmp_path / "out"), Checkpoint(source)
    assert not found.linears
    assert all(torch.equal(found.dense.get(name), plain.get(name)) for name in plain)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """Killed between its two halves, it does not quantize again; with other settings it says so."""
    source, runs = str(model("llama")), []
    whole = quantize_gguf(source, tmp_path / "whole", **QUICK)
    carry, real = workflow.carry, workflow.quantize

    def counting(*arguments, **options):
        runs.append(1)
        return real(*arguments, **options)

    def dying(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "quantize", counting)
    monkeypatch.setattr(workflow, "carry", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize_gguf(source, tmp_path / "killed", **QUICK)
    monkeypatch.setattr(workflow, "carry", carry)
    with pytest.raises(UsageError, match="other settings"):
        quantize_gguf(source, tmp_path / "killed", **{**QUICK, "fast": False})
    killed = quantize_gguf(source, tmp_path / "killed", **QUICK)
    assert len(runs) == 1
    files = [next(r.folder.glob("*.gguf")).read_bytes() for r in (whole, killed)]
    assert files[0] == files[1]


def test_the_mean_squares_are_those_of_the_inputs(tmp_path):
    source = model("gpt_neox")
    found, rows, tokens = importance(
        resolve(str(source)),
        calib=list(QUICK["calib"]),
        calib_rows=4,
        calib_seqlen=64,
        seed=0,
        device="cpu",
        dtype="float32",
        progress=workflow.Progress(),
    )
    assert (rows, tokens) == (4, 64) and len(found) == 8
    loaded, tokenizer = load(str(source), device="cpu", dtype="float32")
    from quantkit.workflows.calibrate import calibrate

    text = calibrate(
        resolve(str(source)),
        tokenizer,
        list(QUICK["calib"]),
        rows=4,
        seqlen=64,
        longest=64,
        seed=0,
        device=torch.device("cpu"),
    )
    seen = []
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h"
    loaded.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for row in text.rows:
            loaded(torch.tensor([row]))
    inputs = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    assert torch.allclose(found[name], inputs.square().mean(0), rtol=1e-4)


def test_importance_matrix_files(tmp_path):
    matrix = {"blk.0.attn_q.weight": torch.rand(64), "blk.1.ffn_up.weight": torch.rand(32)}
    imatrix.write(tmp_path / "i.gguf", matrix, ["bundled"], 4, 64)
    found = imatrix.read(tmp_path / "i.gguf")
    assert found.keys() == matrix.keys()
    assert all(torch.equal(found[name], matrix[name]) for name in matrix)
    other = quantize_gguf(str(model("llama")), tmp_path / "out", type="f16").folder
    with pytest.raises(QuantkitError, match="no importance matrix"):
        imatrix.read(next(other.glob("*.gguf")))


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_importance_changes_what_llama_cpp_rounds_to(tmp_path):
    """With the matrix, the weighted error of Q4_K is smaller, though the plain error is not."""
    source, saved = model("llama", hidden_size=256, intermediate_size=256), tmp_path / "i.gguf"
    plain = quantize_gguf(str(source), tmp_path / "plain", type="q4_k_s", calib="none")
    options = {name: QUICK[name] for name in ("calib", "calib_seqlen")}
    weighed = quantize_gguf(
        str(source), tmp_path / "weighed", type="q4_k_s", imatrix_out=saved, **options
    )
    matrix, checkpoint = imatrix.read(saved), Checkpoint(source)
    assert len(matrix) == 21
    prefix, name = "model.layers.2.mlp.down_proj", "blk.2.ffn_down.weight"
    weight = checkpoint.get(f"{prefix}.weight")
    assert weight.shape[1] == len(matrix[name])
    errors = []
    for result in (plain, weighed):
        lost = opened(result.folder).qweight(prefix).dequantize() - weight
        errors.append(float((lost.square() * matrix[name]).sum()))
    assert errors[1] < 0.99 * errors[0]
    record = read_json(weighed.folder / "quantkit.json")["conversion"]["settings"]
    assert record["importance"] == list(QUICK["calib"])


def test_refusals(tmp_path):
    source, out = str(model("llama")), tmp_path / "out"
    for options, words in (
        ({"type": "q9"}, "no type"),
        ({"type": "q5_0", "calib": "bundled"}, "nothing is calibrated"),
        ({"type": "f16", "calib": ["bundled"]}, "nothing is calibrated"),
        ({"embedding_type": "q6_k"}, "no --embedding-type"),
        ({"imatrix_out": tmp_path / "i"}, "only K types"),
    ):
        with pytest.raises(UsageError, match=words):
            quantize_gguf(source, out, **options)
    narrow = str(model("llama", intermediate_size=80))
    with pytest.raises((QuantkitError, UsageError), match="80"):  # before anything is calibrated
        quantize_gguf(narrow, out, **QUICK)
    with pytest.raises(QuantkitError):  # llama.cpp does not know it so
        quantize_gguf(str(model("gpt2")), out, **QUICK)
    assert not list(tmp_path.glob("out*"))


def test_on_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["gguf", "demo", "-t", "q5_0", "--embedding-type", "q8_0", "-o", out]
    assert command(*arguments, "--dry-run") == 0 and not out.exists()
    assert command(*arguments) == 0
    assert "28 linears: relative error" in capsys.readouterr().out
    assert command("gguf", "demo", "-t", "q9", "-o", tmp_path / "other") == 2
    assert "no type" in sentence(capsys.readouterr().err)[0]
