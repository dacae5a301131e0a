"""GGUF files of whole models: names, row orders, metadata. llama.cpp computes what transformers
computes, and what is read back is what was written."""

import json
import math

import gguf_tools
import pytest
import tiny
import torch
from gguf_tools import needs_gguf
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from quantkit import data
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.gguf_file import GgufFile
from quantkit.core.gguf_values import Value
from quantkit.core.gguf_writer import GgufWriter
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError
from quantkit.formats import gguf, gguf_architectures, gguf_model, gguf_rotary
from quantkit.runtime.gguf_opened import GgufOpened
from quantkit.runtime.skeleton import load

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
# architecture, changes of its configuration, largest difference of logits to llama.cpp's, relative
# to the largest logit. GELU is a table of float16 there, which is why it is more than rounding.
EXACT, GELU = 1e-5, 2e-3
MODELS = {
    "llama": ("llama", {}, EXACT),
    "llama_tied": ("llama_tied", {}, EXACT),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}, EXACT),
    "llama_wide_heads": ("llama", {"head_dim": 32}, EXACT),
    "llama_linear": ("llama", {"rope_parameters": LINEAR}, EXACT),
    "llama_llama3": ("llama", {"head_dim": 32, "rope_parameters": LLAMA3}, EXACT),
    "llama_yarn": ("llama", {"head_dim": 32, "rope_parameters": YARN}, EXACT),
    "mistral": ("mistral", {"sliding_window": None}, EXACT),
    "gpt_neox": ("gpt_neox", {}, GELU),
    "gpt_neox_sequential": ("gpt_neox_sequential", {}, GELU),
    "gpt_neox_tied": ("gpt_neox", {"tie_word_embeddings": True}, GELU),
    "gpt_neox_half": ("gpt_neox", {"rope_parameters": PARTIAL}, GELU),
    "qwen2": ("qwen2", {}, EXACT),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}, EXACT),
    "qwen3": ("qwen3", {}, EXACT),
    "granite": ("granite", {"attention_multiplier": 0.1, "embedding_multiplier": 3.0}, EXACT),
    "olmo2": ("olmo2", {}, EXACT),
    "olmo2_tied": ("olmo2", {"tie_word_embeddings": True}, EXACT),
    "phi3": ("phi3", {"sliding_window": None}, EXACT),
    "phi3_half": ("phi3", {"sliding_window": None, "rope_parameters": PARTIAL}, EXACT),
    "starcoder2": ("starcoder2", {}, GELU),
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(folder, GGUF file in F32, tolerance) of a tiny random model."""
    architecture, changes, tolerance = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tiny.build(architecture, folder, tokenizer=True, **{**SPECIAL, **changes})
    return folder, gguf_tools.write(folder, folder / "model.gguf"), tolerance


def opened(path):
    return GgufOpened(path, Source(path.stem, path.parent))


def rows(count=2, length=40):
    return torch.randint(2, 8192, (count, length), generator=torch.Generator().manual_seed(5))


def reference(folder, ids):
    with torch.no_grad():
        return tiny.reference(folder)(ids).logits


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def rebuilt(file):
    """A model of transformers out of nothing but the GGUF file."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**file.model_config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = {name: file.dense.get(name) for name in file.dense}
    for prefix in file.linears:
        tensors[f"{prefix}.weight"] = file.qweight(prefix).dequantize()
    load(model, tensors, torch.device("cpu"), torch.float32, get_model_conversion_mapping(model))
    model.tie_weights()
    return model


# whole models


@needs_gguf
@pytest.mark.referee
def test_llamacpp_computes_the_same(model):
    folder, path, tolerance = model
    found, _ = gguf_tools.logits(path, rows())
    assert relative(found, reference(folder, rows())) < tolerance


@needs_gguf
@pytest.mark.referee
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_llamacpp_writes_the_demo_s_texts(tmp_path, tokenizer, kind):
    """Logits, their divergence and the greedy continuation, of a model that was really trained."""
    path = gguf_tools.write(data.demo(), tmp_path / "demo.gguf", kind)
    texts = [
        "The history of the city began when the first people came over the river and built a wall.",
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗い所で泣いていた。",
    ]
    ids = [tokenizer.encode(text) for text in texts]
    ids = torch.tensor([row[: min(map(len, ids))] for row in ids])
    found, greedy = gguf_tools.logits(path, ids, 24)
    transformer = AutoModelForCausalLM.from_pretrained(data.demo(), dtype=torch.float32)
    with torch.no_grad():
        wanted = transformer(ids).logits
        text = transformer.generate(
            ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1
        )
    assert relative(found, wanted) < (1e-5 if kind == "F32" else 2e-3)
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none"
    )
    assert float(divergence.sum(-1).mean()) < (1e-6 if kind == "F32" else 1e-5)
    assert torch.equal(greedy, text[:, ids.shape[1] :])


@needs_gguf
def test_a_part_of_a_split_model_is_refused(tmp_path):
    parts = {"split.count": Value("u16", 3)}
    path = gguf_tools.write(data.demo(), tmp_path / "demo-00001-of-00003.gguf", more=parts)
    with pytest.raises(QuantkitError, match="one of 3 parts"):
        opened(path)


@needs_gguf
def test_what_is_read_back_is_the_checkpoint(model):
    folder, path, _ = model
    file = opened(path)
    checkpoint = Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    held = set(checkpoint)
    if config["model_type"] in ("gpt_neox", "olmo2") and config["tie_word_embeddings"]:
        held.add({"gpt_neox": "embed_out.weight", "olmo2": "lm_head.weight"}[config["model_type"]])
    assert set(file.dense) == held
    for name in checkpoint:
        assert torch.equal(file.dense.get(name), checkpoint.get(name)), name
        assert file.dense.spec(name) == checkpoint.spec(name)
    assert not file.linears


@needs_gguf
def test_a_model_made_from_the_file_alone_computes_the_same(model):
    folder, path, _ = model
    with torch.no_grad():
        found = rebuilt(opened(path))(rows()).logits
    assert relative(found, reference(folder, rows())) < 1e-6


@needs_gguf
@pytest.mark.parametrize(("name", "kind"), [("llama", "Q4_0"), ("gpt_neox", "Q8_0")])
def test_codes_move_with_their_rows(tmp_path, name, kind):
    """Packed linears go in and come out bit for bit, and stand where the dense ones stood."""
    folder = tiny.build(name, tmp_path / "model", tokenizer=True)
    checkpoint = Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    bits = {"Q4_0": 4, "Q8_0": 8}[kind]
    generator = torch.Generator().manual_seed(3)
    packed = {}
    for tensor in checkpoint:
        if gguf_model.is_linear(config, tensor):
            out, width = checkpoint.spec(tensor).shape
            codes = torch.randint(0, 1 << bits, (out, width), generator=generator)
            scale = (torch.rand(out, width // 32, generator=generator) / (8 << bits)).half()
            q = QWeight(Scheme(bits, 32), codes.to(torch.uint8), scale)
            packed[tensor] = (kind, q)
    assert len(packed) == {"llama": 21, "gpt_neox": 8}[name]
    file = opened(gguf_tools.write(folder, tmp_path / "model.gguf", packed=packed))
    assert set(file.linears) == {tensor.removesuffix(".weight") for tensor in packed}
    for tensor, (_, q) in packed.items():
        prefix = tensor.removesuffix(".weight")
        assert file.qweight(prefix).identical(q), tensor
        assert (file.linears[prefix].out, file.linears[prefix].width) == q.shape
        assert file.linears[prefix].scheme == q.scheme
        assert file.names(prefix) == [tensor]
        assert tensor not in file.dense
    plain = tiny.reference(folder)
    with torch.no_grad():
        for tensor, (_, q) in packed.items():
            plain.get_parameter(tensor).copy_(q.dequantize())
        assert relative(rebuilt(file)(rows()).logits, plain(rows()).logits) < 1e-6


@needs_gguf
def test_embeddings_that_are_quantized_come_out_dense(tmp_path, monkeypatch):
    folder = tiny.build("llama", tmp_path / "model", tokenizer=True)
    scale = torch.rand(8192, 2).half()
    q = QWeight(Scheme(8, 32), torch.randint(0, 256, (8192, 64)).to(torch.uint8), scale)
    packed = {"model.embed_tokens.weight": ("Q8_0", q)}
    path = gguf_tools.write(folder, tmp_path / "model.gguf", packed=packed)
    monkeypatch.setattr("quantkit.runtime.gguf_opened._SLICE", 64 * 1000)  # several parts
    for dtype in (torch.float32, torch.float16):
        file = GgufOpened(path, Source("model", tmp_path), dtype)
        assert not file.linears
        found = file.dense.get("model.embed_tokens.weight")
        assert torch.equal(found, q.dequantize(dtype))
        assert file.dense.spec("model.embed_tokens.weight").dtype == dtype


# what is written


@needs_gguf
def test_the_metadata_that_llamacpp_asks_for(tmp_path):
    found = GgufFile(gguf_tools.write(data.demo(), tmp_path / "demo.gguf", "F16")).metadata
    found = {k: v for k, v in found.items() if not k.startswith("tokenizer.")}
    assert found.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "test",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.context_length": 2048,
        "llama.embedding_length": 256,
        "llama.block_count": 4,
        "llama.feed_forward_length": 768,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 8192,
    }


@needs_gguf
def test_norms_and_biases_are_float32_and_a_tied_head_is_not_written(tmp_path):
    file = GgufFile(gguf_tools.write(data.demo(), tmp_path / "demo.gguf", "F16"))
    assert {t.type for t in file.tensors.values() if len(t.shape) == 1} == {"F32"}
    assert {t.type for t in file.tensors.values() if len(t.shape) == 2} == {"F16"}
    assert "output.weight" not in file.tensors


def test_rotary_halves_become_neighbours():
    rows = gguf_model._rows(
        gguf_architectures.ARCHITECTURES["llama"], CONFIG, "self_attn.k_proj", "k", (8, 16)
    )
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # two heads of four


def test_fused_heads_become_queries_keys_and_values():
    config = {"num_attention_heads": 2, "hidden_size": 4}
    rows = gguf_model._rows(
        gguf_architectures.ARCHITECTURES["gpt_neox"],
        config,
        "attention.query_key_value",
        "qkv",
        (12,),
    )
    assert rows.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_llama3_slows_long_waves_only():
    factors = gguf_rotary._slowing(64, 10000.0, 8.0, 1.0, 4.0, 8192.0)
    assert factors[0] == 1 and factors[-1] == 8 and bool((factors.diff() >= 0).all())
    # in between, by the definition in transformers' modeling_rope_utils.py, for one frequency
    k = int(((factors > 1) & (factors < 8)).nonzero()[0])
    wave = 2 * math.pi * 10000.0 ** (2 * k / 64)
    smooth = (8192 / wave - 1) / 3
    assert factors[k] == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-6)


def test_a_look_back_that_is_lost_is_told():
    config = {**CONFIG, "model_type": "mistral", "sliding_window": 32}
    (said,) = gguf_model.warnings(config)
    assert "32" in said
    for harmless in (
        {**config, "sliding_window": None},
        {**config, "sliding_window": 64},
        {**config, "model_type": "qwen2", "use_sliding_window": False},
        CONFIG,
    ):
        assert not gguf_model.warnings(harmless)


SHAPES = {
    "model.embed_tokens.weight": (32, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (32, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.gate_proj.weight": (24, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
}


@needs_gguf
def test_names_are_llamacpp_s():
    assert {there: place.source for there, place in gguf_model.plan(CONFIG, SHAPES).items()} == {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }


@needs_gguf
def test_a_head_that_is_the_embedding_is_left_out():
    tied = gguf_model.plan({**CONFIG, "tie_word_embeddings": True}, SHAPES)
    assert "output.weight" not in tied
    without = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    assert gguf_model.plan(CONFIG, without).keys() == tied.keys()
    with pytest.raises(QuantkitError, match=r"lm_head\.weight"):
        gguf_model.plan({**CONFIG, "tie_word_embeddings": False}, without)


@needs_gguf
def test_computed_tensors_of_old_checkpoints_are_left_out():
    old = {**SHAPES, "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    assert gguf_model.plan(CONFIG, old).keys() == gguf_model.plan(CONFIG, SHAPES).keys()


@needs_gguf
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model.layers.0.mlp.router.weight": (4, 16)}, "router"),
        ({"model.layers.0.input_layernorm.bias": (16,)}, "input_layernorm.bias"),
        ({"model.layers.1.mlp.up_proj.weight": (24, 16)}, "layers.1"),
        ({"model.layers.0.self_attn.q_proj.weight": (24, 16)}, "16 rows"),
        ({"model.layers.0.mlp.up_proj.weight": None}, "up_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, match):
    shapes = {name: shape for name, shape in {**SHAPES, **change}.items() if shape}
    with pytest.raises(QuantkitError, match=match):
        gguf_model.plan(CONFIG, shapes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"model_type": None}, "None"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"head_dim": 2.5}, "head_dim"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta"),
        ({"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.1}}, "attention_factor"),
        ({"partial_rotary_factor": 0.5}, "part of a head"),
    ],
)
def test_models_that_llamacpp_would_compute_otherwise_are_refused(change, match):
    with pytest.raises(QuantkitError, match=match):
        gguf_model.metadata({**CONFIG, **change}, "x", "F16")


@needs_gguf
def test_nothing_but_quantkit_s_own_error_comes_out_of_an_odd_config(tmp_path):
    values = (None, 0, -1, 4, 1 << 200, 1.5, math.nan, "", "x", True, [], [1], {}, {"a": []})
    whole = {**CONFIG, "head_dim": 4, "hidden_act": "silu", "tie_word_embeddings": False}
    changes = [{key: value} for key in (*whole, "rope_scaling") for value in values]
    changes += [
        {"rope_parameters": {**parameters, key: value}}
        for parameters in (LLAMA3, YARN)
        for key in parameters
        for value in values
    ]
    written = 0
    for change in changes:
        config = {**whole, **change}
        try:
            metadata = gguf_model.metadata(config, "x", "F16")
            GgufWriter(tmp_path / "x.gguf", metadata, {}).close()
            gguf_model.warnings({**config, "model_type": "mistral", "sliding_window": 3})
            gguf_model.plan(config, SHAPES)
            gguf_rotary.extra_tensors(config)
        except QuantkitError:
            continue
        written += 1
    assert 20 < written < len(changes) / 2


def test_the_refusal_lists_what_is_supported():
    with pytest.raises(QuantkitError) as caught:
        gguf_model.metadata({**CONFIG, "model_type": "gemma"}, "x", "F16")
    assert all(kind in caught.value.hint for kind in gguf_architectures.ARCHITECTURES)


def test_old_and_new_spellings_of_the_rotary_embedding():
    new = {**CONFIG, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    old = {**CONFIG, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert gguf_model.metadata(old, "x", "F16") == gguf_model.metadata(new, "x", "F16")
    neox = {
        **CONFIG,
        "model_type": "gpt_neox",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": False,
    }
    for spelling in (
        {"rotary_pct": 0.5, "rotary_emb_base": 5000},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000}},
    ):
        found = gguf_model.metadata({**neox, **spelling}, "x", "F16")
        assert found["gptneox.rope.dimension_count"].value == 2
        assert found["gptneox.rope.freq_base"].value == 5000
        assert found["gptneox.use_parallel_residual"].value is False


# what is read


PLAIN = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.block_count": 1,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
}
THERE = {"token_embd.weight": (32, 16), "output.weight": (32, 16)}


def test_keys_that_old_files_lack_have_their_defaults():
    config = gguf_model.config_of(PLAIN, THERE)
    assert config["num_key_value_heads"] == 4
    assert config["head_dim"] == 4
    assert config["vocab_size"] == 32
    assert config["rms_norm_eps"] == 1e-5  # and not the float32 next to it
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert not config["tie_word_embeddings"]
    assert gguf_model.config_of(PLAIN, {"token_embd.weight": (32, 16)})["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"general.architecture": None}, "general.architecture"),
        ({"general.architecture": 7}, "general.architecture"),
        ({"llama.block_count": None}, "block_count"),
        ({"llama.block_count": "4"}, "block_count"),
        ({"llama.block_count": True}, "block_count"),
        ({"llama.block_count": 0}, "block_count"),
        ({"llama.embedding_length": 1 << 63}, "embedding_length"),
        ({"llama.attention.head_count": [4, 4]}, "head_count"),
        ({"llama.attention.layer_norm_rms_epsilon": 1}, "epsilon"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.rope.dimension_count": 2}, "part of a head"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.scaling.type": "yarn"}, "factor"),
    ],
)
def test_metadata_that_makes_no_model_is_refused(change, match):
    metadata = {key: value for key, value in {**PLAIN, **change}.items() if value is not None}
    with pytest.raises(QuantkitError, match=match):
        gguf_model.config_of(metadata, THERE)


def test_nothing_but_quantkit_s_own_error_comes_out_of_odd_metadata():
    plain = {
        **PLAIN,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 4,
        "llama.rope.freq_base": 1e4,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    read = 0
    for key in plain:
        for value in (0, -1, 3, 1 << 40, 0.0, -1.5, math.nan, math.inf, "", "x", True, [], [1]):
            try:
                config = gguf_model.config_of({**plain, key: value}, THERE)
                gguf_model.metadata(config, "x", "F16")
            except QuantkitError:
                continue
            read += 1
    assert read > len(plain)


@needs_gguf
def test_tensors_without_a_place_are_refused():
    config = gguf_model.config_of(PLAIN, THERE)
    whole = {there: SHAPES[p.source] for there, p in gguf_model.plan(CONFIG, SHAPES).items()}
    config["num_key_value_heads"] = 2
    assert gguf_model.inverse(config, whole).keys() == SHAPES.keys()
    with pytest.raises(QuantkitError, match="ffn_gate_inp"):
        gguf_model.inverse(config, {**whole, "blk.0.ffn_gate_inp.weight": (4, 16)})
    with pytest.raises(QuantkitError, match="down_proj"):
        gguf_model.inverse(config, {n: s for n, s in whole.items() if "down" not in n})
    with pytest.raises(QuantkitError, match="1000000 blocks"):
        gguf_model.inverse({**config, "num_hidden_layers": 10**6}, whole)
    with pytest.raises(QuantkitError, match="rows"):
        gguf_model.inverse({**config, "num_attention_heads": 1 << 30}, whole)


@needs_gguf
def test_both_ways_undo_each_other():
    config = {**CONFIG, "tie_word_embeddings": False}
    there = gguf_model.plan(config, SHAPES)
    back = gguf_model.inverse(config, {n: SHAPES[p.source] for n, p in there.items()})
    for name, place in back.items():
        tensor = torch.randn(SHAPES[name])
        moved = there[place.source].dense(tensor)
        assert torch.equal(place.dense(moved), tensor)
    assert not torch.equal(there["blk.0.attn_q.weight"].dense(torch.arange(16)), torch.arange(16))


def test_factors_of_no_known_parameters_are_refused():
    config = gguf_model.config_of(PLAIN, THERE)
    factors = gguf_rotary._slowing(64, 10000.0, 8.0, 1.0, 4.0, 8192.0)
    found = gguf_rotary.with_factors(config, factors)["rope_parameters"]
    assert found == {**LLAMA3, "original_max_position_embeddings": 8192}
    with pytest.raises(QuantkitError, match="rope_freqs"):
        gguf_rotary.with_factors(config, torch.tensor([1.0, 3.0, 2.0]))


@needs_gguf
def test_types_that_are_not_read_are_refused_by_name(tmp_path):
    path = gguf_tools.write(data.demo(), tmp_path / "demo.gguf", "F16")
    file = opened(path)
    name = "blk.2.ffn_up.weight"
    tensor = file.file.tensors[name]
    file.file.tensors[name] = type(tensor)(name, tensor.shape, "IQ4_NL", tensor.offset, 18)
    with pytest.raises(QuantkitError, match=r"blk\.2\.ffn_up\.weight.*IQ4_NL"):
        _ = file.linears


def test_without_the_gguf_package_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(QuantkitError) as caught:
        gguf_model.plan(CONFIG, SHAPES)
    assert caught.value.hint == "pip install gguf"


def test_linears_are_told_from_other_tensors():
    assert gguf_model.is_linear(CONFIG, "model.layers.11.mlp.up_proj.weight")
    for name in (
        "model.layers.11.mlp.up_proj.bias",
        "model.layers.11.input_layernorm.weight",
        "model.layers.x.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ):
        assert not gguf_model.is_linear(CONFIG, name)


def test_all_types_that_can_be_written_have_a_file_type():
    assert set(gguf.WRITTEN) | set(gguf_tools.DTYPES) == set(gguf_model.FILE_TYPES)
