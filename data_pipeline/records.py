"""What goes through the pipeline beside the pixels of a training sample, and from there into the ledger.

A record is int64 [8]: (epoch, sample id, y, x, height, width, flip, id of the sample shown). The last differs from the
second where that sample was damaged; the box and the flip are those of the sample shown.
"""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.augment import Augmented

EPOCH, SAMPLE, SHOWN = 0, 1, 7


def training_records(
    epochs: NDArray[np.int64], ids: NDArray[np.int64], shown: NDArray[np.int64], drawn: Augmented
) -> NDArray[np.int64]:
    """The records of n samples, int64 [n, 8]."""
    return np.column_stack([epochs, ids, drawn.boxes, drawn.flips, shown]).astype(np.int64)


def substitutes(records: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [number, 3], (epoch, sample id, id of the sample shown) of those records where the two ids differ."""
    return records[records[:, SAMPLE] != records[:, SHOWN]][:, [EPOCH, SAMPLE, SHOWN]]
