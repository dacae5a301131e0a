"""How much llama.cpp's own quantizer loses, and how much quantkit's files do: all run by llama.cpp.

    python benchmarks/gguf_quality.py --model micro=PATH --calib calib_512x128.jsonl \
        --heldout heldout_512.jsonl --out results.json

The mean KL divergence to the same model in F32, on the first --rows held-out rows of each set.
Embeddings and head have the same types in all files of a kind: F16 beside Q4_0 and Q4_1,
llama.cpp's own choice in K types. Needs llama-cpp-python.
"""

import argparse
import ctypes
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from quantkit.core import provenance
from quantkit.core.gguf_file import GgufFile
from quantkit.core.gguf_values import TYPES
from quantkit.core.metrics import Comparison
from quantkit.workflows.gguf import quantize_gguf

FTYPES = {"q4_0": 2, "q4_1": 3}  # enum llama_ftype
Maker = Callable[[Path], Path]


def main() -> None:
    args = _arguments()
    held_out = _held_out(args.heldout, args.rows)
    result: dict[str, Any] = {
        "versions": provenance.versions() | {"llama-cpp-python": llama_cpp.__version__},
        "machine": provenance.machine(torch.device("cpu")),
        "rows": {label: len(rows) for label, rows in held_out.items()},
        "models": {},
    }
    for named in args.model:
        name, _, path = named.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            files = {
                label: make(Path(folder) / str(index))
                for index, (label, make) in enumerate(_makers(path, args).items())
            }
            result["models"][name] = _measured(files, held_out, args.threads)
        for label, found in result["models"][name].items():
            print(f"| {name} | {label} | {found['bytes'] / 1e6:.2f} MB | {_words(found)} |")
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--type", action="append", help="q4_0, q4_1, K types; all of them if none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _makers(model: str, args: argparse.Namespace) -> dict[str, Maker]:
    """What makes each file, in the folder that it is given. The first is the reference."""

    def ours(**options: Any) -> Maker:
        def make(out: Path) -> Path:
            quantize_gguf(model, out, check=False, **options)
            return next(out.glob("*.gguf"))

        return make

    makers: dict[str, Maker] = {"f32": ours(type="f32")}
    for kind in args.type or ["q4_0", "q4_1", "q3_k_m", "q4_k_m"]:
        if kind in FTYPES:
            makers[f"{kind}, llama.cpp"] = _theirs(ours(type="f16"), FTYPES[kind])
            same = {"type": kind, "embedding_type": "f16", "output_type": "f16"}
            makers[f"{kind}, rounded"] = ours(**same, calib="none")
            makers[f"{kind}, GPTQ --fast"] = ours(**same, calib=args.calib, fast=True)
            makers[f"{kind}, GPTQ"] = ours(**same, calib=args.calib)
        else:
            makers[f"{kind}, llama.cpp"] = ours(type=kind, calib="none")
            makers[f"{kind}, llama.cpp with our importance"] = ours(type=kind, calib=args.calib)
    return makers


def _theirs(plain: Maker, ftype: int) -> Maker:
    """llama.cpp's quantizer, embeddings and head left as they are."""

    def make(out: Path) -> Path:
        source, made = plain(out), out / "theirs.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = ftype, 1
        params.token_embedding_type = params.output_tensor_type = TYPES["F16"].id
        names = str(source).encode(), str(made).encode()
        if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
            raise SystemExit(f"llama.cpp could not quantize {source}")
        return made

    return make


def _measured(
    files: dict[str, Path], sets: dict[str, list[list[int]]], threads: int
) -> dict[str, Any]:
    longest = max(len(row) for rows in sets.values() for row in rows)
    reference, *others = (_opened(file, longest, threads) for file in files.values())
    labels = list(files)[1:]
    comparisons = {label: Comparison() for label in labels}
    for kind, row in _rows(sets):
        expected = _logits(reference, row)
        for label, model in zip(labels, others):
            comparisons[label].add(kind, torch.tensor(row), expected, _logits(model, row))
    return {
        label: comparison.described() | {"bytes": files[label].stat().st_size, "types": _types(f)}
        for (label, comparison), f in zip(comparisons.items(), list(files.values())[1:])
    }


def _types(file: Path) -> dict[str, int]:
    """How many tensors of each type a file has."""
    counts: dict[str, int] = defaultdict(int)
    for tensor in GgufFile(file).tensors.values():
        counts[tensor.type] += 1
    return dict(counts)


def _opened(file: Path, length: int, threads: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(file),
        n_ctx=length,
        n_batch=length,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )


def _logits(model: llama_cpp.Llama, row: list[int]) -> torch.Tensor:
    model.reset()
    model.eval(row)
    return torch.from_numpy(np.array(model.scores[: len(row)], dtype=np.float32))


def _held_out(path: Path, rows: int) -> dict[str, list[list[int]]]:
    sets: dict[str, list[list[int]]] = defaultdict(list)
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        if len(sets[row["set"]]) < rows:
            sets[row["set"]].append(row["input_ids"])
    return sets


def _rows(sets: dict[str, list[list[int]]]) -> Iterator[tuple[str, list[int]]]:
    for label, rows in sets.items():
        for row in rows:
            yield label, row


def _words(found: dict[str, Any]) -> str:
    return f"{found['kl']:.4f} ± {found['kl_error']:.4f}"


if __name__ == "__main__":
    main()
