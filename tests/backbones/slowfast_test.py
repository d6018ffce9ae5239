"""SlowFast against PySlowFast's code, on seeded weights in its names and shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden_files, seeded
from vad_jax import checkpoint, convert, describe, sharding
from vad_jax.backbones import slowfast
from vad_jax.ops.roi_align import roi_align
from vad_jax.rngs import make_rngs

FLOAT32, FLOAT64 = 2e-4, 1e-6  # of the tap's standard deviation
SOURCE = convert.Source("SlowFast", "", (), slowfast.REFERENCE_NAMES, "slowfast", slowfast.reference_arguments)
QUICK = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes the time


@functools.cache
def parts(**arguments) -> tuple[nnx.GraphDef, nnx.State]:
  """A model without values, in parts."""
  return nnx.split(nnx.eval_shape(lambda: slowfast.SlowFast(**arguments, rngs=make_rngs(0))))


def weights_of(recorded: dict) -> dict[str, np.ndarray]:
  weights = {name: seeded.fill(name, shape) for name, shape in recorded["manifest"].items()}
  (gain,) = recorded["fill_overrides"]
  return {name: w * np.float32(gain["gain"]) if w.ndim == gain["ndim"] else w for name, w in weights.items()}


def loaded(weights: dict[str, np.ndarray], names=slowfast.REFERENCE_NAMES, **arguments) -> slowfast.SlowFast:
  """A model with published weights, of which each is used."""
  graphdef, state = parts(**slowfast.reference_arguments({name: w.shape for name, w in weights.items()}), **arguments)
  left, values = dict(weights), []
  for path, variable in nnx.to_flat_state(state):
    (name,) = convert.published_names(path, SOURCE._replace(names=names))
    value = left.pop(name)
    value = np.moveaxis(value, (0, 1), (-1, -2)) if path[-1] == "kernel" else value
    assert value.shape == variable.shape, name
    values.append((path, variable.replace(jnp.asarray(value))))
  assert all(name.endswith("num_batches_tracked") for name in left), left.keys()
  return nnx.merge(graphdef, nnx.from_flat_state(values))


def official_taps(recorded: dict, dtype: jnp.dtype) -> dict[str, jax.Array]:
  """Runs our network, and what the official one has behind it."""
  config = recorded["config"]
  model = loaded(weights_of(recorded), dilated=config["det"], num_classes=config["num_classes"])
  (clip,) = recorded["inputs"]
  video = seeded.seeded(clip["key"], clip["shape"]).transpose(0, 2, 3, 4, 1)
  assert slowfast.slow_frames(video.shape[1], config["alpha"]).tolist() == config["slow_frame_index"]
  graphdef, state = nnx.split(model)

  @QUICK
  def run(state, video):
    model = nnx.merge(graphdef, state)
    taps = {}
    for stage, (slow, fast) in enumerate(model.layers(video), 1):
      taps |= {f"s{stage}_slow": slow, f"s{stage}_fast": fast}
      if stage < 5:
        taps[f"s{stage}_fuse_slow"] = jnp.concatenate([slow, jax.nn.relu(model.lateral[stage - 1](fast))], -1)
    if config["det"]:
      taps |= official_detector(model, slow, fast, jnp.asarray(config["roi_boxes_batchidx_x1y1x2y2_pixels"], dtype))
    else:
      taps |= official_classifier(model, slow, fast)
    return {name: jnp.moveaxis(tap, -1, 1) for name, tap in taps.items()}

  return run(jax.tree.map(lambda x: x.astype(dtype), state), video.astype(dtype))


def official_detector(model, slow, fast, boxes) -> dict[str, jax.Array]:
  pooled = {"slow": slow.mean(1), "fast": fast.mean(1)}
  taps = {f"tpool_{name}": x for name, x in pooled.items()}
  regions = {name: roi_align(x, boxes[None, :, 1:], scale=1 / 16, sampling_ratio=0)[0] for name, x in pooled.items()}
  taps |= {f"roi7x7_{name}": x for name, x in regions.items()}
  taps["cat_tpool_roi7x7"] = jnp.concatenate([*regions.values()], -1)
  taps["roi_max_concat"] = taps["cat_tpool_roi7x7"].max((1, 2))
  taps["logits"] = model.classifier(taps["roi_max_concat"])
  return taps | {"probs": jax.nn.sigmoid(taps["logits"])}


def official_classifier(model, slow, fast) -> dict[str, jax.Array]:
  taps = {"pooled_concat": jnp.concatenate([slow.mean((1, 2, 3)), fast.mean((1, 2, 3))], -1)}
  taps["logits"] = model.classify(slow, fast)
  # Probabilities are those of windows of a 32nd of the clip's side (112 pixels: 3 of 4 cells), averaged.
  windows = [(slow[:, :, y : y + 3, x : x + 3], fast[:, :, y : y + 3, x : x + 3]) for y in (0, 1) for x in (0, 1)]
  return taps | {"probs": sum(jax.nn.softmax(model.classify(*window)) for window in windows) / 4}


def check(taps: dict, recorded: dict, limit: float) -> None:
  assert taps.keys() == recorded["taps"].keys()
  for name, tap in recorded["taps"].items():
    golden_files.assert_tap(taps[name], tap, limit, name)


def test_equals_official_code() -> None:
  """The classifier; a detector follows, in float64."""
  recorded = golden_files.load("slowfast/r50_32x112")
  check(official_taps(recorded, jnp.float32), recorded, FLOAT32)


def test_equals_official_code_in_float64() -> None:
  recorded = golden_files.load("slowfast/tiny_16x64_detector")
  with jax.enable_x64(True):
    check(official_taps(recorded, jnp.float64), recorded, FLOAT64)


def published(path: str, names) -> str:
  (name,) = convert.published_names(path.split("."), SOURCE._replace(names=names))
  return name


@pytest.mark.parametrize(
  ("path", "native", "caffe2"),
  [
    ("slow.stem.conv.kernel", "s1.pathway0_stem.conv.weight", "conv1_w"),
    ("fast.stem.norm.var", "s1.pathway1_stem.bn.running_var", "t_res_conv1_bn_riv"),
    ("lateral.0.conv.kernel", "s1_fuse.conv_f2s.weight", "t_pool1_subsample_w"),
    ("lateral.0.norm.bias", "s1_fuse.bn.bias", "t_pool1_subsample_bn_b"),
    ("lateral.1.conv.kernel", "s2_fuse.conv_f2s.weight", "t_res2_2_branch2c_bn_subsample_w"),
    ("lateral.2.conv.kernel", "s3_fuse.conv_f2s.weight", "t_res3_3_branch2c_bn_subsample_w"),
    ("lateral.3.norm.mean", "s4_fuse.bn.running_mean", "t_res4_5_branch2c_bn_subsample_bn_rm"),
    ("slow.stages.3.2.b.conv.kernel", "s5.pathway0_res2.branch2.b.weight", "res5_2_branch2b_w"),
    ("fast.stages.0.0.c.norm.scale", "s2.pathway1_res0.branch2.c_bn.weight", "t_res2_0_branch2c_bn_s"),
    ("slow.stages.1.0.shortcut.norm.bias", "s3.pathway0_res0.branch1_bn.bias", "res3_0_branch1_bn_b"),
    ("fast.stages.2.0.shortcut.conv.kernel", "s4.pathway1_res0.branch1.weight", "t_res4_0_branch1_w"),
    ("classifier.kernel", "head.projection.weight", "pred_w"),
    ("classifier.bias", "head.projection.bias", "pred_b"),
  ],
)
def test_published_names(path: str, native: str, caffe2: str) -> None:
  assert published(path, slowfast.REFERENCE_NAMES) == native
  assert published(path, slowfast.CAFFE2_NAMES) == caffe2


def test_three_layouts_of_published_weights_are_the_same_network() -> None:
  recorded = golden_files.load("slowfast/tiny_16x64_detector")
  torch_names = golden_files.load("slowfast/pytorchvideo_names")
  assert len(torch_names) == len(recorded["manifest"]) == 662
  torch_names |= {f"head.projection.{leaf}": f"model.blocks.6.proj.{leaf}" for leaf in ("weight", "bias")}
  arguments = {"dilated": True, "num_classes": 80}
  weights, caffe2 = weights_of(recorded), {}
  paths = [
    ".".join(map(str, path)) for path, _ in nnx.to_flat_state(parts(**slowfast.VARIANTS["tiny"], **arguments)[1])
  ]
  for path in paths:
    caffe2[published(path, slowfast.CAFFE2_NAMES)] = weights[published(path, slowfast.REFERENCE_NAMES)]
  momentum = {f"{name}_momentum": w for name, w in caffe2.items()}
  shapes = {name: w.shape for name, w in (caffe2 | momentum).items()}
  assert slowfast.reference_arguments(shapes) == slowfast.VARIANTS["tiny"]
  pytorchvideo = {torch_names[name].removeprefix("model."): w for name, w in weights.items()}
  native = nnx.state(loaded(weights, **arguments))
  for renamed, names in ((caffe2, slowfast.CAFFE2_NAMES), (pytorchvideo, slowfast.PYTORCHVIDEO_NAMES)):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded(renamed, names, **arguments)), native)


def test_parameters() -> None:
  state = parts(**slowfast.VARIANTS["r50"], dilated=False, num_classes=400)[1]
  assert sum(x.size for x in jax.tree.leaves(nnx.filter_state(state, nnx.Param))) == 34_566_488


@pytest.mark.parametrize(
  ("size", "dilated", "maps", "gmacs"),
  [
    ((32, 224, 224), True, (14, 14), 74.18),
    ((32, 256, 448), True, (16, 28), 169.55),
    ((32, 256, 256), False, (8, 8), 65.71),
    ((8, 90, 150), True, (6, 10), None),  # divides nowhere
  ],
)
def test_maps_and_multiply_adds(size, dilated, maps, gmacs) -> None:
  graphdef, state = parts(**slowfast.VARIANTS["r50"], dilated=dilated, num_classes=400)
  video = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  jaxpr, out = jax.make_jaxpr(lambda state, video: nnx.merge(graphdef, state)(video), return_shape=True)(state, video)
  assert [x.shape for x in out] == [(1, size[0] // 4, *maps, 2048), (1, size[0], *maps, 256)]
  if gmacs:
    counts = describe.multiply_adds(jaxpr.jaxpr, nnx.merge(graphdef, state)).values()
    assert sum(part["exact"] for part in counts) / 1e9 == pytest.approx(gmacs, abs=0.005)


def test_slow_frames() -> None:
  assert slowfast.slow_frames(32, 4).tolist() == [0, 4, 8, 13, 17, 22, 26, 31]
  assert slowfast.slow_frames(64, 4)[[5, 10]].tolist() == [21, 42]  # where fractions are whole
  assert slowfast.slow_frames(4, 4).tolist() == [0]


def test_bad_arguments() -> None:
  with pytest.raises(ValueError, match="unknown norm 'sync'"):
    slowfast.SlowFast(**SMALL, norm="sync", rngs=nnx.Rngs(0))  # pyright: ignore
  with pytest.raises(ValueError, match=r"depths \(1, 2\): SlowFast has four stages"):
    slowfast.SlowFast(**{**SMALL, "depths": (1, 2)}, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="built without a classifier: set num_classes"):
    nnx.merge(*parts(**SMALL)).classify(jnp.zeros(1), jnp.zeros(1))
  with pytest.raises(ValueError, match="video of 6 frames: SlowFast needs a multiple of 4"):
    jax.eval_shape(nnx.merge(*parts(**SMALL)), jnp.zeros((1, 6, 32, 32, 3)))


SMALL = {"width": 8, "fast_width": 4, "depths": (1, 1, 1, 1)}
VIDEO = np.random.default_rng(0).normal(size=(8, 8, 32, 40, 3)).astype(np.float32)


def random_state(state: nnx.State) -> nnx.State:
  def value(path, variable):
    name = ".".join(map(str, path)).replace("mean", "running_mean").replace("var", "running_var")
    noise = seeded.fill(name, variable.shape[::-1]).T  # kernels have variance 1 / fan-in
    return variable.replace(jnp.asarray(noise))

  return nnx.map_state(value, state)


def test_statistics_are_of_the_batch_on_all_devices() -> None:
  graphdef, state = parts(**SMALL, norm="batch")
  model = nnx.view(nnx.merge(graphdef, random_state(state)), deterministic=False)
  graphdef, params, before = checkpoint.split_model(model)

  @QUICK
  def run(video):
    model = nnx.merge(graphdef, params, before)
    return model(video), checkpoint.split_model(model)[2]

  maps, after = run(VIDEO)
  kernel = params["fast"]["stem"]["conv"]["kernel"]
  seen = jax.lax.conv_general_dilated(
    VIDEO, kernel, (1, 2, 2), ((2, 2), (3, 3), (3, 3)), dimension_numbers=("NTHWC", "THWIO", "NTHWC")
  )
  old, new = (tree["fast"]["stem"]["norm"] for tree in (before, after))
  np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * seen.mean((0, 1, 2, 3)), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * seen.var((0, 1, 2, 3)), rtol=1e-4)
  assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))

  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  with jax.set_mesh(mesh):
    spread = run(sharding.to_global(VIDEO, mesh))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), spread, (maps, after))


def train_pathway(*, frozen: bool, remat: bool = False, dtype: jnp.dtype | None = None):
  """Map, gradients, and statistics before and after, of a short pathway in training."""

  def build():
    options = {"dilated": True, "frozen": frozen, "remat": remat, "dtype": dtype, "rngs": nnx.Rngs(0)}
    return slowfast.Pathway(4, (2,), (3, 3), (0,), **options)

  graphdef, state = nnx.split(nnx.eval_shape(build))
  model = nnx.view(nnx.merge(graphdef, random_state(state)), deterministic=False)
  graphdef, params, before = checkpoint.split_model(model)

  def loss(params):
    model = nnx.merge(graphdef, params, before)
    x = model.run(0, model.begin(VIDEO[:2]))
    return (x * jnp.linspace(-1, 1, x.size).reshape(x.shape)).sum(), (x, checkpoint.split_model(model)[2])

  gradients, (x, after) = QUICK(jax.grad(loss, has_aux=True))(params)
  return x, gradients, before, after


@pytest.mark.parametrize("frozen", [True, False])
def test_training(frozen: bool) -> None:
  """Parameters train in any case; recomputing blocks changes nothing."""
  x, gradients, before, after = train_pathway(frozen=frozen)
  stay = [np.array_equal(*pair) for pair in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
  assert stay == [frozen] * len(stay)
  sizes = [np.abs(gradient).max() for gradient in jax.tree.leaves(gradients)]
  assert min(sizes) > 0
  recomputed = train_pathway(frozen=frozen, remat=True)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5 * max(sizes))
  jax.tree.map(close, recomputed, (x, gradients, before, after))


def test_half_precision() -> None:
  x, gradients, *_ = train_pathway(frozen=True)
  rough, rough_gradients, *_ = train_pathway(frozen=True, dtype=jnp.bfloat16)
  assert rough.dtype == jnp.bfloat16
  assert np.abs(x - rough.astype(jnp.float32)).mean() < 0.02 * x.std()
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(rough_gradients), strict=True):
    assert np.abs(a - b).mean() < 0.2 * np.abs(a).mean()
  graphdef, state = parts(**SMALL, dtype=jnp.bfloat16)
  maps = jax.eval_shape(lambda state: nnx.merge(graphdef, state)(VIDEO), state)
  assert all(x.dtype == jnp.bfloat16 for x in maps)


def test_blocks_begin_as_their_shortcut() -> None:
  @QUICK
  def run(x):
    return slowfast.Bottleneck(16, 4, 3, 1, 2, frozen=True, dtype=None, rngs=nnx.Rngs(0))(x)

  x = jnp.abs(jnp.asarray(VIDEO[:1, ..., :1])) + jnp.zeros(16)
  np.testing.assert_array_equal(run(x), x)
