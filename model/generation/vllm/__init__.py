"""vLLM behind the engine's interface: a separate process, in a separate environment, computes all requests."""
