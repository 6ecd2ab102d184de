"""The size of training images as a pure function of the step: that of the recipe, or progressive resizing."""

import math

from configs.schema import Input


def size_at(config: Input, batch_size: int, num_samples: int, step: int) -> int:
    """The side, in pixels, of the images of optimizer step `step` (from 0), for a training split of `num_samples`.

    FFCV's schedule (Leclerc et al. 2023; `get_resolution` in libffcv/ffcv-imagenet): linear from the start to the end,
    to the nearest multiple; here by step rather than by epoch, a half rounded up.
    """
    progressive = config.progressive
    if progressive is None:
        return config.training_size
    first, last = progressive.start_size, progressive.end_size or config.training_size
    start, end = (length.steps(batch_size, num_samples) for length in (progressive.start, progressive.end))
    if step >= end:
        return last
    if step <= start:
        return first
    grown = first + (last - first) * (step - start) / (end - start)
    nearest = math.floor(grown / progressive.multiple + 0.5) * progressive.multiple
    return min(max(nearest, first), last)
