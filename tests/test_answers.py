"""Files of questions into files of answers: the same as one by one, in order, resumable."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tools import command, model, quantized, read_json, sentence

from quantkit import data
from quantkit.core import table_file
from quantkit.core.sampling import Sampling
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.load import load
from quantkit.runtime.torch_engine import TorchEngine
from quantkit.workflows import answers
from quantkit.workflows.answers import answer_file
from quantkit.workflows.generate import generate

QUESTIONS = [
    "日本の首都はどこですか。",
    "Who, then?",
    "富士山の高さは何メートルですか。それはいつ分かりましたか。",
    "a",
    "The history of the city is",
    "海",
    "Tell me about rivers, and about lakes too.",
]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "dtype": "float32"}


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.csv"
    rows = [{"id": i, "question": question} for i, question in enumerate(QUESTIONS)]
    table_file.write(path, ["id", "question"], rows, mark=False)
    return path


def read(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_answers_are_those_of_one_by_one_in_order(questions, batch):
    out = questions.with_name("answers.csv")
    found = answer_file("demo", questions, out, batch=batch, **GREEDY)
    assert (found.rows, found.failed) == (len(QUESTIONS), 0)
    alone = [generate("demo", question, **GREEDY) for question in QUESTIONS]
    rows = read(out)
    assert [row["question"] for row in rows] == QUESTIONS
    assert [row["answer"] for row in rows] == [one.text.strip() for one in alone]
    assert [row["finish_reason"] for row in rows] == [one.reason for one in alone]
    assert {one.reason for one in alone} == {"end", "length"}  # rows end at different times
    assert not list(questions.parent.glob("*.partial"))


@pytest.mark.parametrize("source", ["gpt_neox", "gpt2", "opt", "qwen2", "gemma3_text", "bloom"])
def test_rows_that_are_padded_are_computed_as_if_they_were_not(source):
    engine = TorchEngine(*load(str(model(source)), dtype="float32"))
    prompts = [engine.encode(text, special=False)[:20] for text in QUESTIONS]
    alone = [list(engine.stream(ids, Sampling(temperature=0), 8)) for ids in prompts]
    together: list[list[int]] = [[] for _ in prompts]
    for step in engine.batch(prompts, [Sampling(temperature=0)] * len(prompts), 8):
        for i, token in step:
            together[i].append(token)
    assert together == alone


def test_stop_strings_and_templates(questions):
    out = questions.with_name("answers.jsonl")
    settings = {**GREEDY, "template": "qa", "stop": ("a", "の"), "max_new_tokens": 24}
    answer_file("demo", questions, out, **settings)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    alone = [generate("demo", question, **settings) for question in QUESTIONS]
    assert [row["answer"] for row in rows] == [one.text.strip() for one in alone]
    assert "stop" in {row["finish_reason"] for row in rows}
    assert not any("a" in row["answer"] for row in rows)


def test_a_seed_gives_the_same_answers_whatever_the_batch(questions):
    def made(batch: int, seed: int) -> list[str]:
        out = questions.with_name(f"answers-{batch}-{seed}.csv")
        settings = {**GREEDY, "temperature": 1.2, "seed": seed}
        answer_file("demo", questions, out, batch=batch, **settings)
        return [row["answer"] for row in read(out)]

    assert made(2, 1) == made(5, 1) != made(5, 2)


def test_a_row_that_fails_has_the_reason_and_harms_no_other(tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(data.demo(), folder)
    config = read_json(folder / "config.json") | {"max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"q": "海"}, {"q": ""}, {"q": "長い" * 100}, {"q": 3}, {}, {"q": "a"}]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = answer_file(str(folder), questions, tmp_path / "out.jsonl", chat=False, **GREEDY)
    assert (found.rows, found.failed) == (6, 4)
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [bool(row["error"]) for row in made] == [False, True, True, True, True, False]
    assert made[1]["error"] == "the prompt is empty"
    assert "do not fit into the context of 40" in made[2]["error"]
    assert made[0]["answer"] == generate(str(folder), "海", chat=False, **GREEDY).text.strip()


# going on


def test_a_run_that_was_killed_goes_on(questions):
    """SIGKILL in the middle: the rows that were done are not made again, and the result is that of
    a run that was not killed."""
    out = questions.with_name("answers.csv")
    made = questions.with_name("answers.csv.partial") / answers._DONE
    arguments = ["generate", "demo", "--in", str(questions), "--out", str(out), "--batch", "1"]
    arguments += ["-t", "0", "-n", "8", "--dtype", "float32"]
    program = "import sys; from quantkit.cli.main import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stderr=subprocess.DEVNULL, env=os.environ
    )
    while not (made.exists() and made.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = [json.loads(line) for line in made.read_text().splitlines()]
    marked = [json.dumps({**record, "answer": "kept"}) for record in before]
    made.write_text("\n".join([*marked, marked[0][:20]]))  # and a line that was cut off
    assert command(*arguments) == 0
    answers_made = [row["answer"] for row in read(out)]
    alone = [generate("demo", question, **GREEDY).text.strip() for question in QUESTIONS]
    kept = len(before)
    assert 2 <= kept < len(QUESTIONS)
    assert answers_made == ["kept"] * kept + alone[kept:]


def test_other_settings_do_not_go_on_with_it(questions, monkeypatch):
    out = questions.with_name("answers.csv")
    whole = answers._answers

    def stops_at_the_second(engine, prompts, texts, wanted):
        if 0 not in texts:
            raise KeyboardInterrupt
        return whole(engine, prompts, texts, wanted)

    monkeypatch.setattr(answers, "_answers", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        answer_file("demo", questions, out, batch=2, **GREEDY)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="max_new_tokens was 8, is now 4"):
        answer_file("demo", questions, out, **{**GREEDY, "max_new_tokens": 4})
    found = answer_file("demo", questions, out, overwrite=True, **{**GREEDY, "max_new_tokens": 4})
    assert found.rows == len(QUESTIONS)
    with pytest.raises(UsageError, match="is there already"):
        answer_file("demo", questions, out, **GREEDY)


# files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp932", "utf-16"])
def test_encodings_are_recognised(tmp_path, encoding):
    path = tmp_path / "q.csv"
    path.write_bytes('番号,質問\n1,日本の首都は?\n2,"a,\nb"\n'.encode(encoding))
    table = table_file.read(path)
    assert table.encoding == encoding
    assert table.columns == ["番号", "質問"]
    assert [row["質問"] for row in table.rows] == ["日本の首都は?", "a,\nb"]
    table_file.write(tmp_path / "o.csv", table.columns, table.rows, mark=encoding != "utf-8")
    assert (tmp_path / "o.csv").read_bytes().startswith(b"\xef\xbb\xbf") == (encoding != "utf-8")
    again = table_file.read(tmp_path / "o.csv")
    assert (again.columns, again.rows) == (table.columns, table.rows)


def test_text_and_json_lines(tmp_path):
    (tmp_path / "q.txt").write_text("一\n\n二\r\n", "utf-8")
    assert table_file.read(tmp_path / "q.txt").rows == [{"text": "一"}, {"text": "二"}]
    (tmp_path / "q.jsonl").write_text('{"a": "x\u2028y"}\n\n{"b": 1}\n', "utf-8")
    table = table_file.read(tmp_path / "q.jsonl")
    assert (table.columns, table.rows) == (["a", "b"], [{"a": "x\u2028y"}, {"b": 1}])


@pytest.mark.parametrize(
    ("name", "raw", "problem"),
    [
        ("q.csv", b"a,b\n1,2,3\n", "line 2: more fields"),
        ("q.csv", b'a\n"x\n', "unexpected end"),
        ("q.jsonl", b'{"a": 1}\n{"a": \n', "line 2: no JSON"),
        ("q.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("q.csv", b"a\n\x81\x39\xff\n", "is not cp932 text"),
        ("q.xlsx", b"PK", "does not read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, raw, problem):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(QuantkitError, match=problem):
        table_file.read(tmp_path / name)


def test_the_command(questions, capsys):
    out = questions.with_name("answers.csv")
    cut = questions.with_name("cut.csv")
    cut.write_bytes("番号,ask\n1,海\n".encode("cp932"))
    given = ["generate", "demo", "--in", cut, "-n", 4, "-t", 0]
    for options, problem in (
        (["--out", out], "which column"),
        (["--out", out, "--column", "nonsuch"], "no column 'nonsuch'"),
        (["--out", out, "--column", "ask", "--encoding", "bogus"], "no encoding 'bogus'"),
        (["--out", out, "--column", "ask", "--batch", 0], "--batch"),
        (["--out", "answers.xlsx", "--column", "ask"], "does not write"),
        (["--out", "/nonsuch/answers.csv", "--column", "ask"], "no folder"),
    ):
        assert command(*given, *options) == 2, options
        assert problem in sentence(capsys.readouterr().err)[0]
    for options, problem in (([], "--in has no file"), (["--out", out, "a prompt"], "both")):
        assert command(*given, *options) == 2
        assert problem in sentence(capsys.readouterr().err)[0]
    assert command(*given, "--out", out, "--column", "ask") == 0
    told = capsys.readouterr().err
    assert "1 rows, cp932" in told and "0 without an answer" in told
    assert read(out)[0]["番号"] == "1"


# what a stranger found


def test_half_a_character_harms_no_other_row(tmp_path):
    lines = ['{"question": "a", "id": "\\ud83d"}', '{"question": "\\ud800 b"}', '{"question": "c"}']
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    found = answer_file("demo", tmp_path / "q.jsonl", tmp_path / "a.jsonl", **GREEDY)
    assert (found.rows, found.failed) == (3, 1)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert rows[0]["id"] == "\ud83d" and rows[0]["answer"] and rows[2]["answer"]
    assert "Unicode" in rows[1]["error"]
    answer_file("demo", tmp_path / "q.jsonl", tmp_path / "a.csv", column="question", **GREEDY)
    assert [row["id"] for row in read(tmp_path / "a.csv")] == ["?", "", ""]


def test_other_weights_do_not_go_on(questions, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(data.demo(), folder)
    out = questions.with_name("answers.csv")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answers.Progress, "step", stopped)
        answer_file(str(folder), questions, out, batch=2, **GREEDY)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(UsageError, match="weights was"):
        answer_file(str(folder), questions, out, batch=2, **GREEDY)
    with pytest.raises(UsageError, match="dtype was"):
        answer_file(str(folder), questions, out, batch=2, **GREEDY | {"dtype": "bfloat16"})


def test_a_mistyped_model_is_in_nobody_s_way(questions):
    out = questions.with_name("answers.csv")
    with pytest.raises(QuantkitError, match="there is no folder"):
        answer_file("demoo", questions, out, **GREEDY)
    assert answer_file("demo", questions, out, **GREEDY).failed == 0


def test_what_is_there_stays_until_there_is_something_better(questions):
    out = questions.with_name("answers.csv")
    out.write_text("old")
    with pytest.raises(QuantkitError, match="there is no folder"):
        answer_file("demoo", questions, out, overwrite=True, **GREEDY)
    assert out.read_text() == "old"
    assert not list(questions.parent.glob("*.partial"))
    answer_file("demo", questions, out, overwrite=True, **GREEDY)
    assert len(read(out)) == len(QUESTIONS)


def test_questions_are_not_overwritten(questions):
    before = questions.read_bytes()
    with pytest.raises(UsageError, match="holds the questions"):
        answer_file("demo", questions, questions, overwrite=True, **GREEDY)
    assert questions.read_bytes() == before


def test_seeds_count_past_the_largest(questions):
    out = questions.with_name("answers.csv")
    found = answer_file("demo", questions, out, seed=2**63 - 1, max_new_tokens=2)
    assert found.failed == 0


def test_what_is_answered_one_by_one(questions, tmp_path, monkeypatch):
    """A single row, and rows of a model whose weights a batch would unpack at every step."""
    together = []
    made = answers._together

    def seen(engine, ids, *rest):
        together.append(len(ids))
        return made(engine, ids, *rest)

    monkeypatch.setattr(answers, "_together", seen)
    answer_file("demo", questions, tmp_path / "one.csv", batch=1, **GREEDY)
    assert together == []
    answer_file("demo", questions, tmp_path / "all.csv", **GREEDY)
    assert together == [len(QUESTIONS)]
    answer_file(str(quantized()), questions, tmp_path / "packed.csv", **GREEDY)
    assert together == [len(QUESTIONS)]  # float32: torch's int4 kernel is for bfloat16


def test_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "q.csv").write_text("q,note,note\nhi,first,second\n")
    with pytest.raises(QuantkitError, match="two columns 'note'"):
        table_file.read(tmp_path / "q.csv")


def test_marks_and_names_of_encodings(tmp_path):
    (tmp_path / "q.csv").write_bytes("\ufeffquestion,x\nhi,1\n".encode())
    assert table_file.read(tmp_path / "q.csv", "utf-8").columns == ["question", "x"]
    with pytest.raises(QuantkitError, match="is not undefined text"):
        table_file.read(tmp_path / "q.csv", "undefined")
    (tmp_path / "p.csv").write_text("question\nhi\n")
    answer_file("demo", tmp_path / "p.csv", tmp_path / "a.csv", encoding="UTF8", **GREEDY)
    assert not (tmp_path / "a.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_columns_of_a_table_without_rows(tmp_path):
    (tmp_path / "q.csv").write_text("question,x\n")
    assert table_file.read(tmp_path / "q.csv").columns == ["question", "x"]


def test_what_json_had_stays_json_in_a_csv(tmp_path):
    table_file.write(tmp_path / "a.csv", ["x"], [{"x": {"a": [1, None, True]}}], mark=False)
    assert json.loads(read(tmp_path / "a.csv")[0]["x"]) == {"a": [1, None, True]}


def test_a_cell_with_a_lone_carriage_return_stays_one(tmp_path):
    rows = [{"x": "a\rb", "y": "1"}, {"x": "c", "y": "d\r\ne"}]
    table_file.write(tmp_path / "a.csv", ["x", "y"], rows, mark=False)
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == rows


def test_a_system_message_of_raw_text_is_told_at_once(questions, capsys):
    out = questions.with_name("answers.csv")
    asked = ["generate", "demo", "--in", questions, "--out", out, "--raw", "--system", "x"]
    assert command(*asked) == 2
    assert "--raw" in sentence(capsys.readouterr().err)[0]
    assert not list(questions.parent.glob("*.partial"))
