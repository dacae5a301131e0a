"""Prompt formats: to the letter as their models were trained, several turns too."""

import pytest
from tools import command, sentence

from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime import templates
from quantkit.runtime.load import load
from quantkit.runtime.prompts import Prompts, asked
from quantkit.runtime.torch_engine import TorchEngine

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "SYS"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
]
WEBLAB = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。\n\n"


@pytest.mark.parametrize(
    ("name", "single", "several"),
    [
        (
            "weblab",
            WEBLAB + "### 指示:\nQ1\n\n### 応答:",
            "SYS\n\n### 指示:\nQ1\n\n### 応答:A1\n\n### 指示:\nQ2\n\n### 応答:",
        ),
        (
            "alpaca-ja",
            WEBLAB + "### 指示:\nQ1\n\n### 応答:\n",
            "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。"
            "要求を適切に満たす応答を書きなさい。\n\n"
            "### 指示:\nSYS\n\n### 入力:\nQ1\n\n### 応答:\nA1\n\n"
            + WEBLAB
            + "### 指示:\nQ2\n\n### 応答:\n",
        ),
        (
            "llama-2",
            "[INST] Q1 [/INST]",
            "[INST] <<SYS>>\nSYS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
        ),
        (
            "deepseek",
            "User: Q1\n\nAssistant:",
            "SYS\n\nUser: Q1\n\nAssistant: A1</s>User: Q2\n\nAssistant:",
        ),
        (
            "synthia",
            "USER: Q1\nASSISTANT:",
            "SYSTEM: SYS\nUSER: Q1\nASSISTANT: A1\nUSER: Q2\nASSISTANT:",
        ),
        (
            "qa",
            "<prompt>Q1</prompt>\n<answer>",
            "SYS\n\n<prompt>Q1</prompt>\n<answer>A1</answer>\n<prompt>Q2</prompt>\n<answer>",
        ),
    ],
)
def test_built_in(name, single, several):
    assert templates.find(name).render(asked("Q1"), SPECIAL) == single
    assert templates.find(name).render(TALK, SPECIAL) == several


def test_all_built_in_ones_are_tested_above():
    marks = test_built_in.pytestmark[0].args[1]
    assert [row[0] for row in marks] == list(templates.BUILT_IN)


def test_what_users_say_is_never_a_placeholder():
    rude = "{system}{prompt}{eos}{answer} {0} {{x}}"
    found = templates.find("llama-2").render(asked(rude, rude), SPECIAL)
    assert found == f"[INST] <<SYS>>\n{rude}\n<</SYS>>\n\n{rude} [/INST]"


def test_a_file_of_text(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text('\ufeff{system}|{"json": 1}|質問: {prompt}\n答え:', "utf-8")
    found = templates.find(str(path))
    assert found.render(asked("Q", "S"), {}) == 'S|{"json": 1}|質問: Q\n答え:'
    assert found.render(asked("Q"), {}) == '|{"json": 1}|質問: Q\n答え:'
    path.write_text("no place for it")
    with pytest.raises(UsageError, match="has no"):
        templates.find(str(path))
    path.write_bytes("質問 {prompt}".encode("cp932"))
    with pytest.raises(UsageError, match="not UTF-8"):
        templates.find(str(path))
    with pytest.raises(UsageError, match="no template 'nonsuch'") as caught:
        templates.find("nonsuch")
    assert "weblab" in caught.value.hint


def test_a_file_in_jinja_is_a_chat_template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{bos_token}}{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}")
    found = templates.find(str(path))
    assert found.render(asked("Q", "S"), SPECIAL) == "<s>[system]S[user]Q"
    engine = TorchEngine(*load("demo"))
    ids = Prompts(engine, str(path)).ids(asked("Q"))
    assert ids == engine.encode(engine.special_tokens["bos_token"] + "[user]Q", special=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # out of the sandbox
        "{{ raise_exception('no system message') }}",
        "{% for m in messages %}",
        "{{ nonsuch.x }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_fails_is_an_error_of_one_sentence(tmp_path, source, capsys):
    path = tmp_path / "bad.jinja"
    path.write_text(source)
    with pytest.raises(QuantkitError, match="the chat template fails"):
        templates.find(str(path)).render(asked("Q"), {})
    assert command("generate", "demo", "Q", "--template", path) == 1
    assert "the chat template fails" in sentence(capsys.readouterr().err)[0]


def test_a_template_without_an_end_is_told(tmp_path):
    path = tmp_path / "bad.jinja"
    path.write_text("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}")
    with pytest.raises(QuantkitError, match="calls itself without an end"):
        templates.find(str(path)).render(asked("Q"), {})


def test_the_last_message_is_of_the_user():
    """Whoever else spoke last, plain text has no place for an answer to it."""
    with pytest.raises(QuantkitError, match="not of the user"):
        templates.find("qa").render(TALK[:3], SPECIAL)


def test_a_template_ends_an_answer_at_the_next_turn():
    engine = TorchEngine(*load("demo"))
    assert Prompts(engine, "weblab").stop == ("### 指示:",)
    assert Prompts(engine).stop == ()


def test_a_system_message_needs_a_place(tmp_path):
    (tmp_path / "form.txt").write_text("Q: {prompt}\nA:")
    form = templates.find(str(tmp_path / "form.txt"))
    user = {"role": "user", "content": "hi"}
    assert form.render([user], {}) == "Q: hi\nA:"
    with pytest.raises(QuantkitError, match="no place for a system message"):
        form.render([{"role": "system", "content": "x"}, user], {})
