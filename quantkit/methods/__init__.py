"""Quantization mathematics: tensors in, QWeight out. No files, no models, no packing."""
