"""``quantkit verify``: a quantized model beside its original, in numbers and in words.

The original is run block by block from its files; it is never in memory as a whole. The quantized
model is loaded as it would be for use, so what is measured is what will run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from quantkit.core import calibration, provenance
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.metrics import Comparison
from quantkit.core.progress import Progress, Step
from quantkit.core.source import DEMO, Source, resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.device import pick_device, pick_dtype
from quantkit.runtime.load import load_model
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.tokenizer import load_tokenizer
from quantkit.runtime.walk import Block, Walk, features, is_linear
from quantkit.workflows.calibrate import longest_row
from quantkit.workflows.check import held_out

PROMPTS = (
    "In the early morning, the old fisherman",
    "日本で一番高い山は",
    "def read_lines(path):\n",
)
_GIVE_IT = "give the model that was quantized with --against"
_CONTINUE = 32
_TRACED = 4  # rows whose inputs the layers' errors are measured on


@dataclass(frozen=True)
class Sample:
    """Greedy continuations of one prompt."""

    prompt: str
    original: str
    quantized: str


@dataclass
class Verification:
    """comparison  per text set: perplexities, KL, top-1 agreement
    layers      relative output error of every linear on held-out text, |x (W - Q)|^2 / |x W|^2
    samples     greedy continuations by both
    """

    name: str
    against: str
    comparison: Comparison = field(default_factory=Comparison)
    layers: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON."""
        return {
            "model": self.name,
            "against": self.against,
            **self.comparison.described(),
            "layers": self.layers,
            "samples": [vars(sample) for sample in self.samples],
            "notes": self.notes,
        }


def verify(
    model: str,
    *,
    against: str | None = None,
    text: list[str] | tuple[str, ...] = (),
    rows: int = 16,
    seqlen: int = 512,
    samples: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Measure ``model`` against its original.

    against   the original; by default the one that the model's own provenance names
    text      texts to measure on (sources as for calibration); by default the bundled held-out sets
    rows      at most so many rows of ``seqlen`` tokens of each text
    samples   also let both continue a few prompts

    Raises QuantkitError when either cannot be loaded, or the two do not belong together.
    """
    progress = progress or Progress()
    if rows < 1 or seqlen < 2:
        raise UsageError("measuring needs at least one row of two tokens")
    on = pick_device(device)
    kind = pick_dtype(dtype, on)
    source = resolve(model, revision)
    original = resolve(against) if against else _recorded_original(source)
    tokenizer = load_tokenizer(original)
    walk = Walk(Skeleton(original, Checkpoint(original.folder), on, kind))
    result = Verification(source.name, original.name)
    longest = longest_row(walk.skeleton)
    if longest is not None and longest < seqlen:
        result.notes.append(f"rows are {longest} tokens, the longest that the model can take")
        seqlen = longest
    sets = _texts(list(text), tokenizer, rows, seqlen)
    quantized = load_model(source, on, kind)
    if quantized.config.vocab_size != walk.skeleton.model.config.vocab_size:
        raise QuantkitError(
            f"{source.name} and {original.name} have different vocabularies", _GIVE_IT
        )
    _compare(walk, quantized, sets, result, progress)
    if samples:
        result.samples = _samples(walk.skeleton, quantized, tokenizer, result.notes)
    return result


def _recorded_original(source: Source) -> Source:
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
    raise UsageError(
        f"{source.name} does not say where its original can be found",
        "give the folder or repository of the original with --against",
    )


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


def _compare(
    walk: Walk,
    quantized: nn.Module,
    sets: dict[str, list[list[int]]],
    result: Verification,
    progress: Progress,
) -> None:
    """Run both models on all rows; the original's layers are compared on the way."""
    labels = [label for label, rows in sets.items() for _ in rows]
    batches = [torch.tensor([row]) for rows in sets.values() for row in rows]
    hidden = walk.embed(batches)
    traced = set(range(0, len(batches), max(1, len(batches) // _TRACED)))
    progress.begin("verifying", len(walk) + len(batches))
    for index in range(len(walk)):
        with walk.block(index) as block:
            errors = _LayerErrors(block, quantized, result)
            for i, x in enumerate(hidden):
                if i in traced:
                    with errors.measuring():
                        hidden[i] = block.forward(x)
                else:
                    hidden[i] = block.forward(x)
            result.layers |= errors.relative()
        progress.step(Step(index + 1, len(walk) + len(batches), walk.block_name(index), None, 0))
    for index, (label, batch, logits) in enumerate(
        zip(labels, batches, walk.logits(batches, hidden))
    ):
        with torch.no_grad():
            other = quantized(input_ids=batch.to(logits.device), use_cache=False).logits
        result.comparison.add(label, batch[0], logits[0], other[0])
        done = len(walk) + index + 1
        progress.step(Step(done, len(walk) + len(batches), f"text {label}", None, 0))
    progress.end()


class _LayerErrors:
    """Output errors of the quantized linears, given the original's inputs. Raises QuantkitError
    when the quantized model does not have the block's linears."""

    def __init__(self, block: Block, quantized: nn.Module, result: Verification) -> None:
        self._block = block
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._others = {}
        theirs = dict(quantized.named_modules())
        for name, module in block.module.named_modules():
            if not is_linear(module):
                continue
            other = theirs.get(f"{block.name}.{name}")
            dense = is_linear(other)
            if features(module) != (
                features(other)
                if dense
                else (getattr(other, "out_features", None), getattr(other, "in_features", None))
            ):
                raise QuantkitError(
                    f"{result.name} was not made from {result.against}: they differ in "
                    f"{block.name}.{name}",
                    _GIVE_IT,
                )
            if not dense:
                self._others[name] = other

    def measuring(self) -> Any:
        """While open, every linear's output is compared."""
        return self._block.watching(
            {name: self._hook(name, other) for name, other in self._others.items()}, outputs=True
        )

    def _hook(self, name: str, other: nn.Module) -> Callable[[Tensor, Tensor], None]:
        def see(x: Tensor, y: Tensor) -> None:
            lost = (other(x).float() - y.float()).square().sum()
            had = y.float().square().sum()
            before = self._sums.get(name, (lost.new_zeros(()), had.new_zeros(())))
            self._sums[name] = before[0] + lost, before[1] + had

        return see

    def relative(self) -> dict[str, float]:
        return {
            f"{self._block.name}.{name}": float(lost / had)
            for name, (lost, had) in self._sums.items()
        }


def _samples(
    skeleton: Skeleton, quantized: nn.Module, tokenizer: Any, notes: list[str]
) -> list[Sample]:
    """Greedy continuations; needs the whole original, so only where there is room for it."""
    needed = int(skeleton.checkpoint.nbytes * 1.2)
    free = psutil.virtual_memory().available
    if skeleton.device.type == "cuda":
        free = torch.cuda.mem_get_info(skeleton.device)[0]
    if free < needed:
        notes.append(
            f"no continuations: the original needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            "are free"
        )
        return []
    original = load_model(skeleton.source, skeleton.device, skeleton.dtype)
    return [
        Sample(
            prompt,
            _continued(original, tokenizer, prompt),
            _continued(quantized, tokenizer, prompt),
        )
        for prompt in PROMPTS
    ]


def _continued(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_CONTINUE,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text
