"""Bit layouts on disk: a QWeight to named tensors and back. No mathematics."""
