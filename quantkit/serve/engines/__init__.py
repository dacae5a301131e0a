"""One file per engine. They are imported when they are chosen."""

NAMES = ("torch", "llama.cpp", "vllm")
