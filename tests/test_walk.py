"""The walk against transformers itself, the plan of the output, and one block through GPTQ."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, WIDTH
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from quantkit.core.checkpoint import Checkpoint
from quantkit.core.qweight import Scheme
from quantkit.core.source import Source
from quantkit.core.stats import InputStats
from quantkit.errors import QuantkitError, UsageError
from quantkit.methods import gptq
from quantkit.runtime import gather
from quantkit.runtime.block import Block, is_linear
from quantkit.runtime.skeleton import Skeleton, read_config
from quantkit.runtime.states import States
from quantkit.runtime.walk import Walk
from quantkit.workflows.gptq_block import Gptq, solve_block
from quantkit.workflows.layout import Layout, lay_out
from quantkit.workflows.method import Originals, Solved

SCHEME = Scheme(4, 32)

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an architecture's model, built once; not to be changed."""
    root = tmp_path_factory.mktemp("tiny")

    def get(name: str) -> Path:
        path = root / name
        return path if path.exists() else tiny.build(name, path)

    return get


@pytest.fixture
def variant(folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of an architecture's folder whose tensors a function has changed."""

    def make(name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        path = tmp_path / name
        shutil.copytree(folder(name), path)
        file = path / "model.safetensors"
        tensors = change({key: value.clone() for key, value in load_file(file).items()})
        save_file(tensors, file, metadata={"format": "pt"})
        return path

    return make


def walked(skeleton: Skeleton, batches: list[Tensor]) -> list[Tensor]:
    """Logits of the batches, block by block."""
    walk = Walk(skeleton)
    hidden = walk.embed(batches)
    for index in range(len(walk)):
        with walk.block(index) as block:
            gather.advance(block, States(hidden))
    return list(walk.logits(batches, hidden))


def assert_same_logits(path: Path) -> None:
    batches = tiny.batches()
    model = tiny.reference(path)
    with torch.no_grad():
        wanted = [model(batch).logits for batch in batches]
    found = walked(tiny.skeleton(path), batches)
    assert wanted[0].std() > 0.01  # the comparison means something
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def resident(skeleton: Skeleton) -> set[str]:
    """Which parts hold weights: block numbers, and the first names of everything outside."""
    prefix = Walk(skeleton).prefix + "."
    return {
        name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else "outside"
        for name, parameter in skeleton.model.named_parameters(remove_duplicate=False)
        if parameter.device.type != "meta"
    }


# ---- the walk


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str, folder: Callable[[str], Path]) -> None:
    assert_same_logits(folder(name))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_of_linears(name: str, folder: Callable[[str], Path]) -> None:
    expected = ARCHITECTURES[name]
    walk = Walk(tiny.skeleton(folder(name)))
    hidden = walk.embed(tiny.batches())
    assert len(walk) == expected.layers
    for index in range(len(walk)):
        with walk.block(index) as block:
            groups = block.trace(hidden[0])
            with_no_ends = [replace(group, closes=False, exit=None) for group in groups]
            assert block.trace(hidden[0], ends=False) == with_no_ends
            linears = {n for n, module in block.module.named_modules() if is_linear(module)}
            gather.advance(block, States(hidden))
        assert [group.names for group in groups] == expected.groups
        assert {n for group in groups for n in group.names} == linears
        assert tuple(g.names[0] for g in groups if g.writes) == expected.writers
        assert tuple(g.names[0] for g in groups if g.closes) == expected.closes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_leads_to_kept_inputs_is_not_computed_again(
    name: str, folder: Callable[[str], Path]
) -> None:
    """The block's last linears change; what they are given stays, where only they do."""
    expected = ARCHITECTURES[name]
    walk = Walk(tiny.skeleton(folder(name)))
    start = States(walk.embed(tiny.batches()))
    with walk.block(0) as block:
        groups = block.trace(start[0])
        leaving = [group for group in groups if group.exit]
        assert tuple(g.names[0] for g in leaving) == expected.leaving
        writers = [group for group in groups if group.writes]
        full, given = start.copy(), start.copy()
        _, wanted = gather.observe(block, full, [], writers[:-1])
        _, kept = gather.observe_drift(block, given, wanted, writers[-1], full, keep=True)
        assert kept.keys() == set(leaving)
        for group in leaving:
            tiny.randomize(block.linear(group.names[0]))
        again = given.copy()
        gather.advance(block, again)
        changed = not any(torch.equal(a, b) for a, b in zip(again, full))
        assert changed == bool(leaving)

        readers = {n for g in groups if not g.writes for n in g.names}
        calls: list[str] = []
        hooks = {n: lambda x, n=n: calls.append(n) for n in readers}
        with block.watching(hooks):
            gather.advance(block, given, kept)
        assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))
        assert not kept
        if len(leaving) == len(writers) > 1:
            assert not calls
        elif leaving:
            assert len(set(calls)) < len(readers)
        calls.clear()
        with block.watching(hooks):
            gather.advance(block, given)
        assert set(calls) == readers


class Scaled(torch.nn.Module):
    """Attention whose output is changed in the same memory."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found, *others = self.inner(*args, **kwargs)
        return found.mul_(0.5), *others


class Named(NamedTuple):
    hidden: Tensor
    scores: None


class Telling(Scaled):
    """Attention that returns its values by name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return Named(*self.inner(*args, **kwargs))


@pytest.mark.parametrize(("kind", "module"), [(Scaled, None), (Telling, "self_attn.inner")])
def test_modules_that_do_more_are_no_exits(
    kind: type[Scaled], module: str | None, folder: Callable[[str], Path]
) -> None:
    walk = Walk(tiny.skeleton(folder("llama")))
    hidden = walk.embed(tiny.batches())
    with walk.block(0) as block:
        block.module.self_attn = kind(block.module.self_attn)
        first, second = (group for group in block.trace(hidden[0]) if group.writes)
    assert (first.exit.module if first.exit else None) == module
    assert second.exit is None


@pytest.mark.parametrize("align", [0, 0.5])
def test_ends_are_looked_for_where_something_is_aligned(
    align: float, folder: Callable[[str], Path]
) -> None:
    walk = Walk(tiny.skeleton(folder("llama")))
    hidden = walk.embed(tiny.batches())
    with walk.block(0) as block:
        groups = Gptq(gptq.Options(), align=align).look(block, hidden[0])
    assert any(group.closes for group in groups) == any(g.exit for g in groups) == (align > 0)


def test_groups_have_the_width_of_their_input(folder: Callable[[str], Path]) -> None:
    walk = Walk(tiny.skeleton(folder("gpt2")))
    hidden = walk.embed(tiny.batches())
    with walk.block(0) as block:
        groups = block.trace(hidden[0])
    assert [g.width for g in groups] == [tiny.WIDTH, tiny.WIDTH, tiny.WIDTH, 4 * tiny.WIDTH]


def test_trace_takes_a_piece_of_any_batch(folder: Callable[[str], Path]) -> None:
    walk = Walk(tiny.skeleton(folder("llama")))
    hidden = walk.embed(tiny.batches())
    with walk.block(0) as block:
        found = [block.trace(piece) for piece in hidden]
    assert all(groups == found[0] for groups in found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_block_in_memory_at_a_time(
    name: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = tiny.skeleton(folder(name))
    seen: list[set[str]] = []
    fill = skeleton.fill

    def filled(prefixes: list[str]) -> None:
        fill(prefixes)
        seen.append(resident(skeleton))

    monkeypatch.setattr(skeleton, "fill", filled)
    walk, batches = Walk(skeleton), tiny.batches()
    hidden = walk.embed(batches)
    assert seen == [{"outside"}, {"outside", "0"}]  # block 0 is run once to see what it returns
    for index in range(len(walk)):
        assert resident(skeleton) == set()
        with walk.block(index) as block:
            assert resident(skeleton) == {str(index)}
            assert all(p.device.type == "cpu" for p in block.module.parameters())
            gather.advance(block, States(hidden))
    assert resident(skeleton) == set()
    for _ in walk.logits(batches, hidden):
        assert resident(skeleton) == {"outside"}
    assert resident(skeleton) == set()


def test_a_block_is_emptied_after_an_error(folder: Callable[[str], Path]) -> None:
    skeleton = tiny.skeleton(folder("llama"))
    walk = Walk(skeleton)
    walk.embed(tiny.batches())
    with pytest.raises(ZeroDivisionError), walk.block(1):
        raise ZeroDivisionError
    assert resident(skeleton) == set()


def test_the_head_stays_out_of_memory_until_the_end(folder: Callable[[str], Path]) -> None:
    skeleton = tiny.skeleton(folder("llama"))
    walk, head = Walk(skeleton), skeleton.model.lm_head
    during: list[str] = []
    skeleton.model.model.embed_tokens.register_forward_hook(
        lambda *_: during.append(head.weight.device.type)
    )
    batches = tiny.batches()
    hidden = walk.embed(batches)
    assert set(during) == {"meta"}
    during.clear()
    list(walk.logits(batches, hidden))
    assert set(during) == {"cpu"}


def test_blocks_with_arguments_made_from_the_text_are_refused(tmp_path: Path) -> None:
    """Gemma 4 gives each block an embedding of the tokens; the walk would give it a stale one."""
    config = AutoConfig.for_model(
        "gemma4_text",
        **ARCHITECTURES["gemma3_text"].config,
        num_hidden_layers=3,
        vocab_size=tiny.VOCABULARY,
        vocab_size_per_layer_input=tiny.VOCABULARY,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
    )
    path = tiny.save(AutoModelForCausalLM.from_config(config), tmp_path / "gemma4")
    with pytest.raises(QuantkitError, match="more of the text"):
        Walk(tiny.skeleton(path)).embed(tiny.batches())


def test_blocks_with_arguments_made_from_earlier_ones_are_refused(
    folder: Callable[[str], Path],
) -> None:
    skeleton = tiny.skeleton(folder("llama"))
    first, second = skeleton.model.get_submodule("model.layers")[:2]  # type: ignore[index]
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    second.register_forward_pre_hook(
        lambda module, args, named: (args, named | {"earlier": seen[-1]}), with_kwargs=True
    )
    with pytest.raises(QuantkitError, match="more of the text"):
        Walk(skeleton).embed(tiny.batches())


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("rwkv", {"hidden_size": WIDTH}, "not enough values to unpack"),
        ("xlm", {"emb_dim": WIDTH, "n_heads": 4}, "their outputs are changed on the way"),
    ],
)
def test_blocks_that_do_not_follow_each_other_are_refused(
    name: str, config: dict[str, int], reason: str, tmp_path: Path
) -> None:
    """RWKV's hand on more than hidden states, and what XLM calls its layers are parts of them."""
    sizes = {"num_hidden_layers": 2, "vocab_size": tiny.VOCABULARY, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
    path = tiny.save(model, tmp_path / name)
    with pytest.raises(QuantkitError, match=f"cannot be run one by one: {reason}"):
        Walk(tiny.skeleton(path)).embed(tiny.batches())


def test_blocks_may_return_a_list(tmp_path: Path) -> None:
    sizes = {"n_embd": WIDTH, "n_head": 4, "n_layer": 2, "n_positions": 64}
    config = AutoConfig.for_model("openai-gpt", **sizes, vocab_size=tiny.VOCABULARY)
    assert_same_logits(tiny.save(AutoModelForCausalLM.from_config(config), tmp_path / "gpt"))


# ---- names on disk, names in memory


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.tied])
def test_tied_head_is_the_embedding(name: str, folder: Callable[[str], Path]) -> None:
    skeleton = tiny.skeleton(folder(name))
    assert "lm_head.weight" not in skeleton.checkpoint
    walk, batches = Walk(skeleton), tiny.batches()
    hidden = walk.embed(batches)
    checked = 0
    for _ in walk.logits(batches, hidden):
        embedding = skeleton.model.get_input_embeddings().weight
        assert skeleton.model.get_output_embeddings().weight is embedding
        assert torch.equal(
            embedding, skeleton.checkpoint.get(skeleton.disk_names[tied_name(skeleton)])
        )
        checked += 1
    assert checked == len(batches)


def tied_name(skeleton: Skeleton) -> str:
    return skeleton.model.all_tied_weights_keys["lm_head.weight"]


@pytest.mark.parametrize("head", ["equal", "different", "alone"])
def test_tied_head_on_disk_is_read_as_transformers_reads_it(
    head: str, variant: Callable[..., Path]
) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone()
        if head == "different":
            tensors["lm_head.weight"] = embedding.flip(0).contiguous()
        if head == "alone":
            del tensors["model.embed_tokens.weight"]
        return tensors

    path = variant("llama_tied", change)
    assert_same_logits(path)
    skeleton = tiny.skeleton(path)
    lay_out(skeleton, SCHEME, "gptq")
    Walk(skeleton).embed(tiny.batches())
    assert resident(skeleton) == set()


def test_neox_head_has_its_own_name_on_disk(folder: Callable[[str], Path]) -> None:
    skeleton = tiny.skeleton(folder("gpt_neox"))
    assert "embed_out.weight" in skeleton.checkpoint
    assert "lm_head.weight" not in skeleton.checkpoint
    assert skeleton.live_names["embed_out.weight"] == "lm_head.weight"
    assert skeleton.disk_names["lm_head.weight"] == "embed_out.weight"
    assert "embed_out.weight" in lay_out(skeleton, SCHEME, "gptq").dense


def old_neox(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that GPT-NeoX checkpoints of 2022 and 2023 carry."""
    for index in range(tiny.LAYERS):
        attention = f"gpt_neox.layers.{index}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.full((2,), 7.0)
    return tensors


def test_old_neox_buffers_are_dropped(variant: Callable[..., Path]) -> None:
    path = variant("gpt_neox", old_neox)
    assert_same_logits(path)
    layout = lay_out(tiny.skeleton(path), SCHEME, "gptq")
    assert len(layout.dropped) == 3 * tiny.LAYERS
    assert all(
        re.search(r"attention\.(bias|masked_bias|rotary_emb.inv_freq)$", n) for n in layout.dropped
    )
    assert_partition(path, layout)


def test_base_model_names_without_prefix(variant: Callable[..., Path]) -> None:
    """GPT-2's own repository holds the tensors of the base model, and mask buffers."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        for index in range(tiny.LAYERS):
            found[f"h.{index}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        return found

    path = variant("gpt2", change)
    assert_same_logits(path)
    layout = lay_out(tiny.skeleton(path), SCHEME, "gptq")
    assert layout.dropped == [f"h.{index}.attn.bias" for index in range(tiny.LAYERS)]
    assert layout.jobs[1][0].disk == "h.1.attn.c_attn"
    assert_partition(path, layout)


def test_shards(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path / "llama", shard="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    assert_same_logits(path)


# ---- the plan of the output


def assert_partition(path: Path, layout: Layout) -> None:
    """Every tensor of the checkpoint is quantized, copied or dropped, and only one of these."""
    taken = [f"{job.disk}.weight" for job in layout.all_jobs()]
    taken += [f"{job.disk}.bias" for job in layout.all_jobs() if job.bias]
    assert sorted([*taken, *layout.dense, *layout.dropped]) == sorted(Checkpoint(path))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layout(name: str, folder: Callable[[str], Path]) -> None:
    expected, path = ARCHITECTURES[name], folder(name)
    skeleton = tiny.skeleton(path)
    layout = lay_out(skeleton, SCHEME, "gptq")
    assert_partition(path, layout)
    assert layout.dropped == layout.kept == []
    prefix = Walk(skeleton).prefix
    linears = {name for group in expected.groups for name in group}
    assert len(layout.jobs) == expected.layers
    for index, jobs in enumerate(layout.jobs):
        assert {job.name for job in jobs} == {f"{prefix}.{index}.{n}" for n in linears}
    for job in layout.all_jobs():
        shape = skeleton.checkpoint.spec(f"{job.disk}.weight").shape
        conv = isinstance(skeleton.model.get_submodule(job.name), Conv1D)
        assert (job.out, job.width) == (shape[::-1] if conv else shape)
        assert job.bias == (f"{job.disk}.bias" in skeleton.checkpoint)
    specs = layout.specs()
    assert set(layout.dense) < set(specs)
    assert all(f"{job.disk}.qweight" in specs for job in layout.all_jobs())
    assert not any(f"{job.disk}.weight" in specs for job in layout.all_jobs())
    assert resident(skeleton) == set()  # planning reads no weights


def test_blocks_stay_together_in_the_output(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path / "deep", num_hidden_layers=11)
    names = list(lay_out(tiny.skeleton(path), SCHEME, "gptq").specs())
    numbers = [int(m[1]) if (m := re.search(r"layers\.(\d+)\.", n)) else -1 for n in names]
    assert numbers == sorted(numbers)
    assert set(numbers) == {-1, *range(11)}


@pytest.mark.parametrize(
    ("before", "after"), [(torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)]
)
def test_dense_tensors_are_stored_in_16_bits(
    before: torch.dtype, after: torch.dtype, tmp_path: Path
) -> None:
    path = tiny.build("qwen2", tmp_path / "model", dtype=before)
    layout = lay_out(tiny.skeleton(path), SCHEME, "gptq")
    assert {spec.dtype for spec in layout.dense.values()} == {after}


def test_linears_that_do_not_fill_words_stay_dense(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path / "narrow", num_key_value_heads=1, head_dim=4)
    # q writes and o reads 16 features, k and v write 4: half of a packed word
    layout = lay_out(tiny.skeleton(path), Scheme(4, 16), "gptq")
    assert len(layout.kept) == 2 * ARCHITECTURES["llama"].layers
    assert all(re.search(r"self_attn\.[kv]_proj$", name) for name in layout.kept)
    assert all(f"{name}.weight" in layout.dense for name in layout.kept)
    assert_partition(path, layout)


def test_group_that_does_not_divide_is_refused_with_the_widths(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path / "odd", intermediate_size=96)
    with pytest.raises(UsageError, match=r"group size 128 .* 64, 96 .*q_proj") as caught:
        lay_out(tiny.skeleton(path), Scheme(4, 128), "gptq")
    assert caught.value.hint == "use --group 32"
    with pytest.raises(UsageError, match=r"widths 96 .*down_proj"):
        lay_out(tiny.skeleton(path), Scheme(4, 64), "gptq")
    lay_out(tiny.skeleton(path), Scheme(4, -1), "gptq")


def test_quantized_input_is_refused(variant: Callable[..., Path]) -> None:
    name = "model.layers.0.mlp.up_proj.qweight"
    path = variant("llama", lambda t: {**t, name: torch.zeros(8, 128, dtype=torch.int32)})
    with pytest.raises(QuantkitError, match=re.escape(f"already quantized ({name})")):
        lay_out(tiny.skeleton(path), SCHEME, "gptq")


def test_quantization_config_is_refused(variant: Callable[..., Path]) -> None:
    path = variant("llama", lambda tensors: tensors)
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(QuantkitError, match=r"already quantized \(config\.json"):
        lay_out(tiny.skeleton(path), SCHEME, "gptq")


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "granitemoe",
        **ARCHITECTURES["llama"].config,
        num_hidden_layers=2,
        num_local_experts=4,
        vocab_size=tiny.VOCABULARY,
    )
    path = tiny.save(AutoModelForCausalLM.from_config(config), tmp_path / "fused")
    with pytest.raises(QuantkitError, match=r"experts\.\w+ holds 4 experts") as caught:
        lay_out(tiny.skeleton(path), SCHEME, "gptq")
    assert "linears of its own" in str(caught.value.hint)
    assert_same_logits(path)  # the walk itself can run them


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight"),
        ("llama", "model.layers.2.input_layernorm.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama_tied", "model.embed_tokens.weight"),
        ("opt", "model.decoder.layers.1.fc1.bias"),
    ],
)
def test_missing_tensor_is_refused_before_any_work(
    architecture: str, name: str, variant: Callable[..., Path]
) -> None:
    path = variant(architecture, without(name))
    with pytest.raises(QuantkitError, match=rf"lacks the tensor {re.escape(name)}"):
        lay_out(tiny.skeleton(path), SCHEME, "gptq")


def test_missing_tensor_is_refused_when_it_is_needed(variant: Callable[..., Path]) -> None:
    gone = [f"model.layers.1.mlp.{linear}_proj.weight" for linear in ("down", "gate")]
    walk = Walk(tiny.skeleton(variant("llama", without(*gone))))
    walk.embed(tiny.batches())
    with walk.block(0):
        pass
    with pytest.raises(QuantkitError, match=r"lacks .*layers\.1\.mlp\.\w+_proj.* and 1 more"):
        walk.block(1).__enter__()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_wrong_shape_is_refused(name: str, variant: Callable[..., Path]) -> None:
    path = variant("llama", lambda t: {**t, name: t[name][:-8].clone()})
    wanted = rf"{re.escape(name)} has the shape \((120|56),.* the model needs \((128|64),"
    with pytest.raises(QuantkitError, match=wanted):
        lay_out(tiny.skeleton(path), SCHEME, "gptq")
    with pytest.raises(QuantkitError, match=wanted):
        walked(tiny.skeleton(path), tiny.batches())


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_encoder_is_refused(kind: str, tmp_path: Path) -> None:
    BertConfig(architectures=[kind]).save_pretrained(tmp_path)
    with pytest.raises(QuantkitError, match=rf"not a causal language model .*{kind}"):
        read_config(Source("bert", tmp_path))


def test_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(QuantkitError, match="nonesuch"):
        read_config(Source("model", tmp_path))


def test_code_from_the_repository_is_refused(variant: Callable[..., Path]) -> None:
    path = variant("llama", lambda tensors: tensors)
    edit_config(path, auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})
    (path / "modeling_evil.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(QuantkitError, match="needs Python code from its repository"):
        tiny.skeleton(path)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"has no config\.json"):
        read_config(Source("nothing", tmp_path))


# ---- statistics of a block


def moments_by_hand(xs: list[Tensor], ds: list[Tensor]) -> tuple[Tensor, Tensor]:
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double()
    d = torch.cat([d.reshape(-1, d.shape[-1]) for d in ds]).double()
    return d.T @ x / len(x), d.mean(0)


def record(block: Block, name: str, hidden: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a linear while all batches run."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []

    def see(x: Tensor, y: Tensor) -> None:
        xs.append(x)
        ys.append(y)

    with block.watching({name: see}, outputs=True):
        gather.advance(block, States([x.clone() for x in hidden]))
    return xs, ys


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
def test_observe_and_drift_are_plain_sums(name: str, folder: Callable[[str], Path]) -> None:
    walk = Walk(tiny.skeleton(folder(name)))
    start = walk.embed(tiny.batches())
    with walk.block(0) as block:
        groups = block.trace(start[0])
        writers = [group for group in groups if group.writes]
        inner, closing = writers[-2:]
        full = States([x.clone() for x in start])
        stats, wanted = gather.observe(block, full, groups, keep=[inner])
        for group in groups:
            xs, _ = record(block, group.names[-1], start)
            gram, mean = moments_by_hand(xs, xs)
            found = stats[group].moments(centred=False)
            torch.testing.assert_close(found.gram.double(), gram, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.mean.double(), mean, rtol=1e-4, atol=1e-5)
        assert len(wanted[inner]) == len(start)

        # the same rows, drifted, through a block whose first linear is off
        moved = States([x * 1.1 + 0.1 for x in start])
        first = block.linear(groups[0].names[0])
        first.weight = torch.nn.Parameter(first.weight * 0.9)
        kept = [x.clone() for x in moved]
        drifted, none = gather.observe_drift(block, moved, wanted, closing, full)
        assert none == {}
        assert all(torch.equal(a, b) for a, b in zip(moved, kept))
        xs, ys = record(block, inner.names[0], moved)
        wants = [w.reshape(y.shape) - y for w, y in zip(wanted[inner], ys)]
        assert_drift(drifted[inner], xs, wants)
        xs, _ = record(block, closing.names[0], moved)
        assert_drift(drifted[closing], xs, [w - block.forward(x) for w, x in zip(full, moved)])


def assert_drift(stats: InputStats, xs: list[Tensor], ds: list[Tensor]) -> None:
    moments = stats.moments(centred=False)
    cross, drift = moments_by_hand(xs, ds)
    assert cross.norm() > 0.1
    torch.testing.assert_close(moments.cross.double(), cross, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(moments.drift.double(), drift, rtol=1e-3, atol=1e-5)


# ---- one block through GPTQ


def _no_other(name: str) -> tuple[Tensor, torch.dtype]:
    raise AssertionError(f"GPTQ changes linears alone, not {name}")


def solve(
    path: Path,
    aligned: bool,
    *,
    dtype: torch.dtype = torch.float32,
    inspect: Callable[[Block, dict[str, Solved], list[Tensor], list[Tensor]], None],
    scheme: Scheme = SCHEME,
    names: list[str] | None = None,
) -> Skeleton:
    """Solve the first block; ``inspect`` sees it before it is emptied, with what the calibration
    rows were in front of it and what they are behind it in the quantized model."""
    skeleton = tiny.skeleton(path, dtype)
    walk = Walk(skeleton)
    start = walk.embed([batch.repeat(4, 1) for batch in tiny.batches()])
    with walk.block(0) as block:
        wanted = [block.forward(x) for x in start]

        def weights(name: str) -> Tensor:
            weight = skeleton.checkpoint.get(skeleton.disk_names[f"{block.name}.{name}.weight"])
            return (weight.T if isinstance(block.linear(name), Conv1D) else weight).float()

        def biases(name: str) -> Tensor | None:
            return block.linear(name).bias

        full = States([x.clone() for x in start])
        quantized = full.copy() if aligned else None
        settings = Gptq(gptq.Options(), align=0.5 if aligned else 0)
        if names is None:
            names = [n for n, module in block.module.named_modules() if is_linear(module)]
        originals = Originals(dict.fromkeys(names, scheme), weights, biases, _no_other)
        solved = solve_block(
            block, settings.look(block, full[0]), originals, full, quantized, settings
        ).linears
        assert all(torch.equal(a, b) for a, b in zip(full, wanted, strict=True))
        after = [block.forward(x) for x in start]
        if quantized is not None:
            assert all(torch.equal(a, b) for a, b in zip(quantized, start, strict=True))
        inspect(block, solved, start, after)
    return skeleton


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "plain"])
@pytest.mark.parametrize(
    "name", ["llama", "gpt_neox", "gpt2", "opt", "phi", "phi3", "gemma2", "falcon", "bloom"]
)
def test_block_is_left_as_its_file_will_be(
    name: str, aligned: bool, folder: Callable[[str], Path]
) -> None:
    expected = {n for group in ARCHITECTURES[name].groups for n in group}

    def inspect(block: Block, solved: dict[str, Solved], *_: object) -> None:
        assert set(solved) == expected
        for inner, result in solved.items():
            linear = block.linear(inner)
            weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
            assert torch.equal(weight, result.qweight.dequantize())
            assert 0 < result.error < 0.05
            assert (result.bias is None) == (linear.bias is None)
            if result.bias is not None:
                assert result.bias.dtype == torch.float16
                assert torch.equal(linear.bias, result.bias.float())

    solve(folder(name), aligned, inspect=inspect)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "plain"])
def test_only_the_named_linears_are_touched(aligned: bool, folder: Callable[[str], Path]) -> None:
    path = folder("opt")
    names = ["self_attn.k_proj", "self_attn.q_proj", "fc2"]

    def inspect(block: Block, solved: dict[str, Solved], *_: object) -> None:
        assert set(solved) == set(names)
        disk = Checkpoint(path)
        for inner, module in block.module.named_modules():
            if is_linear(module):
                original = disk.get(f"{block.name}.{inner}.weight")
                assert torch.equal(module.weight, original) == (inner not in names)

    solve(path, aligned, inspect=inspect, names=names)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "plain"])
def test_linears_that_no_token_reaches_are_rounded(
    aligned: bool, folder: Callable[[str], Path]
) -> None:
    """As the experts of a mixture may be, when none of the text is sent to them."""
    walk = Walk(tiny.skeleton(folder("opt")))
    hidden = walk.embed(tiny.batches())
    spare = torch.nn.Linear(tiny.WIDTH, 16)
    tiny.randomize(spare)
    original = spare.weight.detach().clone()
    with walk.block(0) as block:
        block.module.add_module("spare", spare)
        wanted = [block.forward(x) for x in hidden]
        settings = Gptq(gptq.Options())
        first = States(hidden)
        second = first.copy() if aligned else None
        originals = Originals(
            {"spare": SCHEME}, lambda _: original, lambda _: spare.bias, _no_other
        )
        solved = solve_block(
            block, settings.look(block, first[0]), originals, first, second, settings
        ).linears
        assert set(solved) == {"spare"}
        assert solved["spare"].method == "rtn"
        assert torch.equal(spare.weight, solved["spare"].qweight.dequantize())
        assert torch.equal(spare.bias, solved["spare"].bias.float())
        assert 0 < solved["spare"].error < 0.02
        assert all(torch.equal(a, b) for a, b in zip(hidden, wanted, strict=True))


@pytest.mark.parametrize("scheme", [Scheme(4, 32, False), Scheme(3, 64), Scheme(8, -1)], ids=str)
def test_other_schemes(scheme: Scheme, folder: Callable[[str], Path]) -> None:
    def inspect(block: Block, solved: dict[str, Solved], *_: object) -> None:
        assert len(solved) == 4
        for inner, result in solved.items():
            assert result.qweight.scheme == scheme
            assert torch.equal(block.linear(inner).weight.T, result.qweight.dequantize())

    solve(folder("gpt2"), True, inspect=inspect, scheme=scheme)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "plain"])
def test_quantized_block_stays_near_the_original(
    aligned: bool, folder: Callable[[str], Path]
) -> None:
    path = folder("llama")
    original = Walk(tiny.skeleton(path))

    def inspect(
        block: Block, solved: dict[str, Solved], start: list[Tensor], after: list[Tensor]
    ) -> None:
        original.embed([batch.repeat(4, 1) for batch in tiny.batches()])
        with original.block(0) as dense:
            wanted = [dense.forward(x) for x in start]
        change = torch.cat([(w - x).flatten() for w, x in zip(wanted, start)])
        lost = torch.cat([(w - a).flatten() for w, a in zip(wanted, after)])
        assert 0 < lost.norm() < 0.15 * change.norm()

    solve(path, aligned, inspect=inspect)


def test_biases_take_up_the_mean_error(folder: Callable[[str], Path]) -> None:
    path = folder("gpt_neox")
    inner = "attention.query_key_value"
    walk = Walk(tiny.skeleton(path))

    def inspect(
        block: Block, solved: dict[str, Solved], start: list[Tensor], after: list[Tensor]
    ) -> None:
        walk.embed([batch.repeat(4, 1) for batch in tiny.batches()])
        with walk.block(0) as dense:
            _, wanted = record(dense, inner, start)
        _, found = record(block, inner, start)
        error = torch.cat([(w - f).reshape(-1, w.shape[-1]) for w, f in zip(wanted, found)])
        assert error.abs().max() > 0.02
        assert error.mean(0).abs().max() < 1e-3

    solve(path, True, inspect=inspect)


@pytest.mark.parametrize(("name", "centred"), [("gpt_neox", True), ("llama", False)])
def test_error_is_what_rounding_lost(
    name: str, centred: bool, folder: Callable[[str], Path]
) -> None:
    """Relative to the output; about the means where a bias takes the mean error up."""
    inner = ARCHITECTURES[name].groups[0][0]

    def inspect(
        block: Block, solved: dict[str, Solved], start: list[Tensor], after: list[Tensor]
    ) -> None:
        xs, _ = record(block, inner, start)
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double()
        if centred:
            x = x - x.mean(0)
        weight = Checkpoint(folder(name)).get(f"{block.name}.{inner}.weight").double()
        lost = x @ (weight - solved[inner].qweight.dequantize()).T
        wanted = float(lost.square().sum() / (x @ weight.T).square().sum())
        assert float(solved[inner].error) == pytest.approx(wanted, rel=1e-3)

    solve(folder(name), False, inspect=inspect)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_solving_leaves_the_checkpoint_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights of the disk's own dtype are the file's memory map, which must not be written to: the
    originals would be gone, and every page written to would stay in memory."""
    path = tiny.build("opt", tmp_path / "opt", dtype=dtype)
    skeleton = solve(path, True, dtype=dtype, inspect=lambda *_: None)
    for name, tensor in load_file(path / "model.safetensors").items():
        assert torch.equal(skeleton.checkpoint.get(name), tensor), name
