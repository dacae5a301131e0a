"""The loader: a dense model is transformers' own, a quantized one computes what its codes mean."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tools import model, quantized, read_json
from torch import Tensor
from transformers import AutoModelForCausalLM, pipeline

import quantkit
from quantkit import data
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, QuantkitWarning, UsageError
from quantkit.runtime import linear
from quantkit.runtime.kernels import cpu_int4
from quantkit.runtime.linear import CpuInt4Linear, QuantLinear, quantized_linear
from quantkit.runtime.opened import open_checkpoint

CPU = torch.device("cpu")
# few tokens and many: the int4 kernel and the dequantized weight
BATCHES = [(1, 1), (2, 9), (4, 40)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 3e-3}


def ids(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randint(2, 8192, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(loaded: torch.nn.Module, tokens: Tensor) -> Tensor:
    return loaded(input_ids=tokens, use_cache=False).logits.float()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def weights_of(folder: Path) -> dict[str, QWeight]:
    """The packed linears of a checkpoint, by name on disk."""
    opened = open_checkpoint(Source(folder.name, folder))
    return {name: opened.qweight(name) for name in opened.linears}


def meant(folder: Path, new: Path) -> torch.nn.Module:
    """The model that ``folder`` describes: its codes multiplied out, loaded by transformers."""
    shutil.copytree(folder, new)
    config = read_json(new / "config.json")
    del config["quantization_config"]
    (new / "config.json").write_text(json.dumps(config))
    tensors = load_file(new / "model.safetensors")
    opened = open_checkpoint(Source(folder.name, folder))
    for name in [name for prefix in opened.linears for name in opened.names(prefix)]:
        del tensors[name]
    for name, q in weights_of(folder).items():
        found = q.dequantize()
        tensors[f"{name}.weight"] = (
            found.T.contiguous() if config["model_type"] == "gpt2" else found
        )
    save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32).eval()


def changed(folder: Path, new: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of ``folder`` whose tensors were changed."""
    shutil.copytree(folder, new)
    tensors = load_file(new / "model.safetensors")
    change(tensors)
    save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return new


# full precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_model_is_transformers_own(dtype):
    ours, _ = quantkit.load("demo", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(data.demo(), dtype=getattr(torch, dtype)).eval()
    for shape in BATCHES:
        assert torch.equal(logits(ours, ids(shape)), logits(theirs, ids(shape)))
    assert ours.dtype == theirs.dtype
    assert not ours.training


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama_tied", "bloom"])
def test_other_architectures_too(name):
    ours, _ = quantkit.load(str(model(name)), dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(model(name), dtype=torch.float32).eval()
    assert torch.equal(logits(ours, ids((2, 9))), logits(theirs, ids((2, 9))))


def test_it_generates_as_the_original_does():
    ours, tokenizer = quantkit.load("demo", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(data.demo(), dtype=torch.float32).eval()
    tokens = torch.tensor([tokenizer.encode("昔々、ある村に")])
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 20}):
        written = []
        for one in (ours, theirs):
            torch.manual_seed(3)
            written.append(one.generate(tokens, max_new_tokens=20, **settings))
        assert written[0].shape[1] > tokens.shape[1] + 5
        assert torch.equal(*written)


def test_it_has_the_model_s_own_generation_settings(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(quantized(model("gpt_neox"), group=32), folder)
    own = {"do_sample": True, "temperature": 0.25, "max_new_tokens": 3, "eos_token_id": 7}
    (folder / "generation_config.json").write_text(json.dumps(own))
    found = quantkit.load(str(folder))[0].generation_config.to_dict()
    assert {key: found[key] for key in own} == own


# quantized models against what their codes mean

KINDS = {
    "symmetric": ("llama", {"group": 32}),
    "asymmetric": ("llama", {"group": 32, "sym": False}),
    "asymmetric-v1": ("llama", {"group": 32, "sym": False, "format": "gptq"}),
    "g_idx": ("llama", {"group": 32, "act_order": "group"}),
    "g_idx-asymmetric": ("gpt_neox", {"group": 16, "act_order": "group", "sym": False}),
    "2-bits": ("llama", {"group": 16, "bits": 2}),
    "3-bits": ("llama", {"group": 32, "bits": 3, "sym": False}),
    "8-bits": ("llama", {"group": 64, "bits": 8}),
    "rows": ("llama", {"group": -1}),
    "group-16": ("llama", {"group": 16}),
    "biases": ("gpt_neox", {"group": 32}),
    "conv1d": ("gpt2", {"group": 32}),
    "tied": ("llama_tied", {"group": 64}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_computes_what_its_codes_mean(tmp_path, kind):
    name, settings = KINDS[kind]
    folder = quantized(model(name), **settings)
    ours, _ = quantkit.load(str(folder), dtype="float32")
    wanted = meant(folder, tmp_path / "dense")
    original = AutoModelForCausalLM.from_pretrained(model(name), dtype=torch.float32).eval()
    for shape in [(1, 1), (2, 9), (4, 40)]:
        tokens = ids(shape)
        assert relative(logits(ours, tokens), logits(wanted, tokens)) < 2e-5
        assert relative(logits(ours, tokens), logits(original, tokens)) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_demo_in_every_precision(tmp_path, dtype):
    kind = getattr(torch, dtype)
    ours, _ = quantkit.load(str(quantized()), dtype=dtype)
    wanted = meant(quantized(), tmp_path / "dense")
    assert ours.dtype == kind
    assert {p.dtype for p in ours.parameters()} == {kind}
    for shape in BATCHES:
        assert relative(logits(ours, ids(shape)), logits(wanted, ids(shape))) < TOLERANCE[kind]


def test_linears_stay_packed_in_memory():
    ours, _ = quantkit.load(str(quantized()), dtype="bfloat16")
    layers = [m for m in ours.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 28
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    held = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    assert held < weights * 0.7  # bytes; a dense bfloat16 weight has two
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_a_linear_that_stayed_dense_is_loaded_as_it_is(tmp_path):
    folder = quantized(model("llama", intermediate_size=132), group=32)
    ours, _ = quantkit.load(str(folder), dtype="float32")
    block = ours.model.layers[0]
    assert isinstance(block.mlp.up_proj, torch.nn.Linear)
    assert isinstance(block.self_attn.q_proj, QuantLinear)
    wanted = meant(folder, tmp_path / "dense")
    assert relative(logits(ours, ids((2, 9))), logits(wanted, ids((2, 9)))) < 2e-5


def test_shards_load_like_one_file():
    one, _ = quantkit.load(str(quantized(model("llama"), group=32)), dtype="float32")
    folder = quantized(model("llama"), group=32, max_shard_size="1MB")
    many, _ = quantkit.load(str(folder), dtype="float32")
    assert torch.equal(logits(one, ids((2, 9))), logits(many, ids((2, 9))))


# one layer: kernel, reference, definition


def weight(scheme: Scheme, out: int = 128, width: int = 256, seed: int = 0) -> QWeight:
    g = torch.Generator().manual_seed(seed)
    groups = scheme.groups(width)
    codes = torch.randint(0, scheme.max_code + 1, (out, width), generator=g).to(torch.uint8)
    scale = (torch.rand(out, groups, generator=g) * 0.02 + 0.01).half()
    scale *= torch.randint(0, 2, scale.shape, generator=g) * 2 - 1  # the solver uses both signs
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, scheme.max_code + 1, scale.shape, generator=g).to(torch.uint8)
    return QWeight(scheme, codes, scale, zero)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rows", [1, 5, 127, 128, 200])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_kernel_reference_and_definition_agree(symmetric, rows, dtype):
    q = weight(Scheme(4, 64, symmetric))
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 256, generator=g).to(dtype)
    bias = torch.randn(128, generator=g).to(dtype)
    wanted = x.float() @ q.dequantize().T + bias.float()
    for kind in (CpuInt4Linear, QuantLinear):
        layer = kind(q, True, CPU, dtype)
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        found = layer(x)
        assert found.dtype == dtype
        assert relative(found.float(), wanted) < TOLERANCE[dtype] / 3
        assert torch.equal(layer(x.reshape(rows, 1, 256)).squeeze(1), found)
        assert torch.equal(layer.unpack(0, 128), q.codes)


@pytest.mark.parametrize(
    ("dtype", "rows", "used"),
    [
        (torch.bfloat16, 1, True),
        (torch.bfloat16, linear.DENSE_ROWS - 1, True),
        (torch.bfloat16, linear.DENSE_ROWS, False),
        # in these the kernel is slower than dequantizing as soon as there are a few rows
        (torch.float32, 1, True),
        (torch.float32, 8, False),
        (torch.float16, 8, False),
    ],
)
def test_the_kernel_is_used_where_it_is_fast(monkeypatch, dtype, rows, used):
    calls = []
    matmul = cpu_int4.matmul

    def counting(*arguments):
        calls.append(1)
        return matmul(*arguments)

    monkeypatch.setattr(cpu_int4, "matmul", counting)
    layer = quantized_linear(weight(Scheme(4, 64)), False, CPU, dtype)
    layer(torch.randn(rows, 256).to(dtype))
    assert bool(calls) == used


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (Scheme(4, 128), CpuInt4Linear),
        (Scheme(4, -1), CpuInt4Linear),  # a row of 256 is a group that the kernel knows
        (Scheme(4, 32, False), CpuInt4Linear),
        (Scheme(4, 16), QuantLinear),
        (Scheme(3, 128), QuantLinear),
        (Scheme(8, 128), QuantLinear),
        (Scheme(2, 64, False), QuantLinear),
    ],
    ids=str,
)
def test_every_scheme_finds_its_layer(scheme, kind):
    q = weight(scheme)
    layer = quantized_linear(q, False, CPU, torch.float32)
    assert type(layer) is kind
    x = torch.randn(3, 256)
    assert relative(layer(x), x @ q.dequantize().T) < 1e-5


# what the world's files look like


def test_v1_and_v2_files_are_the_same_model():
    v1 = quantized(model("llama"), group=32)
    v2 = quantized(model("llama"), group=32, format="gptq_v2")
    name = "model.layers.0.mlp.up_proj.qzeros"
    stored = [load_file(folder / "model.safetensors")[name] for folder in (v1, v2)]
    assert not torch.equal(*stored)
    found = [logits(quantkit.load(str(f), dtype="float32")[0], ids((2, 9))) for f in (v1, v2)]
    assert torch.equal(*found)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_tensors_are_believed_about_symmetric_zero_points(tmp_path, form):
    """Files that say v1 and hold v2 zeros are out there, and the other way round."""
    truth = quantized(model("llama"), group=32, format=form)
    wrong = tmp_path / "model"
    shutil.copytree(truth, wrong)
    for name in ("config.json", "quantize_config.json"):
        text = (wrong / name).read_text()
        other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[form]
        assert f'"checkpoint_format": "{form}"' in text
        (wrong / name).write_text(text.replace(f'at": "{form}"', f'at": "{other}"'))
    ways = {"gptq": "v1", "gptq_v2": "v2"}
    loaded = [quantkit.load(str(truth), dtype="float32")[0]]
    with pytest.warns(QuantkitWarning, match=f"way {ways[other]}, .* of {ways[form]};"):
        loaded.append(quantkit.load(str(wrong), dtype="float32")[0])
    assert torch.equal(*(logits(one, ids((2, 9))) for one in loaded))


def old_style(folder: Path, new: Path) -> Path:
    """As AutoGPTQ wrote it in 2023: no g_idx, no quantization_config, another file name."""
    changed(folder, new, lambda ts: [ts.pop(name) for name in list(ts) if name.endswith("g_idx")])
    (new / "model.safetensors").rename(new / "gptq_model-4bit-32g.safetensors")
    config = read_json(new / "config.json")
    del config["quantization_config"]
    (new / "config.json").write_text(json.dumps(config))
    (new / "quantkit.json").unlink()
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    (new / "quantize_config.json").write_text(json.dumps({**old, "true_sequential": True}))
    return new


def test_old_files_load(tmp_path):
    folder = quantized(model("gpt_neox"), group=32)
    old = old_style(folder, tmp_path / "old")
    found = [logits(quantkit.load(str(f), dtype="float32")[0], ids((2, 9))) for f in (folder, old)]
    assert torch.equal(*found)


def test_packed_weights_that_no_file_describes_load(tmp_path):
    """Shapes tell bits and groups, and symmetric zero points their convention."""
    folder = quantized(model("gpt_neox"), group=32)
    old = old_style(folder, tmp_path / "old")
    (old / "quantize_config.json").unlink()
    found = [logits(quantkit.load(str(f), dtype="float32")[0], ids((2, 9))) for f in (folder, old)]
    assert torch.equal(*found)


# damage

UP = "model.layers.1.mlp.up_proj"


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def cut(name: str, keep: slice | tuple):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][keep].contiguous()

    return change


def put(name: str, value: Callable[[dict[str, Tensor]], Tensor]):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = value(tensors)

    return change


DAMAGE = {
    "qweight-rows": (cut(f"{UP}.qweight", slice(0, 4)), UP),
    "qweight-odd": (cut(f"{UP}.qweight", slice(0, 5)), "5 words of 4 bits hold 40 inputs"),
    "qweight-columns": (cut(f"{UP}.qweight", (slice(None), slice(0, 64))), UP),
    "scales": (cut(f"{UP}.scales", slice(0, 1)), UP),
    "qzeros": (cut(f"{UP}.qzeros", (slice(None), slice(0, 8))), UP),
    "no-scales": (drop(f"{UP}.scales"), f"{UP} has no tensor scales"),
    "no-qzeros": (drop(f"{UP}.qzeros"), f"{UP} has no tensor qzeros"),
    "g_idx": (put(f"{UP}.g_idx", lambda ts: ts[f"{UP}.g_idx"] + 1), f"{UP}.g_idx names groups"),
    "dtype": (put(f"{UP}.qweight", lambda ts: ts[f"{UP}.qweight"].long()), "int64"),
    "norm": (drop("model.norm.weight"), r"lacks the tensor model\.norm\.weight"),
    "linear": (
        lambda ts: [ts.pop(name) for name in list(ts) if name.startswith(UP)],
        f"lacks the tensor {UP}.weight",
    ),
    "stranger": (
        lambda ts: ts.update(
            {n.replace("layers.1.", "layers.7."): t.clone() for n, t in ts.items() if UP in n}
        ),
        "the model no such layer",
    ),
    "other-model": (
        lambda ts: ts.update(
            {
                n.replace("up_proj", "down_proj"): t.clone()
                for n, t in list(ts.items())
                if n.startswith(UP)
            }
        ),
        r"is a weight of \(128, 64\), the model needs \(64, 128\)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path, kind):
    change, message = DAMAGE[kind]
    folder = changed(quantized(model("llama"), group=32), tmp_path / "model", change)
    with pytest.raises(QuantkitError, match=message):
        quantkit.load(str(folder))


@pytest.mark.parametrize("keep", [0, 5, 900, -100])
def test_a_truncated_file_is_named(tmp_path, keep):
    folder = tmp_path / "model"
    shutil.copytree(quantized(model("gpt_neox"), group=32), folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(QuantkitError, match=r"model\.safetensors is missing, truncated or not"):
        quantkit.load(str(folder))


# using the model


def test_it_cannot_be_saved_in_its_running_form(tmp_path):
    ours, _ = quantkit.load(str(quantized(model("gpt_neox"), group=32)))
    with pytest.raises(QuantkitError, match="cannot be saved"):
        ours.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    dense, _ = quantkit.load(str(model("gpt_neox")))
    dense.save_pretrained(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").exists()


def test_transformers_may_guess_tokens_ahead():
    """Speculative decoding, by looking up the prompt or by another model: the same greedy text."""
    model, tokenizer = quantkit.load(str(quantized()))
    drafts, _ = quantkit.load("demo")
    ids = tokenizer("a b c d a b c d a b", return_tensors="pt").input_ids
    greedy = {"max_new_tokens": 24, "do_sample": False}
    plain = model.generate(ids, **greedy)
    assert torch.equal(model.generate(ids, **greedy, prompt_lookup_num_tokens=4), plain)
    asked = []
    handle = drafts.register_forward_pre_hook(lambda *_: asked.append(1))
    assert torch.equal(model.generate(ids, **greedy, assistant_model=drafts), plain)
    handle.remove()
    assert asked


def test_it_works_in_a_pipeline():
    ours, tokenizer = quantkit.load(str(quantized()))
    assert not hasattr(ours.config, "quantization_config")
    generator = pipeline("text-generation", model=ours, tokenizer=tokenizer)
    text = generator("The history of", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("The history of")
    assert len(text) > len("The history of") + 8


def test_generating_token_by_token_is_reading_all_at_once():
    """One row a step goes through the kernel, the whole text through it or a dense product."""
    ours, tokenizer = quantkit.load(str(quantized()), dtype="float32")
    tokens = torch.tensor([tokenizer.encode("日本の首都は")])
    written = ours.generate(tokens, max_new_tokens=16, do_sample=False)
    best = logits(ours, written)[0, tokens.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(best, written[0, tokens.shape[1] :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "'int8' is not a dtype"),
        ({"device": "gpu"}, "'gpu' is not a device"),
        ({"device": "mps"}, "does not run on 'mps'"),
        ({"device": "meta"}, "does not run on 'meta'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        quantkit.load("demo", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="sees no CUDA GPU"):
        quantkit.load("demo", device="cuda")
