"""The step of the generation engine in C++, for processors: sources, the program that compiles them, and their wrapper."""
