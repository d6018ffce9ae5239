"""Batches: the right frames, boxes and order; sharded, resumed and padded exactly."""

import itertools
import logging

import numpy as np
import pytest

from tests import numbered_video
from vad_jax import annotations, datasets
from vad_jax.annotations import Keyframe
from vad_jax.datasets import records
from vad_jax.datasets.augment import Augment
from vad_jax.datasets.loader import (
  ClipSpec,
  KeyframeDataset,
  RecordFrames,
  VideoFrames,
  eval_batches,
  train_batches,
)
from vad_jax.datasets.video import VideoError

LABELS = {1: "stand", 3: "wave"}
CLIP = ClipSpec(num_frames=4, frame_stride=2, fps=10)
AUGMENT = Augment(flip=0.5, scale=(0.7, 1.5), color=0.2)
PLACE = {"canvas": (32, 64), "short_side": 32, "max_boxes": 3}


def keyframe(video, timestamp, boxes=2):
  corners = np.linspace(0, 0.5, boxes, dtype=np.float32)[:, None]
  # Later boxes are the larger ones.
  size = np.linspace(0.2, 0.5, boxes, dtype=np.float32)[:, None]
  return Keyframe(
    video,
    float(timestamp),
    np.hstack([corners, corners, corners + size, corners + size]),
    np.eye(3, dtype=np.float32)[np.arange(boxes) % 2 * 2],
    np.arange(boxes),
  )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Three videos of 4 s at 10 frames a second."""
  folder = tmp_path_factory.mktemp("set")
  for name in "abc":
    numbered_video.write(folder / "videos" / "train" / f"{name}.mp4", 40)
  return folder


@pytest.fixture(scope="module")
def frames(source):
  return RecordFrames(records.build(source, source / "records", "train"))


@pytest.fixture
def dataset(frames):
  keyframes = [keyframe(video, time) for video, time in itertools.product("abc", (1, 2, 3))]
  return KeyframeDataset([*keyframes, keyframe("a", 0), keyframe("b", 4.0)], frames, CLIP, LABELS)


def assert_equal(one, two):
  for mine, other in zip(one, two, strict=True):
    assert mine.keys() == other.keys()
    for name in mine:
      np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


def take(batches, count):
  return list(itertools.islice(batches, count))


def keys(batches):
  return [int(key) for batch in batches for key in batch["key"]]


def test_a_clip_lies_around_its_keyframe():
  np.testing.assert_allclose(ClipSpec(4, 2, 10).times(5.0), [4.6, 4.8, 5.0, 5.2])
  spec = ClipSpec()
  assert spec.times(902.0)[8] == 902 and len(spec.times(902.0)) == 16
  # AVA's rule at 30 frames a second: every fourth frame, the keyframe in the middle.
  np.testing.assert_allclose(spec.times(2.0) * 30, np.arange(60 - 32, 60 + 32, 4))


@pytest.mark.parametrize("reader", ["records", "video"])
def test_examples_hold_the_frames_of_their_time(source, frames, reader):
  if reader == "video":
    frames = VideoFrames(source / "videos" / "train")
  dataset = KeyframeDataset([keyframe("b", time) for time in (0, 1, 2, 4)], frames, CLIP, LABELS)
  found = [numbered_video.numbers(dataset[index]["video"]) for index in range(4)]
  assert found == [[0, 0, 0, 2], [6, 8, 10, 12], [16, 18, 20, 22], [36, 38, 39, 39]]
  assert dataset.num_classes == 3 and dataset[1]["key"] == 1


def test_a_batch_is_as_documented(dataset):
  batch = next(train_batches(dataset, batch_size=5, seed=0, **PLACE))
  shapes = {name: (value.shape, value.dtype) for name, value in batch.items()}
  assert shapes == {
    "video": ((5, 4, 32, 64, 3), np.uint8),
    "video_size": ((5, 2), np.int32),
    "boxes": ((5, 3, 4), np.float32),
    "labels": ((5, 3, 3), np.float32),
    "box_mask": ((5, 3), bool),
    "key": ((5,), np.int32),
  }
  for row, key in enumerate(batch["key"]):
    annotated = dataset.keyframes[key]
    np.testing.assert_array_equal(batch["box_mask"][row], [True, True, False])
    np.testing.assert_array_equal(batch["boxes"][row], [*annotated.boxes, np.zeros(4)])
    np.testing.assert_array_equal(batch["labels"][row], [*annotated.labels, np.zeros(3)])
    np.testing.assert_array_equal(batch["video_size"][row], [32, 53])
    assert batch["video"][row][:, :, :53].any() and not batch["video"][row][:, :, 53:].any()
    expected = round(annotated.timestamp * 10)
    assert numbered_video.number(batch["video"][row, 2, :, :53]) == min(expected, 39)


def test_every_example_comes_once_an_epoch_in_a_new_order(dataset):
  epochs = np.reshape(keys(take(train_batches(dataset, batch_size=1, seed=3, **PLACE), 33)), (3, 11))
  np.testing.assert_array_equal(np.sort(epochs), [range(11)] * 3)
  assert len({tuple(epoch) for epoch in epochs}) == 3
  again = keys(take(train_batches(dataset, batch_size=1, seed=3, **PLACE), 11))
  other = keys(take(train_batches(dataset, batch_size=1, seed=4, **PLACE), 11))
  assert again == list(epochs[0]) != other


def test_a_stream_goes_on_from_any_batch(dataset):
  options = {"batch_size": 2, "seed": 1, "augment": AUGMENT, **PLACE}
  whole = take(train_batches(dataset, **options), 12)
  for start in (4, 9):  # in the middle of the first epoch, and in the second
    assert_equal(take(train_batches(dataset, start=start, **options), 3), whole[start : start + 3])


def test_augmentation_differs_from_epoch_to_epoch(dataset):
  one = KeyframeDataset(dataset.keyframes[:1], dataset.frames, CLIP, LABELS)
  first, second = take(train_batches(one, batch_size=1, seed=0, augment=AUGMENT, **PLACE), 2)
  assert (first["video"] != second["video"]).any()


def test_processes_share_an_epoch(dataset):
  options = {"seed": 5, "augment": AUGMENT, **PLACE}
  alone = take(train_batches(dataset, batch_size=1, **options), 24)
  shared = [
    take(train_batches(dataset, batch_size=1, process_index=i, process_count=3, **options), 8) for i in range(3)
  ]
  # The same examples with the same augmentation as one process has them, dealt out.
  assert_equal([batch for turn in zip(*shared, strict=True) for batch in turn], alone)
  two = [take(train_batches(dataset, batch_size=2, process_index=i, process_count=2, **options), 6) for i in range(2)]
  for together, *parts in zip(take(train_batches(dataset, batch_size=4, **options), 6), *two, strict=True):
    np.testing.assert_array_equal(together["key"], np.concatenate([part["key"] for part in parts]))


def test_the_stream_does_not_depend_on_the_number_of_workers(dataset):
  options = {"batch_size": 2, "seed": 1, "augment": AUGMENT, **PLACE}
  alone = take(train_batches(dataset, **options), 7)
  batches = train_batches(dataset, workers=2, start=2, **options)
  helped = [{name: np.array(value) for name, value in batch.items()} for batch in take(batches, 5)]
  assert_equal(helped, alone[2:])
  batches.close()


@pytest.mark.parametrize(
  ("place", "augment", "needed"),
  [({"short_side": 24}, None, 24), ({"short_side": 24}, AUGMENT, 36), ({"short_side": None}, None, 64)],
)
def test_training_asks_for_frames_as_large_as_it_needs(dataset, monkeypatch, place, augment, needed):
  asked, example = [], dataset.example
  monkeypatch.setattr(dataset, "example", lambda index, side=np.inf: asked.append(side) or example(index, side))
  place = {**PLACE, **place}
  assert len(list(eval_batches(dataset, batch_size=2, **place))) == 6
  assert set(asked) == {np.inf}  # as others do it
  asked.clear()
  batch = next(train_batches(dataset, batch_size=2, seed=0, augment=augment, **place))
  assert set(asked) == {needed}
  if needed == 24:  # half of what is stored: the same frames and boxes
    for row, key in enumerate(batch["key"]):
      assert numbered_video.number(batch["video"][row, 2, :24, :40]) == min(dataset.keyframes[key].timestamp * 10, 39)
      np.testing.assert_array_equal(batch["boxes"][row, :2], dataset.keyframes[key].boxes)


@pytest.mark.parametrize(("batch_size", "process_count"), [(4, 1), (2, 3), (11, 1), (3, 5)])
def test_evaluation_sees_everything_once(dataset, batch_size, process_count):
  parts = [
    list(eval_batches(dataset, batch_size=batch_size, process_index=i, process_count=process_count, **PLACE))
    for i in range(process_count)
  ]
  assert len({len(part) for part in parts}) == 1
  assert all(batch["key"].shape == (batch_size,) for part in parts for batch in part)
  real = sorted(key for part in parts for key in keys(part) if key >= 0)
  assert real == list(range(11))
  filler = [(batch, row) for part in parts for batch in part for row, key in enumerate(batch["key"]) if key < 0]
  assert all(not batch[name][row].any() for batch, row in filler for name in batch if name != "key")
  if process_count == 1:
    assert keys(parts[0])[:11] == list(range(11))


def test_the_largest_of_a_crowd_are_kept(frames, caplog):
  crowd = KeyframeDataset([keyframe("a", 1, boxes=5), keyframe("a", 2)], frames, CLIP, LABELS)
  with caplog.at_level(logging.WARNING):
    batch = next(iter(eval_batches(crowd, batch_size=2, **PLACE)))
  np.testing.assert_array_equal(batch["boxes"][0], crowd.keyframes[0].boxes[2:])
  np.testing.assert_array_equal(batch["labels"][0], crowd.keyframes[0].labels[2:])
  assert "1 examples have more than 3 actors; only the largest are kept" in caplog.text


def test_boxes_outside_the_frame_are_clipped_and_empty_ones_no_target(frames, caplog):
  boxes = np.array([[-0.1, 0.2, 0.5, 1.2], [0.4, 0.4, 0.4, 0.9], [1.1, 0, 1.3, 1]], np.float32)
  odd = Keyframe("a", 1.0, boxes, np.eye(3, dtype=np.float32), np.arange(3))
  with caplog.at_level(logging.WARNING):
    example = KeyframeDataset([odd], frames, CLIP, LABELS)[0]
  assert "2 boxes are empty or outside the frame" in caplog.text
  np.testing.assert_array_equal(example["boxes"], np.array([[0, 0.2, 0.5, 1]], np.float32))
  np.testing.assert_array_equal(example["labels"], [[1, 0, 0]])


def test_keyframes_without_anybody_are_examples_too(frames):
  nobody = Keyframe("a", 1.0, np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
  dataset = KeyframeDataset([nobody], frames, CLIP, LABELS)
  batch = next(train_batches(dataset, batch_size=2, seed=0, augment=AUGMENT, **PLACE))
  assert not batch["box_mask"].any()


def test_keyframes_without_frames_are_left_out(frames, caplog):
  known = [keyframe("a", 1), keyframe("b", 3)]
  unknown = [keyframe(f"lost{i}", t) for i in range(6) for t in (1, 2)] + [keyframe("a", 60)]
  with caplog.at_level(logging.WARNING):
    dataset = KeyframeDataset([*unknown[:5], *known, *unknown[5:]], frames, CLIP, LABELS)
  assert [(k.video, k.timestamp) for k in dataset.keyframes] == [("a", 1), ("b", 3)]
  assert "13 of 15 keyframes left out: no frames of 7 videos (a, lost0, lost1, lost2, lost3, ...)" in caplog.text


def test_annotations_of_other_videos_are_an_error(frames):
  with pytest.raises(ValueError, match=r"none of the 2 .* \(videos: lost\); check that the annotations name"):
    KeyframeDataset([keyframe("lost", 1), keyframe("lost", 2)], frames, CLIP, LABELS)


def test_the_canvas_can_be_filled_without_keeping_proportions(dataset):
  options = {**PLACE, "canvas": (64, 64), "short_side": None}
  batch = next(train_batches(dataset, batch_size=2, seed=0, **options))
  np.testing.assert_array_equal(batch["video_size"], [[64, 64]] * 2)
  for row, key in enumerate(batch["key"]):
    expected = min(round(dataset.keyframes[key].timestamp * 10), 39)
    assert numbered_video.number(batch["video"][row, 2]) == expected
    np.testing.assert_array_equal(batch["boxes"][row, :2], dataset.keyframes[key].boxes)


CANVASES = {**PLACE, "canvas": ((32, 64), (64, 32)), "short_side": 32}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  """Seven keyframes of a wide video, four of a tall one."""
  folder = tmp_path_factory.mktemp("mixed")
  numbered_video.write(folder / "wide.mp4", 40)
  numbered_video.write(folder / "tall.mp4", 40, size=(80, 48))
  wide = [keyframe("wide", time / 2) for time in range(1, 8)]
  tall = [keyframe("tall", time / 2) for time in range(1, 5)]
  return KeyframeDataset([*wide, *tall], VideoFrames(folder), CLIP, LABELS)


def test_each_video_gets_the_canvas_that_it_fills(mixed):
  options = {"batch_size": 2, "seed": 0, "augment": AUGMENT, **CANVASES}
  batches = take(train_batches(mixed, **options), 22)  # 28 rows of wide and 16 of tall ones: four epochs
  counts = np.bincount(keys(batches), minlength=11)
  np.testing.assert_array_equal(counts, 4)
  for batch in batches:
    shape = batch["video"].shape[2:4]
    assert {shape} == {(32, 64) if key < 7 else (64, 32) for key in batch["key"]}
  # Every process has the same shape at the same time, and together they have what one has, also from the middle on.
  options["batch_size"] = 1
  shared = [take(train_batches(mixed, **options, start=2, process_index=i, process_count=2), 9) for i in (0, 1)]
  for one, *two in zip(batches[2:11], *shared, strict=True):
    assert sorted(one["key"]) == sorted(keys(two))
    assert len({batch["video"].shape for batch in two}) == 1


def test_stretched_frames_have_one_canvas(mixed):
  with pytest.raises(ValueError, match="2 canvases: frames that are stretched need no other shape, give one"):
    eval_batches(mixed, batch_size=2, **{**CANVASES, "short_side": None})


def test_evaluation_goes_canvas_by_canvas(mixed):
  batches = list(eval_batches(mixed, batch_size=3, **CANVASES))
  assert keys(batches) == [*range(7), -1, -1, *range(7, 11), -1, -1]
  assert [batch["video"].shape[2:4] for batch in batches] == [(32, 64)] * 3 + [(64, 32)] * 2


PROPOSALS = {
  ("a", 1.0): np.array([[0, 0, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9], [0.5, 0.5, 0.5, 0.9], [0.1, 0, 0.2, 0.3]], np.float32),
  ("a", 2.0): np.array([[0.3, 0.3, 0.4, 0.6]], np.float32),
}


def test_proposals_are_given_boxes_in_evaluation_and_targets_too_in_training(frames, caplog):
  known = [keyframe("a", 1), keyframe("a", 2), keyframe("a", 3)]
  with caplog.at_level(logging.WARNING):
    dataset = KeyframeDataset(known, frames, CLIP, LABELS, PROPOSALS)
  assert "1 of 3 keyframes have no proposals" in caplog.text
  (batch,) = eval_batches(dataset, batch_size=3, max_proposals=3, **PLACE)
  boxes = PROPOSALS["a", 1.0]
  np.testing.assert_array_equal(batch["proposals"][0], boxes[[0, 1, 3]])  # the third one is empty
  np.testing.assert_array_equal(batch["proposal_mask"], [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
  with caplog.at_level(logging.WARNING):
    batch = next(train_batches(dataset, batch_size=3, max_proposals=5, seed=0, **PLACE))
  assert "1 examples have more than 5 proposals; only the best are kept" in caplog.text
  rows = {int(key): row for row, key in enumerate(batch["key"])}
  targets = known[0].boxes
  np.testing.assert_array_equal(batch["proposals"][rows[0]], [*targets, *boxes[[0, 1, 3]]])
  np.testing.assert_array_equal(batch["proposals"][rows[2]], [*targets, *np.zeros((3, 4))])
  np.testing.assert_array_equal(batch["proposal_mask"].sum(1)[[rows[0], rows[1], rows[2]]], [5, 3, 2])
  assert "proposals" not in next(train_batches(dataset, batch_size=3, seed=0, **PLACE))


def test_no_detection_is_no_error(frames):
  """Where every keyframe has an empty list of given boxes, training has its targets."""
  dataset = KeyframeDataset([keyframe("a", 1)], frames, CLIP, LABELS, {("a", 1.0): np.zeros((0, 4), np.float32)})
  batch = next(train_batches(dataset, batch_size=1, max_proposals=3, seed=0, **PLACE))
  np.testing.assert_array_equal(batch["proposals"][0, :2], batch["boxes"][0, :2])
  np.testing.assert_array_equal(batch["proposal_mask"], [[1, 1, 0]])


def test_missing_proposals_are_told(dataset, frames):
  with pytest.raises(ValueError, match="max_proposals is 3, but the data set has no proposals"):
    eval_batches(dataset, batch_size=2, max_proposals=3, **PLACE)
  with pytest.raises(ValueError, match="none of the 1 keyframes has proposals"):
    KeyframeDataset([keyframe("b", 1)], frames, CLIP, LABELS, PROPOSALS)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_videos_cost_frames_and_no_worker(tmp_path, workers, caplog):
  """Truncated, with a hole, shorter than a clip: batches come; what is gone for good is an error of one line."""
  whole = numbered_video.write(tmp_path / "cut.mp4", 40).read_bytes()
  start = whole.index(b"mdat")
  (tmp_path / "cut.mp4").write_bytes(whole[: start + (len(whole) - start) // 2])
  hole = bytearray(numbered_video.write(tmp_path / "hole.mp4", 40).read_bytes())
  hole[start + 2000 : start + 2100] = bytes(100)
  (tmp_path / "hole.mp4").write_bytes(hole)
  numbered_video.write(tmp_path / "short.mp4", 2)
  known = [keyframe("cut", 0.5), keyframe("cut", 3), keyframe("hole", 2), keyframe("short", 0.1)]
  dataset = KeyframeDataset(known, VideoFrames(tmp_path), CLIP, LABELS)
  batches = train_batches(dataset, batch_size=2, seed=0, workers=workers, **PLACE)
  assert sorted({key for batch in take(batches, 2) for key in batch["key"].tolist()}) == [0, 1, 2, 3]
  getattr(batches, "close", lambda: None)()
  (tmp_path / "short.mp4").unlink()
  batches = train_batches(dataset, batch_size=2, seed=0, workers=workers, **PLACE)
  with pytest.raises(VideoError, match=r"short\.mp4: no such file") as caught:
    take(batches, 9)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"canvas": (32, 50)}, "multiples of 16"),
    ({"max_boxes": 0}, "max_boxes"),
    ({"short_side": 0}, "short_side"),
  ],
)
def test_arguments_that_make_no_batch_are_refused(dataset, change, message):
  with pytest.raises(ValueError, match=message):
    eval_batches(dataset, batch_size=2, **{**PLACE, **change})


def test_labels_have_to_fit_the_label_map(frames):
  with pytest.raises(ValueError, match="labels of 3 classes; the label map has ids up to 80"):
    KeyframeDataset([keyframe("a", 1)], frames, CLIP, {1: "stand", 80: "sit"})
  with pytest.raises(ValueError, match="the annotations name no keyframe"):
    KeyframeDataset([], frames, CLIP, LABELS)
  with pytest.raises(ValueError, match="expected positive numbers"):
    ClipSpec(num_frames=0)


@pytest.fixture
def layout(tmp_path):
  """A set in the common layout, of two splits."""
  for split, name in (("train", "a"), ("val", "v")):
    numbered_video.write(tmp_path / "videos" / split / f"{name}.mp4", 30)
    folder = tmp_path / "annotations"
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.csv").write_text(f"{name},0001,0.1,0.1,0.5,0.9,1,0\n{name},0002,0.1,0.1,0.5,0.9,3,0\n")
  annotations.write_label_map(folder / "label_map.pbtxt", LABELS)
  return tmp_path


def test_a_folder_in_the_common_layout_opens_both_ways(layout):
  by_records = datasets.open_directory(layout, clip=CLIP)
  by_video = datasets.open_directory(layout, clip=CLIP, reader="video")
  for split in ("train", "val"):
    assert len(by_records[split]) == len(by_video[split]) == 2
    for one, two in zip(by_records[split], by_video[split], strict=True):
      assert numbered_video.numbers(one["video"]) == numbered_video.numbers(two["video"])
      np.testing.assert_array_equal(one["labels"], two["labels"])
  with pytest.raises(ValueError, match="reader 'tape'"):
    datasets.open_directory(layout, reader="tape")


def test_annotated_boxes_can_be_the_given_ones(layout):
  """In training they are among the proposals in any case, and once."""
  sets = datasets.open_directory(layout, clip=CLIP, reader="video", oracle=True)
  wanted = [boxes for boxes in sets["val"].proposals.values() if len(boxes)]
  assert wanted and not any(len(boxes) for boxes in sets["train"].proposals.values())
  (evaluated,) = eval_batches(sets["val"], batch_size=2, max_proposals=3, **PLACE)
  trained = next(train_batches(sets["train"], batch_size=2, max_proposals=3, seed=0, **PLACE))
  for batch in (evaluated, trained):
    count = batch["boxes"].shape[1]
    np.testing.assert_array_equal(batch["proposals"][:, :count], batch["boxes"])
    np.testing.assert_array_equal(batch["proposal_mask"].sum(1), batch["box_mask"].sum(1))
  with pytest.raises(ValueError, match="either annotated ones"):
    datasets.open_directory(layout, oracle=True, proposal_threshold=0.8)


def test_a_missing_file_of_a_set_is_named(layout):
  (layout / "videos" / "val" / "v.mp4").write_bytes(b"")
  with pytest.raises(VideoError, match=r"val/v\.mp4: .*the file is empty.* \(as all 1 videos"):
    datasets.open_directory(layout)
  (layout / "annotations" / "train.csv").write_text("zebra,0001,0.1,0.1,0.5,0.9,1,0\n")
  with pytest.raises(ValueError, match=r"none of the 1 annotated keyframes .*zebra"):
    datasets.open_directory(layout)


def test_the_synthetic_set_is_made_and_opened(tmp_path):
  options = {"num_train": 1, "num_val": 1, "size": (64, 48), "seconds": 3, "workers": 1, "clip": CLIP}
  sets = datasets.load("synthetic", tmp_path, **options)
  assert sets["train"][0]["video"].shape == (4, 48, 64, 3)
  assert {k.video for k in sets["train"].keyframes}.isdisjoint(k.video for k in sets["val"].keyframes)
  (made,) = tmp_path.iterdir()
  assert made.name == "synthetic-easy-64x48-25fps-1+1x3s-seed0"


def test_unknown_sets_are_named():
  with pytest.raises(ValueError, match=r"unknown data set 'avaa'; known: synthetic, ava, .*\(see data/README\.md\)"):
    datasets.load("avaa", "data")
