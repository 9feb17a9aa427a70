"""The generation engine's step in C++, for CPUs: sources, the program that compiles them, and their wrapper."""
