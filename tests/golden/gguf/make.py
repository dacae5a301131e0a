"""Makes the files of this folder with the gguf package (0.19.0, numpy 2.4.6): run it in a venv that
has them, from this folder. Nothing of quantkit is imported.

blocks.npz, k_blocks.npz  random bytes of every type, and the float32 values gguf.quants gives them
quantized.npz             what gguf.quants makes of ordinary weights, and its values of that
small.gguf                a file with every kind of value, several types of tensors, alignment 64
big_endian.gguf           the same values, for a machine of the other kind
"""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFEndian, GGUFWriter, quants

SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
random = np.random.default_rng(20261121)


def random_blocks(types, rows, blocks):
    found = {}
    for name in types:
        size = gguf.GGML_QUANT_SIZES[Type[name]][1]
        raw = random.integers(0, 256, (rows, blocks * size), dtype=np.uint8)
        with np.errstate(all="ignore"):  # random float16 scales are sometimes infinite or NaN
            found[f"{name}.values"] = quants.dequantize(raw, Type[name])
        found[f"{name}.raw"] = raw
    return found


def quantized():
    weight = random.standard_normal((3, 96), dtype=np.float32) * np.float32(0.03)
    weight[1, 32:64] = 0  # a block without a scale
    found = {}
    for name in SIMPLE:
        raw = quants.quantize(weight, Type[name])
        found[f"{name}.raw"] = raw
        found[f"{name}.values"] = quants.dequantize(raw, Type[name])
    return found


def write(path, endian):
    writer = GGUFWriter(path, "llama", endianess=endian)
    writer.add_custom_alignment(64)
    writer.add_uint8("a.u8", 255)
    writer.add_int8("a.i8", -128)
    writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -32768)
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -(2**31))
    writer.add_float32("a.f32", 0.1)
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_int64("a.i64", -(2**63))
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.str", "日本の首都")
    writer.add_array("b.strings", ["<s>", "", "日本", "\n"])
    writer.add_array("b.ints", [3, -1, 7])
    writer.add_array("b.floats", [0.5, -1e30])
    writer.add_array("b.bools", [True, False])
    for name, tensor, raw in tensors():
        writer.add_tensor(name, tensor, raw_dtype=raw, tensor_endianess=endian)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors():
    """(name, data, type or None): numbers that a test can say again without this file."""
    yield "f32", np.arange(6, dtype=np.float32).reshape(2, 3) / 4, None
    yield "f16", np.arange(5, dtype=np.float16), None
    yield "experts", np.arange(24, dtype=np.int32).reshape(2, 3, 4), None
    for name, rows, blocks in (("BF16", 1, 2), ("Q4_0", 3, 2), ("Q8_0", 2, 1), ("Q6_K", 2, 1)):
        count = rows * blocks * gguf.GGML_QUANT_SIZES[Type[name]][1]
        raw = (np.arange(count) * 7 % 256).astype(np.uint8).reshape(rows, -1)
        yield name.lower(), raw, Type[name]


if __name__ == "__main__":
    np.savez_compressed("blocks.npz", **random_blocks(SIMPLE, 4, 5))
    np.savez_compressed("k_blocks.npz", **random_blocks(K, 3, 2))
    np.savez_compressed("quantized.npz", **quantized())
    write("small.gguf", GGUFEndian.LITTLE)
    write("big_endian.gguf", GGUFEndian.BIG)
