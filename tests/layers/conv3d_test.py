import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vad_jax.layers.conv3d import (
  BatchNorm,
  Conv3D,
  DepthwiseConv3D,
  convolve,
  convolve_depthwise,
  max_pool,
  same_padding,
)

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # in half the time


def random(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


CONVOLUTIONS = [  # window, stride, padding, dilation, channels
  ((7, 7, 7), (2, 2, 2), "SAME", (1, 1, 1), 3),
  ((3, 3, 3), (1, 1, 1), "SAME", (1, 1, 1), 9),
  ((1, 1, 1), (1, 1, 1), "SAME", (1, 1, 1), 8),
  ((1, 1, 1), (1, 2, 2), "SAME", (1, 1, 1), 8),
  ((7, 1, 1), (4, 1, 1), ((3, 3), (0, 0), (0, 0)), (1, 1, 1), 8),
  ((5, 7, 7), (1, 2, 2), ((2, 2), (3, 3), (3, 3)), (1, 1, 1), 3),
  ((1, 3, 3), (1, 1, 1), ((0, 0), (2, 2), (2, 2)), (1, 2, 2), 8),
  ((3, 3, 3), (2, 1, 2), ((2, 1), (0, 3), (1, 0)), (2, 1, 1), 8),
  ((1, 1, 1), (1, 1, 1), ((1, 0), (2, 1), (0, 1)), (1, 1, 1), 8),
]


@pytest.mark.parametrize(("window", "stride", "padding", "dilation", "channels"), CONVOLUTIONS)
def test_convolution_and_gradients_are_those_of_xla(window, stride, padding, dilation, channels) -> None:
  layer = Conv3D(channels, 5, window, stride=stride, padding=padding, dilation=dilation, rngs=nnx.Rngs(0))
  x = random(2, 7, 9, 12, channels)
  graphdef, state = nnx.split(layer)
  axes = ("NTHWC", "THWIO", "NTHWC")

  def definition(x, state):
    kernel = state["kernel"][...]
    return jax.lax.conv_general_dilated(x, kernel, stride, padding, rhs_dilation=dilation, dimension_numbers=axes)

  def ours(x, state):
    return nnx.merge(graphdef, state)(x)

  @compiled
  def outputs_and_gradients(x, state):
    results = []
    for function in (ours, definition):
      out, backward = jax.vjp(function, x, state)
      results.append((out, backward(random(*out.shape))))
    return results

  ours_and_theirs = map(jax.tree.leaves, outputs_and_gradients(x, state))
  for ours_, theirs in zip(*ours_and_theirs, strict=True):
    np.testing.assert_allclose(ours_, theirs, rtol=1e-4, atol=1e-3)


def test_accelerators_compute_the_same(monkeypatch) -> None:
  x, kernel = random(1, 4, 6, 7, 4), random(3, 3, 3, 4, 2)
  arguments = (2, 1, 1), ((1, 1), (1, 1), (0, 2)), (1, 1, 1)
  here = convolve(x, kernel, *arguments)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  jax.clear_caches()
  there = convolve(x, kernel, *arguments)
  assert str(jax.make_jaxpr(lambda: convolve(x, kernel, *arguments))()).count("conv_general_dilated[") == 1
  np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (2, 1, 1), (1, 2, 3)])
def test_depthwise_convolution_and_gradients_are_those_of_xla(stride, monkeypatch) -> None:
  """On accelerators it is XLA's own."""
  graphdef, state = nnx.split(DepthwiseConv3D(5, stride=stride, rngs=nnx.Rngs(0)))
  x = random(2, 6, 9, 11, 5)

  def output_and_gradients(backend):
    def run(x, state):  # made anew, or else it would be compiled only once
      out, backward = jax.vjp(lambda x, state: nnx.merge(graphdef, state)(x), x, state)
      return out, *backward(random(*out.shape))

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert ("feature_group_count=5" in str(jax.make_jaxpr(run)(x, state))) == (backend != "cpu")
    return compiled(run)(x, state)

  ours, theirs = map(output_and_gradients, ("cpu", "tpu"))
  assert ours[0].shape == (2, *(-(-n // step) for n, step in zip((6, 9, 11), stride, strict=True)), 5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_depthwise_convolution_by_hand() -> None:
  """An impulse gives the mirrored kernel; sums in half precision are exact before they are rounded."""
  kernel = random(3, 1, 5, 1, 2)
  out = convolve_depthwise(jnp.zeros((1, 5, 3, 7, 2)).at[0, 2, 1, 3].set(1), kernel, (1, 1, 1))
  np.testing.assert_array_equal(out[0, 1:4, 1, 1:6], kernel[::-1, 0, ::-1, 0])
  assert np.count_nonzero(out) == kernel.size
  ones = jnp.ones((1, 3, 3, 3, 1), jnp.bfloat16)
  layer = DepthwiseConv3D(1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  layer.kernel = nnx.Param(jnp.full((3, 3, 3, 1, 1), 1 + 1 / 256, jnp.float32))  # a 1 in half precision
  assert layer(ones).dtype == jnp.bfloat16
  assert layer(ones)[0, 1, 1, 1, 0] == jnp.bfloat16(27 * (1 + 1 / 256))


def test_same_padding() -> None:
  """By hand: with stride 2 an even length is padded behind, an odd one on both sides."""
  assert same_padding((16, 15, 16), (7, 7, 3), (2, 2, 2)) == ((2, 3), (3, 3), (0, 1))
  assert same_padding((13, 12, 1), (2, 2, 2), (2, 2, 2)) == ((0, 1), (0, 0), (0, 1))
  assert same_padding((9, 9, 9), (3, 1, 3), (1, 2, 4), (2, 1, 1)) == ((2, 2), (0, 0), (1, 1))


def test_bias_and_half_precision() -> None:
  layer = Conv3D(4, 6, (3, 1, 1), use_bias=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  layer.bias = nnx.Param(jnp.arange(6.0))
  x = random(1, 5, 2, 2, 4)
  out = layer(x)
  assert out.dtype == jnp.bfloat16
  exact = convolve(x, layer.kernel[...], (1, 1, 1), ((1, 1), (0, 0), (0, 0)), (1, 1, 1)) + jnp.arange(6)
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.1)


@pytest.mark.parametrize("padding", ["SAME", ((0, 0), (1, 1), (1, 2))])
@pytest.mark.parametrize(("window", "stride"), [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (1, 1, 1)), ((2, 2, 2), (2, 2, 2))])
def test_max_pool_and_its_gradient(window, stride, padding) -> None:
  x = random(2, 5, 8, 9, 3) - 5  # below the zeros that padding must not be

  def definition(x):
    pads = padding if padding == "SAME" else ((0, 0), *padding, (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), pads)

  @compiled
  def output_and_gradient(x):
    results = []
    for function in (lambda x: max_pool(x, window, stride, padding), definition):
      out, backward = jax.vjp(function, x)
      results.append((out, backward(random(*out.shape))[0]))
    return results

  for ours, theirs in zip(*output_and_gradient(x), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


class TestBatchNorm:
  x = random(2, 3, 4, 5, 6) * 3 + 7

  def test_statistics_of_the_batch_in_training_running_ones_in_inference(self) -> None:
    norm = BatchNorm(6, scale=False, epsilon=1e-3, momentum=0.75, rngs=nnx.Rngs(0))
    norm.bias = nnx.Param(jnp.arange(6.0))
    assert nnx.state(norm, nnx.Param).keys() == {"bias"}
    mean, var = self.x.mean((0, 1, 2, 3)), self.x.var((0, 1, 2, 3))
    training = nnx.view(norm, deterministic=False)
    np.testing.assert_allclose(
      training(self.x), (self.x - mean) / np.sqrt(var + 1e-3) + np.arange(6), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(training.mean, 0.25 * mean, rtol=1e-4)
    np.testing.assert_allclose(training.var, 0.75 + 0.25 * var, rtol=1e-4)
    before = nnx.to_pure_dict(nnx.state(training))
    inference = nnx.view(training, deterministic=True)
    expected = (self.x - before["mean"]) / np.sqrt(before["var"] + 1e-3) + np.arange(6)
    np.testing.assert_allclose(inference(self.x), expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(inference)))

  def test_frozen_statistics_stay_but_scale_and_bias_are_trained(self) -> None:
    graphdef, params, rest = nnx.split(
      nnx.view(BatchNorm(6, frozen=True, rngs=nnx.Rngs(0)), deterministic=False), nnx.Param, ...
    )

    def loss(params):
      norm = nnx.merge(graphdef, params, rest)
      return (norm(self.x) * self.x).sum(), nnx.state(norm, nnx.BatchStat)

    gradient, after = jax.grad(loss, has_aux=True)(params)
    assert gradient.keys() == {"scale", "bias"}
    assert all(np.abs(x).min() > 1 for x in jax.tree.leaves(gradient))
    jax.tree.map(np.testing.assert_array_equal, rest, after)

  @pytest.mark.parametrize("frozen", [True, False])
  def test_half_precision_has_exact_statistics(self, frozen: bool) -> None:
    exact, rough = (BatchNorm(6, frozen=frozen, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (None, jnp.bfloat16))
    x = self.x.astype(jnp.bfloat16)
    for norm in (exact, rough):
      norm.mean[...] += 1 / 512  # lost in half precision
      norm.mean[...] += 6
    out = rough(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact(x.astype(jnp.float32)).astype(jnp.bfloat16))
    np.testing.assert_array_equal(rough.mean, exact.mean)
    assert rough.mean.dtype == rough.var.dtype == jnp.float32
