"""The optimizer: Muon's orthogonalization, Muon with AdamW behind one torch optimizer, the learning-rate schedule."""
