"""Checkpoints: the only module that calls Orbax.

A run keeps two kinds below its ``checkpoints`` directory. ``last/<step>`` holds all that an exact resume
needs: step, weights, optimizer. ``best/<step>`` holds the weights to use (averaged ones where
the run averages) of the evaluation with the best score. Both carry ``info``, a dictionary that says how to
build the model and feed it, so that ``load_model`` needs nothing else. A checkpoint appears under its name
only when it is complete.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from vad_jax import models
from vad_jax.optim import path_of
from vad_jax.rngs import make_rngs

PathLike = str | os.PathLike[str]
State = dict[str, Any]
Info = dict[str, Any]

PRETRAINED = Path(__file__).parent / "pretrained"
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
  """A checkpoint that is missing, damaged or made for something else; the message says which."""


class _DamagedError(CheckpointError):
  """A checkpoint that cannot be read."""


class Loaded(NamedTuple):
  """A model with its weights, ready for inference, and what was stored beside them.

  Attributes:
    model: a system, see ``vad_jax.models.System``.
    info: ``model`` (name and constructor arguments), ``clip``, ``canvas``, ``short_side``, ``label_map``,
      ``step``, ``metrics``; converted weights have ``source``, ``licence`` and ``sha256`` of the file as well.
  """

  model: Any
  info: Info


def split_model(model: nnx.Module) -> tuple[Any, Any, Any]:
  """Takes a model apart: structure, and as plain nested dicts its parameters and its other arrays."""
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


class Checkpoints:
  """The checkpoints of one run.

  Args:
    directory: is made where it is missing.
    keep: how many of the last ones stay.
  """

  def __init__(self, directory: PathLike, *, keep: int = 2):
    self._directory = Path(directory).absolute()
    self._last = ocp.training.Checkpointer(
      str(self._directory / "last"),
      preservation_policy=cast(Any, ocp.training.preservation_policies.LatestN(keep)),
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
    if kind and jax.process_count() > 1:
      return  # the end of a save would be waited for together with a process that may be gone
    with self._saving():
      self._last.close()

  def save(self, state: State, info: Info) -> None:
    """Saves all that a resume needs, in the background; waits for the save before.

    Args:
      state: what ``train`` works on; may be donated as soon as this returns.
      info: see ``Loaded``.

    Raises:
      CheckpointError: this save or the one before could not be written.
    """
    self.wait()
    with self._saving():
      self._last.save_checkpointables_async(
        int(state["step"]), _items(state), force=True, overwrite=True, custom_metadata=_to_json(info)
      )

  def save_best(self, state: State, info: Info) -> None:
    """Saves the weights to use, averaged ones where there are, and drops the best one before."""
    directory = self._directory / "best" / str(int(state["step"]))
    with self._saving():
      save_inference(directory, state.get("ema", state["params"]), state["rest"], info)
    if jax.process_index() == 0:
      for other in directory.parent.iterdir():
        if other.name != directory.name:
          shutil.rmtree(other)

  def best_info(self) -> Info | None:
    """The ``info`` of the best checkpoint, if there is one."""
    best = _steps(self._directory / "best")
    return _read_info(best[-1]) if best else None

  def restore(self, abstract_state: State) -> tuple[State, Info] | None:
    """Restores the last checkpoint that is whole, onto as many devices and processes as there are now.

    Args:
      abstract_state: ``jax.ShapeDtypeStruct`` with shardings, of the structure of the saved state.

    Returns:
      State and info, or None where nothing was saved yet.

    Raises:
      CheckpointError: the checkpoint belongs to another model or optimizer, or none is whole.
    """
    steps = _steps(self._directory / "last")
    for path in reversed(steps):
      loaded: dict[str, Any] = {}
      info: Info = {}
      try:
        info = _read_info(path)
        loaded = _load(path, _items(abstract_state))
      except _DamagedError as error:
        logger.warning("%s: trying the one before", error)
      # A process reads only its share: what is damaged for one is not used by any.
      if multihost_utils.process_allgather(np.bool_(loaded)).all():
        return {**loaded["training"], **loaded["weights"], **loaded.get("ema", {})}, info
    if steps:
      raise CheckpointError(f"{steps[0].parent}: no checkpoint is whole; remove the directory to train from the start")
    return None

  def wait(self) -> None:
    """Returns when the last save is on disk.

    Raises:
      CheckpointError: it could not be written.
    """
    with self._saving():
      self._last.wait()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # whatever storage throws, such as a full disk
      raise CheckpointError(
        f"no checkpoint could be written to {self._directory} ({_first_line(error)}); those before it are kept"
      ) from error


def save_inference(directory: PathLike, params: Any, rest: Any, info: Info, dtype: Any = None) -> None:
  """Saves weights without training state; overwrites.

  Args:
    directory: the checkpoint.
    params: parameters as nested dicts.
    rest: other arrays of the model.
    info: see ``Loaded``.
    dtype: floating-point type to store parameters in; loading gives back the type of the model.
  """
  if dtype is not None:
    params = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
  items = {"weights": {"params": params, "rest": rest}}
  ocp.save_checkpointables(str(Path(directory).absolute()), items, overwrite=True, custom_metadata=_to_json(info))


def load_model(directory_or_name: PathLike) -> Loaded:
  """Builds the model of a checkpoint and loads its weights.

  Args:
    directory_or_name: a run's working directory (its best checkpoint, else its last), one checkpoint, or the
      name of weights that ship with the library, such as ``quickstart``.

  Raises:
    CheckpointError: there is no checkpoint, it is damaged, or it does not fit the model.
  """
  path = _find(directory_or_name)
  info = _read_info(path)
  if info["model"]["name"] not in models.MODELS:
    raise CheckpointError(
      f"checkpoint {path} holds {info['model']['name']}, which is no detector; a backbone is something to start "
      "training from (config.init_from)"
    )
  abstract = nnx.eval_shape(lambda: models.build(**info["model"], rngs=make_rngs(0)))
  graphdef, params, rest = split_model(abstract)
  items = {"weights": _place({"params": params, "rest": rest})}
  if (path / "ema").exists():
    items["ema"] = _place({"ema": params})
  loaded = _load(path, items)
  params = loaded["ema"]["ema"] if "ema" in loaded else loaded["weights"]["params"]
  model = nnx.merge(graphdef, params, loaded["weights"]["rest"])
  return Loaded(nnx.view(model, raise_if_not_found=False, deterministic=True), info)


def is_checkpoint(directory_or_name: PathLike) -> bool:
  """Says whether ``load_model`` or ``load_arrays`` would find a checkpoint there."""
  try:
    return bool(_find(directory_or_name))
  except CheckpointError:
    return False


def load_arrays(directory_or_name: PathLike) -> tuple[dict[str, np.ndarray], Info]:
  """Loads the weights to use without building their model.

  Args:
    directory_or_name: see ``load_model``; may hold a backbone alone.

  Returns:
    Parameters and running statistics by their path, joined by dots, and the info.

  Raises:
    CheckpointError: there is no checkpoint, or it is damaged.
  """
  path = _find(directory_or_name)
  info = _read_info(path)
  parts = ("weights", "ema") if (path / "ema").exists() else ("weights",)
  tree: Any = _load(path, {part: _place(_saved(path, part)) for part in parts})
  params = tree["ema"]["ema"] if "ema" in tree else tree["weights"]["params"]
  arrays = {**_flatten(params), **_flatten(tree["weights"]["rest"])}
  return {key.replace("/", "."): np.asarray(value) for key, value in arrays.items()}, info


def _items(state: State) -> dict[str, Any]:
  """Splits a state into what inference needs and what only training does."""
  items = {
    "weights": {"params": state["params"], "rest": state["rest"]},
    "training": {"step": state["step"], "opt": state["opt"]},
  }
  if "ema" in state:
    items["ema"] = {"ema": state["ema"]}
  return items


def _load(path: Path, items: dict[str, Any]) -> dict[str, Any]:
  """Loads the named parts after checking that exactly the same arrays were saved.

  Raises:
    CheckpointError: keys are missing or not expected, or shapes differ; or the checkpoint is damaged.
  """
  faults = []
  for name, abstract in items.items():
    if name == "ema" and not (path / name).exists():
      faults.append("ema is missing in the checkpoint")
      continue
    faults += _differences(_flatten(_saved(path, name)), _flatten(abstract))
  if faults:
    more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
    raise CheckpointError(f"checkpoint {path} does not fit: {'; '.join(faults[:20])}{more}")
  try:
    return ocp.load_checkpointables(str(path), items)
  except Exception as error:  # whatever Orbax and its storage throw at a damaged file
    raise _damaged(path, error) from error


def _place(abstract: Any) -> Any:
  """The same abstract arrays, to be loaded onto one device."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)


def _saved(path: Path, name: str) -> Any:
  """Shapes and types of the arrays of one part, as the tree that was saved."""
  try:
    saved = ocp.metadata(str(path), checkpointable_name=name).metadata
  except Exception as error:
    raise _damaged(path, error) from error
  if saved is None:
    raise _damaged(path, f"{name} cannot be read")
  return saved


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
  return [
    *(f"{key} is missing in the checkpoint" for key in wanted if key not in saved),
    *(f"{key} is in the checkpoint and not in the model" for key in saved if key not in wanted),
    *(
      f"{key} is {saved[key].shape} in the checkpoint, {wanted[key].shape} in the model"
      for key in wanted
      if key in saved and saved[key].shape != wanted[key].shape
    ),
  ]


def _flatten(tree: Any) -> dict[str, Any]:
  return {path_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _steps(directory: Path) -> list[Path]:
  """Complete checkpoints of a directory, oldest first."""
  if not directory.is_dir():
    return []
  return sorted((path for path in directory.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def _find(directory_or_name: PathLike) -> Path:
  path = Path(directory_or_name).absolute()
  if not path.exists() and len(Path(directory_or_name).parts) == 1 and (PRETRAINED / directory_or_name).exists():
    return PRETRAINED / directory_or_name
  if not path.exists():
    shipped = sorted(entry.name for entry in PRETRAINED.iterdir() if entry.is_dir()) if PRETRAINED.exists() else []
    names = f"; names that ship with the library: {', '.join(shipped)}" if shipped else ""
    raise CheckpointError(f"{path}: no such checkpoint{names}")
  if (path / "weights").exists():
    return path
  for kind in ("checkpoints/best", "checkpoints/last", "best", "last", "."):
    if steps := _steps(path / kind):
      return steps[-1]
  raise CheckpointError(f"{path}: holds no checkpoint; give a run's working directory or one of its checkpoints")


def _to_json(info: Info) -> Info:
  return {**info, "label_map": {str(index): name for index, name in info["label_map"].items()}}


def _read_info(path: Path) -> Info:
  try:
    info: Any = ocp.metadata(str(path), checkpointable_name="weights").custom_metadata
    model = {key: tuple(value) if isinstance(value, list) else value for key, value in info["model"].items()}
    label_map = {int(index): name for index, name in info["label_map"].items()}
    return {**info, "model": model, "label_map": label_map}  # as they were before JSON
  except Exception as error:
    raise _damaged(path, error) from error


def _damaged(path: Path, reason: Exception | str) -> _DamagedError:
  return _DamagedError(f"checkpoint {path} is damaged ({_first_line(reason)})")


def _first_line(reason: Exception | str) -> str:
  text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
  return text.splitlines()[0][:200]
