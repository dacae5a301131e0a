"""Made the file beside it with mlx 0.32.4 on Linux, by mx.quantize and mx.dequantize.

pip install "mlx[cpu]" numpy
python make.py
"""

from pathlib import Path

import mlx.core as mx

HERE = Path(__file__).parent
CASES = [
    (2, 32, mx.float16),
    (2, 128, mx.float32),
    (3, 64, mx.bfloat16),
    (3, 32, mx.float32),
    (4, 64, mx.float16),
    (4, 32, mx.bfloat16),
    (4, 128, mx.float32),
    (5, 32, mx.float16),
    (5, 64, mx.float32),
    (6, 128, mx.bfloat16),
    (6, 32, mx.float32),
    (8, 64, mx.float16),
    (8, 128, mx.bfloat16),
]

tensors = {}
for seed, (bits, size, dtype) in enumerate(CASES):
    # the last row is all positive: MLX then has other signs of scales
    weight = mx.random.normal((3, 256), key=mx.random.key(seed)) * 0.05
    weight = mx.concatenate([weight, mx.abs(weight[:1])]).astype(dtype)
    packed = mx.quantize(weight, group_size=size, bits=bits)
    name = f"b{bits}.g{size}.{str(dtype).rpartition('.')[2]}"
    for suffix, tensor in zip(("weight", "scales", "biases"), packed):
        tensors[f"{name}.{suffix}"] = tensor
    tensors[f"{name}.dequantized"] = mx.dequantize(*packed, group_size=size, bits=bits)
mx.save_safetensors(str(HERE / "affine.safetensors"), tensors)
