"""Scores of lm-eval, of a model that quantkit loads, on a task of our own without network."""

import json

import pytest
import torch
from tools import command, quantized, sentence

from quantkit.errors import UsageError
from quantkit.workflows.evaluate import evaluate

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "a spoon"], "answer": 0},
    {"question": "日本の首都は", "choices": ["東京", "three"], "answer": 0},
    {"question": "One, two, three,", "choices": ["purple rain of", "four"], "answer": 1},
    {"question": "def add(a, b):\n    return", "choices": ["a + b", "昔々"], "answer": 0},
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in QUESTIONS)
    (folder / "rows.jsonl").write_text(rows, "utf-8")
    (folder / "tiny_choice.yaml").write_text(TASK % (folder / "rows.jsonl"), "utf-8")
    return folder


def chosen(folder):
    """How often the loaded model finds the right answer likeliest, computed here."""
    from quantkit import load

    model, tokenizer = load(str(folder), device="cpu", dtype="float32")
    right = 0
    for one in QUESTIONS:
        scores = []
        for choice in one["choices"]:
            before = tokenizer.encode(one["question"])
            ids = tokenizer.encode(f"{one['question']} {choice}")
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            target = torch.tensor(ids[1:])
            scores.append(float(logits[:-1].gather(1, target[:, None])[len(before) - 1 :].sum()))
        right += scores.index(max(scores)) == one["answer"]
    return right / len(QUESTIONS)


def test_scores_are_those_of_the_quantized_model(tasks, capsys):
    pytest.importorskip("lm_eval", reason="pip install 'quantkit[eval]'")
    folder = quantized()
    options = ["--tasks", "tiny_choice", "--include-path", tasks, "--dtype", "float32"]
    assert command("eval", folder, *options, "--device", "cpu", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    score = next(one for one in found["scores"] if one["metric"] == "acc")
    assert score["value"] == chosen(folder)
    assert score["error"] > 0 or score["value"] in (0, 1)
    assert found["samples"] == {"tiny_choice": 4} and found["few_shot"] == {"tiny_choice": 0}
    assert found["settings"]["versions"]["lm_eval"]
    assert command("eval", folder, *options, "--limit", 2, "--num-fewshot", 1) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "tiny_choice" in line)
    assert "acc" in row and row.split("│")[-3:-1] == [f"{1:>9} ", f"{2:>10} "]


def test_an_unknown_task_is_refused_before_the_model_is_loaded(tasks, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install 'quantkit[eval]'")
    monkeypatch.setattr("quantkit.workflows.evaluate.load", lambda *_, **__: pytest.fail("loaded"))
    assert command("eval", "demo", "--tasks", "no_such", "--include-path", tasks) == 2
    assert sentence(capsys.readouterr().err)[0] == "lm-eval has no task 'no_such'"


def test_data_that_is_not_there_is_told(tasks, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="pip install 'quantkit[eval]'")
    (tmp_path / "tiny_choice.yaml").write_text(TASK % (tmp_path / "none.jsonl"), "utf-8")
    line = ["eval", "demo", "--tasks", "tiny_choice", "--include-path", tmp_path]
    assert command(*line) == 1
    assert "the data of tiny_choice cannot be read" in sentence(capsys.readouterr().err)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": " ,"}, "no task to score"),
        ({"tasks": "a", "limit": 0}, "limit 0 leaves nothing"),
        ({"tasks": "a", "batch_size": 0}, "batch_size 0 leaves nothing"),
        ({"tasks": "a", "num_fewshot": -1}, "-1 examples"),
    ],
)
def test_nothing_to_do_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        evaluate("demo", **options)


def test_without_lm_eval_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("quantkit.workflows.evaluate.find_spec", lambda name: None)
    assert command("eval", "demo", "--tasks", "hellaswag") == 1
    message, hint = sentence(capsys.readouterr().err)
    assert "lm-eval is not installed" in message and "quantkit[eval]" in hint


def test_json_is_not_mixed_with_what_lm_eval_says(tasks, capfd):
    pytest.importorskip("lm_eval", reason="pip install 'quantkit[eval]'")
    line = ["eval", "demo", "--tasks", "tiny_choice", "--include-path", tasks, "--limit", 1]
    assert command(*line, "--json") == 0
    json.loads(capfd.readouterr().out)


def test_the_folder_of_tasks_must_be_there(tasks):
    pytest.importorskip("lm_eval", reason="pip install 'quantkit[eval]'")
    with pytest.raises(UsageError, match="is no folder"):
        evaluate("demo", tasks="a", include_path=str(tasks / "none"))
