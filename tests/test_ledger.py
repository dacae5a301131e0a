"""The ledger remembers what is finished, and refuses to go on with other settings."""

import json

import pytest

from quantkit.core import checkpoint, ledger
from quantkit.core.ledger import Ledger
from quantkit.errors import QuantkitError, UsageError

SETTINGS = {"model": "demo", "bits": 4, "damp": 0.01, "calib": ("ja", "en"), "revision": None}


def test_a_new_ledger_is_empty_and_on_disk(tmp_path):
    started = Ledger(tmp_path, SETTINGS)
    assert len(started) == 0
    assert "model.layers.0" not in started
    assert (tmp_path / ledger.FILE).exists()


def test_finished_parts_are_found_again(tmp_path):
    Ledger(tmp_path, SETTINGS).finish("model.layers.0", {"loss": 0.125, "damp": [0.01]})
    again = Ledger(tmp_path, SETTINGS)
    assert "model.layers.0" in again
    assert "model.layers.1" not in again
    assert again.report("model.layers.0") == {"loss": 0.125, "damp": [0.01]}
    again.finish("model.layers.1", None)
    assert len(Ledger(tmp_path, SETTINGS)) == 2


def test_reopening_changes_nothing_on_disk(tmp_path):
    Ledger(tmp_path, SETTINGS).finish("model.layers.0", {"loss": 0.125})
    before = (tmp_path / ledger.FILE).read_bytes()
    Ledger(tmp_path, SETTINGS)
    assert (tmp_path / ledger.FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits", 3), ("damp", 0.02), ("calib", ["en", "ja"]), ("revision", "abc"), ("model", None)],
)
def test_other_settings_are_refused_by_name(tmp_path, key, value):
    Ledger(tmp_path, SETTINGS).finish("model.layers.0", {})
    with pytest.raises(QuantkitError) as caught:
        Ledger(tmp_path, {**SETTINGS, key: value})
    assert f"{key} was" in caught.value.message
    assert str(value) in caught.value.message
    assert sum(f"{other} was" in caught.value.message for other in SETTINGS) == 1
    assert "--overwrite" in caught.value.hint


def test_settings_that_come_or_go_are_refused(tmp_path):
    Ledger(tmp_path, SETTINGS)
    with pytest.raises(QuantkitError, match=r"align was None, is now 0\.5"):
        Ledger(tmp_path, {**SETTINGS, "align": 0.5})
    fewer = {key: value for key, value in SETTINGS.items() if key != "bits"}
    with pytest.raises(QuantkitError, match="bits was 4, is now None"):
        Ledger(tmp_path, fewer)


@pytest.mark.parametrize("text", ["", "half of", "[]", "{}", '{"fingerprint": 1, "done": {}}'])
def test_a_damaged_ledger_is_refused(tmp_path, text):
    (tmp_path / ledger.FILE).write_text(text)
    with pytest.raises(UsageError, match=r"ledger\.json is damaged") as caught:
        Ledger(tmp_path, SETTINGS)
    assert "--overwrite" in str(caught.value.hint)


def test_a_refusal_leaves_the_ledger_as_it_was(tmp_path):
    Ledger(tmp_path, SETTINGS).finish("model.layers.0", {"loss": 1})
    with pytest.raises(QuantkitError):
        Ledger(tmp_path, {**SETTINGS, "bits": 3})
    assert "model.layers.0" in Ledger(tmp_path, SETTINGS)


def test_a_part_that_could_not_be_recorded_is_not_finished(tmp_path, monkeypatch):
    """The file is replaced as a whole: a crash while writing keeps the one before."""
    book = Ledger(tmp_path, SETTINGS)
    book.finish("model.layers.0", {"loss": 1})

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        book.finish("model.layers.1", {"loss": 2})
    monkeypatch.undo()
    again = Ledger(tmp_path, SETTINGS)
    assert "model.layers.0" in again
    assert "model.layers.1" not in again


def test_remove_forgets(tmp_path):
    book = Ledger(tmp_path, SETTINGS)
    book.finish("model.layers.0", {})
    book.remove()
    assert list(tmp_path.iterdir()) == []
    assert "model.layers.0" not in Ledger(tmp_path, SETTINGS)


def test_the_file_is_plain_json(tmp_path):
    Ledger(tmp_path, SETTINGS).finish("model.layers.0", {"loss": 0.5})
    stored = json.loads((tmp_path / ledger.FILE).read_text("utf-8"))
    assert stored["done"] == {"model.layers.0": {"loss": 0.5}}
    assert stored["fingerprint"]["calib"] == ["ja", "en"]
