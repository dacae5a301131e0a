"""Token ids of texts through llama.cpp, from the vocabulary of a GGUF file alone. Run with a python
that has llama-cpp-python:

    python llamacpp_tokens.py FILE.gguf TEXTS.json OUT.json
"""

import json
import sys
from pathlib import Path

import llama_cpp

file, texts, out = sys.argv[1:]
model = llama_cpp.Llama(file, vocab_only=True, verbose=False)
ids = [
    model.tokenize(text.encode(), add_bos=True, special=True)
    for text in json.loads(Path(texts).read_text("utf-8"))
]
Path(out).write_text(json.dumps(ids))
