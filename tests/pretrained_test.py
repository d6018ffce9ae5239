"""The weights that ship with the package, on the videos that ship with the repository."""

from pathlib import Path

import numpy as np
import pytest

from vad_jax import annotations, checkpoint, predict
from vad_jax.ops.boxes import iou

SAMPLE = Path(__file__).parents[1] / "data" / "sample"


@pytest.fixture(scope="module", params=["quickstart", "quickstart_class_query"])
def quickstart(request) -> checkpoint.Loaded:
  return checkpoint.load_model(request.param)


def test_info_says_what_the_weights_are(quickstart):
  assert quickstart.info["model"]["name"] in ("evad", "class_query")
  assert quickstart.info["metrics"]["frame_map_50"] > 0.6
  assert quickstart.info["label_map"] == annotations.read_label_map(SAMPLE / "annotations" / "label_map.pbtxt")


def test_finds_people_and_actions_in_unseen_videos(quickstart, tmp_path):
  keyframes = annotations.keyframes(annotations.read_ava_csv(SAMPLE / "annotations" / "val.csv"), 80)
  found, right, actors = 0, 0, 0
  for path in sorted((SAMPLE / "videos" / "val").glob("*.mp4")):
    result = predict.predict_video(quickstart, path, tmp_path, draw=False)
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
  least = 0.8 if quickstart.info["model"]["name"] == "evad" else 0.6  # class queries' boxes are less exact
  assert found >= least * actors
  assert right >= 0.6 * actors
