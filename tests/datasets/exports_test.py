"""Exports of annotation tools: what they mean, and what is said when they are broken."""

import copy
import json
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vad_jax import annotations
from vad_jax.annotations import AnnotationError
from vad_jax.datasets import exports
from vad_jax.datasets.export_formats import AnnotatedVideo, Box, Classes, Document
from vad_jax.datasets.source_set import Problems

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
FILES = {
  "cvat": SAMPLE / "exports/cvat/easy_train_00000.xml",
  "coco": SAMPLE / "exports/coco/instances_default.json",
  "via": SAMPLE / "exports/via/sample.json",
  "csv": SAMPLE / "exports/csv/actions.csv",
  "datumaro": SAMPLE / "exports/datumaro/annotations/ava_val_v2.2.csv",
}
SIZE = (240, 320)


@pytest.fixture(scope="module")
def truth() -> dict[tuple[str, int], list[tuple[list[float], set[str]]]]:
  """Boxes and actions of the sample by video and frame."""
  names = annotations.read_label_map(SAMPLE / "annotations" / "label_map.pbtxt")
  found: dict = {}
  for split in ("train", "val"):
    for video, tubes in json.loads((SAMPLE / "annotations" / f"{split}_tubes.json").read_text()).items():
      for tube in tubes["tubes"]:
        for frame, *box in tube["boxes"]:
          actions = {names[a["id"]] for a in tube["labels"] if a["start_frame"] <= frame < a["end_frame"]}
          found.setdefault((video, frame), []).append((box, actions))
  return found


def parse(kind: str, content: bytes | str, path: str = "x/file.csv", wanted: tuple[str, ...] = ()):
  """Videos, classes, given ids and problems of a file."""
  classes, problems = Classes(wanted), Problems()
  content = content.encode() if isinstance(content, str) else content
  ids, videos = exports.parse(kind, Document(Path(path), content), classes, problems)
  return videos, list(classes.names), ids, problems.counts


def only(kind: str, content: bytes | str, **kwargs) -> AnnotatedVideo:
  [video] = parse(kind, content, **kwargs)[0]
  return video


@pytest.mark.parametrize("kind", FILES)
def test_samples_say_what_the_annotations_say(kind, truth):
  problems = Problems()
  export = exports.read(SAMPLE / "exports" / kind, problems)
  assert export.format == kind and not problems.counts
  assert set(export.label_map.values()) == set().union(*(a for people in truth.values() for _, a in people))
  count = 0
  for video in export.videos:
    name = Path(video.names[0]).name.removesuffix(".mp4")
    for moment in video.moments:
      frame = int(moment) if video.clock == "frames" else round(int(moment) * 25)
      height, width = video.size or SIZE
      found: dict[tuple, set[str]] = {}
      for box in video.boxes_at(moment):
        found.setdefault(tuple(np.array(box.corners) / (width, height, width, height)), set()).update(box.actions)
      assert len(found) == len(truth[name, frame])
      for (corners, actions), (expected, doing) in zip(sorted(found.items()), sorted(truth[name, frame]), strict=True):
        np.testing.assert_allclose(corners, expected, atol=1e-4)
        assert actions == doing
        count += 1
  assert count == {"cvat": 120, "coco": 42}.get(kind, 35)


# --- CVAT -----------------------------------------------------------------------------------------------------


def attribute(name: str, kind: str, values: str = "") -> str:
  return f"<attribute><name>{name}</name><input_type>{kind}</input_type><values>{values}</values></attribute>"


PERSON = "<label><name>person</name><attributes>{}</attributes></label>"
LABELS = PERSON.format(attribute("action", "select", "__undefined__\nwalk\nrun") + attribute("waves", "checkbox"))


def task(video: str = "a.mp4", number: int = 1, extra: str = "<start_frame>0</start_frame><stop_frame>20</stop_frame>"):
  size = "<original_size><width>200</width><height>100</height></original_size>"
  return f"<task><id>{number}</id><name>t</name><size>21</size>{extra}{size}<source>{video}</source></task>"


def box(frame: int, x: float, *, inside: str = "", **attributes) -> str:
  given = {"xtl": x, "ytl": 10, "xbr": x + 20, "ybr": 60, "outside": 0, "occluded": 0, "keyframe": 1, **attributes}
  return f'<box frame="{frame}" {" ".join(f"{k}={chr(34)}{v}{chr(34)}" for k, v in given.items())}>{inside}</box>'


def said(**values: str) -> str:
  return "".join(f'<attribute name="{name}">{value}</attribute>' for name, value in values.items())


def cvat(*tracks: str, labels: str = LABELS, tasks: str | None = None) -> str:
  body = "".join(f'<track id="{n}" label="person">{track}</track>' for n, track in enumerate(tracks))
  return (
    f"<annotations><version>1.1</version><meta>{tasks or task()}<labels>{labels}</labels></meta>{body}</annotations>"
  )


def test_cvat_boxes_are_linear_between_keyframes_until_they_leave():
  walk = said(action="walk", waves="false")
  video = only("cvat", cvat(box(4, 0, inside=walk) + box(8, 40, inside=walk) + box(12, 80, outside=1, inside=walk)))
  assert (video.clock, video.size, video.names[0]) == ("frames", (100, 200), "a.mp4")
  assert list(video.moments) == list(range(4, 12))
  xs = [video.boxes_at(frame)[0].corners[0] for frame in video.moments]
  assert xs == [0, 10, 20, 30, 40, 50, 60, 70]
  assert video.boxes_at(3) == video.boxes_at(12) == video.boxes_at(20) == []


def test_cvat_last_box_stays_to_the_end_and_nobody_in_between_is_kept():
  walk = said(action="walk")
  video = only("cvat", cvat(box(2, 5, inside=walk) + box(3, 5, outside=1), box(18, 7, inside=walk)))
  assert list(video.moments) == list(range(2, 21))
  assert [len(video.boxes_at(frame)) for frame in (2, 3, 17, 18, 20)] == [1, 0, 0, 1, 1]
  assert video.boxes_at(20) == [Box((7, 10, 27, 60), 1, ("walk",))]


def test_cvat_step_and_start_count_frames_of_the_video():
  extra = "<start_frame>10</start_frame><stop_frame>32</stop_frame><frame_filter>step=5</frame_filter>"
  video = only("cvat", cvat(box(10, 0, inside=said(action="run")), tasks=task(extra=extra)))
  assert list(video.moments) == [10, 15, 20, 25, 30]


def test_cvat_actions_come_from_attributes():
  both = said(action="walk", waves="true")
  videos, names, ids, _ = parse("cvat", cvat(box(0, 0, inside=both) + box(5, 0, inside=said(action="run"))))
  assert names == ["walk", "run", "waves"] and ids is None
  assert [videos[0].boxes_at(frame)[0].actions for frame in (0, 4, 5)] == [("walk", "waves")] * 2 + [("run",)]
  # Attributes that do not change stand with the track in some versions.
  track = said(action="run") + box(0, 0)
  assert only("cvat", cvat(track)).boxes_at(0)[0].actions == ("run",)
  text = PERSON.format(attribute("activities", "text") + attribute("gender", "radio", "f\nm"))
  content = cvat(box(0, 0, inside=said(activities="sit, read;sit", gender="f")), labels=text)
  assert parse("cvat", content)[1] == ["sit", "read"]
  assert parse("cvat", content, wanted=("gender",))[1] == ["f", "m"]
  number = PERSON.format(attribute("action", "number", "0\n9\n1"))  # least, most and step
  assert parse("cvat", cvat(box(0, 0, inside=said(action="3")), labels=number))[1] == ["3"]


def test_cvat_label_is_the_action_where_no_attribute_is():
  labels = "".join(f"<label><name>{name}</name><type>any</type><attributes/></label>" for name in ("person", "ride"))
  videos, names, _, _ = parse("cvat", cvat(box(0, 0), labels=labels))
  assert names == ["person", "ride"] and videos[0].boxes_at(0)[0].actions == ("person",)


def test_cvat_rotated_boxes_are_framed():
  quarter = box(0, 0, rotation=90, inside=said(action="run")) + box(10, 0, rotation=350, inside=said(action="run"))
  video = only("cvat", cvat(quarter))
  np.testing.assert_allclose(video.boxes_at(0)[0].corners, (-15, 25, 35, 45))
  turned = np.radians(70)  # from 90 to -10 degrees, after two of ten frames
  side = (20 * np.cos(turned) + 50 * np.sin(turned)) / 2
  np.testing.assert_allclose(video.boxes_at(2)[0].corners[0], 10 - side)


def test_cvat_project_has_a_video_for_each_task():
  tasks = f"<project><tasks>{task('a.mp4', 7)}{task('b.mp4', 9)}</tasks></project>"
  content = cvat(box(0, 0, inside=said(action="walk")), box(0, 50, inside=said(action="run")), tasks=tasks)
  content = content.replace('id="0"', 'id="0" task_id="9"').replace('id="1"', 'id="1" task_id="7"')
  videos = parse("cvat", content)[0]
  assert [(video.names[0], video.boxes_at(0)[0].actions) for video in videos] == [
    ("a.mp4", ("run",)),
    ("b.mp4", ("walk",)),
  ]


def test_cvat_repairs_are_counted():
  polygon = '<polygon frame="0" points="1,1;2,2;3,1"/>'
  counts = parse("cvat", cvat(polygon, box(0, 0) + box(1, 0, outside=1)))[3]
  assert {kind: places.total() for kind, places in counts.items()} == {
    "shapes that are no boxes, left out": 1,
    "boxes without an action, left out": 1,
  }


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (cvat(box(3, 0, xbr="wide")), "track 0, frame 3: xbr is 'wide'; expected a number"),
    (cvat("", box(3, float("nan"))), "track 1, frame 3: xtl is 'nan'; expected a number"),
    (cvat(box(-1, 0)), "track 0: frame is '-1'; expected a whole number"),
    (cvat(box(1, 0) + box(1, 5)), "track 0, frame 1: two boxes of one track in one frame"),
    (cvat(box(1, 0))[:-30], "file.csv:3: not valid XML: "),
    (cvat(box(1, 0), tasks="<task><id>4</id></task>"), "task 4: no <original_size>"),
    (cvat(box(1, 0), tasks=task(extra="<stop_frame>soon</stop_frame>")), "task 1: stop_frame is 'soon'; expected"),
    (cvat(box(10**9, 0)), "frame 1000000000 with step 1: no video is that long"),
    ('<annotations><image id="0" name="a.png"/></annotations>', 'is "CVAT for images"; export the task as "CVAT for v'),
    ("<annotations></annotations>", "no <meta>"),
  ],
)  # fmt: skip
def test_broken_cvat_is_told(content, message):
  with pytest.raises(AnnotationError, match=re.escape(message)):
    parse("cvat", content)


# --- COCO -----------------------------------------------------------------------------------------------------


def coco(**changes) -> dict:
  content = {
    "videos": [{"id": 5, "name": "a.mp4", "width": 200, "height": 100}],
    "images": [{"id": i, "video_id": 5, "frame_id": 25 * i} for i in range(3)],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [10, 20, 30, 40], "track_id": 8}],
    "categories": [{"id": 4, "name": "walk"}, {"id": 2, "name": "run"}],
  }
  return {**content, **changes}


def test_coco_frames_of_videos():
  [video], names, ids, _ = parse("coco", json.dumps(coco()))
  assert (names, ids) == (["walk", "run"], {4: "walk", 2: "run"})
  assert (video.names, video.size, list(video.moments)) == (["a.mp4"], (100, 200), [0, 25, 50])
  [found] = video.boxes_at(25)
  assert (found.corners, found.actions) == ((10, 20, 40, 60), ("walk",))
  assert video.boxes_at(0) == []


@pytest.mark.parametrize(
  ("pattern", "video"),
  [
    ("clips/b/{:06d}.jpg", "clips/b"),
    ("b/img_{:05d}.png", "b"),
    ("b_frame_{}.jpg", "b"),
    ("b-2_{:04d}.jpg", "b-2"),
    ("frame_{:06d}.PNG", "file"),
  ],
)
def test_coco_frames_by_names_of_files(pattern, video):
  images = [{"id": i, "file_name": pattern.format(i), "width": 200, "height": 100} for i in (1, 2, 7)]
  found = only("coco", json.dumps(coco(videos=[], images=images)))
  assert found.names[0] == video and list(found.moments) == [0, 1, 6]  # names that count from 1


def test_coco_boxes_without_tracks_are_one_person_where_they_are_one_box():
  row = {"image_id": 1, "bbox": [1, 2, 3, 4]}
  rows = [{**row, "category_id": 4}, {**row, "category_id": 2}, {**row, "category_id": 4, "bbox": [1, 2, 3, 5]}]
  people = [found.person for found in only("coco", json.dumps(coco(annotations=rows))).boxes_at(25)]
  assert people[0] == people[1] != people[2]


def test_coco_attributes_name_actions_as_in_cvat():
  row = {"image_id": 1, "category_id": 4, "bbox": [1, 2, 3, 4]}
  attributes = [{"action": "sit", "occluded": True, "talks": False}, {"action": ["sit", "eat"], "talks": True}]
  rows = [{**row, "attributes": {**given, "track_id": n}} for n, given in enumerate(attributes)]
  [video], names, ids, _ = parse("coco", json.dumps(coco(annotations=rows)))
  assert [found.actions for found in video.boxes_at(25)] == [("sit",), ("sit", "eat", "talks")]
  assert set(names) == {"sit", "eat", "talks"} and ids is None


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"annotations": [{"image_id": 9, "category_id": 4, "bbox": [1, 2, 3, 4]}]}, "annotations[0]: image_id 9 is none"),
    ({"annotations": [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}]}, "annotations[0]: category_id 3 is n"),
    ({"annotations": [{"image_id": 1, "category_id": 4, "bbox": [1, 2, 3]}]}, "annotations[0]: bbox is [1, 2, 3]"),
    ({"annotations": [{"category_id": 4}]}, "'image_id' is missing; expected an export of coco"),
    ({"images": [{"id": 1, "video_id": 6, "frame_id": 0}]}, "images[0]: video_id 6 is none of the videos"),
    ({"images": [{"id": 1, "video_id": 5}]}, "images[0]: neither frame_id nor a number at the end of file_name"),
    ({"images": [{"id": 1, "video_id": 5, "frame_id": -2}]}, "images[0]: frame -2; expected a whole number from 0 up"),
    ({"categories": 3}, "file.csv: unexpected content"),
  ],
)  # fmt: skip
def test_broken_coco_is_told(changes, message):
  with pytest.raises(AnnotationError, match=re.escape(message)):
    parse("coco", json.dumps(coco(**changes)))


# --- VIA ------------------------------------------------------------------------------------------------------


def via(regions: dict, *, kind: int = 4, options: dict[str, str] | None = None, name: str = "action") -> str:
  spatial = {"aname": name, "anchor_id": "FILE1_Z1_XY1", "type": kind, "options": options or {"0": "walk", "1": "run"}}
  segments = {"aname": "action", "anchor_id": "FILE1_Z2_XY0", "type": 4, "options": {"0": "other"}}
  return json.dumps(
    {
      "attribute": {"1": segments, "2": spatial},
      "file": {"7": {"fname": "a.mp4", "type": 4}, "8": {"fname": "a.png", "type": 2}},
      "view": {"1": {"fid_list": ["7"]}, "2": {"fid_list": [8]}},
      "metadata": regions,
    }
  )


def region(xy: list, value: str = "0", z: list | None = None, vid: str = "1") -> dict:
  return {"vid": vid, "flg": 0, "z": [1.5] if z is None else z, "xy": xy, "av": {"2": value, "9": "gone"}}


def test_via_regions():
  regions = {
    "a": region([2, 10, 20, 30, 40]),
    "b": region([8, 15, 5, 30, 10, 20, 50, 2, 30], value="1"),
    "c": region([], z=[0, 2]),
    "d": region([3, 1, 1, 5]),
    "e": region([2, 1, 1, 5, 5], value=""),
  }
  [video], names, _, counts = parse("via", via(regions))
  assert (video.names, video.clock, video.size, list(video.moments)) == (["a.mp4"], "shown", None, [1.5])
  assert video.boxes_at(1.5) == [Box((10, 20, 40, 60), 0, ("walk",)), Box((2, 5, 30, 50), 1, ("run",))]
  assert names == ["walk", "run"]
  assert {kind: places.total() for kind, places in counts.items()} == {
    "shapes that are no boxes, left out": 1,
    "boxes without an action, left out": 1,
  }


def test_via_checkboxes_and_text_name_several_actions():
  for kind, value in ((2, "0,1"), (1, "walk, run")):
    video = only("via", via({"a": region([2, 1, 2, 3, 4], value=value)}, kind=kind))
    assert video.boxes_at(1.5)[0].actions == ("walk", "run")
  # With one attribute, there is no doubt what it means.
  assert parse("via", via({"a": region([2, 1, 2, 3, 4])}, name="what"))[1] == ["walk", "run"]


@pytest.mark.parametrize(
  ("regions", "message"),
  [
    ({"q": region([2, 1, 2, 3, 4], vid="2")}, "metadata q: a.png is no video"),
    ({"q": region([2, 1, 2, 3])}, "metadata q: xy without its first number is [1.0, 2.0, 3.0]; expected 4 numbers"),
    ({"q": region([2, 1, 2, 3, "x"])}, 'metadata q: xy is [1, 2, 3, "x"]; expected 4 numbers'),
    ({"q": region([2, 1, 2, 3, 4], z=["soon"])}, 'metadata q: z is ["soon"]; expected 1 numbers'),
    ({"q": region([2, 1, 2, 3, 4], vid="3")}, "'3' is missing; expected an export of via"),
  ],
)
def test_broken_via_is_told(regions, message):
  with pytest.raises(AnnotationError, match=re.escape(message)):
    parse("via", via(regions))


# --- CSV ------------------------------------------------------------------------------------------------------


def test_csv_with_names():
  rows = ['1,0,0,1,1,"sit, eat"', "1,0,0,1,1,run", "1,0,0,0.5,1,run", "2"]
  text = "\n".join(["video,time,x1,y1,x2,y2,action", *(f"a,{row}" for row in rows), "b,1.5,0,0,1,1,run,3"])
  videos, names, ids, _ = parse("csv", text)
  assert (names, ids) == (["sit, eat", "run"], None)
  assert [video.names for video in videos] == [["a"], ["b"]] and videos[0].moments == [1, 2]
  assert [(found.person, found.actions) for found in videos[0].boxes_at(1)] == [
    (0, ("sit, eat",)),
    (0, ("run",)),
    (2, ("run",)),
  ]
  assert videos[0].boxes_at(2) == [] and videos[1].boxes_at(1.5)[0].person == 3


def test_csv_with_ids(tmp_path):
  rows = "a,0902,0,0,1,1,7,0\na,0902,0,0,1,1,3,0\n"
  assert parse("csv", rows)[2] == {3: "class 3", 7: "class 7"}
  (tmp_path / "labels.pbtxt").write_text('item {name: "run" id: 3} item {name: "sit" id: 7} item {name: "eat" id: 9}')
  (tmp_path / "rows.csv").write_text(rows)
  export = exports.read(tmp_path, Problems())
  assert export.label_map == {3: "run", 7: "sit", 9: "eat"} and export.format == "csv"
  assert [found.actions for found in export.videos[0].boxes_at(902)] == [("sit",), ("run",)]
  with pytest.raises(AnnotationError, match=r"rows.csv:2: '8' is none of the classes of .*labels.pbtxt"):
    parse("csv", rows.replace(",3,0", ",8,0"), path=str(tmp_path / "rows.csv"))


@pytest.mark.parametrize("first", ['name: "no action"', 'name: "run"'])
def test_datumaro_leaves_the_id_0_out(tmp_path, first):
  (tmp_path / "annotations").mkdir()
  labels = f'label {{\n  {first}\n}}\nlabel {{\n  name: "sit"\n  label_id: 1\n}}\n'
  (tmp_path / "annotations" / "ava_action_list_v2.2.pbtxt").write_text(labels)
  rows = ["a,1,0,0,1,1,1,0\r\n"] + ["a,2,0,0,1,1,0,0\r\n"] * ("run" in first)
  (tmp_path / "annotations" / "ava_train_v2.2.csv").write_text("".join(rows))
  export = exports.read(tmp_path, Problems())
  assert export.format == "datumaro" and export.videos[0].split == "train"
  assert export.label_map == ({1: "run", 2: "sit"} if "run" in first else {1: "sit"})
  assert export.videos[0].boxes_at(1)[0].actions == ("sit",)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ("a,1,0,0,1,1", "file.csv:2: 6 columns; expected video,seconds,x1,y1,x2,y2,action[,person]"),
    ("a,1,0,0,1,x,run", 'file.csv:2: the box is ["0", "0", "1", "x"]; expected 4 numbers'),
    ("a,1,0,0,inf,1,run", "file.csv:2: the box is"),
    ("a,1,0,0,120,80,run", "file.csv:2: the box is in pixels; expected x1,y1,x2,y2 in [0, 1] of the frame"),
    (",1,0,0,1,1,run", "file.csv:2: names no video"),
    ("a,now,0,0,1,1,run", "file.csv:2: the time is"),
    ("a,1,0,0,1,1,", "file.csv:2: '' is none of the classes"),
  ],
)
def test_broken_csv_is_told(row, message):
  with pytest.raises(AnnotationError, match=re.escape(message)):
    parse("csv", f"a,1,0,0,1,1,run\n{row}\n")


# --- files ----------------------------------------------------------------------------------------------------


def test_archives_are_read_and_other_files_passed_over(tmp_path):
  with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
    archive.writestr("annotations.xml", cvat(box(0, 0, inside=said(action="run"))))
    archive.writestr("images/frame_000000.png", b"")
  (tmp_path / "notes.json").write_text("{}")
  (tmp_path / "feed.xml").write_text("<rss/>")
  (tmp_path / "table.csv").write_text("height,weight\n1,2\n")
  export = exports.read(tmp_path, Problems())
  assert (export.format, export.files) == ("cvat", [tmp_path / "a.zip"])
  assert "a" in export.videos[0].names
  with zipfile.ZipFile(tmp_path / "clip.zip", "w") as archive:
    images = [{"id": 1, "file_name": "frame_000000.PNG", "height": 100, "width": 200}]
    archive.writestr("annotations/instances_default.json", json.dumps(coco(videos=[], images=images)))
  assert "clip" in exports.read(tmp_path / "clip.zip", Problems()).videos[0].names
  (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:200])
  with pytest.raises(AnnotationError, match=r"a.zip: a damaged or locked archive"):
    exports.read(tmp_path, Problems())


def test_excluded_keyframes_are_left_out(tmp_path):
  (tmp_path / "val.csv").write_text("a,1,0,0,1,1,4\na,2,0,0,1,1,4\nb,2,0,0,1,1,4\n")
  (tmp_path / "val_excluded_timestamps.csv").write_text("a,0002\nb,0001\n")
  export = exports.read(tmp_path, Problems())
  assert [(video.names, video.moments) for video in export.videos] == [(["a"], [1]), (["b"], [2])]
  assert export.label_map == {4: "class 4"} and export.notes[1:] == ["2 keyframes are excluded by a file, and left out"]


def test_format_has_to_be_clear(tmp_path):
  with pytest.raises(AnnotationError, match="no annotations here of cvat, coco, via, datumaro, csv"):
    exports.read(tmp_path, Problems())
  (tmp_path / "a.json").write_text(json.dumps(coco()))
  (tmp_path / "b.xml").write_text(cvat(box(0, 0, inside=said(action="run"))))
  with pytest.raises(AnnotationError, match=r"several formats .*choose with --annotations or --format"):
    exports.read(tmp_path, Problems())
  assert exports.read(tmp_path, Problems(), kind="coco").format == "coco"
  with pytest.raises(AnnotationError, match="no attribute acton; there are: action, waves"):
    exports.read(tmp_path / "b.xml", Problems(), action_attributes=["acton"])
  (tmp_path / "a.json").write_text('{\n"images":\n')
  with pytest.raises(AnnotationError, match=r"a.json:3: not valid JSON"):
    exports.read(tmp_path / "a.json", Problems())


def test_files_that_number_classes_differently_are_numbered_anew(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps(coco()))
  other = [{"id": 4, "name": "sit"}, {"id": 2, "name": "run"}]
  (tmp_path / "b.json").write_text(json.dumps(coco(categories=other)))
  export = exports.read(tmp_path, Problems())
  assert export.label_map == {1: "walk", 2: "run", 3: "sit"}
  assert any("numbered in order of appearance" in note for note in export.notes)


# --- damage ---------------------------------------------------------------------------------------------------


def survives(kind: str, content: bytes) -> None:
  """Reads what can be read; only errors with a message of ours may leave."""
  path = FILES[kind].with_name("damaged" + FILES[kind].suffix)
  try:
    exports.recognise(Document(path, content))
    for video in exports.parse(kind, Document(path, content), Classes(), Problems())[1]:
      for moment in video.moments[:3]:
        for found in video.boxes_at(moment):
          assert np.isfinite(found.corners).all() and found.actions
  except AnnotationError as error:
    assert str(path.name) in str(error) or ".pbtxt" in str(error)


FUZZ = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TRASH = (
  b"",
  b"\x00",
  b"<",
  b'"',
  b"-1",
  b"1e999",
  b"nan",
  b"\xff",
  b",",
  b"{}",
  b"[]",
  b"null",
  b"99999999999999999999",
)


@pytest.mark.parametrize("kind", FILES)
def test_damaged_bytes_never_crash(kind):
  whole = FILES[kind].read_bytes()[:6000]  # where the head of the file is; cut, it is damaged anyway
  whole_too = FILES[kind].read_bytes()

  @FUZZ
  @given(st.randoms(use_true_random=False), st.integers(1, 4), st.booleans())
  def check(rng: random.Random, cuts: int, short: bool) -> None:
    content = whole if short else whole_too
    for _ in range(cuts):
      start = rng.randrange(len(content) + 1)
      content = content[:start] + rng.choice(TRASH) + content[start + rng.choice((0, 1, 3, 10)) :]
    survives(kind, content)

  check()


SCALARS = st.sampled_from(
  [None, True, -1, 0, 3, 1.5, 1e400, float("nan"), "", "x", "1", [], {}, [1, 2], {"a": 1}, 10**30]
)


@pytest.mark.parametrize("kind", ["coco", "via"])
def test_damaged_values_never_crash(kind):
  whole = json.loads(FILES[kind].read_text())

  @FUZZ
  @given(st.randoms(use_true_random=False), SCALARS, st.integers(1, 3))
  def check(rng: random.Random, value: object, changes: int) -> None:
    content = copy.deepcopy(whole)
    for _ in range(changes):
      node = content
      for _ in range(rng.randint(1, 5)):
        if not isinstance(node, dict | list) or not node:
          break
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], dict | list) or rng.random() < 0.3:
          node[key] = copy.deepcopy(value)
          break
        node = node[key]
    survives(kind, json.dumps(content).encode())

  check()


def test_damaged_numbers_of_cvat_never_crash():
  whole = FILES["cvat"].read_text()
  places = [match.span(1) for match in re.finditer(r'="([^"]*)"|>([^<]+)<', whole) if match[1]]

  @FUZZ
  @given(st.randoms(use_true_random=False), st.sampled_from(["", "nan", "-5", "1e400", "x", "1e9", "٣", "0x10", "²"]))
  def check(rng: random.Random, value: str) -> None:
    begin, end = rng.choice(places)
    survives("cvat", (whole[:begin] + value + whole[end:]).encode())

  check()
