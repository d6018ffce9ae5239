"""I3D against kinetics-i3d, on seeded weights in the names and shapes of its PyTorch conversions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests import golden_files, seeded
from vad_jax import convert, describe, sharding
from vad_jax.backbones import i3d
from vad_jax.checkpoint import split_model
from vad_jax.rngs import make_rngs

FLOAT32, FLOAT64 = 2e-4, 1e-6  # of the tap's standard deviation
PYTORCH = convert.Source("I3D", "", (), i3d.PYTORCH_NAMES, "i3d", i3d.reference_arguments)
TENSORFLOW = PYTORCH._replace(names=i3d.TENSORFLOW_NAMES)
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # in half the time
SHAPES = {  # of a video of 64 x 400 x 400
  "Conv3d_1a_7x7": (32, 200, 200, 64),
  "MaxPool3d_2a_3x3": (32, 100, 100, 64),
  "Conv3d_2b_1x1": (32, 100, 100, 64),
  "Conv3d_2c_3x3": (32, 100, 100, 192),
  "MaxPool3d_3a_3x3": (32, 50, 50, 192),
  "Mixed_3b": (32, 50, 50, 256),
  "Mixed_3c": (32, 50, 50, 480),
  "MaxPool3d_4a_3x3": (16, 25, 25, 480),
  "Mixed_4b": (16, 25, 25, 512),
  "Mixed_4c": (16, 25, 25, 512),
  "Mixed_4d": (16, 25, 25, 512),
  "Mixed_4e": (16, 25, 25, 528),
  "Mixed_4f": (16, 25, 25, 832),
  "MaxPool3d_5a_2x2": (8, 13, 13, 832),
  "Mixed_5b": (8, 13, 13, 832),
  "Mixed_5c": (8, 13, 13, 1024),
}


@functools.cache
def parts(kind: type[i3d.Chain] = i3d.I3D, **arguments):
  """A model without values, in parts."""
  return nnx.split(nnx.eval_shape(lambda: kind(**arguments, rngs=make_rngs(0))))


def arrays(state: nnx.State) -> list[tuple[tuple, nnx.Variable]]:
  """Parameters and running statistics with their paths."""
  return list(nnx.to_flat_state(state))


def official_taps(recorded: dict, dtype: jnp.dtype) -> dict[str, jax.Array]:
  graphdef, state = parts(num_classes=recorded["config"]["num_classes"])
  (override,) = recorded["fill_overrides"]
  weights = {name: seeded.fill(name, shape) for name, shape in recorded["manifest"].items()}
  values = []
  for path, variable in arrays(state):
    (name,) = convert.published_names(path, PYTORCH)
    value = weights.pop(name)
    if value.ndim == override["ndim"]:
      value = np.moveaxis(value * np.float32(override["gain"]), (0, 1), (-1, -2))
    values.append((path, variable.replace(jnp.asarray(value.reshape(variable.shape), dtype))))
  assert not weights
  (clip,) = recorded["inputs"]
  video = seeded.seeded(clip["key"], clip["shape"]).transpose(0, 2, 3, 4, 1).astype(dtype)

  @compiled
  def run(state, video):
    model = nnx.merge(graphdef, state)
    taps = dict(model.endpoints(video))
    if "logits" in recorded["taps"]:
      taps["avg_pool_2x7x7_valid"] = nnx.avg_pool(taps["Mixed_5c"], (2, 7, 7))
      taps["logits_map"] = model.logits(taps["avg_pool_2x7x7_valid"])
      taps["logits"] = model.classify(taps["Mixed_5c"])
      taps["predictions"] = jax.nn.softmax(taps["logits"])
    return {name: jnp.moveaxis(tap, -1, 1) for name, tap in taps.items()}

  return run(nnx.from_flat_state(values), video)


@pytest.mark.parametrize(("name", "dtype"), [("16x224", jnp.float32), ("17x75x101_odd", jnp.float64)])
def test_equals_official_code(name: str, dtype: jnp.dtype) -> None:
  """Only in double precision the epsilon of normalisation would be told from a similar one."""
  recorded = golden_files.load(f"i3d/{name}")
  with jax.enable_x64(dtype == jnp.float64):
    taps = official_taps(recorded, dtype)
    assert taps.keys() == recorded["taps"].keys()
    for tap in taps:
      golden_files.assert_tap(taps[tap], recorded["taps"][tap], FLOAT32 if dtype == jnp.float32 else FLOAT64, tap)


def test_names_of_published_weights() -> None:
  recorded = golden_files.load("i3d/names")
  pairs = recorded["tensorflow_to_pytorch"]
  published, prefix = recorded["variables"]["rgb_imagenet"], "RGB/inception_i3d/"
  newer = {name: shape for name, shape in recorded["variables"]["rgb_scratch_kin600"].items() if "Momentum" not in name}
  found = set()
  for path, variable in arrays(parts(num_classes=400)[1]):
    (name,) = convert.published_names(path, TENSORFLOW)
    found.add(prefix + name)
    assert convert.published_names(path, PYTORCH) == (pairs[prefix + name],)
    squeezed = [size for size in published[prefix + name] if size > 1]
    assert squeezed == [size for size in variable.shape if size > 1], name
    if path[0] != "logits":  # the newer ones know 600 classes
      assert math.prod(newer[name]) == variable.size
  assert found == pairs.keys() == published.keys() == {prefix + name for name in newer} and len(found) == 230


@pytest.mark.parametrize("width", [1, 0.25])
def test_reference_arguments(width: float) -> None:
  _, state = parts(num_classes=400, width=width)
  kernels = {convert.published_names(path, TENSORFLOW)[0]: variable.shape for path, variable in arrays(state)}
  assert i3d.reference_arguments(kernels) == {"width": width}
  kernels = {"Conv3d_1a_7x7.conv3d.weight": (int(64 * width), 3, 7, 7, 7)}
  assert i3d.reference_arguments(kernels) == {"width": width}


@pytest.mark.parametrize(
  ("arguments", "parameters", "statistics"),
  [
    ({"num_classes": 400}, 12_689_984, 14_560),
    ({}, 12_279_984, 14_560),
    ({"final_endpoint": "Mixed_4f"}, 7_523_264, None),
  ],
)
def test_sizes(arguments: dict, parameters: int, statistics: int | None) -> None:
  _, params, rest = split_model(nnx.merge(*parts(**arguments)))
  assert sum(x.size for x in jax.tree.leaves(params)) == parameters
  assert statistics in (None, sum(x.size for x in jax.tree.leaves(rest)))


def test_size_of_the_head() -> None:
  _, params, _ = split_model(nnx.merge(*parts(i3d.I3DHead)))
  parameters = {name: sum(x.size for x in jax.tree.leaves(params[name])) for name in params}
  assert parameters == {"Mixed_5b": 1_973_248, "Mixed_5c": 2_783_472}


def test_shapes_of_all_endpoints() -> None:
  graphdef, state = parts()
  video = jax.ShapeDtypeStruct((2, 64, 400, 400, 3), jnp.float32)
  shapes = jax.eval_shape(lambda state, video: dict(nnx.merge(graphdef, state).endpoints(video)), state, video)
  assert {name: x.shape for name, x in shapes.items()} == {name: (2, *shape) for name, shape in SHAPES.items()}
  assert list(SHAPES) == list(i3d.ENDPOINTS)
  graphdef, state = parts(i3d.I3DHead)
  regions = jax.ShapeDtypeStruct((300, 16, 7, 7, 832), jnp.float32)
  head = jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, regions)
  assert head.shape == (300, 8, 4, 4, 1024)


@pytest.mark.parametrize(
  ("kind", "arguments", "size", "gmacs"),
  [
    (i3d.I3D, {"final_endpoint": "Mixed_4f"}, (64, 224, 224, 3), 109.29),
    (i3d.I3D, {}, (64, 224, 224, 3), 111.15),
    (i3d.I3D, {"final_endpoint": "Mixed_4f"}, (64, 400, 400, 3), 348.49),
    (i3d.I3D, {}, (64, 400, 400, 3), 354.92),
    (i3d.I3D, {}, (16, 224, 224, 3), 27.79),
    (i3d.I3DHead, {}, (16, 7, 7, 832), 0.609),
  ],
)
def test_multiply_adds(kind, arguments, size, gmacs) -> None:
  graphdef, state = parts(kind, **arguments)
  model = nnx.merge(graphdef, state)
  video = jax.ShapeDtypeStruct((1, *size), jnp.float32)
  jaxpr = jax.make_jaxpr(lambda state, video: nnx.merge(graphdef, state)(video))(state, video).jaxpr
  counts = describe.multiply_adds(jaxpr, model)
  assert sum(count["exact"] for count in counts.values()) / 1e9 == pytest.approx(gmacs, abs=0.005)


def random_state(state: nnx.State) -> nnx.State:
  """Values of reasonable sizes; variances are positive."""
  rng = np.random.default_rng(0)

  def value(path, variable):
    x = rng.normal(size=variable.shape)
    x = x / math.sqrt(math.prod(x.shape[:-1])) if x.ndim > 1 else x / 4
    return variable.replace(jnp.asarray(np.abs(x) + 0.5 if path[-1] == "var" else x, jnp.float32))

  return nnx.from_flat_state([(path, value(path, variable)) for path, variable in arrays(state)])


VIDEO = np.random.default_rng(0).normal(size=(8, 4, 24, 24, 3)).astype(np.float32)


def step(mesh=None, **arguments) -> tuple[dict, dict]:
  """Gradients and other arrays after a forward pass in training."""
  graphdef, state = parts(final_endpoint="Mixed_3b", width=1 / 8, **arguments)
  _, params, rest = split_model(nnx.merge(graphdef, random_state(state)))

  def loss(params, rest, video):
    model = nnx.view(nnx.merge(graphdef, params, rest), deterministic=False)
    features = model(video).astype(jnp.float32)
    return (features * jnp.cos(jnp.arange(features.size)).reshape(features.shape)).mean(), split_model(model)[2]

  video = jnp.asarray(VIDEO)
  if mesh is not None:
    video = jax.device_put(video, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    params, rest = jax.device_put((params, rest), NamedSharding(mesh, PartitionSpec()))
  return compiled(jax.grad(loss, has_aux=True))(params, rest, video)


def assert_close(ours: dict, theirs: dict, limit: float = 1e-4) -> None:
  largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=limit, atol=limit * largest), ours, theirs)


@pytest.fixture(scope="module")
def trained() -> tuple[dict, dict]:
  return step(norm="batch")


def test_statistics_move_in_training_unless_frozen(trained) -> None:
  graphdef, state = parts(final_endpoint="Mixed_3b", width=1 / 8)
  before = jax.tree.leaves(split_model(nnx.merge(graphdef, random_state(state)))[2])
  assert all((a != b).all() for a, b in zip(before, jax.tree.leaves(trained[1]), strict=True))
  gradients, rest = step(norm="frozen")
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.leaves(rest))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))


def test_eight_devices_are_as_one(trained) -> None:
  mesh = sharding.make_mesh({"data": -1})
  assert mesh.size == 8
  for ours, one in zip(step(mesh, norm="batch"), trained, strict=True):
    assert_close(ours, one)


def test_recomputing_changes_nothing(trained) -> None:
  for ours, plain in zip(step(norm="batch", remat=True), trained, strict=True):
    assert_close(ours, plain)


def test_head_goes_on_from_the_trunk() -> None:
  (graphdef, state), (head_graphdef, _) = parts(width=1 / 16), parts(i3d.I3DHead, width=1 / 16)
  state = random_state(state)

  @compiled
  def run(state):
    taps = dict(nnx.merge(graphdef, state).endpoints(VIDEO[:1]))
    head_state = nnx.State({name: state[name] for name in ("Mixed_5b", "Mixed_5c")})
    return taps["Mixed_5c"], nnx.merge(head_graphdef, head_state)(taps["Mixed_4f"])

  np.testing.assert_array_equal(*run(state))


def test_half_precision() -> None:
  def run(dtype):
    graphdef, state = parts(final_endpoint="Mixed_3b", width=1 / 8, dtype=dtype)
    return compiled(lambda state: nnx.merge(graphdef, state)(VIDEO))(random_state(state))

  exact, rough = run(None), run(jnp.bfloat16)
  assert rough.dtype == jnp.bfloat16
  assert np.abs(exact - rough.astype(jnp.float32)).mean() < 0.02 * exact.std()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"final_endpoint": "Mixed_4g"}, r"no endpoint 'Mixed_4g': choose one of Conv3d_1a_7x7, .*, Mixed_5c$"),
    ({"final_endpoint": "Mixed_4f", "num_classes": 400}, "needs final_endpoint='Mixed_5c', not 'Mixed_4f'"),
    ({"norm": "frozn"}, "no norm 'frozn': choose one of frozen, batch"),
  ],
)
def test_arguments_that_do_not_fit(arguments: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    i3d.I3D(**arguments, rngs=nnx.Rngs(0))


def test_what_cannot_be_classified() -> None:
  features = jnp.zeros((1, 2, 7, 6, 16))
  with pytest.raises(ValueError, match="set num_classes"):
    nnx.merge(*parts(width=1 / 64)).classify(features)
  with pytest.raises(ValueError, match=r"\(2, 7, 6\): .* from 2 x 7 x 7 on"):
    nnx.merge(*parts(width=1 / 64, num_classes=3)).classify(features)
