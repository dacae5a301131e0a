"""What all tests share: the CPU, one thread, no deadlines in hypothesis, the demo's tokenizer, and
a Hub on this machine in the place of the real one."""

import os
import shutil
import socket
import tempfile
import threading

# before torch looks: results are the same on every machine
if not os.environ.get("QUANTKIT_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: it runs without a GPU

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    _PORT = free.getsockname()[1]
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_PORT}"  # read when huggingface_hub is imported
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

os.environ.setdefault("NUMBA_CACHE_DIR", f"{tempfile.gettempdir()}/quantkit-numba")

settings.register_profile("quantkit", deadline=None)
settings.load_profile("quantkit")


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from quantkit import data

    return AutoTokenizer.from_pretrained(data.demo())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub for the client in this process, with a cache of its own and no token."""
    from hub import Hub, serving
    from huggingface_hub import close_session, constants

    from quantkit.core import hub as client

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(client, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    found = Hub()
    with serving(found, _PORT):
        yield found
        for thread in threading.enumerate():  # a download that failed leaves some behind
            if thread.name.startswith("fetch"):
                thread.join()
        close_session()  # its connections belong to this server


@pytest.fixture
def writer(hub, monkeypatch):
    """The Hub, and a token that may write."""
    from hub_store import WRITER

    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


@pytest.fixture
def made(tmp_path):
    """A folder that was measured while it was made; a copy, to be changed."""
    from tools import quantized

    return shutil.copytree(quantized(check=True), tmp_path / "made")
