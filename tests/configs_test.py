"""Every config builds a model that runs; keys and arguments that do not exist are errors."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from configs import common, evad_vitb
from vad_jax import datasets, models, optim, sharding
from vad_jax.checkpoint import split_model
from vad_jax.datasets.augment import Augment
from vad_jax.datasets.loader import ClipSpec
from vad_jax.rngs import make_rngs

NAMES = sorted(
  path.stem for path in Path(common.__file__).parent.glob("*.py") if path.stem not in ("common", "__init__")
)
NUM_CLASSES = 80


def get(name: str, arg: str | None = None) -> ml_collections.ConfigDict:
  return importlib.import_module(f"configs.{name}").get_config(arg)


def build(config: ml_collections.ConfigDict) -> Any:
  """The model without its numbers."""
  return nnx.eval_shape(lambda: models.build(**config.model, num_classes=NUM_CLASSES, rngs=make_rngs(0)))


@pytest.mark.parametrize("arg", [None, "tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_config_fits_the_code(name: str, arg: str | None) -> None:
  config = get(name, arg)
  assert config.is_locked
  assert set(config) == set(common.base())
  for part in ("clip", "augment", "mesh", "eval", "log", "checkpoint", "optimizer"):
    assert set(config[part]) == set(common.base()[part]), part
  canvases = np.reshape(config.canvas, (-1, 2))  # one or several
  assert not (canvases % 16).any()
  ClipSpec(**config.clip)
  Augment(**config.augment)
  sharding.make_mesh(config.mesh)
  schedule = optim.make_schedule(**config.schedule, num_steps=100, steps_per_epoch=10)
  assert 0 <= schedule(0) < 1
  if config.data.name in datasets.DATASETS:
    known = set(inspect.signature(datasets.DATASETS[config.data.name]).parameters)
    if "kwargs" in known:
      known |= set(inspect.signature(datasets.open_directory).parameters)
    assert set(config.data) - {"name"} <= known

  model = build(config)
  _, params, _ = split_model(model)
  optim.make_optimizer(params, learning_rate=schedule, **config.optimizer)
  shape = (1, config.clip.num_frames, *canvases[-1].tolist(), 3)
  batch = {
    "video": jax.ShapeDtypeStruct(shape, jnp.uint8),
    "video_size": jax.ShapeDtypeStruct((1, 2), jnp.int32),
    "boxes": jax.ShapeDtypeStruct((1, config.max_boxes, 4), jnp.float32),
    "labels": jax.ShapeDtypeStruct((1, config.max_boxes, NUM_CLASSES), jnp.float32),
    "box_mask": jax.ShapeDtypeStruct((1, config.max_boxes), jnp.bool_),
    "key": jax.ShapeDtypeStruct((1,), jnp.int32),
    "proposals": jax.ShapeDtypeStruct((1, config.max_proposals, 4), jnp.float32),
    "proposal_mask": jax.ShapeDtypeStruct((1, config.max_proposals), jnp.bool_),
  }
  graphdef, state = nnx.split(nnx.view(model, deterministic=True))

  def detect(state: Any, batch: Any) -> Any:
    merged = nnx.merge(graphdef, state)
    return merged.detections(merged(batch), batch)

  found = jax.eval_shape(detect, state, batch)
  assert found.boxes.shape == (*found.actor_score.shape, 4)
  assert found.action_score.shape == (*found.actor_score.shape, NUM_CLASSES)


def test_ablations_build() -> None:
  one_each = {tuple(changed): name for name, changed in evad_vitb.ABLATIONS.items()}
  for name in one_each.values():
    build(get("evad_vitb", f"tiny,ablation={name}"))


def test_arguments() -> None:
  config = get("evad_vitb", "keep_rate=0.6,short_side=224,ablation=weight_4")
  assert (config.model.keep_rate, config.model.keyframe_weight) == (0.6, 4.0)
  assert (config.short_side, config.canvas) == (224, (224, 416))


@pytest.mark.parametrize(
  "arg, message",
  [
    ("keep_rat=0.6", r"'keep_rat' is not known \(did you mean 'keep_rate'\?\); known: keep_rate, short_side"),
    ("keep_rate=high", "keep_rate=high: expected float"),
    ("ablation=none_such", "unknown ablation 'none_such': choose one of none, linear_head"),
  ],
)
def test_bad_arguments(arg: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    get("evad_vitb", arg)


def test_unknown_key() -> None:
  config = common.base()
  with pytest.raises(AttributeError, match="batchsize"):
    config.batchsize = 3
  with pytest.raises(AttributeError, match="flipp"):
    config.augment.flipp = 0.1


def test_any_config_runs_on_the_synthetic_set() -> None:
  """What `--config.data.name=synthetic` gives has no arguments that only another set knows."""
  known = inspect.signature(datasets.DATASETS["synthetic"]).parameters
  assert set(get("evad_vitb").data) - {"name"} <= set(known)


def test_paper_recipe() -> None:
  """Learning rates of the ViT-B recipe at a few epochs; both heads learn eight times as fast."""
  config = get("evad_vitb")
  schedule = optim.make_schedule(**config.schedule, num_steps=1200, steps_per_epoch=100)
  np.testing.assert_allclose(
    [schedule(s) for s in (0, 100, 200, 500, 800)], [2.5e-6, 1.375e-5, 2.5e-5, 2.5e-6, 2.5e-7], 1e-6
  )
  optimizer = {"groups": config.optimizer.groups, "no_decay": config.optimizer.no_decay}
  assert optim.group_of("decoder/blocks/0/mlp/fc1/kernel", (2, 2), **optimizer) == (8, True)
  assert optim.group_of("head/0/linear1/bias", (2, 2), **optimizer) == (8, False)
  assert optim.group_of("backbone/blocks/0/attn/qkv/kernel", (2, 2), **optimizer) == (1, True)
  assert optim.group_of("proposals/features", (2, 2), **optimizer) == (1, True)
  assert get("evad_vitl").schedule.learning_rate == 1e-5
  assert get("evad_vitl").model.action_loss == 6
