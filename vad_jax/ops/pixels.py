"""Pixels as models take them."""

import jax.numpy as jnp

from vad_jax.batch import Array


def normalize(
  video: Array,
  video_size: Array,
  *,
  mean: float | tuple[float, ...],
  std: float | tuple[float, ...],
  dtype: jnp.dtype | None = None,
) -> tuple[Array, Array]:
  """Normalises a uint8 video (a floating-point one is taken as normalised) and zeroes its padding.

  Args:
    video: ``[B, T, H, W, 3]``.
    video_size: ``[B, 2]`` height and width without padding.
    mean, std: of pixels in [0, 1]; one number or one for each channel.
    dtype: of the result; None keeps float32, or the video's own type.

  Returns:
    Video ``[B, T, H, W, 3]``, and the mask ``[B, H, W]`` of pixels that are not padding.
  """
  video, size = jnp.asarray(video), jnp.asarray(video_size)
  if video.dtype == jnp.uint8:
    video = (video.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
  inside_y = jnp.arange(video.shape[2]) < size[:, :1]
  inside_x = jnp.arange(video.shape[3]) < size[:, 1:]
  mask = inside_y[:, :, None] & inside_x[:, None, :]
  video = jnp.where(mask[:, None, :, :, None], video, 0)
  return video if dtype is None else video.astype(dtype), mask
