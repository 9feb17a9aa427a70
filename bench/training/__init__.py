"""Training against peers: nanoGPT and the Trainer's Llama, and what a step, a checkpoint and a resume cost."""
