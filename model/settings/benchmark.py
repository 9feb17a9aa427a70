"""What the benchmark report measures (`configs/benchmark/`)."""

from dataclasses import dataclass

from model.settings.option import Settings, expect, option

_MAX_POINTS = 32


@dataclass
class BenchmarkSettings(Settings, group="benchmark"):
    """What the benchmark report measures (`configs/benchmark/`)."""

    generated_tokens: list[int] = option(
        [64, 256, 1024],
        "Lengths generated from a one-token prompt, with and without KV cache.",
        unit="tokens",
        above=0,
        maximum=2**20,
    )
    prefill_tokens: list[int] = option(
        [64, 256, 1000], "Prompt lengths, each prefilled in one pass.", unit="tokens", above=0, maximum=2**20
    )
    batch_sizes: list[int] = option([1, 4, 8], "Sequences decoded at once.", unit="sequences", above=0, maximum=4096)
    batch_tokens: int = option(
        64, "Tokens that each sequence of a batch generates.", unit="tokens", above=0, maximum=2**20
    )
    repeats: int = option(3, "Interleaved rounds; the report gives the median.", unit="rounds", above=0, maximum=1000)
    quality_windows: int = option(
        64,
        "Validation windows for bits per byte, full precision against quantized.",
        unit="windows",
        above=0,
        maximum=10**9,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generated_tokens", "prefill_tokens", "batch_sizes"):
            values = getattr(self, name)
            fits = 0 < len(values) <= _MAX_POINTS
            expect(fits, f"benchmark.{name}", values, f"a list of numbers greater than 0, 1 to {_MAX_POINTS} of them")
