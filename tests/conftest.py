"""What all tests share: the CPU, one thread, no deadlines in hypothesis, the demo's tokenizer."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: results are the same on every machine
os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: it runs without a GPU

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("quantkit", deadline=None)
settings.load_profile("quantkit")


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from quantkit import data

    return AutoTokenizer.from_pretrained(data.demo())
