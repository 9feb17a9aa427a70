"""The generation service: a BentoML service whose routes call the engine in `model.generation`."""
