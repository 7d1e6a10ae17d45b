"""The mapping between Hugging Face and Megatron weights. Importable without Megatron or CUDA."""
