"""The weights that ship with the package, on the videos that ship with the repository."""

from pathlib import Path

import numpy as np
import pytest

from vad_jax import annotations, checkpoint, predict
from vad_jax.ops.boxes import iou

SAMPLE = Path(__file__).parents[1] / "data" / "sample"


# System, and how many of 25 people are found, and have their best action right, in videos that training never saw.
WEIGHTS = {
  "quickstart": ("evad", 20, 15),
  "quickstart_class_query": ("class_query", 15, 15),
  "quickstart_bmvit": ("bmvit", 20, 18),
  "quickstart_action_transformer": ("action_transformer", 10, 8),
  "quickstart_st_context": ("st_context", 20, 8),
}


@pytest.fixture(scope="module", params=WEIGHTS)
def name(request) -> str:
  return request.param


@pytest.fixture(scope="module")
def quickstart(name) -> checkpoint.Loaded:
  return checkpoint.load_model(name)


def test_info_says_what_the_weights_are(name, quickstart):
  assert quickstart.info["model"]["name"] == WEIGHTS[name][0]
  assert 0 < quickstart.info["metrics"]["frame_map_50"] < 1
  assert not quickstart.info["data"]["root"].startswith("/")
  assert quickstart.info["label_map"] == annotations.read_label_map(SAMPLE / "annotations" / "label_map.pbtxt")


def test_finds_people_and_actions_in_unseen_videos(name, quickstart, tmp_path):
  system, least_found, least_right = WEIGHTS[name]
  boxes = "quickstart" if system == "st_context" else None
  keyframes = annotations.keyframes(annotations.read_ava_csv(SAMPLE / "annotations" / "val.csv"), 80)
  found, right, actors = 0, 0, 0
  for path in sorted((SAMPLE / "videos" / "val").glob("*.mp4")):
    result = predict.predict_video(quickstart, path, tmp_path, draw=False, boxes=boxes)
    for keyframe in (k for k in keyframes if k.video == path.stem):
      detected = result.keyframes[int(keyframe.timestamp)]
      assert detected.time == keyframe.timestamp
      actors += len(keyframe.boxes)
      for box, labels in zip(keyframe.boxes, keyframe.labels, strict=True):
        overlap = iou(box[None], detected.boxes) if len(detected.boxes) else np.zeros(1)
        if overlap.max() >= 0.5:
          found += 1
          best = np.argmax(detected.action_score[overlap.argmax()])
          right += bool(labels[best])
  assert actors == 25
  assert found >= least_found
  assert right >= least_right
