"""Running models: the block-by-block walk, the one loader, quantized linears, decoding."""
