"""Options that run a container of the service's image, and size limits of the image.

Shared by the image assets, which check the size and print the options, and by the benchmark and tests, which run the
image.
"""

HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
"""Options of `docker run`: no writable root, no capabilities and no way to gain privileges; the service needs none."""
IMAGE_GB = {"cpu": 1.7, "gpu": 6.5}
"""Largest size of an image, 1e9 bytes, by device."""
VLLM_GB = {"cpu": 2.5, "gpu": 12.0}
"""What the environment of vLLM may add to it."""
