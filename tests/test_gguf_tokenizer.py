"""Tokenizers in GGUF files: what transformers cuts, llama.cpp cuts alike, and what is read back is
the same tokenizer."""

import copy
import json
from importlib.util import find_spec

import gguf_tools
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quantkit import data
from quantkit.core.gguf_file import GgufFile
from quantkit.core.gguf_values import string
from quantkit.core.gguf_writer import GgufWriter
from quantkit.errors import QuantkitError
from quantkit.formats import gguf_tokenizer, gguf_tokenizer_read, gguf_words
from quantkit.formats.gguf_tokenizer import Files
from quantkit.formats.gguf_words import Cut, Step
from quantkit.runtime.gguf_opened import load_tokenizer
from quantkit.runtime.gguf_roundtrip import TEXTS, check_roundtrip

END = "<|endoftext|>"
# llama.cpp's own regular expressions do not do these exactly as the original ones
KNOWN = {
    "gpt-4o": {"marks"},
    "tekken": {"marks"},
    "deepseek-coder": {"wide space"},
}
MARKS, WIDE = TEXTS[12], TEXTS[15]


@pytest.fixture(scope="module")
def words():
    """A byte-level tokenizer.json whose tokens reach over words and lines, so that each place where
    a text is cut shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        max_token_length=40,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer.json like Llama 2's, with all ways to make each of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=900, min_frequency=1, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token, _ in learned if token not in tokens and "\n" not in token]
    types = [gguf_tokenizer.CONTROL] * 3 + [gguf_tokenizer.BYTE] * 256
    types += [gguf_tokenizer.NORMAL] * (len(tokens) - len(types))
    scores = [-float(number) for number in range(len(tokens))]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0",
        "added_tokens": [gguf_tokenizer_read._added(n, t, True) for n, t in enumerate(special)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
        },
        "pre_tokenizer": None,
        "post_processor": gguf_tokenizer_read._template_of(
            tokens, {"bos": "<s>"}, {"bos": True, "eos": False}
        ),
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": gguf_tokenizer_read._merges_of(tokens, types, scores),
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


WORDS = {"bos_token": END, "eos_token": END}
PIECES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def cut_by(words, name):
    cut = gguf_words.PRE_TOKENIZERS[name]
    changed = copy.deepcopy(words)
    changed["pre_tokenizer"] = gguf_words.pre_tokenizer(cut)
    changed["model"]["ignore_merges"] = cut.whole
    return changed


def original(tokenizer, special):
    backend = Tokenizer.from_str(json.dumps(tokenizer))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def write(path, files, pre=None):
    metadata = {"general.architecture": string("llama")} | gguf_tokenizer.metadata(files, pre)
    GgufWriter(path, metadata, {}).close()
    return path


def read(path):
    return load_tokenizer(GgufFile(path).metadata, 2048)


def differing(found, tokenizer):
    return {text for text, ids in zip(TEXTS, found) if ids != tokenizer.encode(text)}


# llama.cpp


@pytest.mark.referee
@pytest.mark.parametrize("name", gguf_words.PRE_TOKENIZERS)
def test_llamacpp_cuts_words_alike(tmp_path, words, name):
    tokenizer = cut_by(words, name)
    path = write(tmp_path / "t.gguf", Files(tokenizer, WORDS))
    assert GgufFile(path).metadata["tokenizer.ggml.pre"] == name
    known = {"marks": MARKS, "wide space": WIDE}
    found = differing(gguf_tools.tokens(path, list(TEXTS)), original(tokenizer, WORDS))
    assert found == {known[what] for what in KNOWN.get(name, ())}


@pytest.mark.referee
def test_another_name_shows_in_the_tokens(tmp_path, words):
    """Otherwise the tests here would show nothing."""
    for name, other in (("gpt-2", "llama-bpe"), ("llama-bpe", "qwen2"), ("gpt-2", "starcoder")):
        tokenizer = cut_by(words, name)
        path = write(tmp_path / "t.gguf", Files(tokenizer, WORDS), other)
        found = differing(gguf_tools.tokens(path, list(TEXTS)), original(tokenizer, WORDS))
        assert len(found) >= 2, (name, other)


@pytest.mark.referee
@pytest.mark.parametrize("first", [True, False])
def test_llamacpp_cuts_pieces_alike(tmp_path, pieces, first):
    tokenizer = copy.deepcopy(pieces)
    if not first:
        del tokenizer["normalizer"]["normalizers"][0]
    path = write(tmp_path / "t.gguf", Files(tokenizer, PIECES))
    found = differing(gguf_tools.tokens(path, list(TEXTS)), original(tokenizer, PIECES))
    assert not found


@pytest.mark.referee
def test_llamacpp_cuts_as_the_demo_does(tmp_path, tokenizer):
    path = write(tmp_path / "t.gguf", gguf_tools.tokenizer_files(data.demo()))
    texts = [*TEXTS, f"a{END}b", f"{END}{END}"]
    found = gguf_tools.tokens(path, texts)
    assert found == [tokenizer.encode(text) for text in texts]


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_the_roundtrip_finds_differences_and_nothing_else(tmp_path, words):
    tokenizer = cut_by(words, "gpt-2")
    right = write(tmp_path / "right.gguf", Files(tokenizer, WORDS))
    assert check_roundtrip(right, original(tokenizer, WORDS)) == []
    wrong = write(tmp_path / "wrong.gguf", Files(tokenizer, WORDS), "qwen2")
    found = check_roundtrip(wrong, original(tokenizer, WORDS))
    assert found and all(d.ours != d.llama_cpp and d.text in TEXTS for d in found)
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    with pytest.raises(QuantkitError, match=r"none\.gguf"):
        check_roundtrip(tmp_path / "none.gguf", original(tokenizer, WORDS))


def test_without_llamacpp_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.runtime.gguf_roundtrip.available", lambda: False)
    with pytest.raises(QuantkitError) as caught:
        check_roundtrip(tmp_path / "x.gguf", None)
    assert "quantkit[llamacpp]" in caught.value.hint


# back


@pytest.mark.parametrize("name", gguf_words.PRE_TOKENIZERS)
def test_words_are_read_back(tmp_path, words, name):
    tokenizer = cut_by(words, name)
    back = read(write(tmp_path / "t.gguf", Files(tokenizer, WORDS)))
    whole = original(tokenizer, WORDS)
    for text in TEXTS:
        assert back.encode(text) == whole.encode(text)
        assert back.decode(back.encode(text)) == text


@pytest.mark.parametrize("first", [True, False])
def test_pieces_are_read_back(tmp_path, pieces, first):
    tokenizer = copy.deepcopy(pieces)
    if not first:
        del tokenizer["normalizer"]["normalizers"][0]
    back = read(write(tmp_path / "t.gguf", Files(tokenizer, PIECES)))
    whole = original(tokenizer, PIECES)
    for text in TEXTS:
        assert back.encode(text) == whole.encode(text)
        assert back.decode(back.encode(text), skip_special_tokens=True) == text
    assert back.encode("a")[0] == 1


def test_the_demo_is_read_back(tmp_path, tokenizer):
    back = read(write(tmp_path / "t.gguf", gguf_tools.tokenizer_files(data.demo())))
    for text in (*TEXTS, f"a{END}b"):
        assert back.encode(text) == tokenizer.encode(text)
    chat = [{"role": "user", "content": "日本の首都は？"}]
    wanted = tokenizer.apply_chat_template(chat, tokenize=False)
    assert back.apply_chat_template(chat, tokenize=False) == wanted
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(back, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id")
    assert len(back) == len(tokenizer)
    assert back.all_special_ids == tokenizer.all_special_ids


# what is written


@pytest.fixture
def small():
    """The smallest tokenizer.json that has everything."""
    return {
        "added_tokens": [
            {"id": 3, "content": "<s>", "special": True},
            {"id": 4, "content": "  ", "special": False},
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    }


def metadata(small, config=None, pre=None, **other):
    found = gguf_tokenizer.metadata(Files(small, config or {}, **other), pre)
    return {key: value.plain() for key, value in found.items()}


def test_tokens_have_types_and_all_embeddings_a_token(small):
    found = metadata(small, model={"vocab_size": 7})
    assert found["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<s>", "  ", "[PAD5]", "[PAD6]"]
    assert found["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 4, 5, 5]
    assert found["tokenizer.ggml.merges"] == ["a b"]
    assert found["tokenizer.ggml.model"] == "gpt2"
    with pytest.raises(QuantkitError, match="embeddings for 4"):
        metadata(small, model={"vocab_size": 4})


def test_fillers_do_not_repeat_a_token(small):
    small["model"]["vocab"]["[PAD5]"] = 6
    assert metadata(small)["tokenizer.ggml.tokens"][5:] == ["[[PAD5]]", "[PAD5]"]
    small["added_tokens"][0]["content"] = "a"
    with pytest.raises(QuantkitError, match="same text"):
        metadata(small)


def test_merges_of_old_files_are_one_string(small):
    small["model"]["merges"] = ["a b"]
    assert metadata(small)["tokenizer.ggml.merges"] == ["a b"]
    small["model"]["merges"] = ["a b c"]
    with pytest.raises(QuantkitError, match="a b c"):
        metadata(small)


def test_special_tokens_are_found_wherever_they_are_said(small):
    key = "tokenizer.ggml.bos_token_id"
    assert key not in metadata(small)
    assert metadata(small, {"bos_token": "<s>"})[key] == 3
    assert metadata(small, {"bos_token": {"content": "<s>"}})[key] == 3
    assert metadata(small, special={"bos_token": "<s>"})[key] == 3
    assert metadata(small, model={"bos_token_id": 3})[key] == 3
    assert metadata(small, model={"bos_token_id": [3, 1]})[key] == 3
    assert metadata(small, {"bos_token": "ab"}, model={"bos_token_id": 3})[key] == 2


@pytest.mark.parametrize(
    ("single", "config", "wanted"),
    [
        (None, {}, (False, False)),
        (["<s>", None], {}, (True, False)),
        ([None, "<s>"], {}, (False, True)),
        (["<s>", None, "<s>"], {}, (True, True)),
        (["<s>", None], {"add_bos_token": False}, (False, False)),
        (None, {"add_bos_token": True}, (True, False)),
        (None, {"add_eos_token": True}, (False, True)),
    ],
)
def test_tokens_around_a_text(small, single, config, wanted):
    if single:
        small["post_processor"] = {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel"},
                {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": t}} if t else {"Sequence": {"id": "A"}}
                        for t in single
                    ],
                },
            ],
        }
    found = metadata(small, {"bos_token": "<s>", "eos_token": "<s>", **config})
    assert tuple(found[f"tokenizer.ggml.add_{role}_token"] for role in ("bos", "eos")) == wanted


def test_other_tokens_around_a_text_are_refused(small):
    small["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "ab"}}, {"Sequence": {"id": "A"}}],
    }
    with pytest.raises(QuantkitError, match="ab"):
        metadata(small, {"bos_token": "<s>"})
    small["post_processor"] = {"type": "BertProcessing"}
    with pytest.raises(QuantkitError, match="BertProcessing"):
        metadata(small)


def test_a_first_token_that_there_is_none_of_is_not_asked_for(small):
    """llama.cpp would end the process."""
    assert metadata(small, {"add_bos_token": True})["tokenizer.ggml.add_bos_token"] is False


def test_chat_templates(small):
    key = "tokenizer.chat_template"
    assert key not in metadata(small)
    assert metadata(small, {"chat_template": "x"})[key] == "x"
    assert metadata(small, template="y")[key] == "y"
    several = [{"name": "default", "template": "x"}, {"name": "tools", "template": "z"}]
    found = metadata(small, {"chat_template": several})
    assert (found[key], found[f"{key}.tools"]) == ("x", "z")


def test_line_ends_are_escaped_or_not(words):
    tokenizer = cut_by(words, "deepseek-v3")
    for step in tokenizer["pre_tokenizer"]["pretokenizers"][:-1]:
        regex = step["pattern"]["Regex"]
        step["pattern"]["Regex"] = regex.replace(r"\r", "\r").replace(r"\n", "\n")
    assert gguf_words.pre_tokenizer_name(tokenizer) == "deepseek-v3"


@pytest.mark.parametrize(
    "change",
    [
        {"type": "ByteLevel", "add_prefix_space": True},
        {"type": "Whitespace"},
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated"},
        {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Removed"},
        {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Whitespace"}]},
        None,
    ],
)
def test_unknown_cuts_are_refused_unless_named(small, change):
    small["pre_tokenizer"] = change
    with pytest.raises(QuantkitError) as caught:
        metadata(small)
    assert "--pre-tokenizer" in caught.value.hint
    assert metadata(small, pre="mine")["tokenizer.ggml.pre"] == "mine"


def test_whether_whole_words_are_tokens_decides_the_name(words):
    tokenizer = cut_by(words, "llama-bpe")
    tokenizer["model"]["ignore_merges"] = False
    assert gguf_words.pre_tokenizer_name(tokenizer) == "smaug-bpe"


def test_no_two_names_stand_for_the_same_cut():
    cuts = list(gguf_words.PRE_TOKENIZERS.values())
    assert len(set(cuts)) == len(cuts)
    assert Cut((Step("digits"), Step("bytes", "regex"))) in cuts


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "Unigram"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "WordPiece"),
        ({"model": None}, "unknown"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "Lowercase"),
    ],
)
def test_tokenizers_that_llamacpp_has_not_are_refused(small, change, match):
    with pytest.raises(QuantkitError, match=match):
        metadata({**small, **change})


def test_composing_normalizers_are_let_through(small):
    """Many models have NFC; composed texts, which is what people write, come out the same."""
    small["normalizer"] = {"type": "NFC"}
    assert metadata(small)["tokenizer.ggml.pre"] == "gpt-2"


def test_scores_stand_for_the_order_of_merges(pieces):
    found = gguf_tokenizer.metadata(Files(pieces, PIECES))
    tokens = found["tokenizer.ggml.tokens"].value
    scores = dict(zip(tokens, found["tokenizer.ggml.scores"].value))
    ranks = {}
    for rank, (left, right) in enumerate(pieces["model"]["merges"]):
        ranks.setdefault(left + right, rank)
    assert [scores[token] for token in ranks] == [-float(rank) for rank in ranks.values()]
    assert found["tokenizer.ggml.token_type"].value[:5] == [2, 3, 3, 6, 6]


def test_merges_that_no_scores_can_stand_for_are_refused(pieces):
    merges = pieces["model"]["merges"]
    twice = next(n for n in range(1, len(merges)) if "".join(merges[n]) == "".join(merges[n - 1]))
    for wrong in (merges[:twice] + merges[twice + 1 :] + [merges[twice]], merges[:-1]):
        changed = {**pieces, "model": {**pieces["model"], "merges": wrong}}
        with pytest.raises(QuantkitError, match="SentencePiece"):
            gguf_tokenizer.metadata(Files(changed, PIECES))


def test_metaspace_is_another_way_to_write_sentencepiece(pieces):
    for scheme, wanted in (("always", True), ("first", True), ("never", False)):
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        changed = {**pieces, "normalizer": None, "pre_tokenizer": space}
        found = gguf_tokenizer.metadata(Files(changed, PIECES))
        assert found["tokenizer.ggml.add_space_prefix"].value is wanted
    changed = {**pieces, "normalizer": {"type": "Precompiled"}}
    with pytest.raises(QuantkitError, match="normalizes"):
        gguf_tokenizer.metadata(Files(changed, PIECES))


# what is read


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": "t5"}, "t5"),
        ({"model": None}, "model"),
        ({"pre": "default"}, "default"),
        ({"pre": None}, "pre"),
        ({"tokens": None}, "tokens"),
        ({"tokens": []}, "tokens"),
        ({"tokens": [1, 2]}, "tokens"),
        ({"tokens": ["a", "a", "ab", "b", "c"]}, "same text"),
        ({"token_type": [1]}, "token_type"),
        ({"merges": None}, "merges"),
        ({"merges": ["a z"]}, "z"),
        ({"merges": ["ab"]}, "ab"),
        ({"model": "llama"}, "scores"),
        ({"model": "llama", "scores": [0.0]}, "scores"),
    ],
)
def test_files_without_a_usable_tokenizer_are_refused(small, change, match):
    plain = metadata(small) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(QuantkitError, match=match):
        load_tokenizer({k: v for k, v in plain.items() if v is not None}, 64)


def test_all_of_llamacpp_s_names_for_a_cut_are_read(small):
    for name in ("olmo", "llama3", "deepseek-r1-qwen", "smollm"):
        assert load_tokenizer(metadata(small, pre=name), 64).encode("ab")


def test_defaults_of_files_that_do_not_say_what_goes_around_a_text(small):
    plain = metadata(small, {"bos_token": "<s>"}, pre="llama-bpe")
    del plain["tokenizer.ggml.add_bos_token"]
    assert load_tokenizer(plain, 64).encode("ab") == [3, 2]
    plain["tokenizer.ggml.pre"] = "gpt-2"
    assert load_tokenizer(plain, 64).encode("ab") == [2]


ODD = [None, 0, -1, 1 << 63, 1.5, float("nan"), "", "x", True, [], [0], ["a"], ["a", "a"], [""]]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_nothing_but_quantkit_s_own_error_comes_out_of_odd_metadata(small, kind):
    plain = metadata(small, {"bos_token": "<s>", "unk_token": "a"})
    plain |= {"tokenizer.ggml.model": kind, "tokenizer.ggml.scores": [0.0] * 5}
    plain["tokenizer.ggml.add_space_prefix"] = True
    read_whole = 0
    for key in plain:
        for value in ODD:
            changed = {**plain, key: value}
            if value is None:
                del changed[key]
            try:
                load_tokenizer(changed, 64).encode("ab")
            except QuantkitError:
                continue
            read_whole += 1
    assert read_whole > len(plain)


def changes(node, values):
    """Copies of ``node`` (JSON) with one value somewhere inside replaced or left out."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, inner in list(items):
        for value in values:
            other = copy.copy(node)
            other[key] = value
            yield other
        other = copy.copy(node)
        del other[key]
        yield other
        if isinstance(inner, dict | list):
            for changed in changes(inner, values):
                other = copy.copy(node)
                other[key] = changed
                yield other


def test_nothing_but_quantkit_s_own_error_comes_out_of_odd_files(small):
    """tokenizer.json comes from strangers, too."""
    template = [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]
    small["post_processor"] = {
        "type": "Sequence",
        "processors": [{"type": "TemplateProcessing", "single": template}],
    }
    small["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    small["pre_tokenizer"] = gguf_words.pre_tokenizer(gguf_words.PRE_TOKENIZERS["qwen2"])
    small["model"]["ignore_merges"] = False
    config = {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "default", "template": "x"}],
    }
    whole = {"tokenizer": small, "config": config, "model": {"vocab_size": 7, "bos_token_id": 3}}
    values = [None, 0, -1, 1 << 40, 1.5, "", "x", True, [], [0], ["a"], {}, {"a": "b"}, [[]], [{}]]
    written = 0
    for part, content in whole.items():
        for changed in changes(content, values):
            files = Files(**{**whole, part: changed})
            try:
                assert len(gguf_tokenizer.metadata(files)["tokenizer.ggml.tokens"].value) < 100
            except QuantkitError:
                continue
            written += 1
    assert written > 50
