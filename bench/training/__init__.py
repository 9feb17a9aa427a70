"""Training compared with nanoGPT and transformers' Trainer; costs of a step, a checkpoint and a resume."""
