"""Real processes that train as one: same losses and data, checkpoints for any number of them, stops, losses of one."""

import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import train_test
from tests.two_processes import ROOT, start
from vad_jax import processes

# What a process of `train_as` runs; behind it come its arguments and the flags of `two_processes.start`.
CHILD = "from tests import two_processes_test; two_processes_test.child()"


def child() -> None:
  """Trains the stand-in with the other processes and notes what this one saw."""
  directory, num_steps, *flags = sys.argv[1:]
  coordinator, count, index = (flag.partition("=")[2] for flag in flags)
  processes.join(coordinator, int(count), int(index))
  spy = train_test.Spy()
  result, scalars = train_test.run(
    Path(directory) / "run", int(num_steps), batches=spy, devices=int(count), matcher="scipy"
  )
  state = jax.tree.map(np.asarray, result.state)
  (Path(directory) / f"{index}.pkl").write_bytes(pickle.dumps((result.steps, state, scalars, spy.keys)))


def train_as(count: int, directory: Path, num_steps: int) -> list[tuple[int, Any, Any, Any]]:
  """Trains with so many processes up to this step; steps made, final state, scalars and keys of each."""
  started = start(count, [sys.executable, "-c", CHILD, str(directory), str(num_steps)])
  outputs = finish(started)
  assert [process.returncode for process in started] == [0] * count, outputs
  return [pickle.loads((directory / f"{index}.pkl").read_bytes()) for index in range(count)]


def finish(started: list[subprocess.Popen[str]], seconds: float = 300) -> list[str]:
  """Waits for processes; what they printed, or the rest of it."""
  try:
    return [process.communicate(timeout=seconds)[0] for process in started]
  finally:
    for process in started:
      process.kill()


def wait_for(line: str, process: subprocess.Popen[str]) -> None:
  assert process.stdout
  seen = []
  for printed in process.stdout:
    seen.append(printed)
    if line in printed:
      return
  pytest.fail(f"{line!r} was not printed: {''.join(seen)}")


def assert_close(a: Any, b: Any) -> None:
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_two_processes_train_as_one_and_any_number_goes_on(tmp_path: Path) -> None:
  spy = train_test.Spy()
  one, expected = train_test.run(tmp_path / "one", 6, batches=spy, devices=2, matcher="scipy")
  first, second = train_as(2, tmp_path, 4)
  jax.tree.map(np.testing.assert_array_equal, first[1], second[1])
  for step, keys in enumerate(zip(first[3], second[3], strict=True)):
    assert [*keys[0], *keys[1]] == spy.keys[step]  # shares of the batch that one process takes
  for step in (1, 2, 4):
    for name in ("loss", "loss_box", "grad_norm"):
      losses = [scalars[step][f"train/{name}"] for _, _, scalars, _ in (first, second)]
      assert losses[0] == losses[1] == pytest.approx(expected[step][f"train/{name}"], rel=1e-5)

  def size(run: str) -> int:
    return sum(file.stat().st_size for file in (tmp_path / run / "last").glob("4/**/d/*"))

  assert [path.name for path in sorted((tmp_path / "run" / "last").iterdir())] == ["2", "4"]
  assert size("run") < 1.2 * size("one")  # each array was written by one of them
  four = train_as(4, tmp_path, 5)
  assert [steps for steps, *_ in four] == [1] * 4
  assert [key for *_, (keys,) in four for key in keys] == spy.keys[4]
  result, _ = train_test.run(tmp_path / "run", 6, matcher="scipy")
  assert result.steps == 1
  assert_close(result.state, one.state)


def test_a_preemption_of_one_saves_all_and_a_death_of_one_stops_all(tmp_path: Path) -> None:
  """Through the command line; evaluation comes every third step, so that stops fall into it as well."""
  command = [sys.executable, "-m", "vad_jax.main", f"--config={ROOT}/tests/stand_in_config.py", f"--workdir={tmp_path}"]
  command += [f"--config.data.root={tmp_path}", "--config.num_steps=100000", "--config.eval.every_epochs=0.5"]
  both = start(2, command)
  wait_for("compiled in", both[1])
  time.sleep(1)
  both[1].send_signal(signal.SIGTERM)
  outputs = finish(both)
  assert [process.returncode for process in both] == [0, 0], outputs
  assert all("preempted: all is saved" in output for output in outputs)
  assert len(list((tmp_path / "logs").glob("events*"))) == 1

  both = start(2, command)
  for process in both:
    wait_for("compiled in", process)
  begun = time.monotonic()
  both[1].kill()
  output, _ = finish(both)
  assert time.monotonic() - begun < 30
  assert both[0].returncode == 1
  assert re.search(r"^error: another process stopped or cannot be reached; its own output says why", output, re.M)
  assert "Traceback" not in output


LATE = "from vad_jax import processes; processes.JOIN_SECONDS = 2; processes.join('localhost:{}', 2, {})"


def test_a_process_that_never_joins() -> None:
  """The first of two waits for the second, and the second of others for the first."""
  waiting = [
    subprocess.Popen([sys.executable, "-c", LATE.format(port, index)], stderr=subprocess.PIPE, text=True)
    for index, port in enumerate((29876, 29877))
  ]
  for process in waiting:
    error = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGABRT
    assert error.splitlines()[-1].startswith("error: ended by JAX, since another process stopped, ")


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("localhost:1", 2, None), "go together"),
    (("localhost", 2, 0), "--coordinator=localhost: expected host:port"),
  ],
)
def test_arguments_that_do_not_fit(arguments: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    processes.join(*arguments)
