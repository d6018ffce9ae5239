"""Learning-rate schedules and the optimizers: AdamW and SGD, with groups chosen by the names of the parameters."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vad_jax.batch import Array

Groups = Sequence[tuple[str, float]]


def step_epochs(
  learning_rate: float,
  *,
  steps_per_epoch: int,
  boundaries: Sequence[float] = (5, 8),
  factor: float = 0.1,
  warmup_epochs: float = 2,
  warmup_learning_rate: float = 0.0,
) -> optax.Schedule:
  """Linear warm-up, then steps: the rate is multiplied by ``factor`` at each boundary, given in epochs."""
  warmup_steps = warmup_epochs * steps_per_epoch

  def schedule(step: Array) -> Array:
    passed = sum((step >= epoch * steps_per_epoch) * jnp.ones(()) for epoch in boundaries)
    rate = learning_rate * factor**passed
    if not warmup_steps:
      return rate
    ramp = warmup_learning_rate + (learning_rate - warmup_learning_rate) * (step / warmup_steps)
    return jnp.where(step < warmup_steps, ramp, rate)

  return schedule


def cosine(
  learning_rate: float,
  *,
  num_steps: int,
  warmup: float = 0.05,
  start: float = 0.0,
  final: float = 0.0,
  decay_steps: int | None = None,
) -> optax.Schedule:
  """Linear warm-up, then half a cosine.

  Args:
    learning_rate: the peak.
    num_steps: length of the training.
    warmup: fraction of the steps that warm up.
    start: fraction of the peak that the warm-up begins with.
    final: fraction of the peak that is left at the end.
    decay_steps: where the cosine would end, and what ``warmup`` is a fraction of, if training stops before that; None
      ends it with the training.
  """
  decay_steps = decay_steps or num_steps
  warmup_steps = int(warmup * decay_steps)
  return optax.warmup_cosine_decay_schedule(
    start * learning_rate if warmup_steps else learning_rate,
    learning_rate,
    warmup_steps,
    decay_steps,
    final * learning_rate,
  )


def make_schedule(
  name: str, learning_rate: float, *, num_steps: int, steps_per_epoch: int, **kwargs: Any
) -> optax.Schedule:
  """Builds ``step_epochs`` or ``cosine``; the rest of the arguments goes to it.

  Raises:
    ValueError: the name is not known.
  """
  if name == "step_epochs":
    return step_epochs(learning_rate, steps_per_epoch=steps_per_epoch, **kwargs)
  if name == "cosine":
    return cosine(learning_rate, num_steps=num_steps, **kwargs)
  raise ValueError(f"unknown schedule {name!r}: choose step_epochs or cosine")


def group_of(
  path: str, shape: Sequence[int], *, groups: Groups = (), no_decay: Sequence[str] = ()
) -> tuple[float, bool]:
  """Says how one parameter is optimized.

  Args:
    path: name of the parameter, joined by ``/``.
    shape: its shape.
    groups: pairs of a regular expression, searched for in the path, and a factor of the learning rate; the
      first that is found counts, and 1 where none is. 0 freezes.
    no_decay: regular expressions of the names without weight decay. Tensors of one axis or none never decay.

  Returns:
    The factor of the learning rate, and whether weight decay applies.
  """
  scale = next((scale for pattern, scale in groups if re.search(pattern, path)), 1.0)
  decayed = len(shape) > 1 and not any(re.search(pattern, path) for pattern in no_decay)
  return scale, decayed


def make_optimizer(
  params: Any,
  *,
  learning_rate: optax.Schedule,
  weight_decay: float,
  name: str = "adamw",
  groups: Groups = (),
  no_decay: Sequence[str] = (),
  clip_norm: float | None = None,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  momentum: float = 0.9,
  nesterov: bool = False,
) -> optax.GradientTransformation:
  """AdamW or SGD with a learning rate and weight decay by group.

  Args:
    params: a pytree of arrays, abstract or concrete; only its names and shapes are looked at.
    learning_rate: rate as a function of the step, before the factor of the group.
    weight_decay: times the parameter is added to what AdamW makes of the gradient (decoupled), or to the gradient
      itself before SGD's momentum (an L2 penalty).
    name: ``adamw`` or ``sgd``.
    groups: see ``group_of``.
    no_decay: see ``group_of``.
    clip_norm: largest global norm of the gradients; None does not clip.
    b1: decay of AdamW's first moment.
    b2: decay of its second moment.
    eps: added to the root of the second moment.
    momentum: decay of SGD's sum of gradients.
    nesterov: SGD looks one step ahead.

  Raises:
    ValueError: the name is not known, or the pattern of a group matches no parameter, so that it would do nothing.
  """
  paths = [path_of(path) for path, _ in jax.tree.leaves_with_path(params)]
  for pattern, _ in groups:
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(f"optimizer: no parameter matches {pattern!r}; names are like {paths[0]}, {paths[-1]}")

  def choose(what: int) -> Any:
    return jax.tree.map_with_path(
      lambda path, x: group_of(path_of(path), x.shape, groups=groups, no_decay=no_decay)[what], params
    )

  decay = optax.add_decayed_weights(weight_decay, choose(1))
  if name == "adamw":
    update = optax.scale_by_adam(b1, b2, eps), decay
  elif name == "sgd":
    update = decay, optax.trace(momentum, nesterov)
  else:
    raise ValueError(f"unknown optimizer {name!r}: choose adamw or sgd")
  scales = choose(0)
  scale_groups = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales))
  return optax.chain(
    *([optax.clip_by_global_norm(clip_norm)] if clip_norm else []),
    *update,
    scale_groups,
    optax.scale_by_learning_rate(learning_rate),
  )


def path_of(path: Any) -> str:
  """Name of a leaf, joined by ``/``, from its key path in a pytree."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
