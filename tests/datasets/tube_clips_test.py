"""Videos in clips: every frame once, boxes on their frames, filling without targets."""

import logging
from pathlib import Path

import numpy as np
import pytest

from tests import numbered_video
from vad_jax import datasets
from vad_jax.datasets.augment import Augment
from vad_jax.datasets.loader import ClipSpec, VideoFrames, eval_batches, train_batches
from vad_jax.datasets.tube_clips import TubeDataset, cut
from vad_jax.tubes import Tube, TubeGroundTruth, Video

CLIP = ClipSpec(num_frames=8, frame_stride=1, fps=30)
PLACE = {"canvas": (32, 64), "short_side": 32, "max_boxes": 3}
SIZE = (48, 80)


def tube(label, first, last, x=8.0, width=16.0):
  """A box that moves one pixel a frame."""
  frame = np.arange(first, last + 1.0)
  return Tube(label, np.stack([frame, x + frame, 0 * frame, x + width + frame, 0 * frame + 24], axis=1))


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tubes")
  for name, count in {"short": 5, "long": 13}.items():
    numbered_video.write(folder / f"{name}.mp4", count, fps=12.5)
  return VideoFrames(folder)


def truth(*, size=SIZE, fps=12.5):
  videos = {
    "short": Video(5, size, [tube(0, 1, 5)], fps),
    "long": Video(13, size, [tube(1, 3, 12), tube(1, 9, 13, x=30.0, width=9.0)], fps),
    "lost": Video(9, size, [tube(0, 1, 9)], fps),
  }
  return TubeGroundTruth(["stand", "run"], videos, [([], list(videos))])


@pytest.fixture
def dataset(frames):
  return TubeDataset(truth(), ["short", "long"], frames, CLIP)


@pytest.mark.parametrize(("num_frames", "length"), [(5, 8), (8, 8), (13, 8), (40, 40), (39, 40), (64, 32), (900, 32)])
def test_clips_hold_every_frame_once(num_frames, length):
  numbers = np.concatenate(cut(num_frames, length))
  assert len(numbers) == -(-num_frames // length) * length
  real = numbers[(numbers >= 1) & (numbers <= num_frames)]
  np.testing.assert_array_equal(real, np.arange(1, num_frames + 1))
  before, after = (numbers < 1).sum(), (numbers > num_frames).sum()
  assert 0 <= after - before <= 1


def test_boxes_lie_on_their_frames(dataset):
  short, first, second = (dataset[index] for index in range(len(dataset)))
  # 5 frames in 8: one before and two after them repeat the ends.
  assert numbered_video.numbers(short["video"]) == [0, 0, 1, 2, 3, 4, 4, 4]
  np.testing.assert_array_equal(short["box_mask"][:, 0], [0, 1, 1, 1, 1, 1, 0, 0])
  assert numbered_video.numbers(first["video"]) == [0, 0, 1, 2, 3, 4, 5, 6]
  assert numbered_video.numbers(second["video"]) == [7, 8, 9, 10, 11, 12, 12, 12]
  # The first tube spans frames 3 to 12, which are shown as numbers 2 to 11; the second one starts with frame 9.
  np.testing.assert_array_equal(first["box_mask"], np.array([[0, 0, 0, 1, 1, 1, 1, 1]]).T)
  np.testing.assert_array_equal(second["box_mask"].T, [[1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0]])
  expected = np.array([8 + 9, 0, 24 + 9, 24]) / [80, 48, 80, 48]
  np.testing.assert_allclose(second["boxes"][1, 0], expected, atol=1e-6)
  np.testing.assert_array_equal(second["labels"], second["box_mask"][..., None] * [0, 1])
  np.testing.assert_array_equal(dataset.clips[2].frames[:6], np.arange(8, 14))


def test_actions_of_a_person_are_one_target(frames):
  """Tubes that agree wherever they meet are one person's; those that agree in one frame alone are not."""
  boxes = tube(0, 1, 13).boxes
  crossing = boxes.copy()
  crossing[:6, 1] -= 4
  crossing[7:, 1] += 4
  tubes = [Tube(1, boxes[:5]), Tube(0, boxes), Tube(2, boxes[5:]), Tube(1, crossing)]
  video = Video(13, SIZE, tubes, 12.5)
  dataset = TubeDataset(TubeGroundTruth(list("abc"), {"long": video}, [([], ["long"])]), ["long"], frames, CLIP)
  first, second = dataset[0], dataset[1]
  assert dataset.num_boxes(0) == (2, 0)
  # The clips start with frame 0, which fills up, and with frame 8.
  np.testing.assert_array_equal(first["labels"][:, 0], [[0] * 3, *[[1, 1, 0]] * 5, *[[1, 0, 1]] * 2])
  np.testing.assert_array_equal(first["labels"][:, 1], [[0] * 3, *[[0, 1, 0]] * 7])
  np.testing.assert_array_equal(second["labels"][:6, 0], [[1, 0, 1]] * 6)
  (batch,) = eval_batches(dataset, batch_size=2, **PLACE)
  np.testing.assert_array_equal(batch["labels"][0, :, :2], first["labels"])


def test_rendered_people_open_as_tubes():
  """What keyframes are annotated with is what their frames have."""
  sample = Path(__file__).parents[2] / "data" / "sample"
  clip = ClipSpec(num_frames=16, frame_stride=1, fps=25)
  dataset = datasets.open_directory(sample, reader="video", tubes=True, clip=clip)["val"]
  keyframes = datasets.open_directory(sample, reader="video", clip=clip)["val"]
  classes = np.array([keyframes.label_map[index] for index in sorted(keyframes.label_map)])
  assert list(dataset.label_map.values()) == classes.tolist()
  assert len(keyframes) > 3
  for keyframe in keyframes.keyframes:
    frame = round(keyframe.timestamp * 25) + 1
    index = next(i for i, (name, numbers) in enumerate(dataset.clips) if name == keyframe.video and frame in numbers)
    example, row = dataset[index], frame - dataset.clips[index].frames[0]
    there = example["box_mask"][row]
    found = {
      (*box.round(4), *classes[labels > 0])
      for box, labels in zip(example["boxes"][row, there], example["labels"][row, there], strict=True)
    }
    expected = zip(keyframe.boxes, keyframe.labels[:, np.array(sorted(keyframes.label_map)) - 1], strict=True)
    assert found == {(*box.round(4), *classes[labels > 0]) for box, labels in expected}
  with pytest.raises(ValueError, match="tubes come without given boxes"):
    datasets.open_directory(sample, tubes=True, oracle=True)


def test_batches_have_targets_in_every_frame(dataset):
  (batch,) = eval_batches(dataset, batch_size=4, **PLACE)
  shapes = {
    name: (value.shape, value.dtype) for name, value in batch.items() if name in ("boxes", "labels", "box_mask")
  }
  assert shapes == {
    "boxes": ((4, 8, 3, 4), np.float32),
    "labels": ((4, 8, 3, 2), np.float32),
    "box_mask": ((4, 8, 3), bool),
  }
  np.testing.assert_array_equal(batch["key"], [0, 1, 2, -1])
  np.testing.assert_array_equal(batch["box_mask"][2, :, :2], dataset[2]["box_mask"])
  np.testing.assert_array_equal(batch["labels"][2, :, :2, 1], dataset[2]["box_mask"])
  outside = ~batch["box_mask"]
  assert not batch["boxes"][outside].any() and not batch["labels"][outside].any()
  augment = Augment(0.5, (1.0, 1.5), box_jitter=0.1)
  batches = train_batches(dataset, batch_size=3, seed=0, augment=augment, **PLACE)
  assert sorted(next(batches)["key"]) == [0, 1, 2]


def test_the_largest_tubes_of_a_crowd_are_kept(dataset, caplog):
  with caplog.at_level(logging.WARNING):
    (batch,) = eval_batches(dataset, batch_size=3, **{**PLACE, "max_boxes": 1})
  assert "1 examples have more than 1 actors" in caplog.text
  np.testing.assert_array_equal(batch["box_mask"][2, :, 0], [1, 1, 1, 1, 1, 0, 0, 0])


def test_videos_without_frames_are_left_out(frames, caplog):
  with caplog.at_level(logging.WARNING):
    dataset = TubeDataset(truth(), ["lost", "short", "unknown"], frames, CLIP)
  assert [clip.video for clip in dataset.clips] == ["short"]
  assert "2 of 3 videos left out: no tubes or frames (lost, unknown)" in caplog.text
  with pytest.raises(ValueError, match=r"none of the 1 videos has both tubes and frames \(lost\)"):
    TubeDataset(truth(), ["lost"], frames, CLIP)


def test_unfit_annotations_are_told(frames):
  with pytest.raises(ValueError, match=r"frame_stride 4: .* has to be 1"):
    TubeDataset(truth(), ["short"], frames, ClipSpec())
  for wrong in ({"size": None}, {"fps": None}):
    with pytest.raises(ValueError, match="short: the tubes name no resolution or no fps"):
      TubeDataset(truth(**wrong), ["short"], frames, CLIP)
