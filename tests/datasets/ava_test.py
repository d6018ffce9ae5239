"""AVA from what disks hold: every layout gives the frames that the annotations mean."""

import json
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests import numbered_video
from vad_jax import annotations, datasets
from vad_jax.datasets import ava, prepare, proposals
from vad_jax.datasets.loader import ClipSpec
from vad_jax.datasets.records import RecordFrames
from vad_jax.datasets.video import VideoWriter

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
  assert found["layout"] == layout and found["annotations"] == "2.2" and len(found["sha256"]) == 4
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


def write_video(path: Path, first: int, count: int) -> None:
  """One frame a second; pictures show numbers from `first` on."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with VideoWriter(path, size=(48, 80), fps=1) as writer:
    for index in range(first, first + count):
      writer.write(numbered_video.picture(index % 1024))


@pytest.mark.parametrize(("layout", "suffix"), [("movies", "mkv"), ("cuts", "webm")])
def test_videos_are_read_at_the_seconds_of_the_movie(tmp_path, layout, suffix):
  source = tmp_path / "ava"
  whole = layout == "movies"
  mp4 = tmp_path / "video.mp4"
  write_video(mp4, *((0, 1900) if whole else (900, 901)))
  for video in (TRAIN, VAL):
    (source / "videos").mkdir(parents=True, exist_ok=True)
    (source / "videos" / f"{video}.{suffix}").write_bytes(mp4.read_bytes())
  write_annotations(source, seconds=(899, 900, 959, 1300, 1799, 1805))
  assert run(source, tmp_path / "out" / "ava")["layout"] == layout
  sets = datasets.load("ava", tmp_path / "out", clip=ClipSpec(5, 30, 30))
  found = {k.timestamp: numbered_video.numbers(sets["val"][i]["video"]) for i, k in enumerate(sets["val"].keyframes)}
  assert list(found) == [900, 959, 1300, 1799]  # what is not annotated has no frames
  for time, numbers in found.items():
    assert numbers == [min(max(int(time) + step, 900), 1800) % 1024 for step in range(-2, 3)]
  records = json.loads((tmp_path / "out" / "ava" / "records" / "val" / "index.json").read_text())["seconds"][VAL]
  assert (records[0], records[-1]) == (900, 1800)


@pytest.fixture
def source(tmp_path):
  """A small AVA: two seconds of extracted frames in mmaction2's layout."""
  folder = tmp_path / "ava"
  for video in (TRAIN, VAL):
    write_frames(folder / "rawframes" / video, "img_{:05d}.jpg", 61)
  write_annotations(folder / "annotations", seconds=range(900, 903))
  return folder


def fails(capsys, source: Path, *options: str) -> str:
  with pytest.raises(SystemExit) as stop:
    prepare.main(["ava", "--source", str(source), "--output", str(source.parent / "failed"), *options])
  assert not (source.parent / "failed" / "dataset.json").exists()
  assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ")
  assert "\n" not in stop.value.code
  return stop.value.code


def problems_of(output: Path) -> dict:
  return json.loads((output / "problems.json").read_text())


def test_versions_never_mix(source, capsys):
  folder = source / "annotations"
  write_annotations(folder, "2.1", range(900, 902))
  assert "versions 2.1 and 2.2; choose one with --version" in fails(capsys, source)
  (folder / "ava_val_excluded_timestamps_v2.1.csv").unlink()
  message = fails(capsys, source, "--version", "2.1")
  assert "ava_val_excluded_timestamps_v2.2.csv: is of another version than" in message
  (folder / "ava_val_excluded_timestamps_v2.2.csv").unlink()
  found = run(source, source.parent / "out", "--version", "2.1")
  assert found["annotations"] == "2.1" and all("2.1" in name for name in found["sha256"])
  assert len(annotations.read_ava_csv(source.parent / "out" / "annotations" / "train.csv").action) == 4
  assert "no ava_train_v2.2.csv" in fails(capsys, source, "--annotations", str(source / "rawframes"))


def test_two_copies_of_annotations_have_to_agree(source, capsys):
  write_annotations(source / "annotations" / "ava_v2.2", seconds=range(900, 903))
  run(source, source.parent / "one")
  write_annotations(source / "annotations" / "ava_v2.2", seconds=range(900, 902))
  assert "differ; delete one" in fails(capsys, source)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (f"{VAL},0901,0.1,0.2,0.5,nan,12,0", "ava_val_v2.2.csv:7: box or timestamp is not finite"),
    (f"{VAL},0901,0.1,0.2,0.5,12", "ava_val_v2.2.csv:7: 6 columns"),
    (f"{VAL},0901,0.1,0.2,0.5,0.9,81,0", "ava_val_v2.2.csv:7: action id 81; known are 1 to 80"),
    (f"{VAL},0901,64,48,320,240,12,0", "ava_val_v2.2.csv:7: the box 64, 48, 320, 240 lies outside the frame"),
    (f"{VAL},fifteen,0.1,0.2,0.5,0.9,12,0", "ava_val_v2.2.csv:7: 'fifteen' is not a number"),
  ],
)
def test_a_malformed_row_is_named(source, capsys, row, message):
  with open(source / "annotations" / "ava_val_v2.2.csv", "a") as file:
    file.write(row + "\n")
  assert message in fails(capsys, source)


def test_odd_boxes_and_unknown_videos_are_counted(source, capsys):
  path = source / "annotations" / "ava_val_v2.2.csv"
  with open(path, "a") as file:
    file.write(f"{VAL},0901,-0.1,0.2,0.5,1.1,12,1\n{VAL},0901,0.5,0.2,0.1,0.9,12,2\n{VAL},0901,0.5,0.2,0.5,0.9,12,3\n")
    file.write("gone,0901,0.1,0.2,0.5,0.9,12,2\ngone,0902,0.1,0.2,0.5,0.9,12,2\n")
  run(source, source.parent / "out")
  found = problems_of(source.parent / "out")
  assert found["counts"] == {
    "boxes empty or inverted, left out": {str(path): 2},
    "boxes over the edge of the frame, clipped": {str(path): 1},
    "keyframes without frames, left out": {"gone": 2},
  }
  assert found["notes"] == {"annotated videos that are not here, left out": {"gone": "gone: no frames"}}
  rows = annotations.read_ava_csv(source.parent / "out" / "annotations" / "val.csv")
  np.testing.assert_array_equal(rows.boxes[rows.extra == 1], [[0, 0.2, 0.5, 1]])
  assert not np.isin(rows.extra, (2, 3))[rows.video == VAL].any()
  printed = capsys.readouterr().out
  assert "boxes empty or inverted, left out: 2" in printed and "keyframes without frames, left out: 2" in printed


def test_missing_and_damaged_images_are_counted_and_their_neighbours_stand_in(source):
  folder = source / "rawframes" / VAL
  (folder / "img_00001.jpg").unlink()
  (folder / "img_00031.jpg").unlink()  # the keyframe of second 901
  (folder / "img_00032.jpg").unlink()
  (folder / "img_00041.jpg").write_bytes(b"")
  (folder / "img_00042.jpg").write_text("no image")
  whole = (folder / "img_00043.jpg").read_bytes()
  (folder / "img_00043.jpg").write_bytes(whole[: len(whole) // 2])
  run(source, source.parent / "out")
  found = problems_of(source.parent / "out")["counts"]
  assert found == {"frames damaged or missing, the nearest stand in": {VAL: 6}}
  dataset = datasets.open_directory(source.parent / "out", clip=ClipSpec(6, 2, 30))["val"]
  clip = dataset[[k.timestamp for k in dataset.keyframes].index(901)]
  assert numbered_video.numbers(clip["video"]) == [24, 26, 28, 29, 32, 34]
  assert numbered_video.numbers(dataset.frames.frames(VAL, 900 + np.array([0, 40, 41, 42]) / 30)) == [1, 39, 39, 43]


def test_frames_are_copied_where_they_can_be(source):
  folder = source / "rawframes" / TRAIN
  progressive = cv2.imread(str(folder / "img_00002.jpg"))
  cv2.imwrite(str(folder / "img_00002.jpg"), progressive, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
  cv2.imwrite(str(folder / "img_00003.jpg"), cv2.resize(progressive, None, fx=2, fy=2))
  cv2.imwrite(str(folder / "img_00004.jpg"), progressive[..., 0])  # grey
  run(source, source.parent / "out")
  record = RecordFrames(source.parent / "out" / "records" / "train")._read(0)
  same = [jpeg == (folder / f"img_{number:05d}.jpg").read_bytes() for number, jpeg in enumerate(record["frames"], 1)]
  assert same == [True, False, False, False, *[True] * 26]
  assert {cv2.imdecode(np.frombuffer(jpeg, np.uint8), -1).shape for jpeg in record["frames"]} == {(48, 80, 3)}


def test_the_majority_decides_what_videos_are(source, capsys, tmp_path):
  shutil.rmtree(source / "rawframes")
  write_video(source / f"{VAL}.mp4", 0, 1000)
  write_video(source / f"{TRAIN}.mp4", 0, 1000)
  write_video(source / "broken_off.mp4", 0, 500)
  with open(source / "annotations" / "ava_val_v2.2.csv", "a") as file:
    file.write("broken_off,0901,0.1,0.2,0.5,0.9,12,2\n")
  assert run(source, tmp_path / "out")["layout"] == "movies"
  (note,) = problems_of(tmp_path / "out")["notes"]["videos of another length than the rest, left out"].values()
  assert "broken_off.mp4: 500 s, but most files are movies; --layout forces it" in note
  assert run(source, tmp_path / "forced", "--layout", "cuts")["layout"] == "cuts"
  frames = RecordFrames(tmp_path / "forced" / "records" / "val")
  assert numbered_video.numbers(frames.frames("broken_off", [950.0])) == [50]
  assert "none of the 3 annotated videos is here in the layout acar" in fails(capsys, source, "--layout", "acar")


def test_unreadable_videos_cost_no_more_than_themselves(source, tmp_path, capsys):
  shutil.rmtree(source / "rawframes")
  names = (TRAIN, VAL, "empty", "text", "cut_short", "short")
  for name in names:
    numbered_video.write(source / "videos_15min" / f"{name}.mp4", 4 if name == "short" else 120, fps=30)
  (source / "videos_15min" / "empty.mp4").write_bytes(b"")
  (source / "videos_15min" / "text.mp4").write_text("<html>not found</html>")
  whole = (source / "videos_15min" / "cut_short.mp4").read_bytes()
  (source / "videos_15min" / "cut_short.mp4").write_bytes(whole[: len(whole) * 2 // 3])
  rows = [f"{name},{time},0.1,0.2,0.5,0.9,12,2\n" for name in names for time in (900, 902)]
  (source / "annotations" / "ava_val_v2.2.csv").write_text("".join(rows))
  run(source, tmp_path / "out")
  found = problems_of(tmp_path / "out")
  assert list(found["notes"]["videos that cannot be read, left out"]) == ["empty", "text"]
  assert found["counts"]["keyframes without frames, left out"]["short"] == 1
  assert 0 < found["counts"]["frames damaged or missing, the nearest stand in"]["cut_short"] < 120
  dataset = datasets.open_directory(tmp_path / "out", clip=ClipSpec(4, 2, 30))["val"]
  kept = {(k.video, k.timestamp): numbered_video.numbers(dataset[i]["video"]) for i, k in enumerate(dataset.keyframes)}
  assert kept["short", 900] == [0, 0, 0, 2]  # its own frames, repeated
  assert kept[VAL, 902] == [56, 58, 60, 62]


def test_one_split_alone_is_prepared(source, tmp_path):
  shutil.rmtree(source / "rawframes" / TRAIN)
  run(source, tmp_path / "out")
  assert list(datasets.open_directory(tmp_path / "out")) == ["val"]
  assert "splits left out" in problems_of(tmp_path / "out")["notes"]


def test_proposals_of_both_forms_become_one(source, tmp_path):
  rows = [
    f"{TRAIN},0901,0.1,0.2,0.5,0.9,12,1.0",
    f"{TRAIN},0901,0.1,0.2,0.5,0.9,80,1.0",  # the same box with another label
    f"{TRAIN},0901,0.3,0.2,0.5,1.2,,0.85",
    f"{TRAIN},0901,0.4,0.2,0.5,0.9,,0.5",
    "other,0901,0.4,0.2,0.5,0.9,,0.5",
  ]
  (tmp_path / "boxes.csv").write_text("\n".join(rows) + "\n")
  boxes = {
    f"{VAL},0901": np.array([[0.1, 0.1, 0.2, 0.2, 0.7], [0, 0, 1, 1, 0.9]], np.float32),
    f"{VAL},0902": np.zeros((0, 5)),
  }
  (tmp_path / "boxes.pkl").write_bytes(pickle.dumps(boxes, protocol=2))
  run(source, tmp_path / "out", "--proposals", str(tmp_path / "boxes.csv"), str(tmp_path / "boxes.pkl"))
  folder = tmp_path / "out" / "annotations"
  train = proposals.read(folder / "train_proposals.csv", threshold=0.8)
  assert list(train) == [(TRAIN, 901.0)]
  np.testing.assert_allclose(train[TRAIN, 901.0], [[0.1, 0.2, 0.5, 0.9], [0.3, 0.2, 0.5, 1]], rtol=1e-6)
  val = proposals.read(folder / "val_proposals.csv", threshold=0.0)
  np.testing.assert_allclose(val[VAL, 901.0], [[0, 0, 1, 1], [0.1, 0.1, 0.2, 0.2]], rtol=1e-6)
  found = problems_of(tmp_path / "out")["counts"]
  assert found["proposals of unknown videos, left out"] == {str(tmp_path / "boxes.csv"): 1}
  assert found["boxes over the edge of the frame, clipped"] == {str(tmp_path / "boxes.csv"): 1}


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("b.csv", b"v,0901,0.1,0.2,0.5,0.9,,0.5\nv,0901,0.1,0.2,0.5,,0.5\n", r"b\.csv:2: v,0901,.*; expected video,second"),
    ("b.csv", b"v,0901,0.1,0.2,0.5,inf,,0.5\n", r"b\.csv:1: .*with numbers"),
    ("b.pkl", pickle.dumps({"v,0901": np.zeros((2, 4))}), r"b\.pkl: 'v,0901'; expected .* an array \[n, 5\]"),
    ("b.pkl", pickle.dumps({"v": np.zeros((2, 5))}), r"b\.pkl: 'v'; expected 'video,second'"),
    ("b.pkl", pickle.dumps([1]), r"b\.pkl: holds a list"),
    ("b.pkl", pickle.dumps(Path("x")), r"b\.pkl"),
  ],
)
def test_malformed_proposals_are_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    proposals.read_published(tmp_path / name)


def test_class_groups_cover_the_80_classes():
  groups = json.loads((Path(ava.__file__).parent / "labels" / "ava_groups.json").read_text())
  names = annotations.read_label_map("ava_80")
  assert sorted(number for group in groups.values() for number in group) == list(names)
  assert {names[group[0]] for group in groups.values()} == {
    "bend/bow (at the waist)", "answer phone", "fight/hit (a person)",
  }  # fmt: skip
