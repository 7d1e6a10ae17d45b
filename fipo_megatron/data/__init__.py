"""Plain data: prompts, trajectories, groups, and their packing and slicing. No torch.distributed, no Megatron."""
