"""The training loop on a stand-in system: resume, meshes, stops."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests import stand_in
from vad_jax import optim, sharding, train
from vad_jax.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("compile_once")

SCHEDULE = optax.schedules.linear_schedule(1e-2, 1e-3, 12)


@pytest.fixture(scope="module")
def straight(compile_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
  """Six steps without a break: result, scalars and keys of the batches."""
  spy = Spy()
  result, scalars = run(tmp_path_factory.mktemp("straight"), 6, batches=spy)
  return result, scalars, spy.keys


def run(workdir: Path, num_steps: int, *, batches: Any = None, devices: int = 1, mesh: Any = None, **kwargs: Any):
  """Trains the stand-in; returns the result, what was written, and the checkpoints' directory."""
  writer = stand_in.Writer()
  with Checkpoints(workdir) as checkpoints:
    result = train.train(
      stand_in.make_model,
      batches or stand_in.batches,
      num_steps=num_steps,
      make_optimizer=partial(optim.make_optimizer, learning_rate=SCHEDULE, weight_decay=0.01, groups=(("parts", 2.0),)),
      learning_rate=SCHEDULE,
      mesh=sharding.make_mesh(mesh or {"data": -1}, jax.devices()[:devices]),
      checkpoints=checkpoints,
      info=stand_in.INFO,
      writer=writer,
      **{"log_every": 2, "save_every": 2, **kwargs},
    )
  return result, writer.scalars


def assert_equal(a: Any, b: Any) -> None:
  jax.tree.map_with_path(lambda path, x, y: np.testing.assert_array_equal(x, y, str(path)), a, b)


class Spy:
  """Notes the keys of the batches that pass, and acts before one of them."""

  def __init__(self, at: int = -1, act: Any = None):
    self.keys: list[list[int]] = []
    self._at, self._act = at, act

  def __call__(self, start: int) -> Iterator[Any]:
    for batch in stand_in.batches(start):
      if len(self.keys) == self._at:
        batch = self._act(batch) or batch
      self.keys.append(batch["key"].tolist())
      yield batch


def test_resume_is_exact(straight: Any, tmp_path: Path) -> None:
  expected, scalars, keys = straight
  run(tmp_path, 3)
  resumed = Spy()
  actual, rest = run(tmp_path, 6, batches=resumed)
  assert actual.steps == 3
  assert_equal(expected.state, actual.state)
  assert keys[3:] == resumed.keys
  assert rest[6]["train/loss"] == scalars[6]["train/loss"]


def test_average_of_parameters(tmp_path: Path) -> None:
  run(tmp_path / "averaged", 2, ema_decay=0.5)
  result, _ = run(tmp_path / "averaged", 3, ema_decay=0.5)
  states = [run(tmp_path / "plain", step)[0].state for step in (1, 2, 3)]
  assert_equal(result.state["params"], states[-1]["params"])
  average = 0.0  # where this bias starts
  for state in states:
    average = 0.5 * average + 0.5 * state["params"]["embed"]["bias"]
  np.testing.assert_allclose(result.state["ema"]["embed"]["bias"], average, rtol=1e-5)


KILLED = """
import os, sys, threading, time
from pathlib import Path
from tests import conftest, train_test
workdir, moment = Path(sys.argv[1]), sys.argv[2]
def die(_=None):
  os.kill(os.getpid(), 9)
def watch():
  whole = lambda: [path for path in (workdir / "last").glob("*") if path.name.isdigit()]
  before = len(whole())
  while not (list((workdir / "last").glob("*tmp*")) and len(whole()) >= before + (before == 0)):
    time.sleep(0.001)
  die()
if moment == "save":
  threading.Thread(target=watch, daemon=True).start()
train_test.run(workdir, 6, batches=train_test.Spy(at=3 if moment == "step" else -1, act=die), save_every=1)
"""


def test_resume_after_sigkills(straight: Any, tmp_path: Path) -> None:
  """In the middle of two saves, the first one with a whole checkpoint before it, then between steps."""
  cache = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
  for moment in ("save", "save", "step"):
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], env=cache, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
  spy = Spy()
  actual, _ = run(tmp_path, 6, batches=spy)
  assert 0 < actual.steps < 6
  assert_equal(straight[0].state, actual.state)
  assert straight[2][-actual.steps :] == spy.keys


@pytest.mark.parametrize(
  "mesh, strategy", [({"data": 8}, "replicate"), ({"fsdp": 8}, "fsdp"), ({"data": 4, "fsdp": 2}, "fsdp")]
)
@pytest.mark.parametrize("matcher", ["device", "scipy"])
def test_eight_devices_equal_one(straight: Any, tmp_path: Path, mesh: Any, strategy: str, matcher: Any) -> None:
  one, scalars_one, _ = straight
  many, scalars = run(tmp_path, 6, matcher=matcher, devices=8, mesh=mesh, sharding=strategy)
  kernel = many.state["params"]["hidden"]["kernel"]
  assert len(kernel.sharding.device_set) == 8
  assert kernel.is_fully_replicated == (strategy == "replicate")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.state, many.state)
  for step, values in scalars_one.items():
    for name in ("train/loss", "train/loss_box", "train/grad_norm"):
      assert scalars[step][name] == pytest.approx(values[name], rel=1e-5)


def test_learns_and_writes(tmp_path: Path) -> None:
  result, scalars = run(tmp_path, 12)
  assert (result.state["rest"]["seen"] > 0).all()  # arrays that are no parameters are kept up to date too
  assert scalars[12]["train/loss"] < 0.8 * scalars[1]["train/loss"]
  assert scalars[1]["train/learning_rate"] == pytest.approx(1e-2)
  assert set(scalars[12]) == {
    f"train/{name}"
    for name in (
      *("loss", "loss_box", "loss_action", "loss_actor"),
      *("grad_norm", "learning_rate", "steps_per_second", "data_wait_share"),
    )
  }


def test_nan_stops_and_names_keys(tmp_path: Path) -> None:
  spy = Spy(at=2, act=poisoned)
  with pytest.raises(train.NonFiniteError, match=r"step 3: .*loss_box") as error:
    run(tmp_path, 8, batches=spy, log_every=4, save_every=4)
  assert str(spy.keys[2]) in str(error.value)
  assert not list((tmp_path / "last").iterdir())


def poisoned(batch: Any) -> Any:
  return {**batch, "boxes": batch["boxes"] * np.nan}


def test_nan_is_skipped_and_counted(tmp_path: Path, capfd: Any) -> None:
  spy = Spy(at=1, act=poisoned)
  result, scalars = run(tmp_path / "skipped", 2, batches=spy, nonfinite="skip", ema_decay=0.5)
  before, _ = run(tmp_path / "before", 1, ema_decay=0.5)
  assert int(result.state.pop("step")) == int(before.state.pop("step")) + 1
  assert_equal(result.state, before.state)
  assert (scalars[1]["train/skipped"], scalars[2]["train/skipped"]) == (0, 1)
  assert "train/loss" not in scalars[2]
  assert re.search(rf"step 2: .*loss_box.* keys {re.escape(str(spy.keys[1]))}: skipped\n", capfd.readouterr().err)


def test_nothing_but_nan_stops(tmp_path: Path) -> None:
  def endless(start: int) -> Iterator[Any]:
    return map(poisoned, stand_in.batches(start))

  with pytest.raises(train.NonFiniteError, match=r"step 10: .*, and so were 9 steps before"):
    run(tmp_path, 50, batches=endless, nonfinite="skip")


def test_one_compilation_for_each_shape(tmp_path: Path, capfd: Any) -> None:
  compilations = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compilations.append(name) if name.endswith("backend_compile_duration") else None
  )
  counts = []

  def two_shapes(start: int) -> Iterator[Any]:
    for index, batch in enumerate(stand_in.batches(start), start):
      counts.append(len(compilations))
      yield {**batch, "video": batch["video"][:, :, : (8 if index % 2 else 4)]}

  result, scalars = run(tmp_path, 6, batches=two_shapes, save_every=100, peak_steps_per_second=100.0)
  assert capfd.readouterr().err.count("compiled in") == 2
  assert counts[0] < counts[2] == counts[-1]
  assert result.compile_seconds > 0
  assert scalars[6]["train/mfu"] == scalars[6]["train/steps_per_second"] / 100


def test_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(train, "_TRACED", (1, 3))
  run(tmp_path, 4, profile=str(tmp_path / "logs"))
  assert len(list((tmp_path / "logs").glob("plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize("number, reason", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "preempted")])
def test_signal_saves_and_stops(straight: Any, tmp_path: Path, number: int, reason: str, capfd: Any) -> None:
  before = signal.getsignal(number)
  spy = Spy(at=2, act=lambda batch: os.kill(os.getpid(), number))
  stopped, _ = run(tmp_path, 6, batches=spy, save_every=100)
  assert (stopped.stopped, stopped.steps) == (reason, 3)
  assert signal.getsignal(number) is before
  assert "saving" in capfd.readouterr().err
  actual, _ = run(tmp_path, 6)
  assert actual.steps == 3
  assert_equal(straight[0].state, actual.state)


def test_second_interrupt_aborts(tmp_path: Path) -> None:
  def twice(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, 6, batches=Spy(at=2, act=twice))


def test_evaluates_and_keeps_the_best(tmp_path: Path) -> None:
  scores = iter([0.1, 0.5, 0.3])

  def evaluate(step: int, predict: Any, stop: Any) -> dict[str, float]:
    assert predict(next(stand_in.batches())).boxes.shape == (8, 4, 4)
    assert not stop()
    return {"frame_map_50": next(scores)}

  _, scalars = run(tmp_path, 5, evaluate_every=2, evaluate=evaluate)
  assert {step: values["eval/frame_map_50"] for step, values in scalars.items() if "eval/frame_map_50" in values} == {
    2: 0.1,
    4: 0.5,
    5: 0.3,
  }
  assert [path.name for path in (tmp_path / "best").iterdir()] == ["4"]
  assert Checkpoints(tmp_path).best_info()["metrics"] == {"step": 4, "frame_map_50": 0.5}


def test_stop_while_evaluating_repeats_the_evaluation(tmp_path: Path) -> None:
  def interrupted(step: int, _: Any, stop: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop()

  result, _ = run(tmp_path, 4, evaluate_every=2, evaluate=interrupted)
  assert (result.stopped, result.steps) == ("preempted", 2)
  seen = []
  result, scalars = run(tmp_path, 4, evaluate_every=2, evaluate=lambda *_: seen.append(1) or {"frame_map_50": 0.2})
  assert (result.steps, len(seen)) == (2, 2)
  assert "eval/frame_map_50" in scalars[2]


@pytest.mark.parametrize("shape", [{"data": 1}, {"data": 2, "fsdp": 2}], ids=str)
def test_gradients_are_means_over_microbatches(shape):
  """Also where each device holds several: no row is lost, doubled or moved to another one's part."""
  rows = np.arange(1.0, 9.0, dtype=np.float32)

  def loss_fn(params, rest, batch, key):
    del key
    part = (params * batch["key"]) ** 2
    return part.sum() / batch["key"].max(), ({"rows": batch["key"].sum()}, rest + batch["key"].sum())

  size = int(np.prod(list(shape.values())))
  mesh = sharding.make_mesh(shape, jax.devices()[:size])
  with jax.set_mesh(mesh):
    batch = sharding.to_global({"key": rows}, mesh)
    step = jax.jit(partial(train._mean_gradients, loss_fn, microbatch=1))
    (loss, (terms, rest)), gradient = step(np.float32(2.0), np.float32(0.0), batch, jax.random.key(0))
  parts = [rows.reshape(size, -1)[:, i] for i in range(8 // size)]
  expected = np.mean([4 * (part**2).sum() / part.max() for part in parts])
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)  # d(p^2)/dp = p^2 at 2
  assert rest == rows.sum() and terms["rows"] == rows.sum() / len(parts)


def test_microbatch_has_to_divide_the_batch():
  with pytest.raises(ValueError, match=r"6 examples .* parts of 4"):
    train._mean_gradients(lambda *_: 0.0, 0.0, 0.0, {"key": np.zeros(6)}, jax.random.key(0), 4)
