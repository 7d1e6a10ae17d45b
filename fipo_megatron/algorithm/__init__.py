"""The algorithm in plain torch, on CPU or GPU: imports nothing else of this package and neither Megatron nor CUDA."""
