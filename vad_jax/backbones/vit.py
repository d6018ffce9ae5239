"""Video ViT with tubelet tokens and fixed positions, as in VideoMAE (Tong et al., NeurIPS 2022).

``[B, T, H, W, 3]`` becomes tokens ``[B, T/2, H/16, W/16, C]``; there is no class token. The blocks are exposed, since
detectors look between them. ``stem="convolution"`` replaces the patch embedding by a few overlapping convolutions of
the same stride (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021): small models that
start from scratch learn much faster with it, published weights need ``stem="patch"``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.batch import Array
from vad_jax.layers.attention import Block
from vad_jax.layers.position import video_positions


class ViT(nnx.Module):
  """Patch embedding, positions, blocks and a final norm.

  Attributes:
    blocks: the transformer blocks.
    norm: the final LayerNorm, not applied by ``embed``.
    patch: size ``(t, h, w)`` of a token in frames and pixels.
  """

  def __init__(
    self,
    *,
    width: int,
    depth: int,
    heads: int,
    patch: tuple[int, int, int] = (2, 16, 16),
    trained_side: int = 14,
    stem: Literal["patch", "convolution"] = "patch",
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      width: ``C``.
      depth: number of blocks.
      heads: attention heads of a block.
      patch: size of a token in frames and pixels.
      trained_side: tokens a side of the grid whose position table is resized to other grids (14 for 224 pixels).
      stem: published patch embedding, or overlapping convolutions.
      drop_path: rate of the last block; it grows linearly from 0.
      remat: recompute blocks in the backward pass instead of storing their activations.
      dtype: computation type; None follows the parameters.
      rngs: source of the initial parameters.
    """
    self.width, self.patch, self.trained_side, self.remat = width, patch, trained_side, remat
    if stem == "patch":
      self.patch_embed = PatchEmbed(width, patch, dtype=dtype, rngs=rngs)
    else:
      self.patch_embed = ConvolutionStem(width, patch, dtype=dtype, rngs=rngs)
    rates = np.linspace(0, drop_path, depth)
    self.blocks = nnx.List([Block(width, heads, drop_path=float(rate), dtype=dtype, rngs=rngs) for rate in rates])
    self.norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)

  def __call__(self, video: Array, rngs: nnx.Rngs | None = None) -> Array:
    """Normalised video ``[B, T, H, W, 3]`` to normed tokens ``[B, t, h, w, C]``."""
    tokens = self.embed(video)
    x = tokens.reshape(len(tokens), -1, self.width)
    run = nnx.remat(Block.__call__) if self.remat else Block.__call__
    for block in self.blocks:
      x = run(block, x, rngs)
    return self.norm(x).reshape(tokens.shape)

  def embed(self, video: Array) -> Array:
    """Normalised video ``[B, T, H, W, 3]`` to tokens with positions ``[B, t, h, w, C]``.

    Raises:
      ValueError: the video does not divide into tokens.
    """
    for name, size, patch in zip(("frames", "height", "width"), video.shape[1:4], self.patch, strict=True):
      if size % patch:
        raise ValueError(f"video {video.shape[1:4]}: its {name} must be a multiple of {patch}")
    tokens = self.patch_embed(video)
    positions = video_positions(self.width, tokens.shape[1:4], self.trained_side)
    return tokens + jnp.asarray(positions, tokens.dtype)


class PatchEmbed(nnx.Module):
  """Linear embedding of non-overlapping patches: a convolution whose stride is its window, as one matmul."""

  def __init__(self, width: int, patch: tuple[int, int, int], *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
    self.patch, self.dtype = patch, dtype
    self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (*patch, 3, width)))
    self.bias = nnx.Param(jnp.zeros(width))

  def __call__(self, video: Array) -> Array:
    """``[B, T, H, W, 3]`` to ``[B, t, h, w, C]``."""
    t, h, w = self.patch
    x = einops.rearrange(video, "b (t dt) (h dh) (w dw) c -> b t h w (dt dh dw c)", dt=t, dh=h, dw=w)
    kernel, bias = self.kernel[...], self.bias[...]
    dtype = self.dtype or jnp.result_type(x, kernel)
    return x.astype(dtype) @ kernel.reshape(-1, len(bias)).astype(dtype) + bias.astype(dtype)


class ConvolutionStem(nnx.Module):
  """Small patches, 3x3 convolutions of stride 2 in space up to the stride of the tokens, then one over time."""

  def __init__(self, width: int, patch: tuple[int, int, int], *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
    steps = (patch[1] // 4).bit_length() - 1
    if patch[1:] != (4 * 2**steps,) * 2 or width % 2**steps:
      raise ValueError(f"a convolution stem needs square patches of 4, 8, 16... pixels, not {patch[1:]}")
    channels = width // 2**steps
    self.first = PatchEmbed(channels, (patch[0], 4, 4), dtype=dtype, rngs=rngs)
    self.norms, self.space = nnx.List([]), nnx.List([])
    for _ in range(steps):
      self.norms.append(nnx.LayerNorm(channels, epsilon=1e-6, dtype=dtype, rngs=rngs))
      self.space.append(nnx.Conv(channels, 2 * channels, (3, 3), strides=2, padding=1, dtype=dtype, rngs=rngs))
      channels *= 2
    self.norms.append(nnx.LayerNorm(channels, epsilon=1e-6, dtype=dtype, rngs=rngs))
    self.time = nnx.Conv(channels, channels, (3,), padding=1, dtype=dtype, rngs=rngs)

  def __call__(self, video: Array) -> Array:
    """``[B, T, H, W, 3]`` to ``[B, t, h, w, C]``."""
    x = self.first(video)
    batch = len(x)
    x = einops.rearrange(x, "b t h w c -> (b t) h w c")
    for norm, conv in zip(self.norms, self.space, strict=False):
      x = conv(jax.nn.gelu(norm(x), approximate=False))
    _, h, w, _ = x.shape
    x = einops.rearrange(x, "(b t) h w c -> (b h w) t c", b=batch)
    x = x + self.time(jax.nn.gelu(self.norms[-1](x), approximate=False))
    return einops.rearrange(x, "(b h w) t c -> b t h w c", b=batch, h=h, w=w)


# --- Published weights ----------------------------------------------------------------------------------------------

# (our path, published name) as regular expressions, see vad_jax.convert. VideoMAE, fine-tuned or pre-trained:
REFERENCE_NAMES = (
  (r"patch_embed\.(.*)", r"patch_embed.proj.\1"),
  (r"(blocks\..*)", r"\1"),
  (r"(norm\..*)", r"\1"),
)
# The same in Hugging Face's layout, where queries, keys and values have a matrix each.
_HUGGING_FACE_LAYER = r"encoder.layer.\1."
HUGGING_FACE_NAMES = (
  (r"patch_embed\.(.*)", r"embeddings.patch_embeddings.projection.\1"),
  (
    r"blocks\.(\d+)\.attn\.qkv\.weight",
    tuple(rf"{_HUGGING_FACE_LAYER}attention.attention.{part}.weight" for part in ("query", "key", "value")),
  ),
  (r"blocks\.(\d+)\.attn\.([qv]_bias)", rf"{_HUGGING_FACE_LAYER}attention.attention.\2"),
  (r"blocks\.(\d+)\.attn\.proj\.(.*)", rf"{_HUGGING_FACE_LAYER}attention.output.dense.\2"),
  (r"blocks\.(\d+)\.norm1\.(.*)", rf"{_HUGGING_FACE_LAYER}layernorm_before.\2"),
  (r"blocks\.(\d+)\.norm2\.(.*)", rf"{_HUGGING_FACE_LAYER}layernorm_after.\2"),
  (r"blocks\.(\d+)\.mlp\.fc1\.(.*)", rf"{_HUGGING_FACE_LAYER}intermediate.dense.\2"),
  (r"blocks\.(\d+)\.mlp\.fc2\.(.*)", rf"{_HUGGING_FACE_LAYER}output.dense.\2"),
  (r"norm\.(.*)", r"layernorm.\1"),
)


def reference_arguments(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Arguments of the constructor for published weights, from the shapes of their tensors in either layout.

  Shapes do not tell the number of heads; in all published networks a head has 64 channels.
  """
  kernel = next(shape for name, shape in shapes.items() if re.fullmatch(r".*patch_embed.*\.weight", name))
  layers = [re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", name) for name in shapes]
  width = kernel[0]
  depth = 1 + max(int(match[1]) for match in layers if match)
  return {"width": width, "depth": depth, "heads": width // 64, "patch": tuple(kernel[2:])}
