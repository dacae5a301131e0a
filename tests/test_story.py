"""docs/story.md as people live it: every command of it, against a Hub on this machine, with a small
GPT-NeoX in the place of matsuo-lab/weblab-10b. README.ja.md tells the same commands."""

import re
import shlex
from pathlib import Path

import tiny
from hub import Hub
from hub_store import WRITER
from huggingface_hub import constants
from tools import command, read_json

ROOT = Path(__file__).parent.parent
ELSEWHERE = ["pip install .", "hf auth login"]  # what a test cannot do
ORIGINAL, OURS, GGUF = (
    "matsuo-lab/weblab-10b",
    "your-name/weblab-10b-gptq",
    "your-name/weblab-10b-gguf",
)
BRANCH = "gptq-4bit-32g-actorder_True"
CARD = b"---\nlicense: cc-by-nc-4.0\nlanguage: [ja, en]\n---\n# weblab-10b\n"


def commands(page: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def test_both_languages_tell_the_same():
    assert commands("README.ja.md") == commands("docs/story.md")


def test_every_command_of_the_story(hub, tmp_path, monkeypatch, capsys):
    model = tiny.build(
        "gpt_neox", tmp_path / "weblab", tokenizer=True, hidden_size=128, intermediate_size=256
    )
    (model / "README.md").write_bytes(CARD)
    commit = hub.add_folder(ORIGINAL, model)
    work, shown = tmp_path / "work", {}
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    told = commands("docs/story.md")
    assert [line for line in told if line in ELSEWHERE] == ELSEWHERE
    for line in told:
        if line in ELSEWHERE:
            continue
        # what was published is fetched by somebody who has nothing
        other = OURS in line and " push " not in line
        monkeypatch.setattr(
            constants, "HF_HUB_CACHE", str(tmp_path / ("theirs" if other else "ours"))
        )
        program, *arguments = shlex.split(line)
        code = command(*arguments)
        printed = capsys.readouterr()
        assert (program, code) == ("quantkit", 0), f"{line}\n{printed.err}"
        assert WRITER not in printed.out + printed.err
        shown[line] = printed.out
    assert_published(hub, work, commit)
    texts = [text for line, text in shown.items() if line.startswith("quantkit generate")]
    assert len(texts) == 3 and texts[0] == texts[1]  # from the folder, and from the Hub
    assert (work / "report.html").exists()


def assert_published(hub: Hub, work: Path, commit: str) -> None:
    def landed(name: str, branch: str = "main") -> dict[str, bytes]:
        files = hub.repositories[name].files(branch)
        return {file: raw for file, raw in files.items() if file != ".gitattributes"}

    def held(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (work / folder).iterdir()}

    assert landed(OURS) == held("weblab-10b-gptq-4bit-128g")
    assert landed(OURS, BRANCH) == held("weblab-10b-32g")
    assert "gptq_model-4bit-32g.safetensors" in landed(OURS, BRANCH)
    assert landed(GGUF) == held("weblab-10b-gguf")
    record = read_json(work / "weblab-10b-gptq-4bit-128g" / "quantkit.json")
    assert (record["source"]["name"], record["source"]["revision"]) == (ORIGINAL, commit)
    assert record["verified"]["gate"]["passed"]
    for card in (landed(OURS), landed(OURS, BRANCH), landed(GGUF)):
        text = card["README.md"].decode()
        assert f"base_model: {ORIGINAL}" in text and "license: cc-by-nc-4.0" in text
        assert "base_model_relation: quantized" in text
    for raw in landed(OURS).values():
        assert str(work).encode() not in raw
