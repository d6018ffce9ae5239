"""Evaluation: rows from detections, fillers, order, thresholds."""

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
from vad_jax.evaluate import Evaluation, evaluate, ground_truth_rows

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


# What each of two processes runs: its share of the batches, with fillers at their ends.
_PROCESS = """
import pickle, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
from tests import evaluate_test
result = evaluate_test.run_compiled([[[0, 1], [4, -1]], [[2, 3], [-1, -1]]][rank])
with open(path, "wb") as file:
  pickle.dump([result.metrics, *map(tuple, result[2:])], file)
"""


def run_compiled(keys: list[list[int]]) -> Evaluation:
  """Scores detections that hash their keyframe's key; all processes take part, with one device each."""

  @jax.jit
  def predict(batch: Any) -> Detections:
    def hashed(*shape: int) -> jax.Array:  # fractions that no order of sums and no compiler rounds
      numbers = batch["key"][:, None] * 389 + np.arange(np.prod(shape)) * 577
      return (numbers % 1024).reshape(-1, *shape) / 1024

    near, anywhere = BOXES[None, :1] + hashed(1, 4) / 64, hashed(3, 2) / 2
    boxes = jax.numpy.concatenate([near, jax.numpy.concatenate([anywhere, anywhere + 0.375], axis=2)], axis=1)
    return Detections(boxes, hashed(4), hashed(4, 3), jax.numpy.ones((len(boxes), 4), bool))

  mesh = sharding.make_mesh({"data": -1}, jax.devices()[: jax.process_count()])
  result = evaluate(predict, Set(), batches(keys), LABEL_MAP, mesh=mesh)
  assert result is not None
  return result


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
  one = run_compiled([[0], [1], [2], [3], [4]])
  assert 0 < one.metrics["frame_map_50"] < 1
  for rank in range(2):
    metrics, *tables = pickle.loads((tmp_path / f"{rank}.pkl").read_bytes())
    assert metrics == one.metrics
    for actual, expected in zip(tables, one[2:], strict=True):
      for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)
