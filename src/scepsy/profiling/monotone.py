"""Times that never fall: measured or tabulated step times carry noise, a step with more work does not get faster."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def monotone(values: ArrayLike) -> NDArray[np.float64]:
    """The values with every fall along any axis taken out.

    The mean of the running maximum from the front and the running minimum from the back: both never fall, the first
    lies above the values and the second below, so noise of either sign is halved instead of being pushed one way.
    Values that never fall come back unchanged.
    """
    upper = np.array(values, dtype=np.float64)
    lower = upper.copy()
    for axis in range(upper.ndim):
        upper = np.maximum.accumulate(upper, axis=axis)
        lower = np.flip(np.minimum.accumulate(np.flip(lower, axis=axis), axis=axis), axis=axis)
    return (upper + lower) / 2
