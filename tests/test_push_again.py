"""Publishing into what is there already: broken-off pushes, other people, and edited cards."""

import shutil

import pytest
from hub_answers import Handler
from pushing import REPO, edit, faults, files, without_attributes

from quantkit import convert
from quantkit.errors import QuantkitError, UsageError
from quantkit.workflows.push import push


def test_a_push_into_a_new_branch_breaks_off_and_goes_on(writer, made):
    """The branch is made before the commit, and shows what main has until then."""
    writer.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"mine", "more.md": b"m"})
    before = writer.repositories[REPO].files()
    writer.instead = faults("/commit/", 403)
    with pytest.raises(QuantkitError, match="no right"):
        push(made, REPO, branch="variant")
    assert "variant" in writer.repositories[REPO].branches
    writer.instead = lambda handler: False
    assert push(made, REPO, branch="variant").removed == []
    assert without_attributes(writer, "variant") == files(made)
    assert writer.repositories[REPO].files() == before


def test_a_new_branch_is_made_when_all_files_are_there(writer, made):
    """A copy of main under the variant's name is shown for a moment, not for an upload's hours."""
    writer.add(REPO, {"README.md": b"r"})
    writer.instead = faults("^lfs/", 403)  # where the contents of large files go
    with pytest.raises(QuantkitError, match="no right"):
        push(made, REPO, branch="variant")
    assert list(writer.repositories[REPO].branches) == ["main"]


@pytest.mark.parametrize("branch", ["main", "variant"])
def test_the_answer_to_the_commit_gets_lost(writer, made, branch):
    """The commit was made: asking for it once more must not look like somebody else's."""
    push(made, REPO)
    push(made, REPO, branch=branch)
    repository, lost = writer.repositories[REPO], []
    old = {**repository.files(branch), "model-00001-of-00002.safetensors": b"old"}
    repository.commit(branch, old)
    edit(made / "quantkit.json", note="new")

    def lose(handler: Handler) -> bool:
        if "/commit/" not in handler.path_ or lost:
            return False
        answer, handler.send = handler.send, lambda *_: lost.append(True)
        handler.commit(REPO, branch)
        handler.send = answer
        handler.hang_up()
        return True

    writer.instead = lose
    found = push(made, REPO, branch=branch, message="last")
    assert lost and found.written and found.commit == repository.branches[branch]
    assert repository.log(branch).count("last") == 1
    assert without_attributes(writer, branch) == files(made)


@pytest.mark.parametrize("branch", ["main", "variant"])
def test_two_push_at_once(writer, made, tmp_path, branch):
    """The other one is done while this one is about to commit: the second is refused, whole."""
    push(made, "me/other")
    writer.repositories[REPO] = writer.repositories.pop("me/other")
    other, begun = shutil.copytree(made, tmp_path / "other"), []
    edit(made / "quantkit.json", note="mine")
    edit(other / "quantkit.json", note="theirs")

    def meanwhile(handler: Handler) -> bool:
        if "/commit/" in handler.path_ and not begun:
            begun.append(True)
            push(other, REPO, branch=branch)
        return False

    writer.instead = meanwhile
    with pytest.raises(QuantkitError, match="changed by somebody else"):
        push(made, REPO, branch=branch)
    assert without_attributes(writer, branch) == files(other)
    assert push(made, REPO, branch=branch).written
    assert without_attributes(writer, branch) == files(made)


def test_files_of_others_survive(writer, made):
    """Notes, pictures, weights in folders of their own, and hidden files."""
    theirs = {
        "NOTES.md": b"n",
        "pictures/a.png": b"p",
        "onnx/model.bin": b"o",
        ".env.example": b"e",
    }
    writer.add(REPO, theirs)
    ours = files(made)
    (made / ".env").write_text("secret")
    push(made, REPO)
    assert without_attributes(writer) == {**theirs, **ours}


def test_gguf_files_lie_side_by_side(writer, made, tmp_path):
    """One file for each type; weights in another format make way for them, and they for those."""
    gguf = convert(str(made), "gguf:q4_0", tmp_path / "gguf").folder
    writer.add(REPO, {"other.Q8_0.gguf": b"GGUF", "model.safetensors": b"old"})
    found = push(gguf, REPO, unverified=True, overwrite=True)
    assert found.removed == ["model.safetensors"]
    assert without_attributes(writer) == {**files(gguf), "other.Q8_0.gguf": b"GGUF"}
    ours = [name for name in files(gguf) if name.endswith(".gguf")]
    assert sorted(push(made, REPO).removed) == sorted(["other.Q8_0.gguf", *ours])


def test_an_edited_card_is_told_of(writer, made, capsys):
    """It makes way, but its writer hears where it stays; one that push wrote needs no words."""
    card = made / "README.md"
    assert push(made, REPO).notes == []
    repository = writer.repositories[REPO]
    card.write_text("# the next\n", "utf-8")
    edit(made / "quantkit.json", note="next")
    assert push(made, REPO).notes == []
    by_hand = repository.commit("main", {**repository.files(), "README.md": b"# by hand\n"})
    edit(made / "quantkit.json", note="again")
    for dry_run in (True, False):
        (note,) = push(made, REPO, dry_run=dry_run).notes
        assert "the card on the Hub was changed there" in note
        assert note.endswith(f"/{REPO}/tree/{by_hand}")
    assert repository.files()["README.md"] == b"# the next\n"
    # taken over into the folder, it is nobody's loss
    repository.commit("main", {**repository.files(), "README.md": b"# by hand\n"})
    card.write_text("# by hand\n", "utf-8")
    assert push(made, REPO).notes == []


@pytest.mark.parametrize(
    "branch",
    ["", "HEAD", "a b", "../x", "a..b", "-x", "/x", "x/", "a//b", "x.lock", "refs/pr/1", "a\nb"],
)
def test_names_that_no_branch_has(writer, made, branch):
    with pytest.raises(UsageError, match="is no name of a branch") as caught:
        push(made, REPO, branch=branch)
    assert caught.value.message.isprintable()
    assert not writer.seen


@pytest.mark.parametrize("branch", ["gptq-4bit-32g-actorder_True", "feature/x", "v1.0"])
def test_names_that_branches_have(writer, made, branch):
    push(made, REPO, branch=branch, dry_run=True)


def test_file_names_that_cannot_be_shown(writer, made):
    (made / "a\x1b[31m.txt").write_text("x")
    with pytest.raises(QuantkitError, match="has a file called") as caught:
        push(made, REPO)
    assert caught.value.message.isprintable()
    assert not writer.repositories


def test_a_page_that_is_not_of_the_hub(writer, made):
    page = b"<html>log in</html>"
    writer.instead = lambda h: not h.send(200, page, {"Content-Type": "text/html"})
    with pytest.raises(QuantkitError, match="what answered is not the Hub"):
        push(made, REPO)
