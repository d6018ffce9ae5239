"""What transformers for detection are made of: attention, feed-forward parts, and the plain layers of DETR."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vad_jax.batch import Array
from vad_jax.layers import attention

XAVIER = nnx.initializers.xavier_uniform()


class EncoderLayer(nnx.Module):
  """Encoder layer of DETR: all cells of a clip look at each other."""

  def __init__(self, dim: int, heads: int, hidden: int, *, dropout: float, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    self.heads = heads
    self.query, self.key, self.value, self.out = (
      nnx.Linear(dim, dim, kernel_init=XAVIER, dtype=dtype, rngs=rngs) for _ in range(4)
    )
    self.norm1, self.norm2 = (layer_norm(dim, dtype, rngs) for _ in range(2))
    self.mlp = FeedForward(dim, hidden, dropout, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout)

  def __call__(self, x: Array, positions: Array, mask: Array, rngs: nnx.Rngs | None) -> Array:
    """``[B, S, D]`` to ``[B, S, D]``, given positions of that shape and ``[B, S]`` bool, False for padding."""
    split = lambda tokens: tokens.reshape(*tokens.shape[:2], self.heads, -1)  # noqa: E731
    placed = x + positions
    found = attention.attend(split(self.query(placed)), split(self.key(placed)), split(self.value(x)), mask)
    x = self.norm1(x + self.dropout(self.out(found.reshape(x.shape)), rngs=rngs))
    return self.norm2(x + self.dropout(self.mlp(x, rngs), rngs=rngs))


class DecoderLayer(nnx.Module):
  """Decoder layer of DETR (Carion et al., ECCV 2020), the baseline of Table 1: it sees one map, the mean of levels."""

  def __init__(self, dim: int, heads: int, hidden: int, *, dropout: float, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    def linear() -> nnx.Linear:
      return nnx.Linear(dim, dim, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    self.heads = heads
    self.self_query, self.self_key, self.self_value, self.self_out = (linear() for _ in range(4))
    self.cross_query, self.cross_key, self.cross_value, self.cross_out = (linear() for _ in range(4))
    self.norm1, self.norm2, self.norm3 = (layer_norm(dim, dtype, rngs) for _ in range(3))
    self.mlp = FeedForward(dim, hidden, dropout, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout)

  def __call__(
    self, actor: Array, levels: Array, *, query_position: Array, positions: Array, mask: Array, rngs: nnx.Rngs | None
  ) -> dict[str, Array]:
    """Runs the layer; arguments and results as in ``LocalizingLayer``."""
    drop = lambda x: self.dropout(x, rngs=rngs)  # noqa: E731
    placed = actor + query_position
    found, self_attention = attend(
      self.self_query(placed), self.self_key(placed), self.self_value(actor), self.heads, drop=drop
    )
    actor = self.norm1(actor + drop(self.self_out(found)))
    context = levels.mean(0)
    query, key = self.cross_query(actor + query_position), self.cross_key(context + positions)
    found, attention = attend(query, key, self.cross_value(context), self.heads, mask=mask, drop=drop)
    feature = self.norm2(actor + drop(self.cross_out(found)))
    output = self.norm3(feature + drop(self.mlp(feature, rngs)))
    return {"actor_feature": feature, "output": output, "self_attention": self_attention, "attention": attention}


class FeedForward(nnx.Module):
  """Two linear layers with ReLU and dropout between them."""

  def __init__(self, dim: int, hidden: int, dropout: float, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    self.fc1 = nnx.Linear(dim, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
    self.fc2 = nnx.Linear(hidden, dim, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout)

  def __call__(self, x: Array, rngs: nnx.Rngs | None) -> Array:
    """``[..., D]`` to ``[..., D]``."""
    return self.fc2(self.dropout(jax.nn.relu(self.fc1(x)), rngs=rngs))


def attend(
  query: Array,
  key: Array,
  value: Array,
  heads: int,
  *,
  mask: Array | None = None,
  drop: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, Array]:
  """Scaled dot-product attention of heads that take their shares of the channels.

  Args:
    query: ``[..., Q, C]``.
    key: ``[..., S, C]``; leading axes broadcast against those of the others.
    value: ``[..., S, D]``.
    heads: how many.
    mask: ``[..., S]`` bool, False for what nobody may look at.
    drop: dropout of the attention.

  Returns:
    What was found ``[..., Q, D]``, and the attention ``[..., Q, S]``, the mean over heads.
  """
  query, key, value = (x.reshape(*x.shape[:-1], heads, -1) for x in (query, key, value))
  exact = jnp.promote_types(query.dtype, jnp.float32)
  logits = jnp.einsum("...qhc,...shc->...hqs", query * query.shape[-1] ** -0.5, key, preferred_element_type=exact)
  if mask is not None:
    logits = jnp.where(mask[..., None, None, :], logits, jnp.finfo(exact).min)
  weights = jax.nn.softmax(logits)
  found = jnp.einsum("...hqs,...shd->...qhd", drop(weights).astype(value.dtype), value)
  return found.reshape(*found.shape[:-2], -1), weights.mean(-3)


def layer_norm(dim: int, dtype: jnp.dtype | None, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """With PyTorch's epsilon."""
  return nnx.LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
