"""Hugging Face and Megatron weights: which tensor is where. Importable without Megatron or CUDA."""
