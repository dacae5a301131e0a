"""llama.cpp as an engine. Skipped where llama-cpp-python is not importable."""

import gguf_tools
import pytest
import torch

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
