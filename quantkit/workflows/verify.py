"""``quantkit verify``: a quantized model beside its original, in numbers and in words.

Both are run block by block from their files, side by side; neither is ever in memory as a whole.
The quantized model computes in the layers that it would be loaded into, so what is measured is what
will run. Only continuations of prompts need whole models, one at a time (see whole.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any

import torch

from quantkit.core import calibration, provenance
from quantkit.core.metrics import Comparison
from quantkit.core.progress import Progress, Step
from quantkit.core.source import DEMO, Source, resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.device import pick_device, pick_dtype
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows import card, divergence, sizes, verdict
from quantkit.workflows.calibrate import longest_row
from quantkit.workflows.candidate import Candidate
from quantkit.workflows.check import held_out
from quantkit.workflows.divergence import Sample
from quantkit.workflows.engine import TORCH, refuse_engine
from quantkit.workflows.gate import Gate, Given
from quantkit.workflows.passages import Passages
from quantkit.workflows.reference import Reference


@dataclass
class Verification:
    """comparison  per text set: perplexities, KL, agreement
    worst       passages where the two disagree most
    layers      by linear: error, sqnr and cosine on held-out text, and the error that was predicted
    samples     greedy continuations by both
    size        of the files, a weight, and in memory
    nonfinite   tensors and layers with NaN or infinities
    gate        the limits, and whether they were kept; None without limits
    """

    name: str
    against: str
    comparison: Comparison = field(default_factory=Comparison)
    worst: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, dict[str, float | None]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    size: dict[str, Any] = field(default_factory=dict)
    nonfinite: list[str] = field(default_factory=list)
    gate: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON and the report."""
        return {
            "model": self.name,
            "against": self.against,
            **self.comparison.described(),
            "histogram": self.comparison.histogram(),
            "worst": self.worst,
            "layers": self.layers,
            "samples": [vars(sample) for sample in self.samples],
            "divergence": divergence.summary(self.samples),
            "size": self.size,
            "nonfinite": self.nonfinite,
            "gate": self.gate,
            "settings": self.settings,
            "notes": self.notes,
        }


def verify(
    model: str,
    *,
    against: str | None = None,
    text: str | Sequence[str] = (),
    rows: int = 16,
    seqlen: int = 512,
    samples: bool = True,
    max_kl: Given = None,
    min_top1: Given = None,
    max_ppl_ratio: Given = None,
    gate: bool = False,
    write: bool = True,
    engine: str = TORCH,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Measure ``model`` against its original.

    against   the original, in any format; by default the one that the model's own provenance names
    text      texts to measure on (sources as for calibration); by default the bundled held-out sets
    rows      at most so many rows of ``seqlen`` tokens of each text
    samples   also let both continue a few prompts
    max_kl, min_top1, max_ppl_ratio   limits: a number for the mean over the texts, or
              ``SET=NUMBER``, or several; whether they were kept is in the result's ``gate``
    gate      also hold it to what is usual for its bits
    engine    ``llama.cpp``: it, not quantkit, computes the predictions of a GGUF file
    write     put the verdict into quantkit.json and the card of a folder that quantkit wrote

    Raises QuantkitError when either cannot be loaded, or the two do not belong together.
    """
    limits = Gate.of(max_kl, min_top1, max_ppl_ratio, gate)
    _refuse_nothing(rows, seqlen)
    source = resolve(model, revision)
    refuse_engine(engine, [source])
    original = resolve(against) if against else recorded_original(source)
    bench = Bench(original, text, rows, seqlen, samples, device, dtype, limits, engine)
    (result,) = bench.measure([source], progress or Progress())
    if write:
        verdict.write(result.described(), source, Path(model), result.notes)
    return result


def _refuse_nothing(rows: int, seqlen: int) -> None:
    if rows < 1 or seqlen < 2:
        raise UsageError("measuring needs at least one row of two tokens")


def recorded_original(source: Source) -> Source:
    """The original that quantkit.json names. Raises UsageError when it cannot be found, and
    QuantkitError for what is no model."""
    recorded = (source.read_json(provenance.FILE) or {}).get("source", {})
    name, revision = recorded.get("name"), recorded.get("revision")
    if name and "/" in name:
        return resolve(name, revision)
    if name == DEMO:  # or somebody's folder of that name
        demo = resolve(DEMO)
        files = [demo.folder / file for file in recorded["files"]]
        here = all(file.exists() for file in files)
        if here and provenance.hash_files(files).result() == recorded["files"]:
            return demo
    open_checkpoint(source)  # if there is no model at all, that is what is wrong
    raise UsageError(
        f"{source.name} does not say where its original can be found",
        "give the folder or repository of the original with --against",
    )


class Bench:
    """An original with texts, on which any number of models is measured together."""

    def __init__(
        self,
        original: Source,
        text: str | Sequence[str],
        rows: int,
        seqlen: int,
        samples: bool,
        device: str,
        dtype: str,
        limits: Gate,
        engine: str = TORCH,
    ) -> None:
        _refuse_nothing(rows, seqlen)
        self._device = pick_device(device)
        self._dtype = pick_dtype(dtype, self._device)
        self._samples, self._limits, self._engine = samples, limits, engine
        self.reference = Reference(original, self._device, self._dtype)
        self._notes = []
        longest = longest_row(self.reference.skeleton)
        if longest is not None and longest < seqlen:
            self._notes.append(f"rows are {longest} tokens, the longest that the model can take")
            seqlen = longest
        texts = [text] if isinstance(text, str) else list(text)
        sets = _texts(texts, self.reference.tokenizer, rows, seqlen)
        limits.check_sets(sets)
        self._labels = [label for label, some in sets.items() for _ in some]
        self.reference.batches = [torch.tensor([row]) for some in sets.values() for row in some]
        self._texts = [calibration.public_name(name) for name in texts]
        self._settings = {
            "rows": rows,
            "seqlen": seqlen,
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": provenance.machine(self._device),
            "texts": self._texts or [card.HELD_OUT],
            "versions": provenance.versions(),
        }

    def measure(self, sources: list[Source], progress: Progress) -> list[Verification]:
        """Everything about each model. Raises QuantkitError when one of them cannot be run, or was
        not made from the original."""
        reference = self.reference
        candidates = [
            Candidate(one, reference.source, reference.walk, reference.batches, self._engine)
            for one in sources
        ]
        blocks, rows = len(reference.walk), len(self._labels)
        total = blocks + rows * len(sources)
        names = ", ".join(source.name for source in sources)
        progress.begin(f"verifying {names}", total)
        for candidate in candidates:
            candidate.begin()
        for index, name in enumerate(reference.run(candidates)):
            progress.step(Step(index + 1, total, name, None, 0))
        results = []
        for source, candidate in zip(sources, candidates):
            results.append(self._result(source, candidate))
            for done, label in enumerate(self._predict(candidate, results[-1])):
                at = blocks + rows * (len(results) - 1) + done + 1
                progress.step(Step(at, total, f"text {label}", None, 0))
        progress.end()
        for candidate, result in zip(candidates, results):
            if self._samples:
                self._continue(candidate, result)
            candidate.close()
        return results

    def _result(self, source: Source, candidate: Candidate) -> Verification:
        """What is known behind the last block, before anything is predicted."""
        reference = self.reference
        result = Verification(source.name, reference.source.name, notes=list(self._notes))
        result.layers = candidate.layers
        result.size = {
            "bytes": sizes.bytes_of(candidate.opened),
            "original_bytes": reference.bytes,
            "bits_per_weight": sizes.bits_per_weight(candidate.opened),
            "memory": candidate.census.bytes,
        }
        made = {"quantization": _made(candidate)}
        result.settings = {**made, **self._settings, "engine": candidate.engine}
        result.nonfinite = _with_layers(candidate.census.nonfinite, result.layers)
        if broken := result.nonfinite:
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            result.notes.append(
                f"{source.name} holds NaN or infinities: {', '.join(broken[:3])}{more}"
            )
        result.notes += [
            f"it was calibrated on {text}, too: other text tells more"
            for text in self._texts
            if calibration.overlaps(text, _calibrated_on(candidate))
        ]
        return result

    def _predict(self, candidate: Candidate, result: Verification) -> Iterator[str]:
        """Compare what both predict, row by row; yields the label of each."""
        passages = Passages(self.reference.tokenizer)
        rows = zip(self._labels, self.reference.batches, strict=True)
        both = zip(self.reference.logits(), candidate.logits(), strict=True)  # run to their ends
        for (logits, other), (label, batch) in zip(both, rows, strict=True):
            other = other.to(logits.device)
            kl = result.comparison.add(label, batch[0], logits, other)
            if kl is not None:
                passages.see(label, batch[0], kl, logits, other)
            yield label
        result.worst = passages.described()
        result.notes += _lost(result, logits.shape[-1])
        if self._limits:
            bits = result.size["bits_per_weight"]
            measured = result.comparison.described()
            result.gate = self._limits.judge(measured, bits, len(result.nonfinite))

    def _continue(self, candidate: Candidate, result: Verification) -> None:
        """Let both continue the prompts, where there is room."""
        tokenizer = self.reference.tokenizer
        written = self.reference.written()
        own = written if isinstance(written, str) else candidate.written(tokenizer)
        if isinstance(written, str) or isinstance(own, str):
            result.notes.append(str(own))
        else:
            result.samples = divergence.compared(written, own, tokenizer)


def _texts(text: list[str], tokenizer: Any, rows: int, seqlen: int) -> dict[str, list[list[int]]]:
    if not text:
        return held_out(tokenizer, rows, seqlen)
    sets = {}
    for name in text:
        documents = calibration.read(name, seed=0)
        label = name if name.startswith("hf:") else Path(name).stem
        if label in sets:
            raise UsageError(f"two texts are called '{label}'", "rename one of the files")
        sets[label] = calibration.pack(documents, tokenizer, None, seqlen, rows).rows
        if max(len(row) for row in sets[label]) < 2:
            raise QuantkitError(f"text '{label}' has no two tokens in a row to measure on")
    return sets


def _made(candidate: Candidate) -> dict[str, Any]:
    """How the model was made, as far as quantkit.json says it. The format is that of the files,
    which may have been converted."""
    record, found = candidate.record, candidate.opened.format
    settings, rows = record.get("settings"), record.get("calibration")
    made = dict(settings) if isinstance(settings, dict) else {}
    if not str(made.get("format")).startswith(found):  # gptq_v2 is a gptq
        made["format"] = found
    tokens = rows.get("tokens") if isinstance(rows, dict) else None
    return {
        "format": made.pop("format"),
        **({"method": record["method"]} if "method" in record else {}),
        **({"calibration_tokens": tokens} if isinstance(tokens, int) else {}),
        **made,
    }


def _calibrated_on(candidate: Candidate) -> list[str]:
    """What --calib was given, as far as quantkit.json says it."""
    rows = candidate.record.get("calibration")
    sources = rows.get("sources") if isinstance(rows, dict) else None
    return [name for name in sources if isinstance(name, str)] if isinstance(sources, list) else []


def _lost(result: Verification, vocabulary: int) -> list[str]:
    """What is to be said of predictions that have less to do with the original's than equal chances
    for all tokens would have."""
    if result.comparison.described()["kl"] <= log(vocabulary):
        return []
    return [
        f"{result.name} predicts no better than by chance: its weights are damaged, and not only "
        "those of linears whose errors are small"
    ]


def _with_layers(tensors: Iterable[str], layers: dict[str, dict[str, Any]]) -> list[str]:
    """The tensors, and the layers whose outputs are not numbers though all their tensors are."""
    found = list(tensors)
    for name, layer in layers.items():
        broken = not abs(layer["error"]) < float("inf")
        if broken and not any(tensor.startswith(f"{name}.") for tensor in found):
            found.append(name)
    return found
