"""Attention against its definition, whole and head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vad_jax.layers import attention


def inputs(seed: int = 0):
  rng = np.random.default_rng(seed)
  query, key, value = (jnp.asarray(rng.normal(size=(2, 6, 3, 4)), jnp.float32) for _ in range(3))
  return query, key, value, jnp.asarray(rng.uniform(1, 3, 6), jnp.float32), jnp.asarray(rng.random((2, 6)) < 0.7)


@pytest.fixture(params=[2**26, 1], ids=["whole", "head by head"])
def limit(request, monkeypatch):
  monkeypatch.setattr(attention, "MOST_WEIGHTS", request.param)


@pytest.mark.parametrize("masked", [False, True])
def test_by_definition(limit, masked):
  query, key, value, weight, mask = inputs()
  logits = np.einsum("bqhd,bkhd->bhqk", query, key) / 2
  if masked:
    logits = np.where(mask[:, None, None], logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
  out, received = attention.attend_and_weigh(query, key, value, weight, mask if masked else None)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(received, np.einsum("bhqk,q->bk", weights, weight) / 18, rtol=1e-4)
  np.testing.assert_allclose(
    attention.attend(query, key, value, mask if masked else None), expected, rtol=1e-4, atol=1e-6
  )


def test_gradients_are_the_same_head_by_head(monkeypatch):
  query, key, value, weight, _ = inputs()

  def loss(query):
    out, received = attention.attend_and_weigh(query, key, value, weight)
    return (out**2).sum() + received.sum() + (attention.attend(query, key, value) ** 2).sum()

  whole = jax.grad(loss)(query)
  monkeypatch.setattr(attention, "MOST_WEIGHTS", 1)
  np.testing.assert_allclose(jax.grad(loss)(query), whole, rtol=1e-4, atol=1e-6)
