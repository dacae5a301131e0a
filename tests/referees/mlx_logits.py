"""Logits and greedy tokens of a checkpoint through mlx-lm, on its CPU backend. Run with a python
that has mlx-lm:

    python mlx_logits.py FOLDER IDS.json OUT.safetensors DTYPE [NEW]

DTYPE is what everything but the codes is computed in (widening scales to float32 is exact). OUT
holds ``logits`` [rows, tokens, vocabulary] and ``greedy`` [rows, NEW].
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from safetensors.numpy import save_file


def continued(model: nn.Module, row: list[int], new: int) -> list[int]:
    """``new`` tokens after the row, the most probable every time."""
    cache, step, found = make_prompt_cache(model), row, []
    for _ in range(new):
        logits = model(mx.array([step]), cache=cache)
        step = [int(mx.argmax(logits[0, -1]))]
        found += step
    return found


def main(folder: str, ids: str, out: str, dtype: str, new: str = "0") -> None:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder))
    model.set_dtype(getattr(mx, dtype))
    assert any(isinstance(m, nn.QuantizedLinear) for m in model.modules()), "nothing is quantized"
    rows = json.loads(Path(ids).read_text())
    logits = [np.array(model(mx.array([row])).astype(mx.float32))[0] for row in rows]
    greedy = [continued(model, row, int(new)) for row in rows]
    shaped = np.array(greedy, dtype=np.int64).reshape(len(rows), int(new))
    save_file({"logits": np.stack(logits), "greedy": shaped}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
