"""The learning-rate schedule: warm-up, stable, linear decay."""


def warmup_stable_decay(step: int, *, warmup_steps: int, decay_steps: int, max_steps: int) -> float:
    """Factor on the base learning rate at 0-based `step`: linear up, constant, linear down to 0 at `max_steps`.

    The first step already learns (factor 1 / warmup_steps) and the last one still does (1 / decay_steps).
    """
    up = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    down = (max_steps - step) / decay_steps if step > max_steps - decay_steps else 1.0
    return max(0.0, min(up, down))
