"""Generating: whole characters as they come, repeatable, with the sampling that was asked for."""

import io
import json
import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tools import command, model, quantized, read_json, sentence
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import data
from quantkit.errors import UsageError
from quantkit.runtime.load import load
from quantkit.runtime.prompts import Prompts, asked
from quantkit.runtime.stream import Detokenizer, StopStrings
from quantkit.runtime.torch_engine import TorchEngine
from quantkit.workflows.generate import Wanted, generate

PROMPT = "昔々、ある村に"
GREEDY = {"temperature": 0, "chat": False, "max_new_tokens": 24}
BROKEN = "\ufffd"

# what a Japanese user may see: kana, kanji (rare ones too, which are split into bytes), full-width
# punctuation, emoji of several code points, ASCII, spaces and line ends
CHARACTERS = st.one_of(
    st.characters(min_codepoint=0x3040, max_codepoint=0x30FF),
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    st.characters(min_codepoint=0x20000, max_codepoint=0x2A6DF),
    st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF),
    st.characters(min_codepoint=0xFF00, max_codepoint=0xFFEF),
    st.characters(min_codepoint=0x20, max_codepoint=0x7E),
    st.sampled_from(["\n", " ", "　", "。", "、", "👩‍👩‍👧", "🇯🇵", "が", "葛󠄀", "é"]),
)
TEXTS = st.lists(CHARACTERS, min_size=1, max_size=40).map("".join)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """A tokenizer of Llama 2's kind: a word list, single bytes for all else, a space in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["▁", "▁the", "t", "h", "e", "日", "本", "の", "。", "▁日本"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "日"), ("▁日", "本")]
    words += [a + b for a, b in merges if a + b not in words]
    tokens = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokens.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokens.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", eos_token="</s>")


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(lambda ids: whole(tokenizer, ids))
    return [*(detokenizer.push(token) for token in ids), detokenizer.rest()]


def whole(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# characters


def test_rare_characters_are_several_tokens(tokenizer):
    """Else the tests below would show nothing."""
    assert len(tokenizer.encode("鰯")) > 1
    assert whole(tokenizer, tokenizer.encode("鰯")[:1]) == BROKEN


@given(text=TEXTS)
@example("鰯と鱈🐟を食べた。")
@example("𠮷野家で👩‍👩‍👧が🇯🇵")
@settings(max_examples=300)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert BROKEN not in "".join(pieces)
    assert "".join(pieces) == whole(tokenizer, ids)


@given(text=TEXTS)
@example("the 日本の🐟 the")
@settings(max_examples=200)
def test_with_byte_fallback_too(byte_fallback, text):
    ids = byte_fallback.encode(text, add_special_tokens=False)
    pieces = pieces_of(byte_fallback, ids)
    assert BROKEN not in "".join(pieces)
    assert "".join(pieces) == whole(byte_fallback, ids)


@given(text=TEXTS, cut=st.integers(1, 60))
@example("鰯", 1)
@example("日本🐟", 3)
@settings(max_examples=200)
def test_a_text_that_is_cut_off_ends_with_a_whole_character(tokenizer, text, cut):
    """--max-new-tokens may end in the middle of one."""
    ids = tokenizer.encode(text, add_special_tokens=False)[:cut]
    joined = "".join(pieces_of(tokenizer, ids))
    assert joined == whole(tokenizer, ids).rstrip(BROKEN)
    assert text.startswith(joined)


def test_text_comes_as_soon_as_it_is_complete(tokenizer):
    ids = tokenizer.encode("日本の首都は東京です。", add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert pieces[-1] == ""
    assert len([piece for piece in pieces if piece]) > 3
    one = tokenizer.encode("鰯", add_special_tokens=False)
    assert pieces_of(tokenizer, one) == [""] * (len(one) - 1) + ["鰯", ""]


def test_special_tokens_are_not_shown(tokenizer):
    ids = [*tokenizer.encode("日本"), tokenizer.eos_token_id, *tokenizer.encode("東京")]
    assert "".join(pieces_of(tokenizer, ids)) == "日本東京"


@given(text=TEXTS, stops=st.lists(st.text("ab。日", min_size=1, max_size=4), max_size=3))
@example("日本ab", ["本a"])
@example("ab。", ["ab。", "b"])
@settings(max_examples=300)
def test_stop_strings_are_found_in_any_pieces_and_never_shown(text, stops):
    for size in (1, 2, 5, len(text)):
        stopping = StopStrings(stops)
        pieces = [stopping.push(text[i : i + size]) for i in range(0, len(text), size)]
        places = ((text.find(stop), len(stop)) for stop in stops)
        complete = [(start + length, start) for start, length in places if start >= 0]
        assert "".join(pieces) + stopping.rest() == text[: min(complete, default=(0, None))[1]]
        assert stopping.found == bool(complete)


def test_only_what_may_be_a_stop_string_is_held_back():
    stopping = StopStrings(["</answer>"])
    assert [stopping.push(t) for t in ("a <", "/ans", "ets", "</answer", ">b")] == [
        "a ",
        "",
        "</ansets",
        "",
        "",
    ]
    assert stopping.found and stopping.rest() == ""


# text from a model


def test_greedy_text_is_transformers_own_and_is_passed_on_as_it_comes():
    heard: list[str] = []
    found = generate("demo", PROMPT, dtype="float32", write=heard.append, **GREEDY)
    tokenizer = AutoTokenizer.from_pretrained(data.demo())
    dense = AutoModelForCausalLM.from_pretrained(data.demo(), dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    written = dense.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found.text == whole(tokenizer, written).rstrip(BROKEN)
    assert "".join(heard) == found.text
    assert len(heard) > 5
    assert found.prompt_tokens == ids.shape[1]
    assert found.tokens == len(written) == 24
    assert found.seconds > 0


def test_temperature_zero_and_seeds_are_repeatable():
    sampled = {**GREEDY, "temperature": 1.5}
    greedy = {generate(str(quantized()), PROMPT, **GREEDY).text for _ in range(3)}
    one = {generate(str(quantized()), PROMPT, seed=1, **sampled).text for _ in range(3)}
    several = {generate(str(quantized()), PROMPT, seed=seed, **sampled).text for seed in range(4)}
    assert (len(greedy), len(one), len(several)) == (1, 1, 4)
    assert one < several


def test_top_k_1_is_greedy():
    exact = {**GREEDY, "dtype": "float32"}  # in bfloat16 two tokens can be equally likely
    greedy = generate("demo", PROMPT, **exact).text
    assert generate("demo", PROMPT, **{**exact, "temperature": None}, top_k=1).text == greedy


def test_it_stops_before_a_stop_string():
    free = generate("demo", PROMPT, **GREEDY).text
    stop = free[5:7]
    assert free.index(stop) > 0
    heard: list[str] = []
    found = generate("demo", PROMPT, stop=(stop, "no such text"), write=heard.append, **GREEDY)
    assert found.text == free[: free.index(stop)]
    assert "".join(heard) == found.text
    assert found.tokens < 24
    assert found.reason == "stop"


def test_until_the_model_ends_the_text():
    settings = {"temperature": 0, "max_new_tokens": 1}
    short = generate("demo", "日本の首都はどこですか。", **settings)
    assert (short.tokens, short.reason) == (1, "length")
    ended = generate("demo", "日本の首都はどこですか。", until_eos=True, **settings)
    assert ended.reason == "end"
    assert ended.tokens > 1 and ended.text.startswith(short.text)


def test_a_text_ends_where_the_context_does(tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(data.demo(), folder)
    config = read_json(folder / "config.json") | {"max_position_embeddings": 24}
    (folder / "config.json").write_text(json.dumps(config))
    found = generate(str(folder), PROMPT, temperature=0, chat=False, until_eos=True)
    assert found.reason == "context"
    assert found.prompt_tokens + found.tokens == 24 + 1  # the last one is not computed with
    with pytest.raises(UsageError, match="the model's context 24"):
        generate(str(folder), PROMPT * 10, chat=False)


def test_a_penalty_changes_what_is_repeated():
    free = generate("demo", PROMPT, **{**GREEDY, "max_new_tokens": 60}).text
    found = generate(
        "demo", PROMPT, repetition_penalty=2.0, **{**GREEDY, "max_new_tokens": 60}
    ).text
    assert len(set(found)) > len(set(free))


# prompts


def test_the_chat_template_is_used_unless_it_is_refused(tokenizer):
    engine = TorchEngine(load("demo")[0], tokenizer)
    chat = Prompts(engine).ids(asked("やあ"))
    assert chat == Prompts(engine, chat=True).ids(asked("やあ"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "やあ"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == tokenizer.encode(text, add_special_tokens=False)
    raw = Prompts(engine, chat=False).ids(asked("やあ"))
    assert raw == tokenizer.encode("やあ")
    assert len(chat) > len(raw)


def test_a_chat_needs_a_template():
    engine = TorchEngine(*load(str(model("gpt_neox"))))
    assert engine.chat_template is None
    assert Prompts(engine).ids(asked("やあ")) == engine.encode("やあ")
    with pytest.raises(UsageError, match="no chat template"):
        Prompts(engine, chat=True)
    with pytest.raises(UsageError, match="no place for a system message"):
        Prompts(engine).ids(asked("やあ", "親切に"))


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="the prompt is empty"):
        generate("demo", "")


# the command


def run(capsys, *arguments: object) -> tuple[str, str]:
    assert command("generate", *arguments) == 0
    return capsys.readouterr()


def test_the_command_prints_the_text_and_its_speed(capsys):
    out, err = run(capsys, "demo", PROMPT, "--raw", "-n", 24, "-t", 0)
    assert out == generate("demo", PROMPT, **GREEDY).text + "\n"
    assert "24 tokens" in err and "tokens/s" in err
    out_quiet, err = run(capsys, "demo", PROMPT, "--raw", "-n", 24, "-t", 0, "--quiet")
    assert out_quiet == out
    assert err == ""


def test_a_prompt_from_standard_input(capsys, monkeypatch):
    wanted, _ = run(capsys, "demo", PROMPT, "--raw", "-n", 8, "-t", 0, "-q")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode()), "utf-8"))
    out, _ = run(capsys, "demo", "-", "--raw", "-n", 8, "-t", 0, "-q")
    assert out == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("日本".encode("cp932")), "utf-8"))
    assert command("generate", "demo", "-") == 2
    assert "not UTF-8" in sentence(capsys.readouterr().err)[0]


def test_chat_and_raw_differ(capsys, tmp_path):
    options = ["-n", 8, "-t", 0, "-q"]
    chat, _ = run(capsys, "demo", "日本の首都はどこですか。", *options)
    raw, _ = run(capsys, "demo", "日本の首都はどこですか。", "--raw", *options)
    assert chat != raw
    bare = tmp_path / "bare"
    shutil.copytree(data.demo(), bare, ignore=shutil.ignore_patterns("chat_template.jinja"))
    assert run(capsys, bare, "日本の首都はどこですか。", *options)[0] == raw
    assert command("generate", bare, "やあ", "--chat") == 2
    assert "no chat template" in sentence(capsys.readouterr().err)[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.5"], "--top-p"),
        (["--top-k", "-3"], "--top-k"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--min-p", "2"], "--min-p"),
        (["--seed", "-1"], "--seed"),
        (["-n", "0"], "--max-new-tokens"),
        (["--dtype", "int8"], "int8"),
        (["--device", "gpu"], "gpu"),
    ],
)
def test_bad_options_are_refused(capsys, options, named):
    assert command("generate", "demo", "hello", *options) == 2
    assert named in sentence(capsys.readouterr().err)[0]


def test_one_string_that_stops_is_one():
    assert Wanted(stop="hare").stop == ("hare",)
    text = "Tell me a long story about a fox."
    found = [generate("demo", text, stop=stop, **GREEDY).text for stop in ("zq", ("zq",))]
    assert found[0] == found[1]
