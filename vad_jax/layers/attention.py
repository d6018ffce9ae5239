"""Multi-head self-attention and the pre-norm transformer block of VideoMAE's ViT."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vad_jax.batch import Array
from vad_jax.layers.drop_path import DropPath
from vad_jax.layers.mlp import Mlp

MOST_WEIGHTS = 2**26  # attention weights that one device holds at a time, 256 MiB in float32


def attend(query: Array, key: Array, value: Array, key_mask: Array | None = None) -> Array:
  """Scaled dot-product attention; on a GPU in half precision fused, so that the weights are never stored.

  Args:
    query: ``[B, N, heads, D]``.
    key, value: ``[B, K, heads, D]``.
    key_mask: ``[B, K]`` bool, False for keys that nobody may look at.

  Returns:
    ``[B, N, heads, D]``.
  """
  fused = jax.default_backend() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16)
  mask = None if key_mask is None else key_mask[:, None, None, :]
  if fused:
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
  plain = functools.partial(jax.nn.dot_product_attention, mask=mask, implementation="xla")
  return by_heads(plain, query, key, value)


def attend_and_weigh(
  query: Array, key: Array, value: Array, query_weight: Array, key_mask: Array | None = None
) -> tuple[Array, Array]:
  """Attention that also says how much attention every key gets; arguments as in ``attend``.

  Args:
    query_weight: ``[N]`` weight of each query in that sum.

  Returns:
    ``[B, N, heads, D]``, and the attention ``[B, N]`` that each key receives, averaged over heads and weighted queries;
    no gradient flows through it.
  """
  exact = jnp.promote_types(query.dtype, jnp.float32)

  def weigh(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=exact)
    if key_mask is not None:
      logits = jnp.where(key_mask[:, None, None, :], logits, jnp.finfo(exact).min)
    weights = jax.nn.softmax(logits, axis=-1)
    with jax.named_scope("importance"):
      received = jnp.einsum("bhqk,q->bhk", jax.lax.stop_gradient(weights), query_weight) / query.shape[1]
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value), received.swapaxes(1, 2)

  out, received = by_heads(weigh, query, key, value)
  return out, received.mean(2)


def by_heads(function: Callable[..., Any], query: Array, key: Array, *others: Array) -> Any:
  """Applies a function of arrays with heads on axis 2, head by head where the weights of all would not fit.

  The results have heads on axis 2. Heads, not images, take turns, so that a batch stays spread over devices.

  Args:
    function: of ``query``, ``key`` and ``others``; it may hold weights ``[B, heads, N, K]`` meanwhile.
    query: ``[B, N, heads, D]``.
    key: ``[B, K, heads, D]``.
    *others: values and whatever else the function takes.
  """
  batch, queries, heads, _ = query.shape
  devices = max(jax.sharding.get_abstract_mesh().size, 1)
  if batch * heads * queries * key.shape[1] <= MOST_WEIGHTS * devices:
    return function(query, key, *others)
  one_head = jax.checkpoint(lambda parts: function(*(part[:, :, None] for part in parts)))
  results = jax.lax.map(one_head, tuple(jnp.moveaxis(x, 2, 0) for x in (query, key, *others)))
  return jax.tree.map(lambda x: jnp.moveaxis(x.squeeze(3), 0, 2), results)


class SelfAttention(nnx.Module):
  """Multi-head self-attention with one projection for queries, keys and values.

  With ``key_bias=False`` (VideoMAE) only queries and values have a bias; otherwise all three do (PyTorch's module).
  """

  def __init__(self, dim: int, heads: int, *, key_bias: bool = False, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
    self.heads = heads
    self.qkv = nnx.Linear(dim, 3 * dim, use_bias=key_bias, dtype=dtype, rngs=rngs)
    if not key_bias:
      self.q_bias = nnx.Param(jnp.zeros(dim))
      self.v_bias = nnx.Param(jnp.zeros(dim))
    self.key_bias = key_bias
    self.proj = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)

  def __call__(
    self, x: Array, *, key_mask: Array | None = None, query_weight: Array | None = None
  ) -> tuple[Array, Array | None]:
    """Attends.

    Args:
      x: ``[B, N, C]``.
      key_mask: ``[B, N]`` bool, False for padding.
      query_weight: ``[N]``; when given, the attention is materialised to weigh its columns.

    Returns:
      ``[B, N, C]``, and with ``query_weight`` the importance ``[B, N]`` of every token: the attention that it receives,
      averaged over heads and weighted queries (else None).
    """
    batch, tokens, dim = x.shape
    qkv = self.qkv(x)
    if not self.key_bias:
      bias = jnp.concatenate([self.q_bias[...], jnp.zeros_like(self.q_bias[...]), self.v_bias[...]])
      qkv = qkv + bias.astype(qkv.dtype)
    query, key, value = jnp.split(qkv.reshape(batch, tokens, 3 * self.heads, -1), 3, axis=2)
    if query_weight is None:
      return self.proj(attend(query, key, value, key_mask).reshape(batch, tokens, dim)), None
    out, importance = attend_and_weigh(query, key, value, query_weight, key_mask)
    return self.proj(out.reshape(batch, tokens, dim)), importance


class Block(nnx.Module):
  """Pre-norm transformer block: attention, then MLP, each behind LayerNorm (epsilon 1e-6) and drop path."""

  def __init__(
    self,
    dim: int,
    heads: int,
    *,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    self.norm1 = nnx.LayerNorm(dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.attn = SelfAttention(dim, heads, dtype=dtype, rngs=rngs)
    self.norm2 = nnx.LayerNorm(dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.mlp = Mlp(dim, int(dim * mlp_ratio), dtype=dtype, rngs=rngs)
    self.drop_path = DropPath(drop_path)

  def attention(
    self, x: Array, rngs: nnx.Rngs | None, key_mask: Array | None = None, query_weight: Array | None = None
  ) -> tuple[Array, Array | None]:
    """The first half: ``x`` plus its attention, and the importance of tokens where asked for."""
    update, importance = self.attn(self.norm1(x), key_mask=key_mask, query_weight=query_weight)
    return x + self.drop_path(update, rngs), importance

  def feed_forward(self, x: Array, rngs: nnx.Rngs | None) -> Array:
    """The second half."""
    return x + self.drop_path(self.mlp(self.norm2(x)), rngs)

  def __call__(self, x: Array, rngs: nnx.Rngs | None = None, key_mask: Array | None = None) -> Array:
    """``[B, N, C]`` to ``[B, N, C]``."""
    return self.feed_forward(self.attention(x, rngs, key_mask)[0], rngs)
