"""The cache of derived data: atomic, listed as it is, cleared by kind."""

from pathlib import Path
from threading import Thread

import pytest
from tools import command, sentence

from quantkit.core import cache


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_written_is_read_and_listed(place, capsys):
    assert command("cache", "list") == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"nothing in {place}\n")
    assert cache.read("autotune", "a") is None
    cache.write("autotune", "a", b"one")
    cache.write("autotune", "b", b"other")
    cache.write("cubin", "k.bin", bytes(2_000_000))
    assert cache.read("autotune", "a") == b"one"
    assert command("cache", "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "autotune\t2 files\t0.0 MB",
        "cubin\t1 files\t2.0 MB",
    ]
    assert command("cache", "clear", "cubin") == 0
    assert [one.name for one in cache.kinds()] == ["autotune"]
    assert command("cache", "clear", "cubin") == 2
    assert "nothing called cubin" in sentence(capsys.readouterr().err)[0]
    assert command("cache", "clear") == 0
    assert not list(place.iterdir())


def test_what_is_not_quantkits_stays(place, tmp_path, capsys):
    """QUANTKIT_CACHE may be a folder that holds other things, too, or be made of links."""
    (place / "photos").mkdir(parents=True)
    (place / "photos" / "a").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b").write_text("y")
    (place / "autotune").symlink_to(tmp_path / "elsewhere")
    assert command("cache", "clear", "photos") == 2
    assert command("cache", "clear") == 0
    assert [path.name for path in place.iterdir()] == ["photos"]
    assert (place / "photos" / "a").exists() and (tmp_path / "elsewhere" / "b").exists()


def test_readers_see_all_or_nothing(place):
    contents = {bytes([n]) * 1_000_000 for n in range(4)}
    writers = [Thread(target=cache.write, args=("cubin", "x", content)) for content in contents]
    seen = set()
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        seen.add(cache.read("cubin", "x"))
    assert seen <= contents | {None}
    assert cache.read("cubin", "x") in contents
    assert [path.name for path in place.rglob("*") if path.is_file()] == ["x"]


def test_a_place_that_cannot_be_written_is_no_error(place, monkeypatch):
    place.write_text("a file")
    cache.write("cubin", "x", b"1")
    assert cache.read("cubin", "x") is None and cache.kinds() == []
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(ValueError):
            cache.read("k", name)


def test_where_it_is(monkeypatch):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.root() == Path("/somewhere/quantkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.root() == Path.home() / ".cache" / "quantkit"
