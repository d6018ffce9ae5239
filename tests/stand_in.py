"""The smallest thing that keeps the contract of a system, and data for it; what tests of training run on.

It is none of the library's models, which proves that training, evaluation and checkpoints name none.
"""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.batch import Batch, Detections

NUM_CLASSES = 3
LABEL_MAP = {1: "stand", 2: "walk", 3: "run"}
INFO = {
  "model": {"name": "stand_in", "width": 256, "num_classes": NUM_CLASSES},
  "clip": {"num_frames": 2, "frame_stride": 1, "fps": 25.0},
  "canvas": [32, 32],
  "short_side": 32,
  "label_map": LABEL_MAP,
}


class StandIn(nnx.Module):
  """Mean of the video in four quarters, one box and one set of actions for each; with tubes for each in every frame."""

  transformer_parameters = r"hidden\..*"

  def __init__(self, *, width: int = 256, num_classes: int = NUM_CLASSES, tubes: bool = False, rngs: nnx.Rngs):
    self.tubes = tubes
    self.embed = nnx.Linear(3, width, rngs=rngs)
    self.hidden = nnx.Linear(width, width, rngs=rngs)
    self.parts = nnx.List([nnx.Linear(width, size, rngs=rngs) for size in (4, 1, num_classes)])
    self.dropout = nnx.Dropout(0.1)
    self.seen = nnx.BatchStat(jnp.zeros(3))

  def __call__(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> dict[str, Any]:
    video = jnp.asarray(batch["video"], jnp.float32) / 255
    quarters = [half for part in jnp.split(video, 2, 2) for half in jnp.split(part, 2, 3)]
    x = jnp.stack([quarter.mean((2, 3) if self.tubes else (1, 2, 3)) for quarter in quarters], -2)  # [B, (T,) 4, 3]
    if rngs is not None:
      self.seen[...] = 0.9 * self.seen[...] + 0.1 * x.reshape(-1, 3).mean(0)
    x = self.dropout(nnx.relu(self.hidden(nnx.relu(self.embed(x)))), rngs=rngs)
    boxes, actor, action = (part(x) for part in self.parts)
    return {"boxes": nnx.sigmoid(boxes), "actor": actor[..., 0], "action": action}

  def costs(self, out: dict[str, Any], batch: Batch) -> jax.Array:
    return jnp.abs(out["boxes"][..., None, :] - batch["boxes"][..., None, :, :]).sum(-1)

  def loss(self, out: dict[str, Any], batch: Batch, match: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    count = jnp.maximum(batch["box_mask"].sum(), 1)
    box = (self.costs(out, batch) * match).sum() / count
    wrong = jnp.abs(out["action"][..., None, :] - batch["labels"][..., None, :, :]).sum(-1)
    action = (wrong * match).sum() / count
    actor = jnp.square(out["actor"] - match.any(-1)).mean()
    return box + action + actor, {"loss_box": box, "loss_action": action, "loss_actor": actor}

  def detections(self, out: dict[str, Any], batch: Batch) -> Detections:
    low, high = jnp.split(out["boxes"], 2, -1)
    boxes = jnp.concatenate([jnp.minimum(low, high), jnp.maximum(low, high)], -1)
    valid = jnp.ones((boxes.shape[0], boxes.shape[-2]), bool)
    return Detections(boxes, nnx.sigmoid(out["actor"]), nnx.sigmoid(out["action"]), valid)


def make_model(rngs: nnx.Rngs) -> StandIn:
  """The model of ``INFO``."""
  return StandIn(rngs=rngs)


def example(index: int) -> dict[str, np.ndarray]:
  """One row of a batch: noise, one or two boxes."""
  random = np.random.default_rng(index)
  corners = random.uniform(0, 0.4, (2, 2))
  return {
    "video": random.integers(0, 255, (2, 8, 8, 3), np.uint8),
    "video_size": np.array([8, 8], np.int32),
    "boxes": np.concatenate([corners, corners + 0.5], -1).astype(np.float32),
    "labels": random.integers(0, 2, (2, NUM_CLASSES)).astype(np.float32),
    "box_mask": np.array([True, index % 2 == 0]),
    "key": np.int32(index),
  }


def batches(start: int = 0, *, batch_size: int = 8, size: int = 40) -> Iterator[Batch]:
  """An endless shuffled stream from one of its batches on; of several processes, each gets its share."""
  share = batch_size // jax.process_count()
  first = jax.process_index() * share
  rows = grain.MapDataset.range(size).seed(0).shuffle().repeat().map(example).batch(batch_size)[start:]
  return iter(rows.map(lambda batch: {k: v[first : first + share] for k, v in batch.items()}).to_iter_dataset())


class Writer:
  """Keeps what it is given, by step."""

  def __init__(self) -> None:
    self.scalars: dict[int, dict[str, float]] = {}

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    self.scalars.setdefault(step, {}).update(scalars)
