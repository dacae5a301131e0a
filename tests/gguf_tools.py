"""For the tests of GGUF: whole files out of model folders, and llama.cpp as their referee."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.core.checkpoint import Checkpoint
from quantkit.core.gguf_values import Value
from quantkit.core.gguf_writer import GgufWriter
from quantkit.core.qweight import QWeight
from quantkit.core.source import Source
from quantkit.formats import gguf, gguf_model, gguf_rotary, gguf_tokenizer

SCRIPTS = Path(__file__).parent / "referees"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="the gguf package is not installed"
)


def llamacpp() -> str:
    """A python that has llama-cpp-python."""
    if named := os.environ.get("QUANTKIT_LLAMACPP_PYTHON"):
        return named
    if find_spec("llama_cpp") is None:
        pytest.skip(
            "REFEREE NOT RUN: set QUANTKIT_LLAMACPP_PYTHON to a python that has llama-cpp-python"
        )
    return sys.executable


def tokenizer_files(folder: Path) -> gguf_tokenizer.Files:
    source = Source(folder.name, folder)
    template = folder / "chat_template.jinja"
    return gguf_tokenizer.Files(
        source.read_json("tokenizer.json") or {},
        source.read_json("tokenizer_config.json") or {},
        source.read_json("special_tokens_map.json") or {},
        source.read_json("config.json") or {},
        template.read_text("utf-8") if template.exists() else None,
    )


def write(
    folder: Path,
    path: Path,
    kind: str = "F32",
    packed: dict[str, tuple[str, QWeight]] | None = None,
    more: dict[str, Value] | None = None,
) -> Path:
    """The model in ``folder`` as a GGUF file, its weights in the type ``kind``; ``packed`` are
    quantized tensors that stand for dense ones, with their types, ``more`` further metadata."""
    packed = packed or {}
    config = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint(folder)
    shapes = {name: checkpoint.spec(name).shape for name in checkpoint}
    places = gguf_model.plan(config, shapes)
    extra = gguf_rotary.extra_tensors(config)
    metadata = gguf_model.metadata(config, "test", kind)
    metadata |= gguf_tokenizer.metadata(tokenizer_files(folder)) | (more or {})
    planned = {name: ("F32", tuple(tensor.shape)) for name, tensor in extra.items()}
    for name, place in places.items():
        shape = shapes[place.source]
        dense = "F32" if gguf_model.keeps_float32(shape) else kind
        planned[name] = (packed[place.source][0] if place.source in packed else dense, shape)
    writer = GgufWriter(path, metadata, planned)
    for name, tensor in extra.items():
        writer.write(name, gguf.pack_dense(tensor, "F32"))
    for name, place in places.items():
        type = planned[name][0]
        if place.source in packed:
            raw = gguf.pack(place.packed(packed[place.source][1]), type)
        else:
            tensor = place.dense(checkpoint.get(place.source))
            raw = gguf.pack_dense(tensor.to(DTYPES[type]), type)
        writer.write(name, raw)
    writer.close()
    return path


def run(script: str, *arguments: object) -> None:
    result = subprocess.run(
        [llamacpp(), str(SCRIPTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr[-3000:]


def logits(path: Path, rows: torch.Tensor, new: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What llama.cpp computes: logits [rows, tokens, vocabulary], and ``new`` greedy tokens."""
    ids, out = path.with_suffix(".json"), path.with_suffix(".npz")
    ids.write_text(json.dumps(rows.tolist()))
    run("llamacpp_logits.py", path, ids, out, new)
    found: Any = np.load(out)
    return torch.from_numpy(found["logits"]), torch.from_numpy(found["greedy"])


def tokens(path: Path, texts: list[str]) -> list[list[int]]:
    """How llama.cpp cuts texts."""
    given, out = path.with_suffix(".texts.json"), path.with_suffix(".tokens.json")
    given.write_text(json.dumps(texts), "utf-8")
    run("llamacpp_tokens.py", path, given, out)
    return json.loads(out.read_text())
