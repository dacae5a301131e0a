"""Publishing: what is refused before anything is sent, one commit, and what landed."""

import shutil
from pathlib import Path

import pytest
from hub_answers import Handler
from hub_store import READER, WRITER, git_sha1, sha256
from pushing import REPO, edit, faults, files, without_attributes
from tools import QUICK_OPTIONS, command, model, quantized, read_json, sentence

from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.workflows.push import push


def test_a_folder_arrives_in_one_commit_and_comes_back(writer, made, tmp_path):
    found = push(made, REPO, message="first")
    assert found.written and found.commit == writer.repositories[REPO].branches["main"]
    assert without_attributes(writer) == files(made)
    assert writer.repositories[REPO].log() == ["first", "initial commit"]
    assert not writer.repositories[REPO].private
    again = resolve(REPO)
    for name in {path.name for path in again.folder.iterdir()}:
        assert (again.folder / name).read_bytes() == (made / name).read_bytes()
    # nothing is sent that is there
    writer.seen.clear()
    found = push(made, REPO)
    assert (found.written, found.commit) == (True, None)
    assert not [path for method, path, _ in writer.seen if method in ("PUT", "POST")]


def test_large_files_in_parts(writer, made):
    writer.part_size = 1 << 20
    raw = (made / "model.safetensors").read_bytes()
    assert len(raw) > 3 * writer.part_size
    push(made, REPO, private=True)
    assert without_attributes(writer)["model.safetensors"] == raw
    assert len([p for m, p, _ in writer.seen if m == "PUT"]) == -(-len(raw) // writer.part_size)
    assert writer.repositories[REPO].private


def test_a_branch_for_each_variant(writer, made, tmp_path):
    branch = "gptq-4bit-32g-actorder_True"
    push(made, REPO)
    other = shutil.copytree(quantized(group=32, act_order="group", check=True), tmp_path / "other")
    (other / "model.safetensors").rename(other / "gptq_model-4bit-32g.safetensors")
    push(other, REPO, branch=branch)
    assert without_attributes(writer) == files(made)
    assert without_attributes(writer, branch) == files(other)
    assert ".gitattributes" in writer.repositories[REPO].files(branch)  # what is stored as LFS
    # and in a repository that is not there yet
    push(other, "my-lab/new", branch=branch)
    assert without_attributes(writer, branch, "my-lab/new") == files(other)
    assert set(writer.repositories["my-lab/new"].files()) == {".gitattributes"}


def test_weights_that_would_be_mixed_up_make_way(writer, made):
    push(made, REPO)
    old = writer.repositories[REPO]
    old.commit("main", {**old.files(), "model-00001-of-00002.safetensors": b"old", "more.md": b"m"})
    found = push(made, REPO)
    assert found.removed == ["model-00001-of-00002.safetensors"]
    assert without_attributes(writer) == {**files(made), "more.md": b"m"}


def test_what_says_how_others_were_quantized_makes_way(writer, tmp_path):
    """A folder of GPTQ, and then one of another format to the same place."""
    old, new = quantized(), quantized(format="compressed-tensors")
    assert (old / "quantize_config.json").exists()
    push(old, REPO, unverified=True)
    assert push(new, REPO, unverified=True).removed == ["quantize_config.json"]
    assert without_attributes(writer) == files(new)


def test_the_folder_where_one_is(writer, made, monkeypatch):
    monkeypatch.chdir(made)
    push(".", REPO)
    assert without_attributes(writer) == files(made)


def test_weights_of_somebody_else_stay(writer, made):
    writer.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"mine"})
    with pytest.raises(
        UsageError, match=r"holds other weights in main: pytorch_model.bin"
    ) as caught:
        push(made, REPO)
    assert "--overwrite" in caught.value.hint
    assert "pytorch_model.bin" in writer.repositories[REPO].files()
    push(made, REPO, overwrite=True)
    assert without_attributes(writer) == files(made)


# refused


def test_what_should_not_be_public(writer, made, tmp_path):
    def refused(match: str, folder: Path = made, **options) -> str:
        with pytest.raises(QuantkitError, match=match) as caught:
            push(folder, REPO, **options)
        return caught.value.hint or ""

    record, config = made / "quantkit.json", made / "config.json"
    content = read_json(record)
    edit(record, measured=None)
    assert "quantkit verify" in refused("was never measured")
    edit(record, verified={"kl": 9.0, "gate": {"passed": False}})
    assert "--unverified" in refused("did not keep the limits")
    edit(record, **content, verified=None)
    original = config.read_bytes()
    edit(config, _name_or_path="/home/somebody/secret/model")
    assert "--repair" in refused("holds a path of another machine", unverified=True)
    config.write_bytes(original)
    said = read_json(config)["quantization_config"]
    edit(config, quantization_config={**said, "dataset": ["a private text"]})
    refused("holds calibration texts")
    edit(config, quantization_config={**said, "bits": 8})
    assert "quantkit inspect" in refused("has an error")
    config.write_bytes(original)
    edit(record, source={"name": REPO})
    refused("is the original of")
    record.write_text("{", "utf-8")
    refused("not readable JSON")
    record.unlink()
    assert "hf upload" in refused("was not written by quantkit")
    (made / "ledger.json").write_text("{}", "utf-8")
    refused("is unfinished")
    made.rename(tmp_path / "made.partial")
    refused("is unfinished")
    refused("there is no folder", tmp_path / "nothing")
    with pytest.raises(UsageError, match="no name of a repository"):
        push(made, "demo-gptq")
    assert not writer.repositories


def test_unverified_all_the_same(writer, made):
    edit(made / "quantkit.json", measured=None)
    push(made, REPO, unverified=True)
    assert without_attributes(writer) == files(made)


def test_a_licence_that_forbids_it_is_told(writer, made, capsys):
    card = made / "README.md"
    card.write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n# x\n", "utf-8")
    assert command("push", made, REPO) == 0
    assert "cc-by-nc-nd-4.0, does not allow" in capsys.readouterr().err
    card.write_text("---\nlicense: apache-2.0\n---\n# x\n", "utf-8")
    assert command("push", made, REPO) == 0
    assert "does not allow" not in capsys.readouterr().err


def test_a_dry_run_sends_nothing(writer, made, capsys):
    assert command("push", made, REPO, "--dry-run", "--branch", "b") == 0
    out = capsys.readouterr().out
    assert f"/{REPO}/tree/b" in out
    assert all(name in out for name in files(made))
    assert not writer.repositories
    assert not [path for method, path, _ in writer.seen if method != "GET"]


def test_private_is_not_made_of_public(writer, made):
    push(made, REPO)
    with pytest.raises(UsageError, match="and public"):
        push(made, REPO, private=True)


@pytest.mark.parametrize(
    ("token", "repository", "code", "message"),
    [
        (None, REPO, 2, "needs a token"),
        ("hf_" + "x" * 34, REPO, 1, "does not accept the token"),
        (READER, REPO, 1, "no right to do that"),
        (WRITER, "google/demo", 1, "no right to do that"),
    ],
)
def test_who_may_not_push(hub, made, monkeypatch, capsys, token, repository, code, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert command("push", made, repository) == code
    told, hint = sentence(capsys.readouterr().err)
    assert message in told
    assert "hf auth login" in hint
    assert not token or token not in told + hint
    assert not hub.repositories


# faults


@pytest.mark.parametrize(
    "place", ["repos/create", "preupload", "objects/batch", "^lfs/", "commit/"]
)
def test_a_push_that_fails_publishes_nothing_and_goes_on(writer, made, place, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    writer.instead = faults(place, 400, message=f"Invalid credentials, {WRITER}")
    with pytest.raises(QuantkitError, match="Invalid credentials, hf_") as caught:
        push(made, REPO)
    assert WRITER not in caught.value.message + (caught.value.hint or "")
    if REPO in writer.repositories:
        assert set(writer.repositories[REPO].files()) == {".gitattributes"}
    writer.instead = lambda handler: False
    writer.seen.clear()
    assert push(made, REPO).written
    assert without_attributes(writer) == files(made)
    sent = [path for method, path, _ in writer.seen if method == "PUT"]
    assert bool(sent) == (place != "commit/")  # what was uploaded is not sent again


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for(writer, made, status, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    asked: set[str] = set()

    def busy(handler: Handler) -> bool:
        first = handler.path_ not in asked
        asked.add(handler.path_)
        if first and "validate-yaml" not in handler.path_:
            handler.refuse(status, "", "later")
        return first and "validate-yaml" not in handler.path_

    writer.instead = busy
    assert push(made, REPO).written
    assert without_attributes(writer) == files(made)


def test_somebody_else_commits_meanwhile(writer, made):
    push(made, REPO)
    repository, moved = writer.repositories[REPO], []
    (made / "README.md").write_text("# other\n", "utf-8")

    def move(handler: Handler) -> bool:
        if "/commit/" in handler.path_ and not moved:
            moved.append(repository.commit("main", {**repository.files(), "new.md": b"n"}))
        return False

    writer.instead = move
    with pytest.raises(QuantkitError, match="changed by somebody else"):
        push(made, REPO)
    assert repository.branches["main"] == moved[0]
    assert push(made, REPO).written
    assert without_attributes(writer) == {**files(made), "new.md": b"n"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_landed_is_compared_by_its_hash(writer, made, name):
    """A Hub that stores something else."""
    original = Handler.commit

    def spoil(handler: Handler) -> bool:
        if "/commit/" not in handler.path_:
            return False
        original(handler, REPO, "main")
        landed = writer.repositories[REPO].files()
        landed[name] = landed[name][:-1] + bytes([landed[name][-1] ^ 1])
        return True

    writer.instead = spoil
    with pytest.raises(QuantkitError, match=f"{name} in {REPO} is not what was sent"):
        push(made, REPO)


# --push


def test_a_quantization_that_is_published(writer, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("gptq", "demo", "--out", out, *QUICK_OPTIONS, "--push", REPO) == 0
    shown = capsys.readouterr()
    assert "published" in shown.out
    # --no-check: it had to be measured before
    assert read_json(out / "quantkit.json")["verified"]["against"] == "demo"
    assert without_attributes(writer) == files(out)


def test_a_push_behind_a_quantization_fails_and_says_how_to_go_on(writer, tmp_path, capsys):
    out = tmp_path / "out"
    writer.instead = faults("commit/", 403)
    options = ["--out", out, "--group", "32", *QUICK_OPTIONS, "--push", REPO, "-q"]
    assert command("gptq", model("gpt_neox"), *options) == 1
    hint = sentence(capsys.readouterr().err)[1]
    again = hint.partition("'")[2].partition("'")[0]
    writer.instead = lambda handler: False
    assert command(*again.split()[1:]) == 0
    assert without_attributes(writer) == files(out)


def test_push_is_refused_before_anything_is_quantized(hub, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for name, message in ((REPO, "needs a token"), ("x", "no name of a repository")):
        assert command("gptq", "demo", "--out", out, "--push", name) == 2
        assert message in sentence(capsys.readouterr().err)[0]
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert command("gptq", "demo", "--out", out, "--push", REPO) == 1
    assert "does not accept the token" in sentence(capsys.readouterr().err)[0]
    assert not list(tmp_path.iterdir())


def test_the_hashes_of_the_fixture(writer, made):
    """Those of git and of sha256sum, computed by git itself: git hash-object on 'hello\\n'."""
    assert git_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert sha256(b"")[:8] == "e3b0c442"
