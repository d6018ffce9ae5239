"""Channel-separated residual networks for video: ir-CSN (Tran et al., ICCV 2019).

``[B, T, H, W, 3]`` becomes three maps: ``[B, T/2, H/8, W/8, 512]``, ``[B, T/4, H/16, W/16, 1024]`` and ``[B, T/8,
H/16, W/16, 2048]``, lengths rounded up. Behind the stem, convolutions either look around, each channel by itself, or
mix the channels of one place.

Every parameter fits the weights that were published for Caffe2, and those of the detectors that started from them.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.batch import Array
from vad_jax.layers.conv3d import BatchNorm, Conv3D, DepthwiseConv3D, Size, max_pool

VARIANTS: dict[str, dict[str, Any]] = {
  "csn152": {"depths": (3, 8, 36, 3)},
  "csn50": {"depths": (3, 4, 6, 3)},
  "tiny": {"depths": (1, 1, 1, 1), "width": 16},
}
EPSILON = 1e-3  # of all norms


class CSN(nnx.Module):
  """The network without a classifier.

  Attributes:
    conv1, norm1: the stem.
    stages: their blocks.
    widths: channels of the maps that come out.
  """

  def __init__(
    self,
    *,
    depths: Sequence[int],
    width: int = 64,
    last_stride: bool = False,
    norm: Literal["frozen", "batch"] = "frozen",
    remat: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      depths: number of blocks of each of the four stages.
      width: channels of the stem.
      last_stride: the last stage has 32 pixels a cell, else 16.
      norm: with ``batch``, training normalises by the statistics of the batch; with ``frozen``, by the running ones.
      remat: recompute blocks in the backward pass instead of storing their activations.
      dtype: computation type; None follows the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: there is no such norm, or the stages are not four.
    """
    if norm not in ("frozen", "batch"):
      raise ValueError(f"unknown norm {norm!r}: choose frozen or batch")
    if len(depths) != 4:
      raise ValueError(f"depths {tuple(depths)}: CSN has four stages")
    self.remat, frozen = remat, norm == "frozen"
    padding = ((1, 1), (3, 3), (3, 3))
    self.conv1 = Conv3D(3, width, (3, 7, 7), stride=(1, 2, 2), padding=padding, dtype=dtype, rngs=rngs)
    self.norm1 = BatchNorm(width, epsilon=EPSILON, frozen=frozen, rngs=rngs)
    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2) if last_stride else (2, 1, 1))
    channels, self.stages = width, nnx.List([])
    for stage, (depth, stride) in enumerate(zip(depths, strides, strict=True)):
      blocks, features = nnx.List([]), width * 2**stage
      for index in range(depth):
        step = (1, 1, 1) if index else stride
        blocks.append(Bottleneck(channels, features, step, frozen=frozen, dtype=dtype, rngs=rngs))
        channels = 4 * features
      self.stages.append(blocks)
    self.widths = 8 * width, 16 * width, 32 * width

  def layers(self, video: Array) -> Iterator[Array]:
    """Maps ``[B, t, h, w, C]``: after the stem, then each stage."""
    x = jax.nn.relu(self.norm1(self.conv1(video)))
    x = max_pool(x, (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1)))
    yield x
    run = nnx.remat(Bottleneck.__call__) if self.remat else Bottleneck.__call__
    for blocks in self.stages:
      for block in blocks:
        x = run(block, x)
      yield x

  def __call__(self, video: Array) -> list[Array]:
    """Normalised video ``[B, T, H, W, 3]`` to the maps ``[B, t, h, w, C]`` of the last three stages."""
    return list(self.layers(video))[2:]


class Bottleneck(nnx.Module):
  """Residual block: to few channels, a depthwise convolution, to many channels.

  Layers have their published numbers; a ``conv2`` is in other kinds of CSN only.
  """

  def __init__(self, channels: int, width: int, stride: Size, *, frozen: bool, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    def norm(features: int) -> BatchNorm:
      return BatchNorm(features, epsilon=EPSILON, frozen=frozen, rngs=rngs)

    self.conv1, self.norm1 = Conv3D(channels, width, (1, 1, 1), dtype=dtype, rngs=rngs), norm(width)
    self.conv3, self.norm3 = DepthwiseConv3D(width, stride=stride, dtype=dtype, rngs=rngs), norm(width)
    self.conv4, self.norm4 = Conv3D(width, 4 * width, (1, 1, 1), dtype=dtype, rngs=rngs), norm(4 * width)
    self.shortcut = (
      nnx.Sequential(Conv3D(channels, 4 * width, (1, 1, 1), stride=stride, dtype=dtype, rngs=rngs), norm(4 * width))
      if channels != 4 * width
      else None
    )

  def __call__(self, x: Array) -> Array:
    """``[B, T, H, W, C]`` to ``[B, t, h, w, 4 * width]``."""
    y = jax.nn.relu(self.norm1(self.conv1(x)))
    y = jax.nn.relu(self.norm3(self.conv3(y)))
    return jax.nn.relu(self.norm4(self.conv4(y)) + (x if self.shortcut is None else self.shortcut(x)))


# --- Published weights ----------------------------------------------------------------------------------------------

_PATH = r"(?:stages\.(\d)\.(\d+)\.)?(conv|norm|shortcut\.layers\.)(\d)\.(\w+)"


def _torch_name(path: re.Match[str]) -> str:
  stage, index, unit, number, leaf = path.groups()
  block = f"layer{int(stage) + 1}.{index}." if stage else ""
  unit = {"conv": "conv", "norm": "bn"}.get(unit, "down_sample.")
  return f"{block}{unit}{number}." + {"mean": "running_mean", "var": "running_var"}.get(leaf, leaf)


# (our path, published name) as regular expressions, see vad_jax.convert. Detectors, without the ``backbone.0.body.``
# before their names:
REFERENCE_NAMES = ((_PATH, _torch_name),)


def caffe2_names(depths: Sequence[int]) -> tuple[tuple[str, Callable[[re.Match[str]], str]], ...]:
  """The same for Caffe2's files, which number the blocks of all stages in one row."""

  def name(path: re.Match[str]) -> str:
    stage, index, unit, number, leaf = path.groups()
    leaf = {"weight": "s", "bias": "b", "mean": "rm", "var": "riv"}[leaf]
    if stage is None:
      return "conv1_w" if unit == "conv" else f"conv1_spatbn_relu_{leaf}"
    block = sum(depths[: int(stage)]) + int(index)
    if unit == "conv":
      return f"comp_{block}_conv_{number}_w"
    if unit == "norm":
      return f"comp_{block}_spatbn_{number}_{leaf}"
    return f"shortcut_projection_{block}_" + ("w" if number == "0" else f"spatbn_{leaf}")

  return ((_PATH, name),)


def reference_arguments(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Arguments of the constructor for published weights, from the shapes of their tensors in either layout.

  Shapes do not tell ``last_stride``.
  """
  if "conv1_w" in shapes:
    firsts = [int(match[1]) for name in shapes if (match := re.fullmatch(r"shortcut_projection_(\d+)_w", name))]
    blocks = sum(name.endswith("_conv_1_w") for name in shapes)
    return {"depths": tuple(np.diff([*sorted(firsts), blocks]).tolist()), "width": shapes["conv1_w"][0]}
  stages = [re.findall(rf"^layer{stage}\.\d+\.conv1\.weight$", "\n".join(shapes), re.M) for stage in range(1, 5)]
  return {"depths": tuple(map(len, stages)), "width": shapes["conv1.weight"][0]}
