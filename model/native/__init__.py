"""The generation engine's step in C++ for CPUs: sources, build script and Python wrapper."""
