"""Speculative decoding: tokens that may come next are proposed, and one step checks them all.

The text itself (`repetition.py`) or a smaller model (`draft.py`) proposes. The step chooses a token after each proposed
one as it would without a proposal, from the same logits and with the random number of that position; the scheduler
keeps the chosen ones up to the first that differs from the proposal. So texts are the same to the bit, if the step is
batch invariant (`Step.is_batch_invariant`).
"""
