"""Published weights into our models, strictly: every tensor is used or on an explicit list, or it is an error.

The name maps live with the models and backbones: pairs of a regular expression on our parameter path and the published
name. What is the same for all of them is here: how a leaf is called and laid out in PyTorch.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.models import evad

NameRules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


class Source(NamedTuple):
  """How one kind of published file names its tensors.

  Attributes:
    names: rules from our path (with PyTorch leaf names) to the published name; the first that matches wholly counts.
    skip: patterns of published names that no model needs.
  """

  names: NameRules
  skip: Sequence[str] = ()


SOURCES = {"evad": Source(evad.REFERENCE_NAMES, evad.REFERENCE_SKIP)}


class ConversionError(ValueError):
  """Weights that do not fit the model; the message names the tensors."""


class LoadReport(NamedTuple):
  """What became of every tensor: published names by kind of treatment."""

  loaded: list[str]
  transposed: list[str]
  skipped: list[str]

  def __str__(self) -> str:
    counts = {"loaded as they are": self.loaded, "transposed": self.transposed, "skipped": self.skipped}
    return ", ".join(f"{len(names)} {kind}" for kind, names in counts.items())


def load_reference(model: nnx.Module, state_dict: Mapping[str, np.ndarray], *, source: str) -> LoadReport:
  """Fills a model's parameters from published ones, in place.

  Args:
    model: a freshly built model.
    state_dict: published names to arrays in the published layout.
    source: one of ``SOURCES``.

  Raises:
    ConversionError: a tensor is missing, left over or of another shape; nothing was changed then.
  """
  rules = SOURCES[source]
  state = nnx.state(model, nnx.Param)
  flat = nnx.to_flat_state(state)
  report, problems, values = LoadReport([], [], []), [], []
  for path, variable in flat:
    name = published_name(path, rules.names)
    if name not in state_dict:
      problems.append(f"missing: {name} (for {'.'.join(map(str, path))} {variable.shape})")
      continue
    value, transposed = _to_our_layout(np.asarray(state_dict[name]), str(path[-1]))
    value = value.reshape(variable.shape) if value.size == variable.size and value.ndim > len(variable.shape) else value
    if value.shape != variable.shape:
      problems.append(
        f"shape: {name} {np.shape(state_dict[name])} does not fit {'.'.join(map(str, path))} {variable.shape}"
      )
      continue
    values.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    (report.transposed if transposed else report.loaded).append(name)
  used = {*report.loaded, *report.transposed}
  for name in state_dict:
    if any(re.fullmatch(pattern, name) for pattern in rules.skip):
      report.skipped.append(name)
    elif name not in used and not any(f": {name} " in problem for problem in problems):
      problems.append(f"unused: {name} {np.shape(state_dict[name])}")
  if problems:
    raise ConversionError(f"{len(problems)} tensors do not fit:\n  " + "\n  ".join(problems))
  nnx.update(model, nnx.from_flat_state(values))
  return report


def published_name(path: Sequence[Any], rules: NameRules) -> str:
  """Published name of the parameter at a path of ours.

  Raises:
    ConversionError: no rule covers it.
  """
  *parents, leaf = map(str, path)
  ours = ".".join([*parents, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])
  for pattern, name in rules:
    match = re.fullmatch(pattern, ours)
    if match:
      return name(match) if callable(name) else match.expand(name)
  raise ConversionError(f"no published name is known for {ours}")


def _to_our_layout(value: np.ndarray, leaf: str) -> tuple[np.ndarray, bool]:
  """PyTorch kernels ``[out, in, *window]`` become ``[*window, in, out]``."""
  if leaf != "kernel":
    return value, False
  return np.moveaxis(value, (0, 1), (-1, -2)), True
