"""AVA from what disks hold: every layout gives the frames that the annotations mean."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests import numbered_video
from vad_jax import annotations, datasets
from vad_jax.datasets import ava, prepare, proposals
from vad_jax.datasets.loader import ClipSpec
from vad_jax.datasets.source_set import Problems

TRAIN, VAL = "-train_1", "val_2x"
NUM_FRAMES = 271  # nine seconds and one frame, as ACAR's extraction ends


def write_frames(folder: Path, pattern: str, count: int = NUM_FRAMES) -> None:
  folder.mkdir(parents=True)
  for index in range(count):
    image = numbered_video.picture(index)[..., ::-1]
    cv2.imwrite(str(folder / pattern.format(index + 1)), image, [cv2.IMWRITE_JPEG_QUALITY, 90])


def write_annotations(folder: Path, version: str = "2.2", seconds: range = range(900, 910)) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for split, video in (("train", TRAIN), ("val", VAL)):
    rows = [f"{video},{second:04d},0.1,0.2,0.5,0.9,{action},7\n" for second in seconds for action in (12, 80)]
    (folder / f"ava_{split}_v{version}.csv").write_text("".join(rows))
    (folder / f"ava_{split}_excluded_timestamps_v{version}.csv").write_text(f"{video},0903\n")


def run(source: Path, output: Path, *options: str) -> dict:
  prepare.main(["ava", "--source", str(source), "--output", str(output), *options])
  return json.loads((output / "dataset.json").read_text())


def frames_of_the_rule(second: int, count: int = NUM_FRAMES) -> list[int]:
  """Indices of a clip of 16 frames with stride 4, as the official code takes them from its list of frames."""
  center = (second - 900) * 30
  return np.clip(range(center - 32, center + 32, 4), 0, count - 1).tolist()


@pytest.mark.parametrize(
  ("layout", "folder", "pattern"),
  [
    ("pyslowfast", "frames", "{video}_{{:06d}}.jpg"),
    ("mmaction2", "rawframes", "img_{{:05d}}.jpg"),
    ("acar", "data", "image_{{:06d}}.jpg"),
    ("acar", ".", "image_{{:06d}}.jpg"),
  ],
)
def test_extracted_frames_follow_the_official_rule(tmp_path, capsys, layout, folder, pattern):
  source = tmp_path / "ava"
  for video in (TRAIN, VAL):
    write_frames(source / folder / video, pattern.format(video=video))
  write_annotations(source / "annotations")
  found = run(source, tmp_path / "out" / "ava")
  assert found["layout"] == [layout] and found["annotations"] == "2.2" and len(found["sha256"]) == 4
  sets = datasets.load("ava", tmp_path / "out", clip=ClipSpec(16, 4, 30))
  for split, video in (("train", TRAIN), ("val", VAL)):
    times = [k.timestamp for k in sets[split].keyframes]
    assert times == [*range(900, 903), *range(904, 910)]  # 903 is excluded
    for index, time in enumerate(times):
      example = sets[split][index]
      assert numbered_video.numbers(example["video"]) == frames_of_the_rule(int(time))
    assert {k.video for k in sets[split].keyframes} == {video}
    np.testing.assert_allclose(example["boxes"], [[0.1, 0.2, 0.5, 0.9]], rtol=1e-6)
    assert np.flatnonzero(example["labels"][0]).tolist() == [11, 79]
  assert layout in capsys.readouterr().out
