"""llama.cpp as an engine. Skipped where llama-cpp-python is not importable."""

import gguf_tools
import pytest
import torch
from tools import command, sentence

from quantkit import data
from quantkit.core.sampling import Sampling
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime import llamacpp
from quantkit.runtime.llamacpp import LlamaCpp
from quantkit.runtime.load import load

needs_llamacpp = pytest.mark.skipif(
    not llamacpp.installed(), reason="llama-cpp-python is not installed"
)
GREEDY = Sampling(temperature=0)
TEXT = "日本の首都は"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return gguf_tools.write(data.demo(), tmp_path_factory.mktemp("gguf") / "demo-F32.gguf")


@pytest.fixture(scope="module")
def engine(file):
    engine = LlamaCpp(file, context=256, threads=1)
    yield engine
    engine.close()


@needs_llamacpp
def test_it_computes_what_our_loader_computes(engine, file):
    ours, tokenizer = load(str(file), dtype="float32", device="cpu")
    ids = engine.encode(TEXT)
    assert ids == tokenizer.encode(TEXT)
    assert engine.decode(ids) == TEXT
    found = engine.logits(ids)
    with torch.no_grad():
        wanted = ours(torch.tensor([ids])).logits[0]
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert (found - wanted).abs().max() < 0.02 * wanted.std()
    written = ours.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
    assert list(engine.stream(ids, GREEDY, 20)) == written[0, len(ids) :].tolist()
    assert engine.chat_template == tokenizer.chat_template
    assert tokenizer.eos_token_id in engine.end_ids
    assert engine.special_tokens["eos_token"] == tokenizer.eos_token


@needs_llamacpp
def test_what_a_text_begins_with_alike_is_not_computed_again(engine):
    ids = engine.encode(TEXT)
    first = list(engine.stream(ids, GREEDY, 8))
    computed: list[int] = []
    whole = engine._computed

    def counted(some, every):
        computed.extend(some)
        return whole(some, every)

    engine._computed = counted
    again = list(engine.stream(ids + first[:4], GREEDY, 4))
    del engine._computed
    assert again == first[4:]
    assert computed[0] == first[3] and len(computed) == 4
    other = engine.encode("Once upon a time")
    assert list(engine.stream(other, GREEDY, 4)) == list(engine.stream(other, GREEDY, 4))


@needs_llamacpp
def test_a_stream_that_is_left_does_no_harm(engine):
    ids = engine.encode(TEXT)
    whole = list(engine.stream(ids, GREEDY, 12))
    stream = engine.stream(ids, GREEDY, 12)
    assert [next(stream) for _ in range(5)] == whole[:5]
    stream.close()
    assert list(engine.stream(ids, GREEDY, 12)) == whole


@needs_llamacpp
def test_seeds(engine):
    ids = engine.encode(TEXT)
    settings = [Sampling(temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    one, same, other = (list(engine.stream(ids, s, 12)) for s in settings)
    assert one == same != other


@needs_llamacpp
def test_the_context_ends_a_text(engine):
    room = 6
    ids = (engine.encode("a b c d e f g h") * 100)[: engine.context - room]
    found = list(engine.stream(ids, Sampling(temperature=1.0, seed=0), 100))
    assert len(found) == room + 1 or found[-1] in engine.end_ids
    with pytest.raises(UsageError, match="do not fit into a context"):
        engine.logits([1] * (engine.context + 1))
    with pytest.raises(UsageError, match="no tokens"):
        engine.logits([])


@needs_llamacpp
def test_long_rows_are_computed_in_parts(engine, monkeypatch):
    ids = engine.encode("The history of the city is long and 日本の首都は東京です。") * 3
    whole = engine.logits(ids)
    monkeypatch.setattr(llamacpp, "_BATCH", 7)
    assert (engine.logits(ids) - whole).abs().max() < 0.02 * whole.std()


@needs_llamacpp
def test_files_that_do_not_open(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(3))
    with pytest.raises(QuantkitError):
        LlamaCpp(path)
    strange = gguf_tools.write(data.demo(), tmp_path / "strange.gguf")
    strange.write_bytes(strange.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(QuantkitError, match=r"llama\.cpp does not open"):
        LlamaCpp(strange)


def test_without_it_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    with pytest.raises(QuantkitError) as caught:
        LlamaCpp(tmp_path / "x.gguf")
    assert "quantkit[llamacpp]" in caught.value.hint


def said(capsys, *arguments: object) -> tuple[str, str]:
    assert command("generate", *arguments, TEXT, "--raw", "-n", 12, "-t", 0) == 0
    return capsys.readouterr()


@needs_llamacpp
def test_a_gguf_file_on_a_cpu_is_run_by_llamacpp(file, capsys):
    found, told = said(capsys, file)
    assert "llama.cpp runs this model: GGUF on a CPU" in told
    ours, told = said(capsys, file, "--engine", "torch", "--dtype", "float32")
    assert "llama.cpp" not in told
    assert found == ours == said(capsys, file, "--engine", "llama.cpp")[0]


def test_without_llamacpp_a_gguf_file_runs_too(file, capsys, monkeypatch):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    found, told = said(capsys, file, "--dtype", "float32")
    assert "torch runs this model: GGUF; pip install" in told
    assert found == said(capsys, "demo", "--dtype", "float32")[0]
    assert command("generate", file, "hello", "--engine", "llama.cpp") == 1
    assert "not installed" in sentence(capsys.readouterr().err)[0]


@needs_llamacpp
def test_what_llamacpp_cannot_open_goes_to_torch_and_this_is_said(file, capsys, monkeypatch):
    def fails(path, context):
        raise QuantkitError("llama.cpp does not open it")

    monkeypatch.setattr("quantkit.runtime.engine.LlamaCpp", fails)
    assert "torch runs this model: GGUF, and llama.cpp does not open it" in said(capsys, file)[1]


def test_only_gguf_files_go_to_llamacpp(capsys):
    assert command("generate", "demo", "hello", "--engine", "llama.cpp") == 2
    assert "llama.cpp runs GGUF files" in sentence(capsys.readouterr().err)[0]
    assert command("generate", "demo", "hello", "--engine", "vroom") == 2
    assert "no engine 'vroom'" in sentence(capsys.readouterr().err)[0]


def test_files_with_names_from_before(file, tmp_path, capsys):
    """GPT4All called its files ggml-something.bin, before and after they became GGUF."""
    old = tmp_path / "ggml-model-gpt4all-q4_0.bin"
    old.write_bytes(file.read_bytes())
    assert said(capsys, old, "--engine", "torch")[0] == said(capsys, file, "--engine", "torch")[0]
    for magic in (b"lmgg", b"fmgg", b"tjgg"):
        old.write_bytes(magic + bytes(40))
        assert command("generate", old, "hello") == 1
        problem, hint = sentence(capsys.readouterr().err)
        assert "old GGML file" in problem and "GGUF" in hint
