"""The folder that a quantization writes: every file of it, and what is refused or reported."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tools import QUICK, model, quantized, read_json
from transformers.models.llama.modeling_llama import LlamaMLP

from quantkit import __version__, data
from quantkit.core import calibration
from quantkit.core.checkpoint import INDEX, Checkpoint
from quantkit.core.packbits import unpack
from quantkit.core.progress import Progress
from quantkit.core.qweight import Scheme
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import gptq
from quantkit.formats.older_names import with_older_names
from quantkit.methods import rtn
from quantkit.workflows import quantize as workflow
from quantkit.workflows.check import held_out
from quantkit.workflows.quantize import quantize
from quantkit.workflows.verify import verify

DEMO = data.demo()
COMPANIONS = {
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
WRITTEN = {
    "README.md",
    "config.json",
    "model.safetensors",
    "quantize_config.json",
    "quantkit.json",
}
LINEARS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}
DEMO_LINEARS = {f"model.layers.{i}.{name}": s for i in range(4) for name, s in LINEARS.items()}


class Heard(Progress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.notes, self.warnings, self.steps = [], [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)

    def step(self, step):
        self.steps.append(step)


@pytest.fixture(scope="module")
def demo():
    return quantized()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The demo, in float32 and measured on few short rows of the held-out text."""
    out = tmp_path_factory.mktemp("measured") / "demo-gptq"
    few = lambda tokenizer, tokens: held_out(tokenizer, 2, min(64, tokens))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "held_out", few)
        report = quantize("demo", out, **{**QUICK, "check": True, "dtype": "float32"})
    return out, report


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# what is in the folder


def test_the_folder_holds_everything_that_loaders_look_for(demo):
    assert files_in(demo) == WRITTEN | COMPANIONS
    assert files_in(demo.parent) == {demo.name}


def test_the_tensors_are_those_of_the_plan(demo):
    """4 bits in groups of 128: 8 codes a word, in/128 groups; one g_idx an input; nothing else."""
    source, found = Checkpoint(DEMO), Checkpoint(demo)
    expected = {name: source.spec(name) for name in source}
    for name, (out, width) in DEMO_LINEARS.items():
        assert expected.pop(f"{name}.weight").shape == (out, width)
        expected[f"{name}.qweight"] = (torch.int32, (width // 8, out))
        expected[f"{name}.qzeros"] = (torch.int32, (width // 128, out // 8))
        expected[f"{name}.scales"] = (torch.float16, (width // 128, out))
        expected[f"{name}.g_idx"] = (torch.int32, (width,))
    assert set(found) == set(expected)
    for name, spec in expected.items():
        pair = spec if isinstance(spec, tuple) else (spec.dtype, spec.shape)
        assert (found.spec(name).dtype, found.spec(name).shape) == pair, name
    with safe_open(demo / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_codes_are_the_weights_that_were_there(demo):
    """Not only shapes: what the tensors mean is near the original, all of them."""
    source, found = Checkpoint(DEMO), Checkpoint(demo)
    said = read_json(demo / "config.json")["quantization_config"]
    for name in DEMO_LINEARS:
        q, convention = gptq.read_with_convention(found, name, said)
        original = source.get(f"{name}.weight").float()
        assert convention == "v1"
        assert q.group_of is None
        assert 0 < (q.dequantize() - original).square().sum() / original.square().sum() < 0.1


def test_dense_tensors_are_the_source_s_own(demo):
    before, after = load_file(DEMO / "model.safetensors"), load_file(demo / "model.safetensors")
    dense = [name for name in after if name in before]
    assert len(dense) == 4 * 2 + 2  # norms, the last norm, the embedding that is the head too
    for name in dense:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], before[name])


def test_companions_are_copied_as_they_are(demo):
    for name in COMPANIONS:
        assert (demo / name).read_bytes() == (DEMO / name).read_bytes()


def test_a_licence_is_copied_too_and_other_files_are_not(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(model("gpt_neox"), source)
    (source / "LICENSE").write_text("Apache-2.0, say")
    (source / "vocab.txt").write_text("a\n")
    (source / "training_log.txt").write_text("no")
    (source / "pytorch_model.bin").write_bytes(b"no")
    quantize(str(source), tmp_path / "out", group=32, **QUICK)
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache-2.0, say"
    assert (tmp_path / "out" / "vocab.txt").exists()
    assert not {"training_log.txt", "pytorch_model.bin"} & files_in(tmp_path / "out")


def test_config_says_how_it_was_quantized_and_nothing_else_changes(demo):
    before, after = read_json(DEMO / "config.json"), read_json(demo / "config.json")
    said = after.pop("quantization_config")
    assert after == with_older_names(before)
    assert said == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"quantkit:{__version__}"]},
    }
    legacy = read_json(demo / "quantize_config.json")
    assert legacy.pop("model_name_or_path") == "demo"
    assert legacy.pop("model_file_base_name") == "model"
    assert legacy == said


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bits": 3, "group": -1}, {"bits": 3, "group_size": -1}),
        ({"act_order": "group", "group": 32}, {"desc_act": True, "static_groups": False}),
        ({"act_order": "none", "group": 32}, {"desc_act": False, "static_groups": False}),
        ({"damp": 0.05, "group": 32}, {"damp_percent": 0.05}),
        ({"sym": False, "group": 32}, {"sym": False, "checkpoint_format": "gptq_v2"}),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_config_follows_the_settings(settings, expected):
    folder = quantized(model("gpt_neox"), **settings)
    said = read_json(folder / "config.json")["quantization_config"]
    assert {key: said[key] for key in expected} == expected
    settled = read_json(folder / "quantkit.json")["settings"]
    assert {key: settled[key] for key in settings} == settings


# provenance and the card


def test_provenance_is_complete_and_right(demo, tokenizer):
    found = read_json(demo / "quantkit.json")
    source = found["source"]
    assert source["name"] == "demo"
    assert source["revision"] is None
    assert source["bytes"] == (DEMO / "model.safetensors").stat().st_size
    assert source["files"] == {
        name: hashlib.sha256((DEMO / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }
    settings = found["settings"]
    assert {key: settings[key] for key in ("bits", "group", "sym", "act_order", "damp")} == {
        "bits": 4,
        "group": 128,
        "sym": True,
        "act_order": "static",
        "damp": 0.01,
    }
    # as --fast resolves them
    assert (settings["align"], settings["refine"], settings["tokens_per_input"]) == (0, 0, 10)
    weights = sum(out * width for out, width in DEMO_LINEARS.values())
    assert found["size"]["linears"] == 28
    assert found["size"]["quantized_weights"] == weights
    assert found["size"]["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 128, abs=1e-4)
    total = sum(tensor.nbytes for tensor in load_file(demo / "model.safetensors").values())
    assert found["size"]["bytes"] == total
    assert found["calibration"]["sources"] == list(QUICK["calib"])
    assert found["calibration"]["tokens_by_label"] == {"en": 128, "ja": 128}
    assert (found["calibration"]["rows"], found["calibration"]["tokens"]) == (4, 256)
    rows = calibration.Calibration()
    for part in ("bundled:en", "bundled:ja"):
        rows.extend(calibration.pack(calibration.read(part, 0), tokenizer, 2, 64, 2))
    assert found["calibration"]["sha256"] == rows.digest
    assert found["layers"].keys() == DEMO_LINEARS.keys()
    assert all(0 < layer["error"] < 0.05 for layer in found["layers"].values())
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["quantkit"] == __version__
    assert found["measured"] is None
    assert {"prepare", "solve", "write", "copy"} <= found["seconds"].keys()


def test_no_local_path_and_no_calibration_text_is_published(tmp_path):
    """Everything of this run lives below a folder whose name must not be found in the output."""
    home = tmp_path / "home-of-somebody"
    source = home / "my-model"
    shutil.copytree(model("llama"), source)
    config = read_json(source / "config.json")
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": str(home)}))
    text = "The quixotic zebras of Wolverhampton ate forty marmalade sandwiches. " * 40
    (home / "tickets.txt").write_text(text)
    quantize(
        str(source),
        home / "out",
        group=32,
        **{**QUICK, "calib": [f"{home}/tickets.txt=3"]},
    )
    found = read_json(home / "out" / "quantkit.json")
    assert found["source"]["name"] == "my-model"
    assert found["calibration"]["sources"] == ["tickets.txt=3"]
    for path in (home / "out").iterdir():
        content = path.read_bytes()
        for secret in (b"home-of-somebody", b"quixotic", b"marmalade", str(tmp_path).encode()):
            assert secret not in content, path.name
    assert not {"_name_or_path"} & read_json(home / "out" / "config.json").keys()


@pytest.mark.parametrize(
    ("source", "published"),
    [
        ("bundled:ja=64,en=64", "bundled:ja=64,en=64"),
        ("/home/me/tickets.csv:question=3", "tickets.csv:question=3"),
        ("hf:owner/name:config:train:text=8", "hf:owner/name:config:train:text=8"),
        ("hf:/home/me/sets/mine:default:train:text", "mine:default:train:text"),
        ("hf:./mine", "mine"),
        ("wikitext2=32", "wikitext2=32"),
    ],
)
def test_calibration_sources_are_published_without_folders(source, published):
    assert calibration.public_name(source) == published


def test_the_card_tells_settings_sizes_and_measured_quality(measured):
    out, report = measured
    card = (out / "README.md").read_text("utf-8")
    for name, value in read_json(out / "quantkit.json")["settings"].items():
        assert f"| {name} | {value} |" in card
    overall = report.measured.described()
    assert f"**{overall['kl']:.4f} ± {overall['kl_error']:.4f}**" in card
    assert f"{overall['top1']:.1%}" in card
    for label in ("English", "Japanese", "code", "chat"):
        assert f"| {label} | " in card
    assert "4.16" in card
    assert "5.9 MB" in card and "10.5 MB" in card
    assert "4 rows, 256 tokens (en 128, ja 128)" in card
    assert "base_model" not in card  # the demo is in no registry
    data = ModelCard(card).data
    assert (data.library_name, data.license, data.language) == (
        "transformers",
        "apache-2.0",
        ["en", "ja"],
    )
    assert data.tags == ["quantkit", "gptq", "4-bit"]
    for part in ("vllm serve OWNER/NAME", "## Limits", "## 日本語", "| 日本語 | "):
        assert part in card
    assert "llama-cli" not in card and "mlx_lm" not in card  # they do not read GPTQ


def test_a_card_without_measurement_says_so(demo):
    assert "Quality was not measured" in (demo / "README.md").read_text("utf-8")


def test_quality_measured_on_the_way_is_what_verify_finds(measured):
    out, report = measured
    on_the_way = report.measured.described()
    again = verify(str(out), rows=2, seqlen=64, samples=False, dtype="float32")
    after = again.comparison.described()
    assert 0.01 < on_the_way["kl"] < 1
    assert after["kl"] == pytest.approx(on_the_way["kl"], rel=1e-3)
    assert after["top1"] == pytest.approx(on_the_way["top1"], abs=0.01)
    assert after["sets"].keys() == {"en", "ja", "code", "chat"}
    for label, found in after["sets"].items():
        assert found["rows"] == 2
        for key in ("kl", "perplexity", "reference_perplexity"):
            assert found[key] == pytest.approx(on_the_way["sets"][label][key], rel=1e-2)
    assert read_json(out / "quantkit.json")["measured"] == on_the_way


def test_a_model_that_takes_short_rows_only_is_measured_on_short_rows(tmp_path):
    """GPT-2's learned positions end at 64 here; rows of 512 tokens would fail."""
    report = quantize(
        str(model("gpt2")),
        tmp_path / "out",
        group=32,
        **{**QUICK, "calib_seqlen": 512, "check": True},
    )
    assert report.measured.described()["kl"] > 0
    assert all(len(row) == 64 for row in report.calibration.rows)
    assert any("64 tokens, the longest" in note for note in report.calibration.notes)


# zero points, shards, dtypes, biases


def one_sided(folder: Path) -> Path:
    """A model with weights that are all positive: their best zero point is 0."""
    shutil.copytree(model("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "up_proj" in name:
            tensors[name] = tensors[name].abs() + 0.05
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def zeros_of(folder: Path) -> torch.Tensor:
    """Every stored zero point, as it is stored."""
    tensors = load_file(folder / "model.safetensors")
    stored = [unpack(t.T.contiguous(), 4) for n, t in tensors.items() if n.endswith(".qzeros")]
    return torch.cat([zeros.reshape(-1) for zeros in stored])


def test_asymmetric_is_v2_with_true_zeros_or_v1_with_zeros_from_one(tmp_path):
    source = str(one_sided(tmp_path / "one-sided"))
    settings = {**QUICK, "sym": False, "group": 32, "scale_search": False}
    quantize(source, tmp_path / "v2", **settings)
    quantize(source, tmp_path / "v1", **settings, format="gptq")
    formats = {}
    for name in ("v1", "v2"):
        said = read_json(tmp_path / name / "config.json")["quantization_config"]
        formats[name] = said["checkpoint_format"]
        assert not said["sym"]
        settings = read_json(tmp_path / name / "quantkit.json")["settings"]
        assert settings["format"] == formats[name]
    assert formats == {"v1": "gptq", "v2": "gptq_v2"}
    assert (zeros_of(tmp_path / "v2") == 0).any()  # v2 holds the zeros that v1 cannot
    # v1 stores zero - 1: a stored 15 would be the zero point 0, which readers disagree about
    assert zeros_of(tmp_path / "v1").max() < 15
    for name in ("v1", "v2"):
        errors = [
            x["error"] for x in read_json(tmp_path / name / "quantkit.json")["layers"].values()
        ]
        assert max(errors) < 0.05


def test_symmetric_zero_points_are_the_middle_in_either_convention(demo):
    assert set(zeros_of(demo).tolist()) == {7}
    v2 = quantized(model("gpt_neox"), group=32, format="gptq_v2")
    assert set(zeros_of(v2).tolist()) == {8}


def test_shards_hold_the_same_tensors_and_the_index_knows_all(tmp_path):
    source = model("llama")
    whole = load_file(quantized(source, group=32) / "model.safetensors")
    folder = quantized(source, group=32, max_shard_size="1MB")
    shards = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    index = read_json(folder / INDEX)
    parts = {path.name: load_file(path) for path in shards}
    assert len(parts) >= 3
    assert {n: file for file, part in parts.items() for n in part} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    joined = {name: tensor for part in parts.values() for name, tensor in part.items()}
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    for part in parts.values():
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 1_000_000


def test_float32_becomes_float16():
    source = model("llama")
    before = load_file(source / "model.safetensors")
    folder = quantized(source, group=32)
    after = load_file(folder / "model.safetensors")
    dense = [name for name in after if name in before]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < set(dense)
    for name in dense:
        assert before[name].dtype == torch.float32
        assert torch.equal(after[name], before[name].half())
    assert read_json(folder / "config.json")["dtype"] == "float16"


def test_what_does_not_fit_into_float16_is_refused(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantkitError, match=r"model\.norm\.weight has values that do not fit"):
        quantize(str(source), tmp_path / "out", group=32, **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damaged", "found"),
    [
        ("model.layers.3.mlp.down_proj.weight", r"down_proj.scales holds numbers that are none"),
        ("model.norm.weight", r"model\.norm\.weight holds infinities or NaN"),
        ("model.layers.1.mlp.up_proj.weight", r"layers\.1\.mlp\.up_proj\.weight holds inf"),
    ],
)
def test_a_model_that_is_not_made_of_numbers_is_refused(tmp_path, damaged, found):
    """Wherever it first shows; once it was only in the table, with nan for its quality."""
    tensors = load_file(DEMO / "model.safetensors")
    tensors[damaged] = tensors[damaged].clone()
    tensors[damaged].view(-1)[5] = torch.nan
    source = tmp_path / "model"
    shutil.copytree(DEMO, source)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantkitError, match=found):
        quantize(str(source), tmp_path / "out", **{**QUICK, "check": True})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fast", [True, False])
def test_a_linear_whose_inputs_are_always_zero(tmp_path, fast):
    """As pruned models have them. Its weight is rounded as if all inputs were alike."""
    source = tmp_path / "model"
    shutil.copytree(model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = quantize(str(source), tmp_path / "out", group=32, **{**QUICK, "fast": fast})
    layer = report.layers["model.layers.1.mlp.down_proj"]
    assert (layer["dead"], layer["error"]) == (128, 0.0)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    source = tmp_path / "model"
    tiny.build("llama", source, tokenizer=True, vocab_size=4000)
    with pytest.raises(QuantkitError, match="and the model knows 4000 tokens"):
        quantize(str(source), tmp_path / "out", group=32, **QUICK)
    assert files_in(tmp_path) == {"model"}


def test_gpt_neox_keeps_its_biases():
    source = model("gpt_neox")
    before = load_file(source / "model.safetensors")
    plain = load_file(quantized(source, group=32, bias_correction=False) / "model.safetensors")
    corrected = load_file(quantized(source, group=32) / "model.safetensors")
    biases = [name for name in before if name.endswith(".bias") and "norm" not in name]
    assert len(biases) == 2 * 4
    for name in biases:
        assert plain[name].dtype == corrected[name].dtype == torch.float16
        assert torch.equal(plain[name], before[name].half())
        moved = (corrected[name] - plain[name]).abs()
        assert 0 < moved.mean() < 0.1


def test_groups_by_activation_are_written_as_g_idx():
    tensors = load_file(
        quantized(model("llama"), group=16, act_order="group") / "model.safetensors"
    )
    index = tensors["model.layers.0.self_attn.q_proj.g_idx"]
    assert index.bincount().tolist() == [16] * 4
    assert not torch.equal(index, torch.arange(64, dtype=torch.int32) // 16)
    # linears that share an input share its order
    assert torch.equal(index, tensors["model.layers.0.self_attn.k_proj.g_idx"])


# fallbacks


def unpackable() -> Path:
    """132 is no multiple of 8: three of the seven linears of a block cannot be packed."""
    return model("llama", intermediate_size=132)


KEPT = [
    f"model.layers.{i}.mlp.{n}" for i in range(3) for n in ("gate_proj", "up_proj", "down_proj")
]


def test_linears_that_cannot_be_packed_stay_dense_and_are_told():
    folder = quantized(unpackable(), group=32)
    before = load_file(unpackable() / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert sorted(name for name in after if name in before and ".mlp." in name) == sorted(
        f"{name}.weight" for name in KEPT
    )
    for name in KEPT:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"].half())
        assert f"{name}.qweight" not in after
    found = read_json(folder / "quantkit.json")
    assert set(found["fallbacks"]) >= {f"{n} stays dense: its shape cannot be packed" for n in KEPT}
    assert found["size"]["linears"] == 12
    assert not set(KEPT) & found["layers"].keys()
    dynamic = read_json(folder / "config.json")["quantization_config"]["dynamic"]
    fused = {name.rpartition(".")[0] + ".gate_up_proj" for name in KEPT if "gate" in name}
    named = {"-:^" + name.replace(".", r"\.") + "$": {} for name in {*KEPT, *fused}}  # vLLM's too
    assert dynamic == named
    card = (folder / "README.md").read_text("utf-8")
    assert "Done differently than asked" in card
    assert f"- {KEPT[0]} stays dense" in card


def test_strict_refuses_them_before_anything_is_written(tmp_path):
    with pytest.raises(QuantkitError, match=r"--strict: model\.layers\.0\.mlp\.\w+ stays dense"):
        quantize(str(unpackable()), tmp_path / "out", group=32, strict=True, **QUICK)
    assert files_in(tmp_path) == set()


@pytest.fixture
def never_called(monkeypatch):
    """Llama blocks that do not use their gate projection."""
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)))
    )


@pytest.mark.parametrize("align", [0, 0.5])
def test_a_linear_that_no_token_reaches_is_rounded_and_told(tmp_path, never_called, align):
    heard = Heard()
    source = model("llama")
    report = quantize(str(source), tmp_path / "out", group=32, align=align, progress=heard, **QUICK)
    names = [f"model.layers.{i}.mlp.gate_proj" for i in range(3)]
    texts = [f"{name} was only rounded: no calibration token reached it" for name in names]
    assert [t for t in report.fallbacks if "rounded" in t] == texts
    assert [t for t in heard.warnings if "rounded" in t] == texts
    assert read_json(tmp_path / "out" / "quantkit.json")["fallbacks"] == report.fallbacks
    methods = {name: layer["method"] for name, layer in report.layers.items()}
    assert {name for name, method in methods.items() if method == "rtn"} == set(names)
    original = load_file(source / "model.safetensors")[f"{names[1]}.weight"]
    said = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    q = gptq.read(Checkpoint(tmp_path / "out"), names[1], said)
    assert q.identical(rtn.quantize(original, Scheme(4, 32)))


def test_strict_refuses_to_round(tmp_path, never_called):
    with pytest.raises(QuantkitError, match=r"--strict: .*gate_proj was only rounded"):
        quantize(str(model("llama")), tmp_path / "out", group=32, strict=True, **QUICK)
    assert not (tmp_path / "out").exists()


def test_rows_that_the_text_cannot_give_are_told(tmp_path):
    greedy = {**QUICK, "calib": ["bundled:en=2,code=5000"]}
    heard = Heard()
    report = quantize("demo", dry_run=True, progress=heard, **greedy)
    (told,) = report.fallbacks
    assert told.startswith("calibration bundled:code: 5000 rows were asked for, the text gives ")
    assert heard.warnings == [told]
    with pytest.raises(QuantkitError, match=r"--strict: calibration bundled:code: 5000 rows"):
        quantize("demo", tmp_path / "out", strict=True, **greedy)
    assert not list(tmp_path.iterdir())


def test_a_damping_that_had_to_grow_is_told(tmp_path):
    """One row of 8 tokens says nothing about most of 768 inputs."""
    few = {**QUICK, "calib": ["bundled:en=1"], "calib_seqlen": 8, "damp": 1e-9}
    heard = Heard()
    report = quantize("demo", tmp_path / "out", progress=heard, **few)
    name = "model.layers.0.mlp.down_proj"
    grown = report.layers[name]["damp"]
    assert grown > 1e-9
    assert any(f.startswith(f"{name} needed a damping of {grown:g}") for f in report.fallbacks)
    first, *others = heard.warnings
    assert "8 tokens, fewer than the 768 inputs" in first
    assert report.fallbacks == others
    with pytest.raises(QuantkitError, match=r"--strict: .* needed a damping"):
        quantize("demo", tmp_path / "strict", strict=True, **few)


# what is not written, what is not overwritten


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heard = Heard()
    report = quantize("demo", dry_run=True, progress=heard, **QUICK)
    assert files_in(tmp_path) == set()
    assert not report.written
    assert report.folder == Path("demo-gptq-4bit-128g")
    told = "\n".join(heard.notes)
    assert "4 blocks, 28 linears, 3.1 M weights to 4 bits, groups of 128, symmetric" in told
    assert "4 rows, 256 tokens (en 128, ja 128)" in told
    assert "5.9 MB, from 10.5 MB" in told


def test_progress_tells_every_block(tmp_path):
    heard = Heard()
    report = quantize(str(model("llama")), tmp_path / "out", group=32, progress=heard, **QUICK)
    assert [(s.index, s.total, s.name) for s in heard.steps] == [
        (i + 1, 3, f"model.layers.{i}") for i in range(3)
    ]
    for i, step in enumerate(heard.steps):
        errors = [
            x["error"] for n, x in report.layers.items() if n.startswith(f"model.layers.{i}.")
        ]
        assert step.loss == pytest.approx(sum(errors) / 7)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("settings", [{"calib_rows": 0}, {"calib_seqlen": 1}])
def test_nothing_to_calibrate_on(tmp_path, settings):
    with pytest.raises(UsageError, match="at least one row of two tokens"):
        quantize(str(model("gpt_neox")), tmp_path / "out", **{**QUICK, "group": 32, **settings})
    assert files_in(tmp_path) == set()


def test_an_existing_output_is_refused_unless_overwriting_is_asked_for(tmp_path):
    out = tmp_path / "out"
    shutil.copytree(quantized(model("gpt_neox"), group=32), out)
    before = snapshot(out)
    settings = {**QUICK, "group": 64}
    with pytest.raises(UsageError, match="out already exists"):
        quantize(str(model("gpt_neox")), out, **settings)
    assert snapshot(out) == before
    assert files_in(tmp_path) == {"out"}
    quantize(str(model("gpt_neox")), out, overwrite=True, **settings)
    assert read_json(out / "quantkit.json")["settings"]["group"] == 64
    assert files_in(tmp_path) == {"out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_quantkit_did_not_write_is_never_touched(tmp_path, overwrite):
    """Not even a file whose name quantkit uses itself."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    (out / "ledger.json").write_text("[]")
    before = snapshot(out)
    with pytest.raises(UsageError, match="not written by quantkit" if overwrite else "exists"):
        quantize(str(model("gpt_neox")), out, group=32, overwrite=overwrite, **QUICK)
    assert snapshot(out) == before
    assert files_in(tmp_path) == {"out"}


@pytest.mark.parametrize("name", ["out.partial", "out.partial.old", "out/original"])
def test_a_model_in_the_way_of_its_own_result_is_refused(tmp_path, name):
    """Before its files are cut off while they are read, or removed when all is done."""
    source, out = tmp_path / name, tmp_path / "out"
    if name == "out/original":
        shutil.copytree(quantized(model("gpt_neox"), group=32), out)
    shutil.copytree(model("gpt_neox"), source)
    before = snapshot(source)
    with pytest.raises(UsageError, match="holds the model that is read"):
        quantize(str(source), out, group=32, overwrite=True, **QUICK)
    assert snapshot(source) == before


def test_a_folder_called_old_is_nobody_s_but_its_owner_s(tmp_path):
    """People rename what they want to keep so; even the model itself may be called that."""
    source, out = tmp_path / "out.old", tmp_path / "out"
    shutil.copytree(model("gpt_neox"), source)
    before = snapshot(source)
    for overwrite in (False, True):
        quantize(str(source), out, group=32, overwrite=overwrite, **QUICK)
    assert snapshot(source) == before
    assert files_in(tmp_path) == {"out", "out.old"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_partial_folder_of_somebody_else_is_refused(tmp_path, overwrite):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("half of a download")
    (partial / "notes.tmp").write_text("mine")
    before = snapshot(partial)
    with pytest.raises(UsageError, match="holds something else"):
        quantize(str(model("gpt_neox")), tmp_path / "out", group=32, overwrite=overwrite, **QUICK)
    assert snapshot(partial) == before


def test_a_file_in_the_place_of_the_output_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            quantize(str(model("gpt_neox")), tmp_path / "out", overwrite=overwrite, **QUICK)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "out").mkdir()
    quantize(str(model("gpt_neox")), tmp_path / "out", group=32, **QUICK)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert files_in(tmp_path) == {"out"}


def test_the_source_is_not_changed(tmp_path):
    source = tmp_path / "model"
    tiny.build("gpt2", source, tokenizer=True)
    before = snapshot(source)
    quantize(str(source), tmp_path / "out", group=32, **QUICK)
    assert snapshot(source) == before
