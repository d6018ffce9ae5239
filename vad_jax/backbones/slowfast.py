"""SlowFast: two residual networks that see one clip at two frame rates (Feichtenhofer et al., ICCV 2019).

The fast pathway takes all frames ``[B, T, H, W, 3]`` and is thin, the slow one takes ``T / alpha`` of them and is wide;
after the stem and every stage but the last, what the fast one found joins the slow one. No stage strides over time.

Every parameter fits PySlowFast's, whose code this follows. In its detectors the last stage keeps the resolution of the
one before and is dilated instead; its classifiers of clips have the same parameters and no dilation.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.batch import Array
from vad_jax.layers.conv3d import BatchNorm, Conv3D, Size, max_pool

VARIANTS: dict[str, dict[str, Any]] = {
  "r50": {"width": 64, "fast_width": 8, "depths": (3, 4, 6, 3)},
  "tiny": {"width": 16, "fast_width": 4, "depths": (3, 4, 6, 3)},
}
# Frames that the convolutions of the stem, and the first ones of the blocks of each stage, see at once.
SLOW_WINDOWS = (1, 1, 1, 3, 3)
FAST_WINDOWS = (5, 3, 3, 3, 3)
LATERAL_WINDOW = 7


class SlowFast(nnx.Module):
  """Both pathways, the connections between them, and a classifier of clips where one is wanted.

  Attributes:
    slow, fast: the pathways.
    lateral: convolutions from the fast pathway to the slow one, one before each stage.
    widths: channels of the slow and of the fast map that come out.
    classifier: linear layer on the means of both maps, or None.
  """

  def __init__(
    self,
    *,
    width: int,
    fast_width: int,
    depths: Sequence[int],
    alpha: int = 4,
    dilated: bool = True,
    num_classes: int = 0,
    norm: Literal["frozen", "batch"] = "frozen",
    remat: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      width: channels of the stem of the slow pathway.
      fast_width: channels of the stem of the fast pathway.
      depths: number of blocks of each of the four stages.
      alpha: frames of the fast pathway for each of the slow one.
      dilated: the last stage is dilated, and has 16 pixels a cell, else 32.
      num_classes: of the classifier; 0 for none.
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
      raise ValueError(f"depths {tuple(depths)}: SlowFast has four stages")
    self.alpha = alpha
    options: dict[str, Any] = {"frozen": norm == "frozen", "dtype": dtype, "rngs": rngs}
    leaving = [fast_width * factor for factor in (1, 4, 8, 16)]  # channels of the fast stem and of the stages behind it
    self.lateral = nnx.List(
      [ConvNorm(channels, 2 * channels, (LATERAL_WINDOW, 1, 1), (alpha, 1, 1), **options) for channels in leaving]
    )
    joining = [2 * channels for channels in leaving]
    self.slow = Pathway(width, depths, SLOW_WINDOWS, joining, dilated=dilated, remat=remat, **options)
    self.fast = Pathway(fast_width, depths, FAST_WINDOWS, (0, 0, 0, 0), dilated=dilated, remat=remat, **options)
    self.widths = self.slow.width, self.fast.width
    self.classifier = nnx.Linear(sum(self.widths), num_classes, dtype=dtype, rngs=rngs) if num_classes else None

  def layers(self, video: Array) -> Iterator[tuple[Array, Array]]:
    """Maps ``[B, T / alpha, h, w, C]`` and ``[B, T, h, w, C']`` of both pathways: after the stems, then each stage.

    Raises:
      ValueError: the slow pathway cannot have its share of the frames.
    """
    if video.shape[1] % self.alpha:
      raise ValueError(f"video of {video.shape[1]} frames: SlowFast needs a multiple of {self.alpha}")
    slow, fast = self.slow.begin(video[:, slow_frames(video.shape[1], self.alpha)]), self.fast.begin(video)
    yield slow, fast
    for stage, lateral in enumerate(self.lateral):
      slow = jnp.concatenate([slow, jax.nn.relu(lateral(fast))], axis=-1)
      slow, fast = self.slow.run(stage, slow), self.fast.run(stage, fast)
      yield slow, fast

  def __call__(self, video: Array) -> tuple[Array, Array]:
    """Normalised video ``[B, T, H, W, 3]`` to the last ``[B, T / alpha, h, w, C]`` and ``[B, T, h, w, C']``."""
    *_, maps = self.layers(video)
    return maps

  def classify(self, slow: Array, fast: Array) -> Array:
    """Maps of both pathways to logits ``[B, K]``.

    PySlowFast averages the probabilities of all windows as large as those of training: in clips of 256 pixels, of 2 x 2
    windows of 7 x 7 cells.

    Raises:
      ValueError: there is no classifier.
    """
    if self.classifier is None:
      raise ValueError("SlowFast was built without a classifier: set num_classes")
    return self.classifier(jnp.concatenate([slow.mean((1, 2, 3)), fast.mean((1, 2, 3))], axis=-1))


def slow_frames(frames: int, alpha: int) -> np.ndarray:
  """Indices of the frames that the slow pathway sees: from the first to the last, as evenly as whole numbers go."""
  count = frames // alpha
  return np.arange(count) * (frames - 1) // max(count - 1, 1)


class Pathway(nnx.Module):
  """A residual network.

  Attributes:
    stem: its first convolution.
    stages: their blocks.
    width: channels that come out.
  """

  def __init__(
    self,
    width: int,
    depths: Sequence[int],
    windows: Sequence[int],
    joining: Sequence[int],
    *,
    dilated: bool,
    remat: bool,
    frozen: bool,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    """Builds the network; ``joining`` are the channels that come from elsewhere before each stage."""
    self.remat = remat
    options: dict[str, Any] = {"frozen": frozen, "dtype": dtype, "rngs": rngs}
    self.stem = ConvNorm(3, width, (windows[0], 7, 7), (1, 2, 2), **options)
    self.stages = nnx.List([])
    channels = width
    for stage, (depth, frames, more) in enumerate(zip(depths, windows[1:], joining, strict=True)):
      step = 1 if stage == 0 else 2
      stride, dilation = (1, 2) if dilated and stage == len(depths) - 1 else (step, 1)
      blocks, channels = nnx.List([]), channels + more
      for index in range(depth):
        blocks.append(Bottleneck(channels, width * 2**stage, frames, 1 if index else stride, dilation, **options))
        channels = 4 * width * 2**stage
      self.stages.append(blocks)
    self.width = channels

  def begin(self, video: Array) -> Array:
    """``[B, T, H, W, 3]`` to ``[B, T, H/4, W/4, C]``."""
    return max_pool(jax.nn.relu(self.stem(video)), (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1)))

  def run(self, stage: int, x: Array) -> Array:
    """Runs the blocks of a stage."""
    run = nnx.remat(Bottleneck.__call__) if self.remat else Bottleneck.__call__
    for block in self.stages[stage]:
      x = run(block, x)
    return x


class Bottleneck(nnx.Module):
  """Residual block: a convolution over time to few channels, one over space, one to many channels."""

  def __init__(
    self,
    channels: int,
    width: int,
    frames: int,
    stride: int,
    dilation: int,
    *,
    frozen: bool,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    options: dict[str, Any] = {"frozen": frozen, "dtype": dtype, "rngs": rngs}
    step = (1, stride, stride)
    same = channels == 4 * width and stride == 1
    self.shortcut = None if same else ConvNorm(channels, 4 * width, (1, 1, 1), step, **options)
    self.a = ConvNorm(channels, width, (frames, 1, 1), **options)
    self.b = ConvNorm(width, width, (1, 3, 3), step, dilation, **options)
    self.c = ConvNorm(width, 4 * width, (1, 1, 1), **options)
    # Blocks begin as their shortcut, as in PySlowFast.
    self.c.norm.scale = nnx.Param(jnp.zeros(4 * width))

  def __call__(self, x: Array) -> Array:
    """``[B, T, H, W, C]`` to ``[B, T, h, w, 4 * width]``."""
    y = self.c(jax.nn.relu(self.b(jax.nn.relu(self.a(x)))))
    return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ConvNorm(nnx.Module):
  """Convolution whose windows are centred, and batch normalisation."""

  def __init__(
    self,
    channels: int,
    features: int,
    window: Size,
    stride: Size = (1, 1, 1),
    dilation: int = 1,
    *,
    frozen: bool,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    around = [dilation * (size // 2) for size in window]
    self.conv = Conv3D(
      channels,
      features,
      window,
      stride=stride,
      padding=[(size, size) for size in around],
      dilation=(1, dilation, dilation),
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = BatchNorm(features, frozen=frozen, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """``[B, T, H, W, C]`` to ``[B, t, h, w, features]``."""
    return self.norm(self.conv(x))


# --- Published weights ----------------------------------------------------------------------------------------------

_BLOCK = r"(?P<pathway>slow|fast)\.stages\.(?P<stage>\d)\.(?P<index>\d+)\."
_UNITS = (r"(?P<pathway>slow|fast)\.stem", r"lateral\.(?P<stage>\d)", _BLOCK + "(?P<part>[abc])", _BLOCK + "shortcut")
_TORCH = {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_CAFFE2 = {"weight": "s", "bias": "b", "mean": "rm", "var": "riv"}
# What the lateral connection before each stage starts from, in Caffe2's names of a network with 50 layers.
_SOURCES = ("pool1", "res2_2_branch2c_bn", "res3_3_branch2c_bn", "res4_5_branch2c_bn")


def _rules(leaves: Mapping[str, str], *templates: str) -> Iterator[tuple[str, Callable[[re.Match[str]], str]]]:
  """Rules for stems, lateral connections, blocks and shortcuts, from two templates of each: convolution and norm.

  ``p`` is 0 in the slow pathway and 1 in the fast one, ``t`` nothing and ``t_``; ``s0``, ``s1``, ``s2`` are the
  stage, counted from 0, 1, 2.
  """
  for (unit, layer), template in zip(itertools.product(_UNITS, ("conv", "norm")), templates, strict=True):

    def name(path: re.Match[str], template: str = template) -> str:
      found = path.groupdict()
      fast, stage = found.get("pathway") == "fast", int(found.get("stage", 0))
      stages = {f"s{first}": stage + first for first in range(3)}
      found["leaf"] = leaves[found["leaf"]]
      return template.format(**found, **stages, p=int(fast), t="t_" * fast, source=_SOURCES[stage])

    yield rf"{unit}\.{layer}\.(?P<leaf>\w+)", name


# (our path, published name), see vad_jax.convert. PySlowFast:
REFERENCE_NAMES = (
  *_rules(
    _TORCH,
    *("s1.pathway{p}_stem.conv.{leaf}", "s1.pathway{p}_stem.bn.{leaf}"),
    *("s{s1}_fuse.conv_f2s.{leaf}", "s{s1}_fuse.bn.{leaf}"),
    *("s{s2}.pathway{p}_res{index}.branch2.{part}.{leaf}", "s{s2}.pathway{p}_res{index}.branch2.{part}_bn.{leaf}"),
    *("s{s2}.pathway{p}_res{index}.branch1.{leaf}", "s{s2}.pathway{p}_res{index}.branch1_bn.{leaf}"),
  ),
  (r"classifier\.(.*)", r"head.projection.\1"),
)
# Its older files, which are Caffe2's:
CAFFE2_NAMES = (
  *_rules(
    _CAFFE2,
    *("{t}conv1_w", "{t}res_conv1_bn_{leaf}"),
    *("t_{source}_subsample_w", "t_{source}_subsample_bn_{leaf}"),
    *("{t}res{s2}_{index}_branch2{part}_w", "{t}res{s2}_{index}_branch2{part}_bn_{leaf}"),
    *("{t}res{s2}_{index}_branch1_w", "{t}res{s2}_{index}_branch1_bn_{leaf}"),
  ),
  (r"classifier\.(weight|bias)", lambda path: f"pred_{path[1][0]}"),
)
# PyTorchVideo, without the ``model.`` before the names of its detector:
_PATHWAY = "blocks.{s1}.multipathway_blocks.{p}.res_blocks.{index}."
PYTORCHVIDEO_NAMES = (
  *_rules(
    _TORCH,
    *("blocks.0.multipathway_blocks.{p}.conv.{leaf}", "blocks.0.multipathway_blocks.{p}.norm.{leaf}"),
    *("blocks.{s0}.multipathway_fusion.conv_fast_to_slow.{leaf}", "blocks.{s0}.multipathway_fusion.norm.{leaf}"),
    *(_PATHWAY + "branch2.conv_{part}.{leaf}", _PATHWAY + "branch2.norm_{part}.{leaf}"),
    *(_PATHWAY + "branch1_conv.{leaf}", _PATHWAY + "branch1_norm.{leaf}"),
  ),
  (r"classifier\.(.*)", r"blocks.6.proj.\1"),
)


def reference_arguments(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Arguments of the constructor for published weights, from the shapes of their tensors in any layout.

  Shapes tell neither ``alpha`` nor whether the last stage is dilated.
  """
  stems = [shape[0] for shape in shapes.values() if len(shape) == 5 and shape[1] == 3]
  blocks = r"(?:s{}.pathway0_res|res{}_|blocks.{}.multipathway_blocks.0.res_blocks.)(\d+)"
  depths = []
  for stage in range(4):
    found = (re.match(blocks.format(stage + 2, stage + 2, stage + 1), name) for name in shapes)
    depths.append(1 + max(int(match[1]) for match in found if match))
  return {"width": max(stems), "fast_width": min(stems), "depths": tuple(depths)}
