"""Stand-in models whose answers say which frames they were shown."""

import jax.numpy as jnp
from flax import nnx

from vad_jax import checkpoint
from vad_jax.batch import Detections

CLIP = {"num_frames": 8, "frame_stride": 3, "fps": 30.0}
LABEL_MAP = {1: "first frame", 2: "middle frame", 3: "last frame"}


class ClipReader(nnx.Module):
  """Scores are the brightness of the clip's first, middle and last frame; one sure person, one doubtful."""

  def __call__(self, batch, *, rngs=None):
    height, width = batch["video_size"][0]
    video = batch["video"].astype(jnp.float32)
    inside = (jnp.arange(video.shape[2])[:, None] < height) & (jnp.arange(video.shape[3]) < width)
    return {"brightness": (video.mean(-1) * inside).sum((2, 3)) / inside.sum() / 255}

  def detections(self, out, batch):
    brightness = out["brightness"]
    scores = brightness[:, [0, brightness.shape[1] // 2, -1]]
    size = len(brightness)
    boxes = jnp.array([[0.5, 0.5, 0.6, 0.7], [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]], jnp.float32)
    return Detections(
      boxes=jnp.broadcast_to(boxes, (size, 3, 4)),
      actor_score=jnp.broadcast_to(jnp.array([0.6, 0.9, 0.99]), (size, 3)),
      action_score=jnp.stack([scores * 0, scores, scores], 1),
      valid=jnp.array([True, True, False]) & (batch["key"] >= 0)[:, None],
    )


class ClipReaderOfPeople(ClipReader):
  """The same of given people."""

  takes_proposals = True

  def detections(self, out, batch):
    scores = out["brightness"][:, None, [0, out["brightness"].shape[1] // 2, -1]]
    shape = (*batch["proposal_mask"].shape, 3)
    return Detections(
      batch["proposals"], batch["proposal_score"], jnp.broadcast_to(scores, shape), batch["proposal_mask"]
    )


class TubeReader(ClipReader):
  """Scores of every frame are its own brightness; frame ``i`` of a clip has its box at ``i / 1000``."""

  def detections(self, out, batch):
    brightness = out["brightness"]
    size, length = brightness.shape
    x = jnp.broadcast_to(jnp.arange(length)[:, None] / 1000, (length, 2))
    boxes = jnp.stack([x, x + jnp.array([0.0, 0.5]), x + 0.3, x + jnp.array([0.4, 0.9])], -1)
    scores = jnp.stack([brightness, 1 - brightness], -1)[:, :, None]
    return Detections(
      boxes=jnp.broadcast_to(boxes, (size, length, 2, 4)),
      actor_score=jnp.broadcast_to(jnp.array([0.9, 0.2]), (size, length, 2)),
      action_score=jnp.broadcast_to(scores, (size, length, 2, 2)),
      valid=jnp.ones((size, 2), bool),
    )


LOADED = checkpoint.Loaded(
  ClipReader(),
  {
    "model": {"name": "stand-in"},
    "clip": CLIP,
    "canvas": [64, 96],
    "short_side": 48,
    "label_map": LABEL_MAP,
    "step": 7,
    "metrics": {},
  },
)
