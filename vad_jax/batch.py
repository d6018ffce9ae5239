"""The two structures that every part of the library speaks: what goes into a model and what comes out.

All arrays are numpy on the host and JAX on the device; shapes are static, and rows that pad them are marked, so that
they never change a loss or a detection.
"""

from typing import Any, NamedTuple, NotRequired, TypedDict

Array = Any  # numpy.ndarray or jax.Array


class Batch(TypedDict):
  """Clips and their annotations, padded to static shapes.

  Attributes:
    video: ``[B, T, H, W, 3]`` uint8 RGB, zero-padded at the right and bottom; the model normalises it on the device. A
      floating-point video is taken as already normalised.
    video_size: ``[B, 2]`` int32 height and width in pixels before padding.
    boxes: ``[B, M, 4]`` float32 xyxy in [0, 1] of the unpadded frame; tube models ``[B, T, M, 4]``.
    labels: ``[B, M, K]`` float32 multi-hot; tube models ``[B, T, M, K]``.
    box_mask: ``[B, M]`` bool, False for padding; tube models ``[B, T, M]``.
    key: ``[B]`` int32 index of the example in its dataset; -1 marks a row that only fills up the batch.
    proposals: ``[B, P, 4]`` float32 given person boxes, for systems that take them.
    proposal_mask: ``[B, P]`` bool.
    proposal_score: ``[B, P]`` float32 probability that a given box holds a person, where it is known.
  """

  video: Array
  video_size: Array
  boxes: Array
  labels: Array
  box_mask: Array
  key: Array
  proposals: NotRequired[Array]
  proposal_mask: NotRequired[Array]
  proposal_score: NotRequired[Array]


class Detections(NamedTuple):
  """What a model found. Nothing is dropped: the caller applies thresholds.

  Attributes:
    boxes: ``[B, N, 4]`` float32 xyxy clipped to [0, 1] of the unpadded frame; tube models ``[B, T, N, 4]``.
    actor_score: ``[B, N]`` probability that the box holds an actor; tube models ``[B, T, N]``.
    action_score: ``[B, N, K]`` probability of each action; tube models ``[B, T, N, K]``.
    valid: ``[B, N]`` bool, False for slots that hold no detection at all (padding).
  """

  boxes: Array
  actor_score: Array
  action_score: Array
  valid: Array
