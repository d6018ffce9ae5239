"""ir-CSN against the official code, on seeded weights in its names and shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden_files, seeded
from vad_jax import checkpoint, convert, describe, sharding
from vad_jax.backbones import csn
from vad_jax.rngs import make_rngs

FLOAT64 = 1e-6  # of the tap's standard deviation
SOURCE = convert.Source("CSN", "", (), csn.REFERENCE_NAMES, "csn", csn.reference_arguments)
QUICK = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes the time
FAST = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 2})  # running does


@functools.cache
def parts(**arguments) -> tuple[nnx.GraphDef, nnx.State]:
  """A model without values, in parts."""
  return nnx.split(nnx.eval_shape(lambda: csn.CSN(**arguments, rngs=make_rngs(0))))


def published(path, names) -> str:
  (name,) = convert.published_names(path, SOURCE._replace(names=names))
  return name


def loaded(manifest: dict[str, list[int]], dtype) -> csn.CSN:
  """A model with the seeded weights, of which each is used."""
  left, values = dict(manifest), []
  graphdef, state = parts(**csn.reference_arguments(manifest))
  for path, variable in nnx.to_flat_state(state):
    name = published(path, csn.REFERENCE_NAMES)
    value = seeded.fill(name, left.pop(name))
    value = np.moveaxis(value, (0, 1), (-1, -2)) if path[-1] == "kernel" else value
    assert value.shape == variable.shape, name
    values.append((path, variable.replace(jnp.asarray(value, dtype))))
  assert all(name.endswith("num_batches_tracked") for name in left), left.keys()
  return nnx.merge(graphdef, nnx.from_flat_state(values))


@pytest.fixture
def compiled_blocks(monkeypatch) -> None:
  """Blocks of the same shape are compiled once, which for CSN-152 is nearly all of the time."""
  plain = csn.Bottleneck.__call__
  run = FAST(lambda graphdef, state, x: plain(nnx.merge(graphdef, state), x), static_argnums=0)
  monkeypatch.setattr(csn.Bottleneck, "__call__", lambda self, x: run(*nnx.split(self), x))


@pytest.mark.usefixtures("compiled_blocks")
@pytest.mark.parametrize(("name", "dtype"), [("csn50", np.float32), ("csn152", np.float64)])
def test_equals_official_code(name: str, dtype) -> None:
  recorded = golden_files.load(f"csn/{name}")
  video = seeded.seeded(recorded["input"]["key"], recorded["input"]["shape"]).transpose(0, 2, 3, 4, 1)
  with jax.enable_x64(dtype == np.float64):
    model = loaded(recorded["manifest"], dtype)
    video = jnp.asarray(video, dtype)
    taps = dict(zip(("stem", "layer1", "layer2", "layer3", "layer4"), model.layers(video), strict=True))
    taps |= {f"layer{i + 1}.0": model.stages[i][0](taps[f"layer{i}"]) for i in (1, 2)}
    taps["stem.conv1"] = model.conv1(video)
    taps["stem.bn1"] = model.norm1(taps["stem.conv1"])
    assert taps.keys() == recorded["taps"].keys()
    for tap, x in taps.items():
      limit = FLOAT64 if dtype == np.float64 else 10 * recorded["float32_error"][tap]["rms_over_std"]
      golden_files.assert_tap(jnp.moveaxis(x, -1, 1), recorded["taps"][tap], limit, tap)


@pytest.mark.parametrize(("name", "parameters", "gmacs"), [("csn50", 12_311_552, 86.2), ("csn152", 28_883_968, 145.5)])
def test_sizes(name: str, parameters: int, gmacs: float) -> None:
  graphdef, state = parts(width=64, **csn.VARIANTS[name])
  assert sum(x.size for x in jax.tree.leaves(nnx.filter_state(state, nnx.Param))) == parameters
  video = jax.ShapeDtypeStruct((1, 32, 256, 360, 3), jnp.float32)
  jaxpr, maps = jax.make_jaxpr(lambda state, video: nnx.merge(graphdef, state)(video), return_shape=True)(state, video)
  assert [x.shape for x in maps] == [(1, 16, 32, 45, 512), (1, 8, 16, 23, 1024), (1, 4, 16, 23, 2048)]
  counts = describe.multiply_adds(jaxpr.jaxpr, nnx.merge(graphdef, state)).values()
  assert sum(part["exact"] for part in counts) / 1e9 == pytest.approx(gmacs, abs=0.05)


SMALL = {"depths": (1, 1, 1, 1), "width": 8}
VIDEO = np.random.default_rng(0).normal(size=(8, 5, 50, 36, 3)).astype(np.float32)  # divides nowhere


def random_state(state: nnx.State) -> nnx.State:
  def value(path, variable):
    name = ".".join(map(str, path)).replace("mean", "running_mean").replace("var", "running_var")
    noise = seeded.fill(name, variable.shape[::-1]).T  # kernels have variance 1 / fan-in
    return variable.replace(jnp.asarray(noise))

  return nnx.map_state(value, state)


def small(**arguments) -> csn.CSN:
  graphdef, state = parts(**{**SMALL, **arguments})
  return nnx.merge(graphdef, random_state(state))


def test_last_stride() -> None:
  """The last stage, being one block, gives every other row and column of what it gives without the stride."""
  maps, strided = (QUICK(small(last_stride=last_stride))(VIDEO[:2]) for last_stride in (False, True))
  assert [x.shape for x in maps] == [(2, 3, 7, 5, 64), (2, 2, 4, 3, 128), (2, 1, 4, 3, 256)]
  assert strided[2].shape == (2, 1, 2, 2, 256)
  np.testing.assert_allclose(strided[2], maps[2][:, :, ::2, ::2], rtol=1e-5, atol=1e-5)
  for a, b in zip(maps[:2], strided[:2], strict=True):
    np.testing.assert_array_equal(a, b)


def train(video, **arguments):
  """Maps, gradients, and statistics before and after, of the first half of a network in training."""
  model = nnx.view(small(depths=(1, 1, 0, 0), **arguments), deterministic=False)
  graphdef, params, before = checkpoint.split_model(model)

  def loss(params, video):
    model = nnx.merge(graphdef, params, before)
    maps = model(video)
    value = sum((x * jnp.linspace(-1, 1, x.size).reshape(x.shape)).sum() for x in maps)
    return value, (maps, checkpoint.split_model(model)[2])

  gradients, (maps, after) = QUICK(jax.grad(loss, has_aux=True))(params, video)
  return maps, gradients, before, after


def test_frozen_statistics() -> None:
  """Parameters train all the same."""
  _, gradients, before, after = train(VIDEO[:2])
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert min(np.abs(gradient).max() for gradient in jax.tree.leaves(gradients)) > 0


def test_statistics_of_the_batch() -> None:
  """Spreading clips over devices and recomputing blocks change nothing."""
  one = train(VIDEO, norm="batch")
  _, _, before, after = one
  assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
  seen = small().conv1(VIDEO)
  old, new = (tree["norm1"] for tree in (before, after))
  np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * seen.mean((0, 1, 2, 3)), rtol=1e-4, atol=1e-6)
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  with jax.set_mesh(mesh):
    spread = train(sharding.to_global(VIDEO, mesh), norm="batch", remat=True)
  for several, alone in zip(spread, one, strict=True):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(alone))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5 * largest)
    jax.tree.map(close, several, alone)


def test_half_precision() -> None:
  exact, rough = (QUICK(small(dtype=dtype))(VIDEO[:1]) for dtype in (None, jnp.bfloat16))
  for a, b in zip(exact, rough, strict=True):
    assert b.dtype == jnp.bfloat16
    assert np.abs(a - b.astype(jnp.float32)).mean() < 0.02 * a.std()


@pytest.mark.parametrize(
  ("path", "detector", "csn152", "csn50"),
  [
    ("conv1.kernel", "conv1.weight", "conv1_w", "conv1_w"),
    ("norm1.var", "bn1.running_var", "conv1_spatbn_relu_riv", "conv1_spatbn_relu_riv"),
    ("stages.0.2.conv1.kernel", "layer1.2.conv1.weight", "comp_2_conv_1_w", "comp_2_conv_1_w"),
    ("stages.1.0.norm3.scale", "layer2.0.bn3.weight", "comp_3_spatbn_3_s", "comp_3_spatbn_3_s"),
    ("stages.2.5.conv3.kernel", "layer3.5.conv3.weight", "comp_16_conv_3_w", "comp_12_conv_3_w"),
    ("stages.3.1.norm4.bias", "layer4.1.bn4.bias", "comp_48_spatbn_4_b", "comp_14_spatbn_4_b"),
    (
      "stages.2.0.shortcut.layers.0.kernel",
      "layer3.0.down_sample.0.weight",
      *("shortcut_projection_11_w", "shortcut_projection_7_w"),
    ),
    (
      "stages.3.0.shortcut.layers.1.mean",
      "layer4.0.down_sample.1.running_mean",
      *("shortcut_projection_47_spatbn_rm", "shortcut_projection_13_spatbn_rm"),
    ),
  ],
)
def test_published_names(path: str, detector: str, csn152: str, csn50: str) -> None:
  assert published(path.split("."), csn.REFERENCE_NAMES) == detector
  for name, expected in (("csn152", csn152), ("csn50", csn50)):
    assert published(path.split("."), csn.caffe2_names(csn.VARIANTS[name]["depths"])) == expected


def test_bad_arguments() -> None:
  with pytest.raises(ValueError, match="unknown norm 'sync': choose frozen or batch"):
    csn.CSN(**SMALL, norm="sync", rngs=nnx.Rngs(0))  # pyright: ignore
  with pytest.raises(ValueError, match=r"depths \(1, 2\): CSN has four stages"):
    csn.CSN(depths=(1, 2), rngs=nnx.Rngs(0))
