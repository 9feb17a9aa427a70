"""The schedules of the learning rate and of Muon's momentum: warm-up, stable, linear decay."""


def warmup_stable_decay(step: int, *, warmup_steps: int, decay_steps: int, max_steps: int, floor: float = 0.0) -> float:
    """Factor on the base learning rate at 0-based `step`: linear up, constant, linear down to `floor` at `max_steps`.

    The factor is nonzero at the first step (1 / warmup_steps) and at the last (1 / decay_steps).
    """
    up = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    down = floor + (1 - floor) * (max_steps - step) / decay_steps if step > max_steps - decay_steps else 1.0
    return max(0.0, min(up, down))


def muon_momentum(
    step: int, *, start: float, peak: float, warmup_steps: int, decay_steps: int, max_steps: int
) -> float:
    """Muon's momentum at 0-based `step`: linear from `start` up to `peak`, constant, and down to `start` in the decay.

    With warmup_steps 0 it is `peak` throughout.
    """
    if not warmup_steps:
        return peak
    factor = warmup_stable_decay(step, warmup_steps=warmup_steps, decay_steps=decay_steps, max_steps=max_steps)
    return start + (peak - start) * factor
