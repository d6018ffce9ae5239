"""JHMDB51-21 and UCF101-24 from what disks hold: frames, boxes and tubes are those of the pickle."""

import json
import pickle
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from tests import numbered_video
from vad_jax import annotations, datasets, tubes
from vad_jax.datasets import prepare
from vad_jax.datasets.loader import ClipSpec

SIZE = (240, 320)
JHMDB = {"pour/a_1": 4, "pour/b_2": 6, "run/c_3": 5}


def write_images(folder: Path, count: int, suffix: str) -> None:
  folder.mkdir(parents=True)
  for index in range(count):
    cv2.imwrite(str(folder / f"{index + 1:05d}.{suffix}"), numbered_video.picture(index + 1)[..., ::-1])


def tube(first: int, last: int, shift: float = 0.0) -> np.ndarray:
  """Boxes that move with the frame."""
  frame = np.arange(first, last + 1, dtype=np.float64)
  left = 10 + frame + shift
  return np.stack([frame, left, 0 * frame + 20, left + 100, 0 * frame + 220], axis=1)


def write_pickle(path: Path, labels: list, truth: dict, lengths: dict, splits: list) -> None:
  content = {
    "labels": labels,
    "gttubes": truth,
    "nframes": lengths,
    "train_videos": [train for train, _ in splits],
    "test_videos": [test for _, test in splits],
    "resolution": dict.fromkeys(lengths, SIZE),
  }
  path.write_bytes(pickle.dumps(content, protocol=2))


def write_jhmdb(source: Path) -> None:
  truth = {name: {int(name.startswith("run")): [tube(1, n)]} for name, n in JHMDB.items()}
  a, b, c = JHMDB
  write_pickle(source / "JHMDB-GT.pkl", ["pour", "run"], truth, JHMDB, [([a, b], [c]), ([a, c], [b]), ([b, c], [a])])


def run(kind: str, source: Path, output: Path, *options: str) -> dict:
  prepare.main([kind, "--source", str(source), "--output", str(output), *options])
  return json.loads((output / "problems.json").read_text())


@pytest.fixture
def jhmdb(tmp_path):
  source = tmp_path / "JHMDB"
  for name, count in JHMDB.items():
    write_images(source / "Frames" / name, count, "png")
    write_images(source / "FlowBrox04" / name, count + 1, "jpg")  # must not be taken
  write_jhmdb(source)
  return source


def test_jhmdb_has_three_splits_over_the_same_frames(jhmdb, tmp_path):
  found = run("jhmdb", jhmdb, tmp_path / "out" / "jhmdb")
  assert found == {"counts": {}, "notes": {}}
  clip = ClipSpec(3, 1, 25)
  for split, (train, test) in enumerate(tubes.read_ground_truth(jhmdb / "JHMDB-GT.pkl").splits, 1):
    sets = datasets.load("jhmdb", tmp_path / "out", split=split, clip=clip)
    assert sets["val"].label_map == {1: "pour", 2: "run"}
    for dataset, names in ((sets["train"], train), (sets["val"], test)):
      expected = [(name, frame) for name in names for frame in range(1, JHMDB[name] + 1)]
      assert len(dataset) == len(expected)
      for index, (name, frame) in enumerate(expected):
        example = dataset[index]
        assert dataset.keyframes[index].video == name
        assert numbered_video.numbers(example["video"]) == [max(frame - 1, 1), frame, min(frame + 1, JHMDB[name])]
        box = np.array([10 + frame, 20, 110 + frame, 220]) / (320, 240, 320, 240)
        np.testing.assert_allclose(example["boxes"], [box], atol=1e-6)
        assert example["labels"].argmax() == name.startswith("run")
  with pytest.raises(FileNotFoundError, match="split4"):
    datasets.load("jhmdb", tmp_path / "out", split=4)


def test_tubes_are_kept_exactly(jhmdb, tmp_path):
  run("jhmdb", jhmdb, tmp_path / "out")
  kept, truth = (
    tubes.read_ground_truth(path) for path in (tmp_path / "out" / "annotations" / "tubes.json", jhmdb / "JHMDB-GT.pkl")
  )
  assert (kept.labels, kept.splits, list(kept.videos)) == (truth.labels, truth.splits, list(truth.videos))
  for name, video in truth.videos.items():
    assert kept.videos[name][:2] == video[:2]
    np.testing.assert_array_equal(kept.videos[name].tubes[0].boxes, video.tubes[0].boxes)


def test_original_videos_do_as_well(tmp_path):
  """Of 30 and of 25 frames a second; time follows the file."""
  source = tmp_path / "JHMDB"
  for (name, count), rate in zip(JHMDB.items(), (30, 25, 30), strict=True):
    path = source / "ReCompress_Videos" / f"{name}.avi"
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
      stream = container.add_stream("mpeg4", rate=rate)
      stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
      for index in range(count):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_video.picture(index + 1), format="rgb24")))
      container.mux(stream.encode(None))
  write_jhmdb(source)
  found = run("jhmdb", source, tmp_path / "out")
  assert found == {"counts": {}, "notes": {}}
  sets = datasets.open_directory(tmp_path / "out", annotation_dir="annotations/split1", clip=ClipSpec(1, 1, 25))
  for dataset in sets.values():
    frames = [numbered_video.number(dataset[index]["video"][0]) for index in range(len(dataset))]
    assert frames == [
      frame for name in dict.fromkeys(k.video for k in dataset.keyframes) for frame in range(1, JHMDB[name] + 1)
    ]


@pytest.fixture
def ucf(tmp_path):
  """Two videos of 25 frames a second; in one two people, who overlap in time."""
  source = tmp_path / "UCF101_v2"
  lengths = {"Basketball/v_Basketball_g01_c01": 30, "Biking/v_Biking_g02_c02": 33}
  for name, count in lengths.items():
    write_images(source / "rgb-images" / name, count, "jpg")
    write_images(source / "brox-images" / name, count, "jpg")
  train, test = lengths
  truth = {train: {0: [tube(5, 12), tube(10, 14, shift=50)]}, test: {1: [tube(3, 4)]}}
  write_pickle(source / "UCF101v2-GT.pkl", ["Basketball", "Biking"], truth, lengths, [([train], [test])])
  return source


def test_ucf_has_keyframes_where_there_are_boxes_and_in_val_everywhere(ucf, tmp_path):
  assert run("ucf101_24", ucf, tmp_path / "out" / "ucf101_24") == {"counts": {}, "notes": {}}
  sets = datasets.load("ucf101_24", tmp_path / "out", clip=ClipSpec(1, 1, 25))
  train, val = sets["train"], sets["val"]
  assert [round(k.timestamp * 25) + 1 for k in train.keyframes] == list(range(5, 15))
  assert [len(k.boxes) for k in train.keyframes] == [1] * 5 + [2] * 3 + [1] * 2
  assert [numbered_video.number(train[i]["video"][0]) for i in range(10)] == list(range(5, 15))
  assert {int(person) for k in train.keyframes for person in k.person_ids} == {0, 1}
  assert [round(k.timestamp * 25) + 1 for k in val.keyframes] == list(range(1, 34))
  assert [len(k.boxes) for k in val.keyframes] == [0, 0, 1, 1] + [0] * 29
  assert numbered_video.number(val[29]["video"][0]) == 30  # past the first second


def test_frame_rate_of_folders_can_be_told(ucf, tmp_path):
  run("ucf101_24", ucf, tmp_path / "out", "--fps", "10")
  rows = annotations.read_ava_csv(tmp_path / "out" / "annotations" / "val.csv")
  np.testing.assert_allclose(rows.timestamp, np.arange(33) / 10)


def test_what_does_not_fit_the_annotations_is_told(ucf, tmp_path):
  folder = ucf / "rgb-images" / "Biking" / "v_Biking_g02_c02"
  (folder / "00033.jpg").unlink()
  for number in (3, 4):
    (folder / f"{number:05d}.jpg").unlink()
  content = pickle.loads((ucf / "UCF101v2-GT.pkl").read_bytes())
  extra = "Biking/v_Biking_g09_c09"
  content["nframes"][extra], content["resolution"][extra] = 10, SIZE
  content["gttubes"][extra] = {1: [tube(1, 10)]}
  content["train_videos"][0].append(extra)
  boxes = content["gttubes"]["Basketball/v_Basketball_g01_c01"][0][0]
  boxes[0, 1] = -4.0
  boxes[1, 1:] = 0.0
  (ucf / "UCF101v2-GT.pkl").write_bytes(pickle.dumps(content, protocol=2))
  found = run("ucf101_24", ucf, tmp_path / "out")
  path = str(ucf / "UCF101v2-GT.pkl")
  assert found["counts"] == {
    "boxes empty or inverted, left out": {path: 1},
    "boxes over the edge of the frame, clipped": {path: 1},
    "frames damaged or missing, the nearest stand in": {"Biking/v_Biking_g02_c02": 2},
  }
  assert found["notes"] == {
    "annotated videos that are not here, left out": {extra: f"{extra}: no frames"},
    "videos of another length than annotated, kept": {
      "Biking/v_Biking_g02_c02": "Biking/v_Biking_g02_c02: 32 frames, annotated are 33"
    },
  }
  val = datasets.open_directory(tmp_path / "out", clip=ClipSpec(1, 1, 25))["val"]
  assert [numbered_video.number(val[i]["video"][0]) for i in (1, 2, 3, 31, 32)] == [2, 2, 5, 32, 32]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda c: c["gttubes"]["pour/a_1"][0][0].__setitem__((0, 3), 900.0),
      "pour/a_1, 0 s: the box .* outside the frame",
    ),
    (
      lambda c: c["gttubes"]["pour/a_1"][0][0].__setitem__((0, 3), np.nan),
      "pour/a_1: a tube of class 0 holds what is not",
    ),
    (lambda c: c.pop("resolution"), "pour/a_1: its resolution is missing"),
  ],
)
def test_malformed_annotations_are_named(jhmdb, tmp_path, change, message):
  content = pickle.loads((jhmdb / "JHMDB-GT.pkl").read_bytes())
  change(content)
  (jhmdb / "JHMDB-GT.pkl").write_bytes(pickle.dumps(content, protocol=2))
  with pytest.raises(SystemExit, match=rf"error: .*JHMDB-GT\.pkl: .*{message}"):
    run("jhmdb", jhmdb, tmp_path / "out")


def test_missing_files_are_named(jhmdb, tmp_path):
  with pytest.raises(SystemExit, match=r"no UCF101v2-GT\.pkl here .*--annotations"):
    run("ucf101_24", jhmdb, tmp_path / "out")
  (jhmdb / "Frames").rename(tmp_path / "elsewhere")
  with pytest.raises(SystemExit, match=r"none of the 3 annotated videos is here, like pour/a_1"):
    run("jhmdb", jhmdb, tmp_path / "out")
  with pytest.raises(FileNotFoundError, match=r"prepare jhmdb --source DIR --output"):
    datasets.load("jhmdb", tmp_path)
