"""The systems, by name, and the contract that each of them keeps."""

from typing import Any, Protocol

from flax import nnx

from vad_jax.batch import Array, Batch, Detections
from vad_jax.models.action_transformer import ActionTransformer
from vad_jax.models.bmvit import BMViT
from vad_jax.models.class_query import ClassQuery
from vad_jax.models.evad import EVAD
from vad_jax.models.st_context import SpatioTemporalContext

MODELS = {
  "evad": EVAD,
  "class_query": ClassQuery,
  "bmvit": BMViT,
  "action_transformer": ActionTransformer,
  "st_context": SpatioTemporalContext,
}


class System(Protocol):
  """What training, evaluation and prediction ask of a model. There is no base class: a model just has these members.

  A model with something to see has ``maps(out, batch)`` as well, which gives maps of the padded keyframe, the frame
  at ``T // 2``, by name: ``[B, h, w]``, or ``[B, h, w, 3]`` colours, in [0, 1]; ``attention`` is ``[B, N, K, h, w]``,
  not negative: where was looked to judge class ``k`` of slot ``n``, or ``[B, N, 1, h, w]`` where it is one for all
  classes. One that classifies given boxes has ``takes_proposals = True``. The shape of its detections tells if it
  answers for every frame of a clip.

  Attributes:
    class_parameters: regular expression of the paths of parameters whose shape follows the number of classes.
  """

  class_parameters: str

  def __call__(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> dict[str, Any]:
    """Runs the network. Returns every tensor worth looking at by name; jit prunes the unused."""
    ...

  def costs(self, out: dict[str, Any], batch: Batch) -> Array | None:
    """Matching costs ``[..., N, M]`` of all layers, images and frames at once, or None where nothing is matched."""
    ...

  def loss(self, out: dict[str, Any], batch: Batch, match: Array | None) -> tuple[Array, dict[str, Array]]:
    """Scalar loss and its named terms, given the match mask: bool, of the shape of ``costs``."""
    ...

  def detections(self, out: dict[str, Any], batch: Batch) -> Detections:
    """Boxes and scores of the whole batch."""
    ...


def build(name: str, *, rngs: nnx.Rngs, **kwargs: Any) -> Any:
  """Builds a system.

  Args:
    name: one of ``MODELS``.
    rngs: source of the initial parameters.
    **kwargs: what the model's constructor takes.

  Raises:
    ValueError: the name is not known.
  """
  if name not in MODELS:
    raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
  return MODELS[name](rngs=rngs, **kwargs)
