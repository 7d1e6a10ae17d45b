"""The algorithm in plain torch, on CPU or GPU. It imports nothing else of this package, no Megatron and no CUDA."""
