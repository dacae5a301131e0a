"""Ctrl-C while libraries are imported ends the program at once; later it is a KeyboardInterrupt."""

import subprocess
import sys
import textwrap

import pytest

WAITING = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException:
    pass  # as some libraries do
"""
PROGRAM = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.{before})
sys.path.insert(0, {folder!r})
from quantkit.cli import process
process.stoppable(lambda: print("error: stopped", file=sys.stderr))
if {imported}:
    module = types.ModuleType("transformers.modeling_utils")
    module.__spec__ = types.SimpleNamespace()
    sys.modules["transformers.modeling_utils"] = module
try:
    if {importing}:
        import waiting
    else:
        text = open({folder!r} + "/waiting.py").read()
        exec(text.replace("except BaseException", "except ZeroDivisionError"))
except KeyboardInterrupt:
    sys.exit(9)
sys.exit(7)
"""


def ended(folder, *, importing, imported, before="default_int_handler"):
    (folder / "waiting.py").write_text(WAITING.replace("sleep(5)", "sleep(0.2)"))
    text = PROGRAM.format(folder=str(folder), importing=importing, imported=imported, before=before)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_in_the_first_imports(tmp_path):
    code, said = ended(tmp_path, importing=True, imported=False)
    assert code == 130
    assert said == "error: stopped\n"


@pytest.mark.parametrize("imported", [True, False])
def test_elsewhere(tmp_path, imported):
    assert ended(tmp_path, importing=False, imported=imported) == (9, "")


def test_in_later_imports(tmp_path):
    assert ended(tmp_path, importing=True, imported=True) == (7, "")  # the module has swallowed it


def test_where_it_is_ignored(tmp_path):
    assert ended(tmp_path, importing=True, imported=False, before="SIG_IGN") == (7, "")
