"""The steps of the engine: one interface, and the ways to compute it: PyTorch on any device, C++ on a CPU."""
