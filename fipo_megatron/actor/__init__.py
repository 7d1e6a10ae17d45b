"""All that touches Megatron."""
