"""What lets a detector learn from nothing: first guesses that are not absurd, and a loss that needs no matching.

Published detectors start from large pre-trained networks. From random numbers, matched queries move for thousands of
steps without learning anything. Small variants therefore begin with boxes that are spread over the frame, take actors
and actions for rare, look around their boxes where they attend to a map (``Decoder.start_from_scratch`` of class
queries), and in training every cell of a map says what is there, see ``losses.dense_detection_loss``.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

RARE = -math.log(19)  # logit of 5 %: what is first thought of every actor and action


def spread_boxes(count: int) -> np.ndarray:
  """Boxes ``[count, 4]``, cxcywh in [0, 1], of standing people from left to right, near and far ones in turn."""
  place = (np.arange(count) // 2 + 0.5) / ((count + 1) // 2)
  size = np.where(np.arange(count)[:, None] % 2, [0.4, 0.8], [0.25, 0.6])
  return np.concatenate([place[:, None], np.full((count, 1), 0.55), size], axis=1)


def dense_head(width: int, num_classes: int, rngs: nnx.Rngs) -> nnx.Linear:
  """What ``losses.dense_detection_loss`` wants of each cell ``[..., width]``: ``[..., 1 + 4 + K]``.

  Actors and actions are rare first, and boxes reach two strides to every side.
  """
  bias = jnp.full(5 + num_classes, RARE).at[1:5].set(math.log(2))
  return nnx.Linear(width, 5 + num_classes, bias_init=lambda key, shape, dtype: bias.astype(dtype), rngs=rngs)
