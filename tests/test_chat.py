"""quantkit chat: turns, what is remembered, what is computed again, and how it is left."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from tools import command, model, sentence

from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.load import load
from quantkit.runtime.torch_engine import TorchEngine
from quantkit.workflows.conversation import Conversation
from quantkit.workflows.generate import Wanted

WANTED = Wanted(temperature=0, max_new_tokens=12)
TURNS = ["日本の首都はどこですか。", "そこはどんな町ですか。", "海はありますか。"]


@pytest.fixture(scope="module")
def engine():
    return TorchEngine(*load("demo", dtype="float32"))


def talk(chat: Conversation, *turns: str) -> list[str]:
    return ["".join(chat.say(turn)) for turn in turns]


def contents(chat: Conversation) -> list[str]:
    return [message["content"] for message in chat.messages]


def test_an_answer_depends_on_what_was_said_before(engine):
    chat = Conversation(engine, WANTED)
    answers = talk(chat, *TURNS)
    assert contents(chat) == [text.strip() for pair in zip(TURNS, answers) for text in pair]
    fresh = Conversation(TorchEngine(engine.model, engine.tokenizer), WANTED)
    fresh.messages = [dict(message) for message in chat.messages[:4]]
    assert talk(fresh, TURNS[2]) == answers[2:]
    assert fresh.answer.prompt == chat.answer.prompt
    assert talk(Conversation(engine, WANTED), TURNS[2]) != answers[2:]


def test_earlier_turns_are_not_computed_again(engine, monkeypatch):
    computed = []
    extend = engine._decoder.extend

    def counted(ids):
        computed.append(len(ids))
        return extend(ids)

    monkeypatch.setattr(engine._decoder, "extend", counted)
    chat = Conversation(engine, WANTED)
    prompts = []
    for turn in TURNS:
        computed.clear()
        talk(chat, turn)
        prompts.append((len(chat.answer.prompt), computed[0]))
    assert [new < whole / 2 for whole, new in prompts[1:]] == [True, True], prompts
    # what was made is held as well: new are the end of the turn and the next question
    assert prompts[2][1] <= prompts[2][0] - prompts[1][0]


def test_undo_and_again(engine):
    chat = Conversation(engine, Wanted(temperature=1.5, seed=1, max_new_tokens=12))
    first, second = talk(chat, *TURNS[:2])
    other = "".join(chat.again())
    assert other != second
    assert contents(chat) == [TURNS[0], first.strip(), TURNS[1], other.strip()]
    assert chat.undo() == TURNS[1]
    assert contents(chat) == [TURNS[0], first.strip()]
    chat.undo()
    for nothing in (chat.undo, chat.again):
        with pytest.raises(UsageError):
            nothing()
    same = Conversation(engine, Wanted(temperature=1.5, seed=1, max_new_tokens=12))
    assert talk(same, *TURNS[:2]) == [first, second]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(engine):
    chat = Conversation(engine, WANTED)
    pieces = chat.say(TURNS[0])
    shown = next(pieces)
    pieces.close()
    assert contents(chat) == [TURNS[0], shown.strip()]
    assert talk(chat, TURNS[1])


def test_the_oldest_turns_make_room(engine, monkeypatch):
    chat = Conversation(engine, Wanted(temperature=0, max_new_tokens=4, system="親切に。"))
    monkeypatch.setitem(engine.__dict__, "context", 120)
    dropped = []
    for turn in TURNS * 3:
        talk(chat, turn)
        assert len(chat.answer.prompt) <= 90
        assert engine.decode(chat.answer.prompt).startswith("親切に。")
        dropped.append(chat.dropped)
    assert dropped[0] == 0 and dropped[-1] > 2
    assert len(chat.messages) == 1 + 18  # all of it can be saved
    before = contents(chat)
    with pytest.raises(UsageError, match="this alone has"):
        chat.say("長い" * 200)
    assert contents(chat) == before


def test_save_and_load(engine, tmp_path):
    chat = Conversation(engine, WANTED)
    chat.set_system("親切に。")
    talk(chat, TURNS[0])
    chat.save(tmp_path / "chat.json")
    other = Conversation(engine, WANTED)
    other.load(tmp_path / "chat.json")
    assert other.messages == chat.messages
    assert talk(other, TURNS[1]) == talk(chat, TURNS[1])
    with pytest.raises(QuantkitError, match="cannot be written"):
        chat.save(tmp_path / "nonsuch" / "chat.json")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"messages": 3}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "robot", "content": "a"}, {"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}',
    ],
)
def test_what_is_no_conversation_is_not_loaded(engine, tmp_path, content):
    (tmp_path / "chat.json").write_text(content)
    chat = Conversation(engine, WANTED)
    with pytest.raises(QuantkitError, match="holds no conversation"):
        chat.load(tmp_path / "chat.json")
    assert chat.messages == []


def test_halves_of_characters_are_not_loaded(engine, tmp_path):
    said = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.json").write_text(json.dumps({"messages": said}))
    chat = Conversation(engine, WANTED)
    with pytest.raises(QuantkitError, match="no Unicode"):
        chat.load(tmp_path / "chat.json")
    assert chat.messages == []


def test_a_model_without_a_template_needs_one():
    bare = TorchEngine(*load(str(model("gpt_neox"))))
    with pytest.raises(UsageError, match="no chat template") as caught:
        Conversation(bare, WANTED)
    assert "--template: weblab" in caught.value.hint
    chat = Conversation(bare, Wanted(template="weblab", max_new_tokens=2))
    talk(chat, "a")
    assert bare.decode(chat.answer.prompt).endswith("### 指示:\na\n\n### 応答:")


# the command


def piped(monkeypatch, capsys, lines: list[str], *arguments: object) -> tuple[str, str]:
    text = "".join(line + "\n" for line in lines)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))
    assert command("chat", "demo", "-t", 0, "-n", 12, "--dtype", "float32", *arguments) == 0
    return capsys.readouterr()


def test_from_a_pipe_every_line_is_a_turn(engine, monkeypatch, capsys, tmp_path):
    file = tmp_path / "chat.json"
    lines = [TURNS[0], "", TURNS[1], "/undo", TURNS[1], "/regen", f"/save {file}", "/exit", "no"]
    out, err = piped(monkeypatch, capsys, lines, "-q")
    first, second = talk(Conversation(engine, WANTED), *TURNS[:2])
    assert out == f"{first}\n{second}\n{second}\n{second}\n"
    assert len(json.loads(file.read_text())["messages"]) == 4
    assert "4 messages" in err
    out, _ = piped(monkeypatch, capsys, [f"/load {file}", TURNS[2]], "-q")
    assert out == talk(Conversation(engine, WANTED), *TURNS)[2] + "\n"


def test_a_mistake_does_not_end_a_chat(monkeypatch, capsys):
    lines = ["/bogus", "/save", "/load nonsuch.json", "/regen", "/help", TURNS[0]]
    names = [".", "/", "..", "~nobody-here/x", "a\0b"]
    lines += [f"/{word} {name}" for name in names for word in ("save", "load")]
    out, err = piped(monkeypatch, capsys, lines)
    assert err.count("warning:") == 4 + 2 * len(names)
    assert "/system TEXT" in err and "tokens/s" in err
    assert out.strip()


def test_bad_options_are_refused_before_the_model_is_loaded(capsys):
    assert command("chat", "nonsuch/nonsuch", "-t", -1) == 2
    assert "--temperature" in sentence(capsys.readouterr().err)[0]


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal of POSIX")
def test_ctrl_c_stops_the_answer_and_then_the_chat(tmp_path):
    import pty

    (tmp_path / "plain.txt").write_text("{prompt}")
    terminal, other = pty.openpty()
    program = "from quantkit.cli.main import run; run()"
    options = ["demo", "--template", "plain.txt", "--until-eos", "-t", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, "chat", *options],
        stdin=other,
        stdout=other,
        stderr=other,
        cwd=tmp_path,
        close_fds=True,
        start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
    )
    os.close(other)
    seen = ""

    def until(text: str, seconds: float = 60) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
            assert ready, seen
            seen += os.read(terminal, 4096).decode("utf-8", "replace")
        seen = seen.split(text, 1)[1]

    try:
        until("> ")
        os.write(terminal, "昔々、ある村に\n".encode())
        until("、", 60)  # of the answer: what is typed comes back before it
        until("、", 60)
        process.send_signal(signal.SIGINT)
        until("(stopped)")
        until("> ")
        assert process.poll() is None
        for _ in range(5):  # a signal between readline's prompt and its waiting is lost (CPython)
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(4)
                break
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_an_answer_that_cannot_be_made_again_stays(engine):
    chat = Conversation(engine, WANTED)
    talk(chat, TURNS[0])
    before = contents(chat)
    chat.set_system("long " * 5000)
    with pytest.raises(QuantkitError):
        chat.again()
    assert contents(chat)[-2:] == before


def test_bytes_that_are_no_text_do_not_end_a_chat(engine):
    chat = Conversation(engine, WANTED)
    with pytest.raises(QuantkitError, match="Unicode"):
        talk(chat, b"a\xff".decode("utf-8", "surrogateescape"))
    assert talk(chat, TURNS[0])[0]
