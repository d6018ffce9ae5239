"""Checkpoints: strict restore, damage, inference weights, models by directory or name."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import stand_in
from vad_jax import checkpoint, models
from vad_jax.checkpoint import CheckpointError, Checkpoints

# What Orbax's event loop says after it met a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(models.MODELS, "stand_in", stand_in.StandIn)


def make_state(step: int, *, ema: bool = False, width: int = 8) -> dict[str, Any]:
  """Numbers that differ from step to step."""
  _, params, rest = checkpoint.split_model(stand_in.StandIn(width=width, rngs=nnx.Rngs(step)))
  state = {"step": jnp.int32(step), "params": params, "rest": rest, "opt": ({"mu": params}, jnp.int32(step))}
  return {**state, "ema": jax.tree.map(lambda x: x + 1, params)} if ema else state


INFO = {
  **stand_in.INFO,
  "model": {"name": "stand_in", "width": 8, "num_classes": 3},
  "metrics": {"frame_map_50": 0.5},
}


def abstract(state: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a: Any, b: Any) -> None:
  jax.tree.map_with_path(lambda path, x, y: np.testing.assert_array_equal(x, y, str(path)), a, b)


def save(directory: Path, steps: list[int], *, keep: int = 2, **kwargs: Any) -> None:
  with Checkpoints(directory, keep=keep) as checkpoints:
    for step in steps:
      checkpoints.save(make_state(step, **kwargs), {**INFO, "step": step})


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run with checkpoints of steps 1 and 2, to be copied."""
  directory = tmp_path_factory.mktemp("run")
  save(directory, [1, 2])
  return directory


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
  """A copy of that run, to be spoilt."""
  return shutil.copytree(two_steps, tmp_path / "run")


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip(tmp_path: Path, ema: bool) -> None:
  save(tmp_path, [1, 2, 3], ema=ema)
  assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["2", "3"]
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(abstract(make_state(0, ema=ema)))
  assert restored is not None
  state, info = restored
  assert_equal(state, make_state(3, ema=ema))
  assert info == {**INFO, "step": 3}


def test_nothing_saved(tmp_path: Path) -> None:
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(abstract(make_state(0))) is None
    assert checkpoints.best_info() is None


def rename(state: Any) -> None:
  state["params"]["embedding"] = state["params"].pop("embed")


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda state: state["params"].pop("hidden"),
      "params/hidden/bias is in the checkpoint and not in the model",
    ),
    (rename, "params/embedding/bias is missing in the checkpoint"),
    (
      lambda state: state.update(make_state(0, width=4)),
      r"params/embed/bias is \(8,\) in the checkpoint, \(4,\) in",
    ),
    (lambda state: state.update(ema=state["params"]), "ema is missing in the checkpoint"),
    (lambda state: state.update(opt=()), "opt/1 is in the checkpoint and not in the model"),
  ],
)
def test_strict(run: Path, change: Callable[[Any], Any], message: str) -> None:
  state = make_state(0)
  change(state)
  with Checkpoints(run) as checkpoints, pytest.raises(CheckpointError, match=message):
    checkpoints.restore(abstract(state))


def cut(path: Path) -> None:
  """Halves every file that holds arrays."""
  files = [file for file in path.glob("*/**/d/*") if file.is_file()]
  assert files
  for file in files:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(path: Path) -> None:
  """Changes one byte in the middle of every file that holds arrays."""
  for file in (file for file in path.glob("*/**/d/*") if file.is_file()):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


DAMAGES = {
  "flipped bytes": flip,
  "cut arrays": cut,
  "no optimizer": lambda path: shutil.rmtree(path / "training"),
  "no arrays": lambda path: shutil.rmtree(path / "weights" / "d"),
  "no metadata": lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
  "garbled metadata": lambda path: (path / "weights" / "_METADATA").write_text("{"),
  "empty": lambda path: [shutil.rmtree(part) if part.is_dir() else part.unlink() for part in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_last_checkpoint(run: Path, damage: Callable[[Path], Any], caplog: Any) -> None:
  damage(run / "last" / "2")
  with Checkpoints(run) as checkpoints:
    restored = checkpoints.restore(abstract(make_state(0)))
    assert restored is not None
    assert_equal(restored[0], make_state(1))
    assert "last/2 is damaged" in caplog.text
    checkpoints.save(make_state(2), {**INFO, "step": 2})
  with Checkpoints(run) as checkpoints:
    restored = checkpoints.restore(abstract(make_state(0)))
    assert restored is not None
    assert_equal(restored[0], make_state(2))


def test_all_damaged(run: Path) -> None:
  for step in ("1", "2"):
    cut(run / "last" / step)
  with Checkpoints(run) as checkpoints, pytest.raises(CheckpointError, match="no checkpoint is whole"):
    checkpoints.restore(abstract(make_state(0)))


def test_interrupted_save_is_ignored(run: Path) -> None:
  (run / "last" / "2").rename(run / "last" / "2.orbax-checkpoint-tmp")
  with Checkpoints(run) as checkpoints:
    restored = checkpoints.restore(abstract(make_state(0)))
  assert restored is not None
  assert int(restored[0]["step"]) == 1


def test_load_model_of_a_run(tmp_path: Path) -> None:
  save(tmp_path / "checkpoints", [1, 5], ema=True)
  loaded = checkpoint.load_model(tmp_path)
  assert loaded.info == {**INFO, "step": 5}
  assert loaded.model.dropout.deterministic
  assert_equal(checkpoint.split_model(loaded.model)[1], make_state(5, ema=True)["ema"])
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    for step in (2, 3):
      checkpoints.save_best(make_state(step), {**INFO, "step": step})
    best = checkpoints.best_info()
  assert best is not None
  assert best["step"] == 3
  for path in (tmp_path, tmp_path / "checkpoints" / "best" / "3", tmp_path / "checkpoints" / "best"):
    loaded = checkpoint.load_model(path)
    assert_equal(checkpoint.split_model(loaded.model)[1], make_state(3)["params"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_storage(tmp_path: Path, dtype: Any) -> None:
  state = make_state(1)
  checkpoint.save_inference(tmp_path / "small", state["params"], state["rest"], INFO, dtype)
  params = checkpoint.split_model(checkpoint.load_model(tmp_path / "small").model)[1]
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  assert_equal(params, jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), state["params"]))


def test_load_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "pretrained")
  state = make_state(1)
  checkpoint.save_inference(tmp_path / "pretrained" / "small", state["params"], state["rest"], INFO)
  monkeypatch.chdir(tmp_path)
  assert checkpoint.load_model("small").info["label_map"] == stand_in.LABEL_MAP
  with pytest.raises(CheckpointError, match="big: no such checkpoint; names that ship with the library: small"):
    checkpoint.load_model("big")


def test_load_model_errors(tmp_path: Path) -> None:
  with pytest.raises(CheckpointError, match="holds no checkpoint"):
    checkpoint.load_model(tmp_path)
  state = make_state(1)
  directory = tmp_path / "one"
  checkpoint.save_inference(directory, state["params"], state["rest"], {**INFO, "model": {**INFO["model"], "width": 4}})
  with pytest.raises(CheckpointError, match=r"params/embed/bias is \(8,\) in the checkpoint"):
    checkpoint.load_model(directory)
  cut(directory)
  with pytest.raises(CheckpointError, match="one is damaged"):
    checkpoint.load_model(directory)


def test_loads_without_tensorflow() -> None:
  code = "import sys, vad_jax.checkpoint; assert not {'tensorflow', 'grain', 'clu'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests import checkpoint_test
from vad_jax.checkpoint import CheckpointError
directory = Path(sys.argv[1])
checkpoint_test.save(directory, [1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # bytes; what a full disk looks like
try:
  checkpoint_test.save(directory, [2], keep=1)
except CheckpointError as error:
  print(error)
"""


def test_full_disk(tmp_path: Path) -> None:
  command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
  root = Path(__file__).parents[1]
  result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
  assert "no checkpoint could be written" in result.stdout, result.stderr
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(abstract(make_state(0)))
  assert restored is not None
  assert_equal(restored[0], make_state(1))
