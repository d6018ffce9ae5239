"""One's own videos: from what a tool exports to a trained step, with every box on the right frame."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import custom as custom_config
from tests import numbered_video, stand_in
from vad_jax import convert, datasets, main, models, sharding
from vad_jax.annotations import AnnotationError
from vad_jax.datasets import custom, prepare
from vad_jax.datasets.loader import ClipSpec, train_batches
from vad_jax.datasets.source_set import Problems
from vad_jax.datasets.video import VideoError
from vad_jax.ops import matching
from vad_jax.rngs import make_rngs

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
SIZE = (48, 80)


def run(source: Path, output: Path, *options: str) -> dict:
  prepare.main(["custom", "--source", str(source), "--output", str(output), "--workers", "1", *options])
  return json.loads((output / "problems.json").read_text())


def coco(path: Path, videos: dict[str, list[int]], size: tuple[int, int] = SIZE, actions: dict | None = None) -> None:
  """A file with one box at the given frames of each video; its left edge in pixels is the number of the frame."""
  images, boxes, names = [], [], ["walk"]
  for video, frames in videos.items():
    for frame in frames:
      images.append({"id": len(images), "video_id": video, "frame_id": frame})
      for action in (actions or {}).get(video, ["walk"]):
        names += [action] * (action not in names)
        row = {"image_id": images[-1]["id"], "category_id": names.index(action), "bbox": [frame % 40, 0, 20, 30]}
        boxes.append(row)
  described = [{"id": video, "name": video, "height": size[0], "width": size[1]} for video in videos]
  categories = [{"id": index, "name": name} for index, name in enumerate(names)]
  content = {"videos": described, "images": images, "annotations": boxes, "categories": categories}
  path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["cvat", "coco", "via", "csv", "datumaro"])
def test_from_an_export_to_a_trained_step(tmp_path, kind):
  annotations = ("--annotations", str(SAMPLE / "exports" / kind))
  run(SAMPLE / "videos", tmp_path / "set", *annotations, "--short-side", "64")
  sets = datasets.load("custom", tmp_path, directory="set", clip=ClipSpec(2, 4, 25))
  assert len(sets["train"]) >= 5 and len(sets["val"]) >= 5
  batch = next(train_batches(sets["train"], batch_size=2, canvas=(64, 96), short_side=64, max_boxes=3, seed=0))
  assert batch["box_mask"].any() and batch["labels"][batch["box_mask"]].any(axis=-1).all()
  model = stand_in.StandIn(width=8, num_classes=sets["train"].num_classes, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(nnx.view(model, deterministic=True), nnx.Param, ...)

  @jax.jit
  @jax.value_and_grad
  def loss_and_gradient(params: nnx.State) -> jax.Array:
    model = nnx.merge(graphdef, params, rest)
    out = model(batch)
    return model.loss(out, batch, matching.match(model.costs(out, batch), batch["box_mask"]))[0]

  loss, gradient = loss_and_gradient(params)
  stepped = jax.tree.map(lambda x, g: x - 1e-4 * g, params, gradient)
  assert loss_and_gradient(stepped)[0] < loss


def test_the_command_and_the_config_fit_together(tmp_path, monkeypatch):
  """Everything but the detector itself, which takes long to compile."""
  run(SAMPLE / "videos", tmp_path / "set", "--annotations", str(SAMPLE / "exports" / "coco"))
  config = custom_config.get_config(f"tiny,data={tmp_path / 'set'}")
  monkeypatch.setitem(models.MODELS, "stand_in", stand_in.StandIn)
  one, make_mesh = jax.devices()[:1], sharding.make_mesh
  monkeypatch.setattr(sharding, "make_mesh", lambda shape: make_mesh(shape, one))
  with config.unlocked():
    config.model, config.init_from = {"name": "stand_in", "width": 8}, None
  assert main.run(config, tmp_path / "run", "train", time.perf_counter()) == ""
  assert (tmp_path / "run" / "checkpoints" / "last").exists()


def test_the_quickstart_weights_start_a_detector_of_other_classes():
  config = custom_config.get_config("tiny")
  model = nnx.eval_shape(lambda: models.build(**config.model, num_classes=3, rngs=make_rngs(0)))
  report = convert.load_reference(model, config.init_from, reinit_head=config.reinit_head)
  fates = [tensor.action for tensor in report.tensors]
  assert fates.count("loaded") > 20 * fates.count("re-initialised") > 0


@pytest.mark.parametrize(
  ("name", "times", "options"),
  [
    ("constant", np.arange(90) / 25, {"codec": "libx264"}),
    ("variable", np.cumsum(np.resize([0.02, 0.05, 0.031], 90)), {"codec": "libx264"}),
    ("late", 3 + np.arange(90) / 29.97, {"codec": "libx264"}),
    ("rotated", np.arange(90) / 25, {"codec": "libx264", "rotation": 90}),
  ],
)
def test_frame_numbers_are_frames(tmp_path, name, times, options):
  """Frame 31 of a tool is the picture that shows 31, whatever its time."""
  numbered_video.encode(tmp_path / f"{name}.mp4", times, **options)
  size = SIZE[::-1] if name == "rotated" else SIZE
  frames = [0, 31, 59, 60, 89]
  coco(tmp_path / "a.json", {f"{name}.mp4": frames}, size)
  run(tmp_path, tmp_path / "set", "--stride", "0", "--val-share", "0")
  dataset = datasets.load("custom", tmp_path, directory="set", clip=ClipSpec(1, 1))["train"]
  assert len(dataset) == len(frames)
  for index, frame in enumerate(frames):
    example = dataset[index]
    picture = np.rot90(example["video"][0], -1 if name == "rotated" else 0)
    assert numbered_video.number(picture) == frame
    np.testing.assert_allclose(example["boxes"][0, 0] * size[1], frame % 40, atol=1e-3)


def test_a_keyframe_a_second_by_default(tmp_path):
  numbered_video.write(tmp_path / "a.mp4", 60, fps=12)
  coco(tmp_path / "a.json", {"a.mp4": list(range(60))})
  problems = run(tmp_path, tmp_path / "set", "--val-share", "0")
  dataset = datasets.open_directory(tmp_path / "set", clip=ClipSpec(1, 1))["train"]
  assert numbered_video.numbers(np.stack([dataset[i]["video"][0] for i in range(6)])) == [0, 12, 24, 36, 48, 59]
  assert problems["counts"] == {"annotated frames between keyframes, not used (--stride)": {"a.mp4": 54}}


@pytest.mark.parametrize(("shown", "frame"), [(0, 0), (1.0, 10), (1.099, 10), (1.1, 11), (1.0999, 11), (2.5, 19)])
def test_via_means_the_frame_on_the_screen(tmp_path, shown, frame):
  numbered_video.write(tmp_path / "a.mp4", 20, fps=10)
  content = {
    "attribute": {"1": {"aname": "action", "anchor_id": "FILE1_Z1_XY1", "type": 1}},
    "file": {"1": {"fname": "a.mp4", "type": 4}},
    "view": {"1": {"fid_list": ["1"]}},
    "metadata": {"k": {"vid": "1", "z": [shown], "xy": [2, 8, 12, 40, 24], "av": {"1": "walk"}}},
  }
  (tmp_path / "a.json").write_text(json.dumps(content))
  found, _ = custom.read(tmp_path, Problems(), val_share=0)
  expected = frame / 10 + (0.1 if shown == 1.099 else 0)  # rounded by the tool: the next frame
  np.testing.assert_allclose(found.tables["train"].timestamp, expected)
  np.testing.assert_allclose(found.tables["train"].boxes, [[0.1, 0.25, 0.6, 0.75]])


@pytest.mark.parametrize(
  ("size", "rotation", "message"),
  [
    (SIZE, 90, r"annotated at 80 x 48, but .*a.mp4 plays as 48 x 80: a rotated video. Re-encode it upright"),
    ((48, 48), 0, r"annotated at 48 x 48, but .*a.mp4 is 80 x 48: these are not the same pictures"),
  ],
)
def test_boxes_of_other_pictures_are_refused(tmp_path, size, rotation, message):
  numbered_video.encode(tmp_path / "a.mp4", np.arange(30) / 25, codec="libx264", rotation=rotation)
  coco(tmp_path / "a.json", {"a.mp4": [0]}, size)
  with pytest.raises(AnnotationError, match=message):
    custom.read(tmp_path, Problems())


def test_boxes_of_a_smaller_copy_are_scaled(tmp_path):
  numbered_video.write(tmp_path / "a.mp4", 5)
  coco(tmp_path / "a.json", {"a.mp4": [4]}, (24, 40))
  problems = Problems()
  found, _ = custom.read(tmp_path, problems, val_share=0)
  np.testing.assert_allclose(found.tables["train"].boxes, [[0.1, 0, 0.6, 1]])  # 30 of 24 pixels: clipped
  assert set(problems.notes) == {"videos annotated at another size, boxes scaled"}
  assert set(problems.counts) == {"boxes over the edge of the frame, clipped"}


def test_what_has_no_counterpart_is_listed(tmp_path):
  for name in ("a", "b", "c"):
    numbered_video.write(tmp_path / f"{name}.mp4", 12)
  (tmp_path / "c.mp4").write_bytes(b"no video")
  coco(tmp_path / "all.json", {"sub/a.mp4": [0, 11, 12, 500], "c.mp4": [0], "gone.mp4": [0]})
  problems = run(tmp_path, tmp_path / "set")
  assert problems["counts"]["annotated moments outside the video, left out"].popitem()[1] == 2
  assert list(problems["notes"]["annotated videos that are not here, left out"]) == ["gone.mp4"]
  assert list(problems["notes"]["videos without annotations, left out"]) == ["b"]
  assert list(problems["notes"]["videos that cannot be read, left out"]) == ["c"]


@pytest.mark.parametrize(("kind", "times"), [("csv", [-1, 0, 3.1]), ("csv", [0, 5, 10, 15]), ("coco", [0, 20, 21, 22])])
def test_times_that_are_none_of_the_video_are_refused(tmp_path, kind, times):
  """Frame numbers that stand for seconds, or another cut."""
  numbered_video.write(tmp_path / "a.mp4", 20)  # two seconds
  if kind == "csv":
    (tmp_path / "a.csv").write_text("".join(f"a,{time},0,0,0.5,0.5,run\n" for time in times))
  else:
    coco(tmp_path / "a.json", {"a.mp4": times})
  message = rf"a.{'csv' if kind == 'csv' else 'json'}: {len(times) - 1} of {len(times)} annotated moments lie outside"
  with pytest.raises(AnnotationError, match=message):
    custom.read(tmp_path, Problems())


def test_nobody_to_train_on(tmp_path):
  for name, split in (("a", "train"), ("b", "val")):
    numbered_video.write(tmp_path / f"{name}.mp4", 20)
    (tmp_path / f"{split}.csv").write_text(f"{name},1" + (",0,0,0.5,0.5,run\n" if split == "val" else "\n"))
  with pytest.raises(AnnotationError, match=r"train.csv: no box in any of the videos of train: a$"):
    custom.read(tmp_path, Problems())


def test_no_video_at_all(tmp_path):
  coco(tmp_path / "a.json", {"a.mp4": [0]})
  with pytest.raises(VideoError, match=r"no videos here or two folders below; expected .avi"):
    custom.read(tmp_path, Problems())
  numbered_video.write(tmp_path / "b.mp4", 2)
  with pytest.raises(
    VideoError, match=r"none of the annotated videos \(a.mp4\) is here, but b; where annotations name no video, call "
  ):
    custom.read(tmp_path, Problems())
  (tmp_path / "sub").mkdir()
  numbered_video.write(tmp_path / "sub" / "b.mp4", 2)
  with pytest.raises(VideoError, match=r"b.mp4: the video 'b' is also there as .*rename or delete one"):
    custom.read(tmp_path, Problems())


def test_nobody_is_a_keyframe_of_val_alone(tmp_path):
  names = ["a.mp4", "b.mp4"]
  for name in names:
    numbered_video.write(tmp_path / name, 30)
  coco(tmp_path / "a.json", {name: [0, 10, 20] for name in names})
  content = json.loads((tmp_path / "a.json").read_text())
  content["annotations"] = [row for row in content["annotations"] if row["image_id"] % 3 != 1]
  (tmp_path / "a.json").write_text(json.dumps(content))
  found, _ = custom.read(tmp_path, Problems())
  assert found.tables["train"].action.tolist() == [1, 1] and found.tables["val"].action.tolist() == [1, 0, 1]
  assert found.label_map == {1: "walk"}  # category 0 of the file


def test_given_splits_are_kept(tmp_path):
  for name in ("a", "b", "c"):
    numbered_video.write(tmp_path / f"{name}.mp4", 2)
  for name, split in (("a", "train"), ("b", "val"), ("c", "test")):
    coco(tmp_path / f"instances_{split}.json", {f"{name}.mp4": [0]})
  found, notes = custom.read(tmp_path, Problems())
  assert {split: list(videos) for split, videos in found.videos.items()} == {"train": ["a"], "val": ["b"]}
  assert "1 videos of test are left out" in notes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
  st.lists(st.sets(st.sampled_from("abcdefg"), min_size=1, max_size=3), min_size=1, max_size=14),
  st.floats(0, 0.9),
  st.integers(0, 3),
)
def test_splits_have_every_class_as_far_as_possible(shown, share, seed):
  classes = {f"v{index}": names for index, names in enumerate(shown)}
  val = custom._choose_val(classes, share, seed)
  assert val == custom._choose_val(dict(reversed(classes.items())), share, seed)
  assert len(set(val)) == len(val) < max(len(classes), 2)
  assert bool(val) == bool(share and len(classes) > 1)
  train = set().union(*(classes[video] for video in classes if video not in val))
  if len(val) > 1:  # a single one may have to take a class with it
    assert train == set().union(*shown)
  assert len(val) <= max(round(share * len(classes)), len(classes) // 2, 1)


def test_rare_classes_are_in_both_splits():
  classes = {f"v{index}": {"walk"} for index in range(20)}
  for index, name in enumerate(["run", "run", "sit", "sit", "eat"]):
    classes[f"v{index}"] = {"walk", name}
  for seed in range(10):
    val = custom._choose_val(classes, 0.2, seed)
    assert len(val) == 4 and "v4" not in val
    assert set().union(*(classes[video] for video in val)) == {"walk", "run", "sit"}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--val-share", "1"], "error: --val-share has to be in [0, 1), --stride 0 or more"),
    (["--stride", "nan"], "error: --val-share has to be in"),
    (["--format", "cvat"], "error: {tmp}: no annotations here of cvat"),
    (["--annotations", "{tmp}/none"], "error: [Errno 2] No such file or directory: '{tmp}/none'"),
    (["--format", "yolo"], 2),
    (["--seed", "x"], 2),
  ],
)
def test_misuse_is_explained(tmp_path, options, message):
  numbered_video.write(tmp_path / "a.mp4", 2)
  coco(tmp_path / "a.json", {"a.mp4": [0]})
  with pytest.raises(SystemExit) as stop:
    run(tmp_path, tmp_path / "set", *(option.format(tmp=tmp_path) for option in options))
  if isinstance(message, int):
    assert stop.value.code == message
  else:
    assert str(stop.value.code).startswith(message.format(tmp=tmp_path))
