"""A Megatron-Core based RL trainer for FIPO (Future-KL Influenced Policy Optimization, arXiv 2603.19835)."""
