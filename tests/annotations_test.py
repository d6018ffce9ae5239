"""AVA-format files: what is read back, and what is said about bad ones."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vad_jax import annotations
from vad_jax.annotations import AnnotationError

_GOOD = "clip,0902,0.1,0.2,0.3,0.4,12,3"


def _write(tmp_path, text, name="rows.csv"):
  path = tmp_path / name
  path.write_bytes(text.encode() if isinstance(text, str) else text)
  return path


def test_reads_all_kinds_of_rows(tmp_path):
  text = f"{_GOOD}\r\n\nclip,0903\nclip,904.5,0,0,1,1,80\n"
  rows = annotations.read_ava_csv(_write(tmp_path, text))
  assert rows.video.tolist() == ["clip"] * 3
  assert rows.timestamp.tolist() == [902, 903, 904.5]
  assert rows.action.tolist() == [12, 0, 80]
  assert rows.extra.tolist() == [3, 1, 1]
  np.testing.assert_array_equal(rows.boxes[[0, 2]], [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]])
  assert np.isnan(rows.boxes[1]).all()


def test_reads_an_empty_file(tmp_path):
  rows = annotations.read_ava_csv(_write(tmp_path, ""))
  assert rows.boxes.shape == (0, 4)
  assert annotations.keyframes(rows, 80) == []


def test_parts_of_a_file_hold_whole_keyframes(tmp_path, monkeypatch):
  monkeypatch.setattr(annotations, "_CHUNK", 100)
  text = "".join(f"clip,{900 + row // 7},0,0,1,1,1,{row}\n" for row in range(50))
  path = _write(tmp_path, text)
  parts = list(annotations.iterate_ava_csv(path))
  assert len(parts) > 3
  assert all(a.timestamp[-1] < b.timestamp[0] for a, b in itertools.pairwise(parts))
  rows = annotations.read_ava_csv(path)
  assert rows.extra.tolist() == list(range(50))
  assert rows.timestamp.tolist() == [900 + row // 7 for row in range(50)]
  monkeypatch.setattr(annotations, "_CHUNK", 1)
  apart = _write(tmp_path, "a,1,0,0,1,1,1,5\nb,1\na,1,0,0,1,1,1,6\n")
  assert [part.extra.tolist() for part in annotations.iterate_ava_csv(apart)] == [[5], [1], [6]]


def test_excluded(tmp_path):
  assert annotations.read_excluded(_write(tmp_path, "a,0902\nb,3\n\n")) == {("a", 902.0), ("b", 3.0)}
  with pytest.raises(AnnotationError, match=r"rows.csv: a row holds a box"):
    annotations.read_excluded(_write(tmp_path, _GOOD))
  with pytest.raises(AnnotationError, match=r"rows.csv:2: 1 columns"):
    annotations.read_excluded(_write(tmp_path, "a,0902\nb\n"))


def test_detections_of_predict(tmp_path):
  actions = [{"id": 12, "name": "stand", "score": 0.7}, {"id": 1, "name": "bend", "score": 0.5}]
  actors = [
    {"box": [0, 0, 0.5, 1], "score": 0.9, "actions": actions},
    {"box": [0, 0, 1, 1], "score": 0.2, "actions": []},
  ]
  content = {"video": "/some/cl,ip.mp4", "keyframes": [{"time": 0.5, "actors": actors}, {"time": 1.5, "actors": []}]}
  rows, persons = annotations.read_detections_json(_write(tmp_path, json.dumps(content)))
  assert rows.video.tolist() == ["cl_ip"] * 2
  assert rows.timestamp.tolist() == [0.5, 0.5]
  assert rows.action.tolist() == [12, 1]
  assert rows.extra.tolist() == [0.7, 0.5]
  assert persons.extra.tolist() == [0.9, 0.2]
  assert persons.boxes.tolist() == [[0, 0, 0.5, 1], [0, 0, 1, 1]]
  for bad, complaint in [
    ({"video": "a"}, "'keyframes' is missing"),
    ([], "not detections of vad_jax.predict"),
    (content | {"keyframes": [{"time": "x", "actors": actors}]}, "could not convert string to float"),
    (content | {"keyframes": [{"time": 1, "actors": [{"box": [1, 2], "score": 1, "actions": []}]}]}, "reshape"),
  ]:
    with pytest.raises(AnnotationError, match=complaint):
      annotations.read_detections_json(_write(tmp_path, json.dumps(bad)))


def test_byte_order_mark_is_no_part_of_the_name(tmp_path):
  assert annotations.read_ava_csv(_write(tmp_path, "\ufeff" + _GOOD)).video.tolist() == ["clip"]


@pytest.mark.parametrize(
  ("row", "complaint"),
  [
    ("clip,0902,0.1,0.2,0.3,0.4", "6 columns"),
    (_GOOD + ",5", "9 columns"),
    ("clip", "1 columns"),
    ("clip,0902,0.1,left,0.3,0.4,12,3", "'left' is not a number"),
    ("video_id,timestamp,x1,y1,x2,y2,action_id,score", "'timestamp' is not a number"),
    ("clip,0902,0.1,0.2,0.3,0.4,0,3", "action id 0"),
    ("clip,0902,0.1,0.2,0.3,0.4,1.5,3", "action id 1.5"),
    ("clip,0902,0.1,0.2,0.3,0.4,nan,3", "action id nan"),
    ("clip,0902,0.1,0.2,0.3,0.4,inf,3", "action id inf"),
    ("clip,0902,0.1,0.2,0.3,0.4,1e12,3", "action id 1e12"),
    ("clip,0902,0.1,nan,0.3,0.4,12,3", "not finite"),
    ("clip,inf", "not finite"),
    ("clip,0902,0.1,0.2,0.3,0.4,12,nan", "score"),
    (",0902,0.1,0.2,0.3,0.4,12,3", "video id is empty"),
  ],
)
@pytest.mark.parametrize("around", [_GOOD, "clip,0902"])
def test_bad_row_is_named(tmp_path, row, complaint, around):
  path = _write(tmp_path, f"{around}\n{around}\n{row}\n{around}\n")
  with pytest.raises(AnnotationError) as error:
    annotations.read_ava_csv(path)
  assert f"{path}:3: " in str(error.value)
  assert complaint in str(error.value)
  assert "\n" not in str(error.value)


def test_line_numbers_go_on_from_block_to_block(tmp_path, monkeypatch):
  monkeypatch.setattr(annotations, "_CHUNK", 100)
  path = _write(tmp_path, f"{_GOOD}\n" * 50 + "clip,x\n")
  with pytest.raises(AnnotationError, match=r"rows.csv:51: "):
    annotations.read_ava_csv(path)
  assert len(annotations.read_ava_csv(_write(tmp_path, f"{_GOOD}\n" * 50)).video) == 50


def test_binary_file_is_an_error(tmp_path):
  with pytest.raises(AnnotationError, match="not a text file"):
    annotations.read_ava_csv(_write(tmp_path, b"\x00\xff\xfe\x9c"))


def test_rows_survive_writing(tmp_path):
  rng = np.random.default_rng(0)
  score = rng.random(20).astype(np.float32).astype(np.float64)
  rows = annotations.Rows(
    np.array([f"clip_{index % 3}" for index in range(20)], object),
    902 + np.arange(20) / 4,
    rng.integers(0, 1000, (20, 4)) / 1000,
    rng.integers(1, 81, 20).astype(np.int32),
    score,
  )
  rows.action[5], rows.boxes[5], rows.extra[5] = 0, np.nan, 1
  path = tmp_path / "rows.csv"
  annotations.write_ava_csv(path, rows)
  back = annotations.read_ava_csv(path)
  for name, ours, theirs in zip(rows._fields, rows, back, strict=True):
    np.testing.assert_array_equal(theirs.astype(np.float32) if name == "extra" else theirs, ours, err_msg=name)


def test_written_as_ava_does(tmp_path):
  rows = annotations.read_ava_csv(_write(tmp_path, "a,902,0.125,0,0.5,1,12,31\na,3\na,1.25,0,0,1,1,1,0.5\n"))
  annotations.write_ava_csv(tmp_path / "out.csv", rows)
  expected = "a,0902,0.125,0,0.5,1,12,31\na,0003\na,1.25,0,0,1,1,1,0.5\n"
  assert (tmp_path / "out.csv").read_text() == expected


def test_keyframes_merge_the_rows_of_an_actor(tmp_path):
  text = "b,1,0,0,.5,1,2,7\na,1\nb,1,.5,0,1,1,3,8\nb,1,0,0,.5,1,3,7\nb,1,0,0,.5,1,1,9\n"
  first, second = annotations.keyframes(annotations.read_ava_csv(_write(tmp_path, text)), 3)
  assert (first.video, second.video) == ("b", "a")
  assert first.person_ids.tolist() == [7, 8, 9]  # the third stands where the first does
  assert first.labels.tolist() == [[0, 1, 1], [0, 0, 1], [1, 0, 0]]
  assert first.boxes.tolist() == [[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 0.5, 1]]
  assert second.boxes.shape == (0, 4)
  assert second.labels.shape == (0, 3)


def test_keyframes_refuse_too_large_ids(tmp_path):
  with pytest.raises(AnnotationError, match="action id 12 does not fit 11"):
    annotations.keyframes(annotations.read_ava_csv(_write(tmp_path, _GOOD)), 11)


def test_label_map_survives_writing(tmp_path):
  names = {80: "watch (a person)", 1: "bend/bow (at the waist)", 12: "stand"}
  annotations.write_label_map(tmp_path / "map.pbtxt", names)
  back = annotations.read_label_map(tmp_path / "map.pbtxt")
  assert back == names
  assert list(back) == [1, 12, 80]


def test_label_maps_of_ava():
  some, everything = annotations.read_label_map("ava_60"), annotations.read_label_map("ava_80")
  assert len(some) == 60
  assert list(everything) == list(range(1, 81))
  assert some.items() <= everything.items()
  assert everything[71] == "kick (a person)"


def test_label_map_forms(tmp_path):
  text = 'item { name: "a" id: 1 }\nitem {\n  label_id: 2\n  name: "b"\n}\n'
  assert annotations.read_label_map(_write(tmp_path, text)) == {1: "a", 2: "b"}
  text = 'label {\n  name: "c"\n  label_id: 3\n  label_type: PERSON_MOVEMENT\n}\n'
  assert annotations.read_label_map(_write(tmp_path, text)) == {3: "c"}


@pytest.mark.parametrize(
  ("item", "complaint"),
  [
    ('name: "b" id: 1', ":4: class id 1 stands twice"),
    ('name: "b" id: 0', ":4: class id 0"),
    ('name: "b"', ":4: this item lacks"),
    ("id: 7", ":4: this item lacks"),
  ],
)
def test_bad_label_map(tmp_path, item, complaint):
  path = _write(tmp_path, f'item {{\n  name: "a" id: 1\n}}\nitem {{\n  {item}\n}}\n')
  with pytest.raises(AnnotationError) as error:
    annotations.read_label_map(path)
  assert f"{path}{complaint}" in str(error.value)


def test_label_map_without_classes(tmp_path):
  with pytest.raises(AnnotationError, match="no class found"):
    annotations.read_label_map(_write(tmp_path, "1,stand\n"))


FIELDS = st.sampled_from(
  [
    *("clip", "0902", "0.5", "1", "80", "1.5", "-0", "1e400", "nan", "inf", "-inf", "1_0", "0x1", "2147483648", "1e3"),
    *("+3", "True", "0.1.2", "#1", '"a"', "1;2", "\u0661", "\x00", "", " 7", "7 ", "a b", "\t", "\r", "\x0c", "\xa0"),
    "\u2028",
  ]
)
ROWS = st.one_of(
  st.just(_GOOD.split(",")),
  st.lists(FIELDS, max_size=9),
  st.tuples(st.integers(0, 7), FIELDS).map(
    lambda x: [x[1] if i == x[0] else f for i, f in enumerate(_GOOD.split(","))]
  ),
)


@settings(
  max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(ROWS, max_size=4), end=st.sampled_from(["\n", "\r\n", "\n\n", ""]))
def test_any_text_is_rows_or_an_error_of_one_line(tmp_path, rows, end):
  text = (end or "\n").join(",".join(row) for row in rows) + end
  path = _write(tmp_path, text)
  try:
    found = annotations.read_ava_csv(path)
  except AnnotationError as error:
    assert str(error).startswith(f"{path}:") and "\n" not in str(error)
    return
  boxes = found.action > 0
  assert np.isfinite(found.timestamp).all() and np.isfinite(found.boxes[boxes]).all()
  assert np.isnan(found.boxes[~boxes]).all() and not np.isnan(found.extra).any() and (found.action >= 0).all()
  assert all(found.video)
  # Rows that are parsed together give what they give one by one.
  lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines(keepends=True) if not line.isspace()]
  together = annotations._parse_full_rows(lines, {}) if lines else None
  if together:
    for one, other in zip(together, annotations._parse_rows(lines, {}, path, 1), strict=True):
      np.testing.assert_array_equal(one, other)
