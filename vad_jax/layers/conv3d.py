"""What convolutional video networks are made of: 3-D convolution, batch normalisation and max pooling.

Arrays are ``[B, T, H, W, C]``; windows, strides, padding and dilation are for ``(T, H, W)``.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.batch import Array

Size = tuple[int, int, int]
Padding = Literal["SAME"] | Sequence[tuple[int, int]]

_FEW_CHANNELS = 8  # with fewer, such as those of pixels, one wide convolution is faster on CPUs than several thin ones


class Conv3D(nnx.Module):
  """3-D convolution.

  Attributes:
    kernel: ``[t, h, w, C, features]``.
    bias: ``[features]``, or None.
  """

  def __init__(
    self,
    channels: int,
    features: int,
    window: Size,
    *,
    stride: Size = (1, 1, 1),
    padding: Padding = "SAME",
    dilation: Size = (1, 1, 1),
    use_bias: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the layer.

    Args:
      channels: ``C``.
      features: channels of the result.
      window: size of the kernel.
      stride: steps between windows.
      padding: zeros before and after each axis; ``SAME`` is TensorFlow's, see ``same_padding``.
      dilation: steps between the elements of a window.
      use_bias: adds a bias.
      dtype: computation type; None follows input and kernel.
      rngs: source of the initial parameters.
    """
    self.stride, self.dilation, self.dtype = stride, dilation, dtype
    self.padding = padding if padding == "SAME" else tuple(padding)
    self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (*window, channels, features)))
    self.bias = nnx.Param(jnp.zeros(features)) if use_bias else None

  def __call__(self, x: Array) -> Array:
    """``[B, T, H, W, C]`` to ``[B, t, h, w, features]``."""
    kernel = self.kernel[...]
    dtype = self.dtype or jnp.result_type(x, kernel)
    padding = self.padding
    if padding == "SAME":
      padding = same_padding(x.shape[1:4], kernel.shape[:3], self.stride, self.dilation)
    x = convolve(x.astype(dtype), kernel.astype(dtype), self.stride, padding, self.dilation)
    return x if self.bias is None else x + self.bias[...].astype(dtype)


class DepthwiseConv3D(nnx.Module):
  """3-D convolution of each channel by itself, with centred windows of 3 x 3 x 3 and without bias.

  Attributes:
    kernel: ``[3, 3, 3, 1, C]``.
  """

  def __init__(self, channels: int, *, stride: Size = (1, 1, 1), dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
    """Builds the layer; for the arguments see ``Conv3D``."""
    self.stride, self.dtype = stride, dtype
    self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (3, 3, 3, 1, channels)))

  def __call__(self, x: Array) -> Array:
    """``[B, T, H, W, C]`` to ``[B, t, h, w, C]``, lengths divided by the stride and rounded up."""
    kernel = self.kernel[...]
    return convolve_depthwise(x.astype(self.dtype or jnp.result_type(x, kernel)), kernel, self.stride)


class BatchNorm(nnx.BatchNorm):
  """Batch normalisation whose statistics are in float32, and which can be frozen.

  In training it takes the statistics of the batch, of all devices that share it, and updates the running ones, which
  are ``nnx.BatchStat`` variables. In inference (``nnx.view(model, deterministic=True)``), and when frozen in training,
  too, it takes the running ones and leaves them as they are; scale and bias are trained in any case.
  """

  def __init__(
    self,
    features: int,
    *,
    scale: bool = True,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    frozen: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the layer.

    Args:
      features: ``C``.
      scale: multiplies by a trained scale (gamma), before the bias is added.
      epsilon: added to the variance.
      momentum: share of the running statistics that remains in a step (PyTorch calls the rest so).
      frozen: never uses statistics of a batch.
      dtype: type of the result; None follows the input.
      rngs: source of the initial parameters.
    """
    super().__init__(
      features, use_running_average=frozen, use_scale=scale, epsilon=epsilon, momentum=momentum, rngs=rngs
    )
    self.frozen, self.result_dtype = frozen, dtype

  def set_view(self, deterministic: bool | None = None, **_: object) -> None:
    """Switches the layer for ``nnx.view``.

    Args:
      deterministic: take the running statistics.
    """
    if deterministic is not None:
      self.use_running_average = self.frozen or deterministic

  def __call__(self, x: Array) -> Array:
    """``[..., C]`` to ``[..., C]``."""
    # Statistics, being in float32, make all of the computation so: the type is set only now.
    return super().__call__(x).astype(self.result_dtype or x.dtype)


def same_padding(
  size: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = (1, 1, 1)
) -> tuple[tuple[int, int], ...]:
  """TensorFlow's SAME padding: ``ceil(size / stride)`` windows, the odd element of padding behind."""
  spans = ((n, (k - 1) * d + 1, s) for n, k, s, d in zip(size, window, stride, dilation, strict=True))
  totals = [max((-(-n // s) - 1) * s + span - n, 0) for n, span, s in spans]
  return tuple((total // 2, total - total // 2) for total in totals)


@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4))  # else the gradient would keep a copy of x for each tap
def convolve(x: Array, kernel: Array, stride: Size, padding: Sequence[tuple[int, int]], dilation: Size) -> Array:
  """3-D convolution of ``[B, T, H, W, C]`` with ``[t, h, w, C, features]``.

  On CPUs, XLA's own is slow, and its gradient up to a thousand times so. There, each of the kernel's ``t`` slices
  becomes a 2-D convolution of single frames, or a matrix product; the sum of products is the same.
  """
  if jax.default_backend() != "cpu" and kernel.shape[:3] != (1, 1, 1):
    axes = ("NTHWC", "THWIO", "NTHWC")
    return jax.lax.conv_general_dilated(x, kernel, stride, padding, rhs_dilation=dilation, dimension_numbers=axes)
  taps = list(_views(x, 1, len(kernel), stride[0], padding[0], dilation[0]))
  kernels = list(kernel)
  if x.shape[-1] < _FEW_CHANNELS:
    taps, kernels = [jnp.concatenate(taps, axis=-1)], [jnp.concatenate(kernels, axis=-2)]
  products = (
    _convolve_frames(tap, weights, stride[1:], padding[1:], dilation[1:])
    for tap, weights in zip(taps, kernels, strict=True)
  )
  return functools.reduce(jnp.add, products)


def _convolve_frames(
  x: Array, kernel: Array, stride: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> Array:
  """2-D convolution of each frame of ``[B, T, H, W, C]`` with ``[h, w, C, features]``."""
  if kernel.shape[:2] == (1, 1) and not any(map(any, padding)):
    return x[:, :, :: stride[0], :: stride[1]] @ kernel[0, 0]
  y = jax.lax.conv_general_dilated(
    x.reshape(-1, *x.shape[2:]),
    kernel,
    stride,
    padding,
    rhs_dilation=dilation,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return y.reshape(*x.shape[:2], *y.shape[1:])


def convolve_depthwise(x: Array, kernel: Array, stride: Size) -> Array:
  """Convolution of each channel of ``[B, T, H, W, C]`` with its own of ``[t, h, w, 1, C]``, whose sides are odd.

  The first window is centred on the first element, and there are zeros outside of ``x``.
  """
  if jax.default_backend() != "cpu":
    padding, axes = [(size // 2, size // 2) for size in kernel.shape[:3]], ("NTHWC", "THWIO", "NTHWC")
    return jax.lax.conv_general_dilated(
      x, kernel.astype(x.dtype), stride, padding, dimension_numbers=axes, feature_group_count=x.shape[-1]
    )
  return _sum_of_products(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum_of_products(x: Array, kernel: Array, stride: Size) -> Array:
  """``convolve_depthwise`` for CPUs, where XLA makes one loop of it, hundreds of times faster than its own convolution.

  The gradient is written out, since the derived one would be several times slower.
  """
  with jax.named_scope("depthwise"):
    padded, window = _pad_windows(x, kernel), kernel.shape[:3]
    products = (
      jax.lax.slice(padded, (0, *place, 0), (len(x), *np.add(place, x.shape[1:4]), x.shape[-1]), (1, *stride, 1))
      * weight
      for place, weight in zip(np.ndindex(window), kernel.reshape(-1, x.shape[-1]), strict=True)
    )
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _sum_of_products_forward(x: Array, kernel: Array, stride: Size) -> tuple[Array, tuple[Array, Array]]:
  return _sum_of_products(x, kernel, stride), (x, kernel)


def _sum_of_products_backward(stride: Size, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  x, kernel = kept
  spread = [(0, n - 1 - (m - 1) * s, s - 1) for n, m, s in zip(x.shape[1:4], gradient.shape[1:4], stride, strict=True)]
  spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
  padded = _pad_windows(x, kernel)

  def kernel_gradient(place: Array) -> Array:
    view = jax.lax.dynamic_slice(padded, (0, *place, 0), x.shape)[:, :: stride[0], :: stride[1], :: stride[2]]
    return (view * gradient).sum((1, 2, 3), dtype=kernel.dtype)

  # Clips are added up behind the loop, so that devices that share a batch communicate once.
  kernel_gradients = jax.lax.map(kernel_gradient, np.array(list(np.ndindex(kernel.shape[:3])))).sum(1)
  return _sum_of_products(spread, kernel[::-1, ::-1, ::-1], (1, 1, 1)), kernel_gradients.reshape(kernel.shape)


_sum_of_products.defvjp(_sum_of_products_forward, _sum_of_products_backward)


def _pad_windows(x: Array, kernel: Array) -> Array:
  """Zeros around ``[B, T, H, W, C]`` for windows that are centred on its elements."""
  return jnp.pad(x, ((0, 0), *((size // 2, size // 2) for size in kernel.shape[:3]), (0, 0)))


def max_pool(x: Array, window: Size, stride: Size, padding: Padding = "SAME") -> Array:
  """Maximum over windows of ``[B, T, H, W, C]``; padding never is the maximum.

  One axis after the other: on CPUs many times faster than ``reduce_window`` and its gradient.
  """
  if padding == "SAME":
    padding = same_padding(x.shape[1:4], window, stride)
  for axis in range(3):
    x = functools.reduce(jnp.maximum, _views(x, axis + 1, window[axis], stride[axis], padding[axis], fill=-jnp.inf))
  return x


def _views(
  x: Array, axis: int, window: int, stride: int, padding: tuple[int, int], dilation: int = 1, fill: float = 0.0
) -> Iterator[Array]:
  """What sliding windows along an axis see: the first element of all windows, then the second, and so on."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = padding
  x = jnp.pad(x, widths, constant_values=fill)
  end = x.shape[axis] - (window - 1) * dilation  # of the places of first elements
  for start in range(0, window * dilation, dilation):
    yield jax.lax.slice_in_dim(x, start, start + end, stride, axis)
