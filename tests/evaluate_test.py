"""Evaluation: rows from detections, fillers, order, thresholds."""

import functools
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from vad_jax import sharding
from vad_jax.annotations import Keyframe
from vad_jax.batch import Batch, Detections
from vad_jax.datasets.tube_clips import cut
from vad_jax.evaluate import Evaluation, TubeEvaluation, evaluate, evaluate_tubes, ground_truth_rows
from vad_jax.tubes import Tube, TubeGroundTruth, Video

LABEL_MAP = {1: "stand", 3: "run"}  # class 2 is not scored
BOXES = np.array([[0.1, 0.1, 0.4, 0.8], [0.5, 0.2, 0.9, 0.9]], np.float32)
LABELS = np.array([[1, 0, 0], [1, 1, 1]], np.float32)


class Set:
  """Five keyframes; the first two hold nobody, one and two people, and so on."""

  def __init__(self) -> None:
    self.keyframes = [
      Keyframe("a" if t < 3 else "b", float(t), BOXES[: t % 3], LABELS[: t % 3], np.arange(t % 3)) for t in range(5)
    ]

  def __len__(self) -> int:
    return len(self.keyframes)


def batches(keys: list[list[int]]) -> list[Batch]:
  return [{"key": np.array(row, np.int32)} for row in keys]  # pyright: ignore


def oracle(batch: Any) -> Detections:
  """Finds everybody and one who is not there, whose actor score is low."""
  size = len(batch["key"])
  tile = lambda x: np.tile(np.asarray(x, np.float32), (size, *[1] * np.ndim(x)))  # noqa: E731
  boxes = np.concatenate([BOXES, [[0.0, 0.0, 0.05, 0.05]]])
  action = np.concatenate([np.where(LABELS, 0.9, 0.2), [[0.95, 0.95, 0.95]]])
  valid = (np.arange(3) < np.asarray(batch["key"])[:, None] % 3) | (np.arange(3) == 2)
  return Detections(tile(boxes), tile([0.9, 0.8, 0.3]), tile(action), valid)


def run(keys: list[list[int]], devices: int = 1, **kwargs: Any) -> Evaluation:
  mesh = sharding.make_mesh({"data": -1}, jax.devices()[:devices])
  result = evaluate(oracle, Set(), batches(keys), LABEL_MAP, mesh=mesh, **kwargs)
  assert result is not None
  return result


IN_ORDER = [[0, 1], [2, 3], [4, -1]]


def test_scores_and_rows() -> None:
  result = run(IN_ORDER, score_threshold=0.25)
  truth = result.ground_truth
  assert truth.action.tolist() == [0, 1, 1, 1, 2, 3, 0, 1]
  assert truth.timestamp.tolist() == [0, 1, 2, 2, 2, 2, 3, 4]
  # Each person, the stranger too, gets the classes of the label map, with the product of both scores.
  second = result.detections.select(result.detections.timestamp == 2)
  assert second.action.tolist() == [1, 1, 3, 1, 3]
  np.testing.assert_allclose(second.extra, [0.81, 0.72, 0.72, 0.285, 0.285], rtol=1e-6)
  np.testing.assert_allclose(second.boxes[0], BOXES[0])
  assert result.metrics["frame_map_50"] == pytest.approx(1)
  assert 0.8 < result.metrics["person_ap_50"] <= 1
  assert len(result.persons.action) == 5 + 4


def test_actor_threshold_keeps_all_where_nobody_passes() -> None:
  result = run(IN_ORDER, score="action", actor_threshold=0.7)
  nobody = result.detections.select(result.detections.timestamp == 0)
  np.testing.assert_allclose(nobody.extra, [0.95, 0.95], rtol=1e-6)
  assert len(result.detections.select(result.detections.timestamp == 2).action) == 2 * 2
  assert len(result.persons.action) == 5 + 4


def test_order_and_devices_change_nothing() -> None:
  expected = run(IN_ORDER)
  for actual in (run([[4, 3], [-1, -1], [1, 0], [2, -1]]), run([[4, 3, 2, 1, 0, -1, -1, -1]], devices=8)):
    for columns in zip(actual[2:], expected[2:], strict=True):
      for a, b in zip(*columns, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keys, message", [([[0, 1]], "2 of 5"), ([[0, 1], [1, 2]], "1 came twice")])
def test_incomplete(keys: list[list[int]], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    run(keys)


def test_stops() -> None:
  asked = iter([False, True])
  mesh = sharding.make_mesh({"data": -1}, jax.devices()[:1])
  stop = lambda: next(asked)  # noqa: E731
  assert evaluate(oracle, Set(), batches(IN_ORDER), LABEL_MAP, mesh=mesh, should_stop=stop) is None


def test_ground_truth_keeps_person_ids() -> None:
  rows = ground_truth_rows(Set().keyframes[2:3])
  assert rows.extra.tolist() == [0, 1, 1, 1]
  assert rows.video.tolist() == ["a"] * 4


SIZE = (60, 80)
LENGTH = 4


class TubeSet:
  """Two videos of 7 and 6 frames in clips of 4, which their ends fill up; nobody is in the last frames."""

  def __init__(self) -> None:
    self.clips = [(name, numbers) for name, count in (("b", 7), ("a", 6)) for numbers in cut(count, LENGTH)]
    walk, fall = (
      [np.column_stack([np.arange(1, 6), np.tile(box, (5, 1))])] for box in ([8, 6, 32, 48], [40, 12, 72, 54])
    )
    videos = {
      "a": Video(6, SIZE, [Tube(0, *walk), Tube(2, *fall)], 25.0),
      "b": Video(7, SIZE, [Tube(2, *fall)], 25.0),
      "unseen": Video(9, SIZE, [Tube(0, *walk)], 25.0),
    }
    self.truth = TubeGroundTruth(["walk", "sit", "fall"], videos, [(["unseen"], ["unseen", "a", "b"])])

  def __len__(self) -> int:
    return len(self.clips)


def tube_oracle(batch: Any) -> Detections:
  """Finds who is annotated, except in frames that fill clips up, where it is wrong."""
  dataset = TubeSet()
  rows = []
  for key in np.asarray(batch["key"]):
    name, numbers = dataset.clips[key]
    outside = (numbers < 1) | (numbers > dataset.truth.videos[name].num_frames)
    boxes = np.tile(
      np.array([tube.boxes[0, 1:] for tube in dataset.truth.videos["a"].tubes]) / (80, 60, 80, 60), (4, 1, 1)
    )
    boxes[outside] = boxes[outside, ::-1]
    action = np.tile([[0.9, 0.1, 0.1], [0.1, 0.1, 0.8]], (4, 1, 1)) * ((numbers > 0) & (numbers < 6))[:, None, None]
    action[outside] = 0.95
    rows.append((boxes, np.ones((4, 2)), action, np.array([name == "a", True]) & (key >= 0)))
  return Detections(*(np.stack(column).astype(column[0].dtype) for column in zip(*rows, strict=True)))


def _one_device() -> Any:
  return sharding.make_mesh({"data": -1}, jax.devices()[:1])


def run_tubes(keys: list[list[int]], predict: Any = tube_oracle, **kwargs: Any) -> TubeEvaluation:
  kwargs = {"protocol": "class_query", "rules": "jhmdb", "mesh": _one_device(), **kwargs}
  result = evaluate_tubes(predict, TubeSet(), batches(keys), **kwargs)
  assert result is not None
  return result


def test_tubes_of_every_frame_but_those_that_fill_up() -> None:
  result = run_tubes([[0, 1], [2, 3]])
  found = result.detections
  assert found.videos == ["b", "a"] == list(result.ground_truth.videos)
  assert found.frame[found.video == 0].tolist() == [1, 2, 3, 4, 5, 6, 7]  # one slot is empty
  assert found.frame[found.video == 1].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
  assert found.scores.max() == np.float32(0.9)
  np.testing.assert_allclose(found.boxes[found.video == 0], np.tile([40, 12, 72, 54], (7, 1, 1)), rtol=1e-6)
  assert result.metrics["frame_map_50"] == pytest.approx(1)
  assert result.metrics.keys() == {"frame_map_50", "video_map_20", "video_map_50", "video_map_75", "video_map_50_95"}
  assert result.metrics["video_map_50"] == pytest.approx(2 / 3, abs=1e-4)  # nobody sits
  again = run_tubes([[3], [1], [2], [-1], [0]])
  assert again.metrics == result.metrics
  for a, b in zip(again.detections[1:], found[1:], strict=True):
    np.testing.assert_array_equal(a, b)


def test_tubes_of_one_protocol_and_of_a_video_where_nothing_is_found() -> None:
  def nothing_in_b(batch: Any) -> Detections:
    found = tube_oracle(batch)
    return found._replace(valid=found.valid & (np.asarray(batch["key"]) >= 2)[:, None])

  for kwargs in ({}, {"protocol": "act", "rules": None}):
    result = run_tubes([[0, 1, 2, 3]], nothing_in_b, **kwargs)
    assert set(result.detections.video) == {1}
    assert result.video_map.frame_ap[0.5][0] == pytest.approx(1)
    assert 0.3 < result.video_map.frame_ap[0.5][2] < 0.6


def test_systems_and_sets_that_do_not_fit_each_other() -> None:
  with pytest.raises(
    ValueError, match=r"answers for keyframes, the data set is one of tubes: set config\.data\.tubes=False"
  ):
    run_tubes([[0, 1]], oracle)
  with pytest.raises(
    ValueError, match=r"answers for every frame, the data set is one of keyframes: set config\.data\.tubes"
  ):
    evaluate(tube_oracle, Set(), batches([[0, 1]]), LABEL_MAP, mesh=_one_device())
  with pytest.raises(ValueError, match="3 of 4 examples came"):
    run_tubes([[0, 1], [2, -1]])


# What each of two processes runs: its share of the batches, with fillers at their ends.
_PROCESS = """
import pickle, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
from tests import evaluate_test
result = evaluate_test.run_compiled([[[0, 1], [4, -1]], [[2, 3], [-1, -1]]][rank], [[[0, 1]], [[2, 3]]][rank])
with open(path, "wb") as file:
  pickle.dump(result, file)
"""


def run_compiled(keys: list[list[int]], clips: list[list[int]]) -> list[tuple[dict[str, float], list[Any]]]:
  """Scores detections that hash their key; all processes take part, with one device each.

  Returns:
    Metrics and columns of the detections, of keyframes and of tubes.
  """

  @functools.partial(jax.jit, static_argnums=1)
  def predict(batch: Any, frames: tuple[int, ...]) -> Detections:
    def hashed(*shape: int) -> jax.Array:  # fractions that no order of sums and no compiler rounds
      shape = (*frames, *shape)
      numbers = batch["key"][:, None] * 389 + np.arange(np.prod(shape)) * 577
      return (numbers % 1024).reshape(-1, *shape) / 1024

    near, anywhere = BOXES[:1] + hashed(1, 4) / 64, hashed(3, 2) / 2
    boxes = jax.numpy.concatenate([near, jax.numpy.concatenate([anywhere, anywhere + 0.375], axis=-1)], axis=-2)
    return Detections(boxes, hashed(4), hashed(4, 3), jax.numpy.ones((len(boxes), 4), bool))

  mesh = sharding.make_mesh({"data": -1}, jax.devices()[: jax.process_count()])
  keyframes = evaluate(lambda batch: predict(batch, ()), Set(), batches(keys), LABEL_MAP, mesh=mesh)
  tubes = run_tubes(clips, lambda batch: predict(batch, (LENGTH,)), mesh=mesh)
  assert keyframes is not None
  return [
    (keyframes.metrics, [column for rows in keyframes[2:] for column in rows]),
    (tubes.metrics, list(tubes.detections)),
  ]


def test_two_processes_score_as_one(tmp_path: Path) -> None:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _PROCESS, str(rank), str(port), str(tmp_path / f"{rank}.pkl")],
      cwd=Path(__file__).parents[1],
      stderr=subprocess.PIPE,
    )
    for rank in range(2)
  ]
  try:
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], errors
  one = run_compiled([[0], [1], [2], [3], [4]], [[0], [1], [2], [3]])
  assert all(0 < metrics["frame_map_50"] < 1 for metrics, _ in one)
  for rank in range(2):
    for found, expected in zip(pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()), one, strict=True):
      assert found[0] == expected[0]
      for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(a, b)
