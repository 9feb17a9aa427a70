"""The generation engine: KV cache, scheduling, sampling, detokenization to whole characters. No web code."""
