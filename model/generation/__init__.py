"""The generation engine: KV cache, sampling, text that is cut only between whole characters. No web code."""
