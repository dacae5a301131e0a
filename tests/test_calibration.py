"""Calibration text: what is read, how rows are cut, and that nothing is dropped in silence."""

import json
from collections import Counter

import pytest
import torch
from tools import command

from quantkit import data
from quantkit.core import calibration
from quantkit.core.calibration import BUNDLED, Calibration, Document, Part
from quantkit.core.progress import Progress
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.load import load
from quantkit.workflows.calibrate import calibrate

ROMAN = "The quick brown fox jumps over the lazy dog. "
CHAT = [
    {"role": "user", "content": "What is the capital of Japan?"},
    {"role": "assistant", "content": "It is Tokyo."},
]


def texts(documents):
    return [
        document.text or "\n".join(message["content"] for message in document.messages)
        for document in documents
    ]


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def refusal(call, *arguments, kind=QuantkitError):
    with pytest.raises(kind) as caught:
        list(call(*arguments))
    return caught.value.message


# specifications


@pytest.mark.parametrize(
    ("specification", "parts"),
    [
        ("bundled", [Part("bundled")]),
        ("bundled=12", [Part("bundled", 12)]),
        ("bundled:ja=64,en=32", [Part("bundled:ja", 64), Part("bundled:en", 32)]),
        ("bundled:code,chat=1", [Part("bundled:code"), Part("bundled:chat", 1)]),
        ("notes.txt", [Part("notes.txt")]),
        ("data.csv:question=8", [Part("data.csv:question", 8)]),
        ("hf:a/b:c:train:text=100", [Part("hf:a/b:c:train:text", 100)]),
        ("wikitext2=16", [Part("wikitext2", 16)]),
        ("self", [Part("self")]),
        ("bundled:ja=６４", [Part("bundled:ja", 64)]),  # typed with a Japanese keyboard
    ],
)
def test_parse(specification, parts):
    assert calibration.parse(specification) == parts


@pytest.mark.parametrize(
    "specification",
    [
        "bundled:",
        "bundled:fr",
        "bundled:ja,fr=2",
        "bundled:ja=0",
        "bundled:ja=",
        "c4=x",
        "c4=-1",
        "c4=1.5",
        "c4=²",
    ],
)
def test_parse_refuses(specification):
    assert refusal(calibration.parse, specification, kind=UsageError)


# the bundled texts


@pytest.mark.parametrize(
    ("source", "specifications", "same"),
    [
        ("bundled:en", ["c4=3", "bundled:ja=1,en=2"], True),
        ("bundled", ["bundled:ja"], True),
        ("bundled:ja", ["bundled=64"], True),
        ("bundled:ja", ["bundled:en"], False),
        ("notes.txt", ["notes.txt=5"], True),
        ("notes.txt", ["bundled", "self", "bundled:xx=1", "notes.txt=none"], False),
    ],
)
def test_text_that_is_the_same(source, specifications, same):
    assert calibration.overlaps(source, specifications) is same


def test_bundled_texts_are_large_enough():
    sizes = dict.fromkeys(BUNDLED, 0)
    for label in BUNDLED:
        for text in texts(calibration.read(f"bundled:{label}", 0)):
            sizes[label] += len(text.encode())
    assert list(sizes) == ["en", "ja", "code", "chat"]
    assert sum(sizes.values()) >= 120_000
    assert min(sizes.values()) >= 50_000


def test_bundled_is_all_of_the_sets():
    documents = calibration.read("bundled", 0)
    found = Counter(document.label for document in documents)
    assert set(found) == set(BUNDLED)
    for label in BUNDLED:
        alone = calibration.read(f"bundled:{label}", 0)
        assert found[label] == len(alone)
        assert sorted(texts(alone)) == sorted(texts(d for d in documents if d.label == label))


def test_bundled_labels_are_true():
    assert {calibration.language(text) for text in texts(calibration.read("bundled:ja", 0))} == {
        "ja"
    }
    assert {calibration.language(text) for text in texts(calibration.read("bundled:en", 0))} == {
        "latin"
    }
    assert all(document.messages for document in calibration.read("bundled:chat", 0))


def test_held_out_texts_share_no_passage_with_calibration():
    run = 60
    known = set()
    for text in texts(calibration.read("bundled", 0)):
        assert len(text) > run
        known.update(text[i : i + run] for i in range(len(text) - run + 1))
    for label in BUNDLED:
        held_out = calibration.read(str(data.calibration() / "heldout" / f"{label}.jsonl"), 0)
        assert sum(len(text) for text in texts(held_out)) > 4000
        for text in texts(held_out):
            shared = [
                text[i : i + run] for i in range(len(text) - run + 1) if text[i : i + run] in known
            ]
            assert shared == []


# local files


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("\ufeff" + ROMAN, "utf-8")  # a byte order mark, as Windows writes it
    assert calibration.read(str(path), 0) == [Document("latin", text=ROMAN)]


def test_jsonl_with_texts_chats_and_ids(tmp_path):
    rows = ({"text": ROMAN}, {"content": "日本語の文章です。"}, {"body": "Да"}, {"messages": CHAT})
    documents = calibration.read(write(tmp_path / "a.jsonl", *rows), 0)
    assert {document.label: document.text for document in documents if document.text} == {
        "latin": ROMAN,
        "ja": "日本語の文章です。",
        "cyrillic": "Да",
    }
    assert [d.messages for d in documents if d.messages] == [tuple(CHAT)]


def test_blank_lines_of_jsonl_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n\n  \n{"text": "two"}', "utf-8")
    assert sorted(texts(calibration.read(str(path), 0))) == ["one", "two"]


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,question\n"one, two\nthree",why\nfour,how\n', "utf-8")
    assert sorted(texts(calibration.read(str(path), 0))) == ["four", "one, two\nthree"]
    assert sorted(texts(calibration.read(f"{path}:question", 0))) == ["how", "why"]


def test_csv_with_a_whole_book_in_a_field(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "word " * 60_000 + "\n", "utf-8")
    assert len(texts(calibration.read(str(path), 0))[0]) == 300_000


def test_parquet(tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    table = pyarrow.table({"text": ["one", "two"], "chat": [CHAT, CHAT[:1]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert sorted(texts(calibration.read(str(tmp_path / "a.parquet"), 0))) == ["one", "two"]
    chats = calibration.read(f"{tmp_path / 'a.parquet'}:chat", 0)
    assert sorted(len(document.messages) for document in chats) == [1, 2]


def test_a_column_of_jsonl(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one", "dialogue": CHAT, "answer": "forty-two"})
    assert texts(calibration.read(f"{path}:answer", 0)) == ["forty-two"]
    assert calibration.read(f"{path}:dialogue", 0)[0].messages == tuple(CHAT)


def test_a_colon_in_the_name_of_an_existing_file_is_no_column(tmp_path):
    (tmp_path / "a:b.txt").write_text(ROMAN)
    assert texts(calibration.read(str(tmp_path / "a:b.txt"), 0)) == [ROMAN]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
@pytest.mark.parametrize("padding", [0, 50_000])
def test_text_that_is_not_utf8_is_refused(tmp_path, suffix, padding):
    path = tmp_path / f"a.{suffix}"
    lines = b"text\n" + b'{"text": "a"}\n' * (padding // 14) + "日本".encode("shift-jis")
    path.write_bytes(lines if suffix != "jsonl" else lines.removeprefix(b"text\n"))
    assert "UTF-8" in refusal(calibration.read, str(path), 0)


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", " \n"), ("a.jsonl", "\n"), ("a.csv", "text\n")]
)
def test_files_without_text_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "no text" in refusal(calibration.read, str(tmp_path / name), 0)


@pytest.mark.parametrize("line", ["{", "text", '{"text": "a"} {}', "[1]", '"text"', "null"])
def test_lines_that_are_no_json_objects_are_refused(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    assert f"{path}, line 3 is not" in refusal(calibration.read, str(path), 0)


@pytest.mark.parametrize(
    "row",
    [
        {"title": "x"},
        {"text": None},
        {"text": 5},
        {},
        {"messages": []},
        {"messages": ["hello"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"content": "hello"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"input_ids": []},
        {"input_ids": ["1"]},
        {"input_ids": [1.5]},
        {"input_ids": [True]},
    ],
    ids=str,
)
def test_rows_that_hold_nothing_usable_are_refused(tmp_path, row):
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, row)
    assert "line 2" in refusal(calibration.read, path, 0)


def test_a_missing_column_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one", "title": "two"})
    message = refusal(calibration.read, f"{path}:question", 0)
    assert "'question'" in message
    (tmp_path / "a.csv").write_text("title\none\n")
    assert "row 2" in refusal(calibration.read, str(tmp_path / "a.csv"), 0)


def test_a_missing_or_unknown_file_is_refused(tmp_path):
    assert "there is no file" in refusal(calibration.read, str(tmp_path / "a.txt"), 0)
    for source in ("a.pdf", "nothing", "", str(tmp_path)):
        assert refusal(calibration.read, source, 0, kind=UsageError)


def test_a_broken_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    assert "parquet" in refusal(calibration.read, str(tmp_path / "a.parquet"), 0)


# order


def test_documents_are_shuffled_by_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"text {i}"} for i in range(20)))
    first = texts(calibration.read(path, 7))
    assert texts(calibration.read(path, 7)) == first
    assert texts(calibration.read(path, 8)) != first
    assert sorted(first) == sorted(f"text {i}" for i in range(20))


def test_rows_of_ready_ids_keep_their_order(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"input_ids": [i, i]} for i in range(20)))
    assert [document.ids[0] for document in calibration.read(path, 7)] == list(range(20))


# the Hub


class Stream:
    """As much of a streamed dataset as is used."""

    def __init__(self, rows):
        self.rows, self.shuffled, self.taken = rows, None, 0

    def shuffle(self, **how):
        self.shuffled = how
        return self

    def __iter__(self):
        for row in self.rows:
            self.taken += 1
            yield row


@pytest.fixture
def hub(monkeypatch):
    """Stands in for datasets.load_dataset; call it with the rows, or with an error, to come."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def serve(outcome):
        def load_dataset(*names, **options):
            calls.append((names, options))
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


@pytest.mark.parametrize(
    ("source", "names", "split"),
    [
        ("hf:a/b", ("a/b", None), "train"),
        ("hf:a/b:small", ("a/b", "small"), "train"),
        ("hf:a/b::test", ("a/b", None), "test"),
        ("hf:a/b:small:test:story", ("a/b", "small"), "test"),
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "train"),
        ("c4-ja", ("allenai/c4", "ja"), "train"),
    ],
)
def test_datasets_are_streamed_and_shuffled(hub, source, names, split):
    stream = Stream([{"text": "one", "story": "two"}])
    calls = hub(stream)
    (document,) = calibration.read(source, 5)
    assert calls == [(names, {"split": split, "streaming": True})]
    assert document.text == ("two" if source.endswith("story") else "one")
    assert stream.shuffled["seed"] == 5


def test_no_more_of_a_dataset_is_read_than_needed(hub, tokenizer):
    stream = Stream({"text": ROMAN * 3} for _ in range(1000))
    hub(stream)
    found = calibration.pack(calibration.read("hf:a/b", 0), tokenizer, 4, 32, 9)
    assert [len(row) for row in found.rows] == [32] * 4
    assert stream.taken < 10
    assert found.left == 0


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no dataset a/b\ndetails"), ValueError("bad split"), OSError()]
)
def test_a_dataset_that_cannot_be_read_is_refused(hub, error):
    hub(error)
    message = refusal(calibration.read, "hf:a/b", 0)
    assert "a/b" in message
    assert "details" not in message


def test_a_dataset_without_the_column_is_refused(hub):
    hub(Stream([{"text": "one"}]))
    assert "'story'" in refusal(calibration.read, "hf:a/b:::story", 0)


# rows of tokens


def flat(rows):
    return [token for row in rows for token in row]


def test_packing_drops_nothing(tokenizer):
    documents = [Document(f"d{i % 3}", text=ROMAN * (i + 1)) for i in range(9)]
    expected = flat(
        [*tokenizer.encode(document.text, add_special_tokens=False), tokenizer.eos_token_id]
        for document in documents
    )
    found = calibration.pack(documents, tokenizer, None, 50, 1000)
    assert flat(found.rows) == expected
    assert {len(row) for row in found.rows[:-1]} == {50}
    assert len(found.rows[-1]) == len(expected) % 50 != 0
    assert sum(found.tokens.values()) == len(expected)
    assert (found.used, found.left) == (9, 0)
    assert found.notes == []


@pytest.mark.parametrize(("rows", "cap"), [(3, 1000), (None, 3)])
def test_packing_stops_when_there_is_enough(tokenizer, rows, cap):
    documents = [Document(f"d{i}", text=ROMAN * 4) for i in range(20)]
    whole = calibration.pack(documents, tokenizer, None, 50, 1000)
    found = calibration.pack(documents, tokenizer, rows, 50, cap)
    assert found.rows == whole.rows[:3]
    assert sum(found.tokens.values()) == 150
    assert found.used + found.left == 20
    each = len(tokenizer.encode(ROMAN * 4, add_special_tokens=False)) + 1
    assert found.used == -(-150 // each)
    assert list(found.tokens.values())[:-1] == [each] * (found.used - 1)


def test_too_little_text_is_said(tokenizer):
    found = calibration.pack([Document("ids", ids=(1, 2))] * 2, tokenizer, 64, 8, 1)
    assert len(found.rows) == 2
    assert found.short == ["64 rows were asked for, the text gives 2"]


@pytest.mark.parametrize(("rows", "told"), [(5, True), (6, False)])
def test_fewer_tokens_than_the_widest_linear_has_inputs_are_told(rows, told, tmp_path, capsys):
    text = tmp_path / "ids.jsonl"
    text.write_text(json.dumps({"input_ids": [*range(10, 138)]}) + "\n")
    text.write_text(text.read_text() * rows)
    options = ["--calib", text, "--fast", "--dry-run", "--out", tmp_path / "out"]
    assert command("gptq", "demo", *options) == 0
    few = f"warning: calibration has {128 * rows:,} tokens, fewer than the 768 inputs of the widest"
    assert (few in capsys.readouterr().err) == told


def test_a_model_writes_as_many_texts_as_are_wanted(tokenizer, monkeypatch):
    asked = []
    found, _ = load("demo", device="cpu")
    generate = found.generate

    def noted(ids, **how):
        asked.append(len(ids))
        return generate(ids, **how)

    monkeypatch.setattr(found, "generate", noted)
    monkeypatch.setattr("quantkit.runtime.load.load", lambda *args, **how: (found, tokenizer))
    steps = []
    watching = Progress()
    watching.step = steps.append
    how = {"longest": None, "seed": 0, "device": torch.device("cpu"), "progress": watching}
    text = calibrate(resolve("demo"), tokenizer, ["self"], rows=3, seqlen=12, **how)
    assert [len(row) for row in text.rows] == [12] * 3
    assert set(asked) == {3}
    assert (steps[-1].index, steps[-1].total) == (3, 3)


def test_no_text_at_all_is_refused(tokenizer):
    for documents in ([], iter([]), [Document("en", text="")]):
        with pytest.raises(QuantkitError, match="empty"):
            calibration.pack(documents, tokenizer, None, 8, 4)


def test_ready_ids_are_taken_as_they_are(tokenizer):
    ready = [tuple(range(5)), tuple(range(100, 140)), (8191,)]
    documents = [Document("ids", ids=ids) for ids in ready]
    found = calibration.pack(documents, tokenizer, None, 16, 10)
    assert found.rows == [list(ids) for ids in ready]
    assert found.tokens == {"ids": 46}
    limited = calibration.pack(documents, tokenizer, 2, 16, 10)
    assert limited.rows == found.rows[:2]
    assert limited.left == 1


@pytest.mark.parametrize("token", [-1, 8192, 10**9])
def test_ids_outside_of_the_vocabulary_are_refused(tokenizer, token):
    assert len(tokenizer) == 8192
    with pytest.raises(QuantkitError, match="vocabulary"):
        calibration.pack([Document("ids", ids=(1, token))], tokenizer, None, 16, 10)


def test_chats_without_a_template_are_joined(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    ids = calibration.encode(Document("chat", messages=tuple(CHAT)), tokenizer)
    text = "What is the capital of Japan?\n\nIt is Tokyo."
    assert ids == [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def test_chats_go_through_the_template(tokenizer, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids = calibration.encode(Document("chat", messages=tuple(CHAT)), tokenizer)
    assert tokenizer.decode(ids) == "<user>What is the capital of Japan?<assistant>It is Tokyo."


@pytest.mark.parametrize(
    ("template", "content", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "a", "System role not supported"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "a", "chat template fails"),
        ("{{ messages[0].content }}", "\ud800", "no Unicode"),
    ],
)
def test_chats_that_cannot_go_through_it_are_told(tokenizer, monkeypatch, template, content, said):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    document = Document("chat", messages=({"role": "system", "content": content},))
    with pytest.raises(QuantkitError, match=said):
        calibration.encode(document, tokenizer)


@pytest.mark.parametrize(
    "source", ["hf:", "hf::::", "~nobody-here/x.txt", "x" * 300 + ".txt", "a\0.txt"]
)
def test_what_can_be_no_source_is_refused(source):
    assert refusal(calibration.read, source, 0)


def test_json_without_an_end_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 100_000)
    assert "line 1 is not JSON" in refusal(calibration.read, str(tmp_path / "a.jsonl"), 0)


# what identifies a calibration


def pack_bundled(tokenizer, seed):
    return calibration.pack(calibration.read("bundled", seed), tokenizer, 6, 64, 6)


def test_the_digest_follows_the_seed(tokenizer):
    digest = pack_bundled(tokenizer, 0).digest
    assert pack_bundled(tokenizer, 0).digest == digest
    assert pack_bundled(tokenizer, 1).digest != digest


def test_the_digest_sees_tokens_their_order_and_where_rows_end():
    digests = {
        Calibration(rows).digest
        for rows in (
            [[1, 2, 3]],
            [[1, 2], [3]],
            [[1], [2, 3]],
            [[3, 2, 1]],
            [[1, 2, 4]],
            [[1, 2]],
            [],
        )
    }
    assert len(digests) == 7


def test_extend_adds_everything():
    one = Calibration([[1]], Counter(en=1), used=2, left=3, notes=["a"])
    one.extend(Calibration([[2, 3]], Counter(en=1, ja=1), used=1, left=1, notes=["b"]))
    assert one == Calibration([[1], [2, 3]], Counter(en=2, ja=1), used=3, left=4, notes=["a", "b"])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (ROMAN, "latin"),
        ("琵琶湖は滋賀県の中央に横たわる日本最大の湖である。", "ja"),
        ("カタカナ", "ja"),
        ("北京是中华人民共和国的首都，也是全国的政治中心。", "zh"),
        ("서울은 대한민국의 수도이다.", "ko"),
        ("Москва — столица России.", "cyrillic"),
        ("القاهرة عاصمة مصر", "arabic"),
        ("def main(): pass  # コメント", "latin"),
        ("これは GPTQ の説明です。重みを整数に丸めます。", "ja"),
        ("12345 !?", "latin"),
        ("", "latin"),
    ],
)
def test_language(text, label):
    assert calibration.language(text) == label
