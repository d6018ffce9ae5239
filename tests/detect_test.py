"""Clips and canvases that models are given of a video."""

import weakref

import numpy as np
import pytest

from vad_jax import detect
from vad_jax.datasets.augment import place_on_canvas
from vad_jax.datasets.tube_clips import cut


@pytest.mark.parametrize(("count", "length"), [(1, 8), (5, 8), (8, 8), (13, 8), (64, 32), (99, 40)])
@pytest.mark.parametrize("known", [True, False])
def test_consecutive_clips(count, length, known):
  """Those of evaluation, where the number of frames is known; each frame once in any case."""
  stream = ((float(number), np.array(number)) for number in range(1, count + 1))
  found = list(detect.consecutive_clips(stream, length, count if known else None))
  expected = [numbers.clip(1, count) for numbers in cut(count, length)]
  assert len(found) == len(expected)
  assert [time for moments, _ in found for time, _ in moments] == list(range(1, count + 1))
  for (moments, clip), numbers in zip(found, expected, strict=True):
    assert all(clip[place] == time for time, place in moments)
    if known:
      assert clip.tolist() == numbers.tolist()


def test_clips_equal_a_search_over_all_frames():
  random = np.random.default_rng(0)
  times = np.cumsum(random.uniform(0.005, 0.3, 400))  # variable frame rate
  times -= times[0]
  for stride, offsets in [
    (1.0, np.linspace(-1, 1, 9)),
    (0.3, np.linspace(-0.2, 0.9, 4)),
    (None, np.zeros(1)),
  ]:
    frames = ((time, np.array(index)) for index, time in enumerate(times))
    found = list(detect.clips(frames, offsets, stride))
    keyframes = times if stride is None else np.arange(int(times[-1] / stride) + 1) * stride
    np.testing.assert_allclose([time for time, _ in found], keyframes)
    for time, clip in found:
      assert clip.tolist() == np.abs(times - (time + offsets)[:, None]).argmin(1).tolist()


def test_memory_does_not_grow_with_length():
  alive = weakref.WeakSet()

  class Frame(np.ndarray):
    __hash__ = object.__hash__

  most = 0

  def stream():
    nonlocal most
    for index in range(3000):
      frame = np.zeros(1).view(Frame)
      alive.add(frame)
      most = max(most, len(alive))
      yield index / 30, frame

  for _ in detect.clips(stream(), np.arange(-8, 8) * 4 / 30, 1.0):
    pass
  assert 0 < most < 120  # the clip's two seconds and what comes before its keyframe


@pytest.mark.parametrize(
  "size, canvas, placed",
  [
    ((1080, 1920), (224, 416), (224, 398)),
    ((1920, 1080), (416, 224), (398, 224)),
    ((90, 160), (224, 416), (224, 398)),
    ((800, 1920), (192, 448), (187, 448)),  # wider than in training: the long side decides
    ((2, 4000), (32, 448), (1, 448)),  # a line stays a line
  ],
)
def test_video_canvas(size, canvas, placed):
  assert detect.video_canvas(size, 224, (256, 448)) == canvas
  assert place_on_canvas(np.zeros((1, *size, 3), np.uint8), canvas, 224)[1] == placed


def test_stretched_frames_have_the_canvas_of_training():
  assert detect.video_canvas((90, 160), None, (64, 96)) == (64, 96)
