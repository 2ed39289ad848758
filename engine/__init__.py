"""What a run stands on: how it starts, its folder, checkpoints, log, ranks, and text generation."""
