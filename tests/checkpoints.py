"""Checkpoints of every format: random codes in the linears of a tiny model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tools import model, read_json
from torch import Tensor

from quantkit import formats
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.formats import awq
from quantkit.runtime.opened import Opened, open_checkpoint

WEIGHTS, CONFIG, LEGACY = "model.safetensors", "config.json", "quantize_config.json"


def random_weight(
    out: int, width: int, scheme: Scheme, zero: tuple[int, int] | None, ordered: bool, seed: int
) -> QWeight:
    """Scales are small, so that the model computes numbers and not infinities; ``zero`` is the
    lowest and the highest zero point."""
    g = torch.Generator().manual_seed(seed)
    shape = (out, scheme.groups(width))
    codes = torch.randint(0, scheme.max_code + 1, (out, width), generator=g).to(torch.uint8)
    scale = ((torch.rand(shape, generator=g) + 1) * 0.16 / 2**scheme.bits).half()
    if scheme.grid != "int":
        scale = scale.float()
    zeros = order = None
    if zero is not None:
        zeros = torch.randint(zero[0], zero[1] + 1, shape, generator=g).to(torch.uint8)
    if ordered:
        order = (torch.randperm(width, generator=g) // scheme.width(width)).int()
    return QWeight(scheme, codes, scale, zeros, order)


def write(
    folder: Path,
    form: str = "gptq",
    *,
    bits: int = 4,
    group: int = 32,
    zero: tuple[int, int] | None = None,
    grid: Any = "int",
    ordered: bool = False,
    source: str = "llama",
    change: Callable[[str, QWeight], QWeight] = lambda name, q: q,
) -> Path:
    """A folder in the format ``form``; ``change`` may change each weight before it is packed."""
    shutil.copytree(model(source), folder)
    writer = formats.by_name(form)
    tensors: dict[str, Tensor] = {}
    schemes: list[Scheme] = []
    outputs: dict[str, int] = {}
    for seed, (key, tensor) in enumerate(sorted(load_file(folder / WEIGHTS).items())):
        prefix, _, last = key.rpartition(".")
        if ".layers." not in key or last != "weight" or tensor.dim() != 2:
            tensors[key] = tensor.half()
            continue
        scheme = Scheme(bits, group, zero is None, grid)
        q = change(prefix, random_weight(*tensor.shape, scheme, zero, ordered, seed))
        tensors |= {f"{prefix}.{suffix}": t for suffix, t in writer.pack(q).items()}
        schemes.append(q.scheme)
        outputs[prefix] = q.shape[0]
    config = read_json(folder / CONFIG)
    if form == "awq":
        for name, spec in awq.activation_scales(config["model_type"], outputs).items():
            tensors[name] = torch.ones(spec.shape, dtype=spec.dtype)
    save(tensors, folder)
    head = ["embed_out"] if source == "gpt_neox" else ["lm_head"]
    config |= writer.configuration(schemes[0], head, "somebody")
    if ordered:
        config["quantization_config"]["desc_act"] = True
    write_json(folder / CONFIG, config)
    for file, content in writer.beside(config, "tiny").items():
        write_json(folder / file, content)
    return folder


def save(tensors: dict[str, Tensor], folder: Path, file: str = WEIGHTS) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / file, {"format": "pt"})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), "utf-8")


def opened(folder: Path | str) -> Opened:
    folder = Path(folder)
    if folder.is_file():
        return open_checkpoint(Source(folder.stem, folder.parent, file=folder.name))
    return open_checkpoint(Source(folder.name, folder))


def weights(folder: Path | str) -> dict[str, QWeight]:
    found = opened(folder)
    return {name: found.qweight(name) for name in found.linears}


def exactly(q: QWeight) -> Tensor:
    """The weight in float64, in which all of this is exact."""
    index = q.group_index()
    scale, codes = q.scale.double()[:, index], q.codes.double()
    if q.minimum is not None:
        return codes * scale + q.minimum.double()[:, index]
    zero = q.scheme.midpoint if q.zero is None else q.zero.double()[:, index]
    return (codes - zero) * scale


def as_legacy(folder: Path) -> dict[str, bytes]:
    """As AutoGPTQ laid repositories out: no word of quantization in config.json, weights under a
    name that says it."""
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    config = json.loads(files["config.json"])
    said = config.pop("quantization_config")
    old = {key: said[key] for key in ("bits", "group_size", "desc_act", "sym", "damp_percent")}
    name = f"gptq_model-{said['bits']}bit-{said['group_size']}g.safetensors"
    del files["quantkit.json"], files["README.md"]
    files["config.json"] = json.dumps(config).encode()
    files["quantize_config.json"] = json.dumps(old).encode()
    files[name] = files.pop("model.safetensors")
    return files
