"""Inflated 3-D Inception for RGB video: I3D (Carreira and Zisserman, CVPR 2017).

``[B, T, H, W, 3]`` in [-1, 1] becomes features of a chain of named endpoints: ``[B, T/4, H/16, W/16, 832]`` at
``Mixed_4f``, where detectors take off, and ``[B, T/8, H/32, W/32, 1024]`` at ``Mixed_5c``, the last one. Any size of
video will do, since everything is padded as in TensorFlow: lengths are rounded up.

Every parameter fits the official code's (kinetics-i3d): convolutions without bias, batch normalisation without scale.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from vad_jax.batch import Array
from vad_jax.layers.conv3d import BatchNorm, Conv3D, Size, max_pool

Norm = Literal["frozen", "batch"]

# Features, window and stride of a convolution; window and stride of a pooling; of a Mixed endpoint the features of its
# convolutions: 1x1, then two times 1x1 and behind it 3x3, then 1x1 behind pooling.
ENDPOINTS: dict[str, tuple[Any, ...]] = {
  "Conv3d_1a_7x7": (64, (7, 7, 7), (2, 2, 2)),
  "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
  "Conv3d_2b_1x1": (64, (1, 1, 1), (1, 1, 1)),
  "Conv3d_2c_3x3": (192, (3, 3, 3), (1, 1, 1)),
  "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
  "Mixed_3b": (64, 96, 128, 16, 32, 32),
  "Mixed_3c": (128, 128, 192, 32, 96, 64),
  "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
  "Mixed_4b": (192, 96, 208, 16, 48, 64),
  "Mixed_4c": (160, 112, 224, 24, 64, 64),
  "Mixed_4d": (128, 128, 256, 24, 64, 64),
  "Mixed_4e": (112, 144, 288, 32, 64, 64),
  "Mixed_4f": (256, 160, 320, 32, 128, 128),
  "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
  "Mixed_5b": (256, 160, 320, 32, 128, 128),
  "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
TRUNK_END = "Mixed_4f"  # of detectors; their head goes on from there


class Chain(nnx.Module):
  """Consecutive endpoints, each of which is an attribute unless it only pools.

  Attributes:
    features: channels of the last one.
  """

  def __init__(
    self,
    names: Sequence[str],
    channels: int,
    *,
    norm: Norm,
    width: float,
    remat: bool,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    if norm not in get_args(Norm):
      raise ValueError(f"no norm {norm!r}: choose one of {', '.join(get_args(Norm))}")
    self.names, self.remat = tuple(names), remat
    for name in names:
      if name.startswith("Conv"):
        features, window, stride = ENDPOINTS[name]
        layer = Unit(channels, _scaled(features, width), window, stride=stride, norm=norm, dtype=dtype, rngs=rngs)
      elif name.startswith("Mixed"):
        features = [_scaled(features, width) for features in ENDPOINTS[name]]
        layer = Mixed(channels, features, norm=norm, dtype=dtype, rngs=rngs)
      else:
        continue
      setattr(self, name, layer)
      channels = layer.features
    self.features = channels

  def endpoints(self, x: Array) -> Iterator[tuple[str, Array]]:
    """Names and features of one endpoint after the other."""
    for name in self.names:
      if name.startswith("MaxPool"):
        x = max_pool(x, *ENDPOINTS[name])
      else:
        layer = getattr(self, name)
        call = type(layer).__call__
        x = (nnx.remat(call) if self.remat else call)(layer, x)
      yield name, x

  def __call__(self, x: Array) -> Array:
    """``[B, T, H, W, C]`` to the features of the last endpoint ``[B, t, h, w, features]``."""
    *_, (_, x) = self.endpoints(x)
    return x


class I3D(Chain):
  """The network up to an endpoint, and the classifier of clips where there are classes."""

  def __init__(
    self,
    *,
    final_endpoint: str = "Mixed_5c",
    num_classes: int = 0,
    norm: Norm = "frozen",
    width: float = 1.0,
    remat: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      final_endpoint: the last of ``ENDPOINTS`` to compute.
      num_classes: of the classifier; 0 for none.
      norm: ``frozen`` normalises by the running statistics even in training, to fine-tune published weights; ``batch``
        by those of the batch, to train from scratch.
      width: factor of all channels, for small models.
      remat: recompute endpoints in the backward pass instead of storing what is inside of them.
      dtype: computation type; None follows the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: there is no such endpoint or norm, or the classifier would not get the features of the last one.
    """
    names = list(ENDPOINTS)
    if final_endpoint not in names:
      raise ValueError(f"I3D has no endpoint {final_endpoint!r}: choose one of {', '.join(names)}")
    if num_classes and final_endpoint != names[-1]:
      raise ValueError(f"the classifier of I3D needs final_endpoint={names[-1]!r}, not {final_endpoint!r}")
    names = names[: names.index(final_endpoint) + 1]
    super().__init__(names, 3, norm=norm, width=width, remat=remat, dtype=dtype, rngs=rngs)
    self.logits = nnx.Linear(self.features, num_classes, dtype=dtype, rngs=rngs) if num_classes else None

  def classify(self, features: Array) -> Array:
    """Features of ``Mixed_5c`` to logits ``[B, K]``, the mean over all places of an average pool's 2 x 7 x 7 window.

    Raises:
      ValueError: there is no such place, or no classifier.
    """
    if self.logits is None:
      raise ValueError("I3D was built without a classifier: set num_classes")
    if any(n < least for n, least in zip(features.shape[1:4], (2, 7, 7), strict=True)):
      raise ValueError(f"features {features.shape[1:4]}: I3D classifies from 2 x 7 x 7 on (a video of 9 x 193 x 193)")
    return self.logits(nnx.avg_pool(features, (2, 7, 7))).mean((1, 2, 3))


class I3DHead(Chain):
  """What comes behind ``Mixed_4f``, for the features of regions: ``[R, t, h, w, 832]`` to ``[R, t/2, h/2, w/2, 1024]``.

  Its parameters are those of I3D of the same names.
  """

  def __init__(
    self,
    *,
    norm: Norm = "frozen",
    width: float = 1.0,
    remat: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the head; for the arguments see ``I3D``."""
    names = list(ENDPOINTS)
    start = names.index(TRUNK_END)
    b0, _, b1, _, b2, b3 = (_scaled(features, width) for features in ENDPOINTS[TRUNK_END])
    channels = b0 + b1 + b2 + b3
    super().__init__(names[start + 1 :], channels, norm=norm, width=width, remat=remat, dtype=dtype, rngs=rngs)


class Unit(nnx.Module):
  """Convolution, batch normalisation without scale, ReLU."""

  def __init__(
    self,
    channels: int,
    features: int,
    window: Size,
    *,
    stride: Size = (1, 1, 1),
    norm: Norm,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    self.features = features
    self.conv = Conv3D(channels, features, window, stride=stride, dtype=dtype, rngs=rngs)
    self.norm = BatchNorm(features, scale=False, epsilon=1e-3, frozen=norm == "frozen", dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """``[B, T, H, W, C]`` to ``[B, t, h, w, features]``."""
    return jax.nn.relu(self.norm(self.conv(x)))


class Mixed(nnx.Module):
  """Inception block: four branches beside each other."""

  def __init__(self, channels: int, features: Sequence[int], *, norm: Norm, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    def unit(channels: int, features: int, side: int = 1) -> Unit:
      return Unit(channels, features, (side, side, side), norm=norm, dtype=dtype, rngs=rngs)

    b0, b1a, b1b, b2a, b2b, b3b = features
    self.features = b0 + b1b + b2b + b3b
    self.b0 = unit(channels, b0)
    self.b1a, self.b1b = unit(channels, b1a), unit(b1a, b1b, 3)
    self.b2a, self.b2b = unit(channels, b2a), unit(b2a, b2b, 3)
    self.b3b = unit(channels, b3b)

  def __call__(self, x: Array) -> Array:
    """``[B, T, H, W, C]`` to ``[B, T, H, W, features]``."""
    pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
    return jnp.concatenate([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], axis=-1)


def _scaled(features: int, width: float) -> int:
  return max(int(width * features), 1)


# --- Published weights ----------------------------------------------------------------------------------------------

_BRANCHES = {
  "b0": "Branch_0/Conv3d_0a_1x1",
  "b1a": "Branch_1/Conv3d_0a_1x1",
  "b1b": "Branch_1/Conv3d_0b_3x3",
  "b2a": "Branch_2/Conv3d_0a_1x1",
  "b2b": "Branch_2/Conv3d_0b_3x3",
  "b3b": "Branch_3/Conv3d_0b_1x1",
}
_LEAVES = {
  "conv.weight": "conv_3d/w",
  "norm.bias": "batch_norm/beta",
  "norm.mean": "batch_norm/moving_mean",
  "norm.var": "batch_norm/moving_variance",
}


def _tensorflow_name(match: re.Match[str]) -> str:
  endpoint, branch, leaf = match.groups()
  parts = [endpoint, _BRANCHES[branch]] if branch else [endpoint]
  name = "/".join([*parts, _LEAVES[leaf]])
  # One 3x3 convolution is called as if it came first.
  return name.replace("Mixed_5b/Branch_2/Conv3d_0b", "Mixed_5b/Branch_2/Conv3d_0a")


# (our path, published name) as regular expressions, see vad_jax.convert. Checkpoints of kinetics-i3d, whose kernels are
# laid out as ours:
TENSORFLOW_NAMES = (
  (r"(\w+?)(?:\.(b\d[ab]?))?\.((?:conv|norm)\.\w+)", _tensorflow_name),
  (r"logits\.weight", "Logits/Conv3d_0c_1x1/conv_3d/w"),
  (r"logits\.bias", "Logits/Conv3d_0c_1x1/conv_3d/b"),
)
# The same converted to PyTorch, where batch normalisation has got a scale, of ones:
PYTORCH_NAMES = (
  (r"(.*)\.conv\.weight", r"\1.conv3d.weight"),
  (r"(.*)\.norm\.bias", r"\1.bn.bias"),
  (r"(.*)\.norm\.(mean|var)", r"\1.bn.running_\2"),
  (r"logits\.(.*)", r"logits.conv3d.\1"),
)


def reference_arguments(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Arguments of the constructor for published weights, from the shapes of their tensors in either layout."""
  if "Conv3d_1a_7x7/conv_3d/w" in shapes:
    *_, features = shapes["Conv3d_1a_7x7/conv_3d/w"]
  else:
    features, *_ = shapes["Conv3d_1a_7x7.conv3d.weight"]
  return {"width": features / ENDPOINTS["Conv3d_1a_7x7"][0]}
