"""Targets of proposals by hand, and the balance of what is chosen."""

import jax
import jax.numpy as jnp
import numpy as np

from vad_jax.ops.proposals import assign, choose_balanced

# Boxes of height 1 on a line: IoU is that of intervals.
BOXES = jnp.array([[0, 0, 10, 1], [0, 0, 5, 1], [2, 0, 12, 1], [20, 0, 30, 1], [24, 0, 34, 1]], jnp.float32)
ALL, BOTH = jnp.ones(5, bool), jnp.ones(2, bool)


def targets(*intervals: tuple[float, float]) -> jax.Array:
  return jnp.array([[low, 0, high, 1] for low, high in intervals], jnp.float32)


def test_boxes_by_overlap():
  """IoU with (0, 10): 1, 0.5, 2/3, 0, 0; with (23, 33): 0, 0, 0, 7/13, 9/11."""
  owner, positive, negative = assign(BOXES, ALL, targets((0, 10), (23, 33)), BOTH, low=0.6, high=0.7)
  np.testing.assert_array_equal(positive, [True, False, False, False, True])
  np.testing.assert_array_equal(negative, [False, True, False, True, False])  # the third lies in between
  np.testing.assert_array_equal(owner, [0, 0, 0, 0, 1])


def test_thresholds_are_those_of_the_api():
  """At 0.5 exactly a box is of its target; at the lower threshold exactly it is no background."""
  _, positive, negative = assign(BOXES, ALL, targets((0, 10)), BOTH[:1], low=0.5, high=0.5)
  np.testing.assert_array_equal(positive, [True, True, True, False, False])
  np.testing.assert_array_equal(negative, [False, False, False, True, True])
  _, positive, negative = assign(BOXES, ALL, targets((0, 10)), BOTH[:1], low=0.5, high=0.6)
  assert not positive[1] and not negative[1]


def test_every_target_gets_its_best_box():
  """(26, 28) overlaps the last two by 0.2: the first of them is forced, and was background before."""
  crowd = targets((0, 10), (26, 28))
  _, positive, negative = assign(BOXES, ALL, crowd, BOTH, low=0.3, high=0.7)
  assert not positive[3] and negative[3]
  owner, positive, negative = assign(BOXES, ALL, crowd, BOTH, low=0.3, high=0.7, force=True)
  np.testing.assert_array_equal(positive, [True, False, False, True, False])
  np.testing.assert_array_equal(negative, [False, False, False, False, True])
  assert owner[3] == 1


def test_one_box_is_best_for_two_targets():
  owner, positive, _ = assign(BOXES, ALL, targets((1, 9), (0, 10)), BOTH, low=0.3, high=0.7, force=True)
  assert positive[0] and owner[0] == 0  # of the first, although it overlaps the second more


def test_what_is_masked_decides_nothing():
  """Neither padded targets, NaN or not, nor boxes that are not usable; nor a target that nothing overlaps."""
  padded = jnp.concatenate([targets((0, 10), (0, 10)), jnp.full((1, 4), jnp.nan), targets((50, 60))])
  mask, usable = jnp.array([True, False, False, True]), ALL.at[0].set(False)
  owner, positive, negative = assign(BOXES, usable, padded, mask, low=0.3, high=0.7, force=True)
  np.testing.assert_array_equal(positive, [False, False, True, False, False])  # the best that is usable
  np.testing.assert_array_equal(negative, [False, False, False, True, True])
  np.testing.assert_array_equal(owner, 0)
  _, positive, negative = assign(BOXES, ALL, padded, jnp.zeros(4, bool), low=0.3, high=0.7, force=True)
  assert not positive.any() and negative.all()


def test_choice_by_hand():
  positive = jnp.array([1, 1, 1, 0, 0, 0, 0], bool)
  negative = jnp.array([0, 0, 0, 1, 1, 1, 0], bool)
  priority = jnp.array([0.9, 0.1, 0.5, 0.8, 0.2, 0.3, 0.0])
  chosen = choose_balanced(positive, negative, priority, count=4, positive_share=0.5)
  np.testing.assert_array_equal(chosen, [0, 1, 1, 0, 1, 1, 0])
  chosen = choose_balanced(positive, negative, priority, count=4, positive_share=0.25)
  np.testing.assert_array_equal(chosen, [0, 1, 0, 1, 1, 1, 0])


def test_choice_is_balanced_and_random():
  """Each row by itself: few positives leave room for negatives, and every box has its chance."""
  positive = jnp.arange(400) < jnp.array([[0], [10], [300]])
  key = jax.random.key(0)
  draw = jax.jit(
    lambda key: choose_balanced(positive, ~positive, jax.random.uniform(key, (3, 400)), count=64, positive_share=0.25)
  )
  found = np.stack([draw(key) for key in jax.random.split(key, 200)])
  np.testing.assert_array_equal((found & np.asarray(positive)).sum(-1), np.tile([0, 10, 16], (200, 1)))
  np.testing.assert_array_equal(found.sum(-1), 64)
  assert found.any(0)[0].all() and found.mean(0)[2, :300].max() < 0.2
  assert choose_balanced(positive[1, :5], ~positive[1, :5], jnp.zeros(5), count=64, positive_share=0.25).all()
