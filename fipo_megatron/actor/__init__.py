"""The actor: the policy on Megatron-Core."""
