"""Ratio: a mean over part of a batch that can be averaged like any other metric."""

from typing import NamedTuple

import jax
import numpy as np


class Ratio(NamedTuple):
    """The mean of v over the examples with m = 1, kept as two means over all examples.

    total = mean_i m_i v_i,  count = mean_i m_i,  and the mean over the part is total / count.
    Microbatches, devices and log rows average both and divide last; means of quotients would
    count a part that is small by chance as much as a large one.

    Attributes:
      total: [] float32.
      count: [] float32 in [0, 1], the part's share of the examples; at 0 there is no mean.
    """

    total: jax.Array | np.ndarray
    count: jax.Array | np.ndarray
