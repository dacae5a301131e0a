"""Logits and greedy tokens of a GGUF file through llama.cpp. Run with a python that has
llama-cpp-python and numpy:

    python llamacpp_logits.py FILE.gguf IDS.json OUT.npz NEW

OUT holds ``logits`` [rows, tokens, vocabulary] and ``greedy`` [rows, NEW]. Keys and values are kept
in float32, so that only the weights round.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

file, ids, out, new = sys.argv[1:]
rows = json.loads(Path(ids).read_text())
model = llama_cpp.Llama(
    file,
    n_ctx=len(rows[0]) + int(new) + 1,
    n_threads=1,
    n_threads_batch=1,
    logits_all=True,
    flash_attn=False,
    type_k=0,  # GGML_TYPE_F32
    type_v=0,
    verbose=False,
)


def last() -> int:
    """The most probable token after what was evaluated."""
    found = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.argmax(np.ctypeslib.as_array(found, (model.n_vocab(),))))


logits, greedy = [], []
for row in rows:
    model.reset()
    model.eval(row)
    logits.append(np.array(model.scores[: len(row)], dtype=np.float32))
    tokens = []
    for _ in range(int(new)):
        tokens.append(last())
        model.eval(tokens[-1:])
    greedy.append(tokens)
np.savez(
    out, logits=np.stack(logits), greedy=np.array(greedy, dtype=np.int64).reshape(len(rows), -1)
)
