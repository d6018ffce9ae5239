"""Schedules against the reference's numbers, groups, the optimizer's arithmetic."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vad_jax import optim

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lr_schedule.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("x64, rtol", [(True, 1e-12), (False, 1e-6)])
def test_step_epochs_equals_reference(name: str, x64: bool, rtol: float) -> None:
  golden = GOLDEN[name]
  with jax.enable_x64(x64):
    schedule = optim.make_schedule(
      "step_epochs",
      golden["base_lr"],
      num_steps=12_000,
      steps_per_epoch=1000,
      boundaries=golden["steps"][1:],
      warmup_epochs=golden["warmup_epochs"],
      warmup_learning_rate=golden["warmup_start"],
    )
    for epoch, expected in golden["points"]:
      step = jnp.int32(round(1000 * epoch))
      np.testing.assert_allclose(jax.jit(schedule)(step), expected, rtol, err_msg=f"epoch {epoch}")


def test_step_epochs_without_warmup() -> None:
  schedule = optim.step_epochs(1.0, steps_per_epoch=3, boundaries=(1,), warmup_epochs=0)
  np.testing.assert_allclose([schedule(jnp.int32(step)) for step in range(5)], [1, 1, 1, 0.1, 0.1])


def test_cosine() -> None:
  schedule = optim.make_schedule("cosine", 2.0, num_steps=100, steps_per_epoch=7, warmup=0.1, final=0.05)
  np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 55, 100)], [0, 1, 2, 1.05, 0.1], rtol=1e-6)
  assert optim.cosine(2.0, num_steps=3)(0) == 2.0  # too short to warm up
  schedule = optim.cosine(2.0, num_steps=60, decay_steps=100, warmup=0.1, start=0.25)
  np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 55)], [0.5, 1.25, 2, 1], rtol=1e-6)


def test_unknown_schedule() -> None:
  with pytest.raises(ValueError, match="'linear': choose step_epochs or cosine"):
    optim.make_schedule("linear", 1.0, num_steps=1, steps_per_epoch=1)


GROUPS = ((r"^head/", 8.0), (r"^backbone/", 0.5))


@pytest.mark.parametrize(
  "path, shape, expected",
  [
    ("head/linear/kernel", (2, 3), (8.0, True)),
    ("head/linear/bias", (3,), (8.0, False)),
    ("head/mask_token", (1, 3), (8.0, False)),
    ("backbone/head/kernel", (2, 3), (0.5, True)),
    ("fpn/kernel", (1, 1, 2, 3), (1.0, True)),
    ("fpn/scale", (), (1.0, False)),
  ],
)
def test_group_of(path: str, shape: tuple[int, ...], expected: tuple[float, bool]) -> None:
  assert optim.group_of(path, shape, groups=GROUPS, no_decay=("mask_token$",)) == expected


def test_optimizer_is_adamw_by_group() -> None:
  params = {"head": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "backbone": {"w": jnp.full((2, 2), 3.0)}}
  grads = jax.tree.map(lambda x: 0.3 * x, params)
  actual = optim.make_optimizer(
    params, learning_rate=lambda _: 0.1, weight_decay=0.01, groups=(("^head/", 8.0),), eps=1e-4
  )
  updates, state = actual.update(grads, actual.init(params), params)
  updates, _ = actual.update(grads, state, params)
  for name, rate, decay in (("head/w", 0.8, 0.01), ("head/b", 0.8, 0), ("backbone/w", 0.1, 0.01)):
    part, leaf = name.split("/")
    expected = optax.adamw(rate, eps=1e-4, weight_decay=decay)
    state = expected.init(params[part][leaf])
    _, state = expected.update(grads[part][leaf], state, params[part][leaf])
    wanted, _ = expected.update(grads[part][leaf], state, params[part][leaf])
    np.testing.assert_allclose(updates[part][leaf], wanted, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov: bool) -> None:
  params, gradients = {"head": {"w": jnp.full((2, 2), 2.0)}, "b": jnp.ones(2)}, [1.0, 3.0]
  sgd = optim.make_optimizer(
    params,
    name="sgd",
    learning_rate=lambda step: jnp.where(step == 0, 0.1, 0.2),
    weight_decay=0.5,
    groups=(("^head/", 4.0),),
    momentum=0.9,
    nesterov=nesterov,
  )
  state, sums = sgd.init(params), [0.0, 0.0]
  for rate, gradient in zip((0.1, 0.2), gradients, strict=True):
    updates, state = sgd.update(jax.tree.map(lambda x, g=gradient: jnp.full(x.shape, g), params), state, params)
    for index, (found, factor, penalty) in enumerate(((updates["head"]["w"], 4, 0.5 * 2), (updates["b"], 1, 0))):
      now = gradient + penalty
      sums[index] = 0.9 * sums[index] + now
      moved = now + 0.9 * sums[index] if nesterov else sums[index]
      np.testing.assert_allclose(found, np.full(found.shape, -rate * factor * moved), rtol=1e-6)


def test_unknown_optimizer() -> None:
  with pytest.raises(ValueError, match="'adam': choose adamw or sgd"):
    optim.make_optimizer({"w": jnp.ones(2)}, name="adam", learning_rate=lambda _: 1, weight_decay=0)


def test_clips_the_global_norm() -> None:
  params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
  # An epsilon far above the gradients makes Adam linear in them.
  make = lambda clip: optim.make_optimizer(  # noqa: E731
    params, learning_rate=lambda _: 1.0, weight_decay=0.0, clip_norm=clip, eps=1e6
  )
  grads = jax.tree.map(lambda x: 5 * x, params)  # norm 5 * sqrt(8)
  clipped, _ = make(1.0).update(grads, make(1.0).init(params), params)
  free, _ = make(None).update(grads, make(None).init(params), params)
  np.testing.assert_allclose(free["a"] / clipped["a"], 5 * np.sqrt(8), rtol=1e-5)


def test_group_without_parameters() -> None:
  with pytest.raises(ValueError, match="no parameter matches '\\^haed/'; names are like head/b, head/w"):
    optim.make_optimizer(
      {"head": {"w": jnp.ones(2), "b": jnp.ones(2)}},
      learning_rate=lambda _: 1,
      weight_decay=0,
      groups=(("^haed/", 2),),
    )
