"""Plain data: trajectories, and how they are packed and sliced. No torch.distributed, no Megatron."""
