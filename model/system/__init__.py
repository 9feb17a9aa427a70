"""The machine: cores and quota, devices and precision, memory allocator."""
