"""The two decoder layers of the class-query detector, for the people of a frame.

Lee et al., "Classification Matters", ECCV 2024, section 4.2 and Figure 4. A localizing layer finds out where people are
and makes of the levels of the feature map what concerns each of them, the context. A classifying layer asks that
context, for each person and each class, whether the class is there.

Frames are rows here: ``R`` of them, ``N`` people in each, ``S`` cells of the map, ``K`` classes, ``D`` channels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vad_jax.batch import Array
from vad_jax.layers.detr import XAVIER, DecoderLayer, FeedForward, attend, layer_norm
from vad_jax.layers.from_scratch import RARE, spread_boxes

Aggregation = Literal["actor", "weighted_sum", "mean"]
Combination = Literal["sum", "concat", "cross_attention", "self_attention"]


class LocalizingLayer(nnx.Module):
  """LDL: people look at each other, then at the map, with content and place apart (as in Conditional DETR)."""

  def __init__(
    self,
    dim: int,
    heads: int,
    hidden: int,
    levels: int,
    *,
    first: bool,
    aggregation: Aggregation = "actor",
    dropout: float,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    """Builds the layer.

    Args:
      dim: ``D``.
      heads: of both attentions.
      hidden: channels inside the feed-forward part.
      levels: ``L``, of the feature map.
      first: of all layers; only there is the place part of the content when people look at the map.
      aggregation: how levels become one map: by weights of each actor, by the same ones for all, or by their mean
        (Table 2).
      dropout: rate.
      dtype: computation type.
      rngs: source of the initial parameters.
    """

    def linear(features: int = dim) -> nnx.Linear:
      return nnx.Linear(dim, features, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    self.heads, self.aggregation = heads, aggregation
    self.sa_qcontent, self.sa_qpos, self.sa_kcontent, self.sa_kpos, self.sa_v = (linear() for _ in range(5))
    self.ca_qcontent, self.ca_kcontent, self.ca_kpos, self.ca_v, self.ca_qpos_sine = (linear() for _ in range(5))
    self.ca_qpos = linear() if first else None
    self.self_out, self.cross_out = linear(), linear()
    self.level = linear(levels) if aggregation == "actor" else None
    self.level_logits = nnx.Param(jnp.zeros(levels)) if aggregation == "weighted_sum" else None
    self.context_norm, self.norm1, self.norm2, self.norm3 = (layer_norm(dim, dtype, rngs) for _ in range(4))
    self.mlp = FeedForward(dim, hidden, dropout, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout)

  def __call__(
    self,
    actor: Array,
    levels: Array,
    *,
    query_position: Array,
    place: Array,
    positions: Array,
    mask: Array,
    rngs: nnx.Rngs | None,
  ) -> dict[str, Array]:
    """Runs the layer.

    Args:
      actor: ``[R, N, D]`` what is known of people.
      levels: ``[L, R, S, D]`` the feature map.
      query_position: ``[R, N, D]`` of their boxes.
      place: ``[R, N, D]`` actor positional queries: of the centres of their boxes.
      positions: ``[R, S, D]`` of cells.
      mask: ``[R, S]`` bool, False for cells of padding.
      rngs: for dropout.

    Returns:
      ``actor_feature`` ``[R, N, D]``, which goes to the classifying layer, ``output`` ``[R, N, D]`` for the next layer,
      ``context`` ``[R, N, S, D]``, ``level_weights`` ``[R, N, L]``, ``self_attention`` ``[R, N, N]`` and ``attention``
      ``[R, N, S]``.
    """
    drop = lambda x: self.dropout(x, rngs=rngs)  # noqa: E731
    query = self.sa_qcontent(actor) + self.sa_qpos(query_position)
    key = self.sa_kcontent(actor) + self.sa_kpos(query_position)
    found, self_attention = attend(query, key, self.sa_v(actor), self.heads, drop=drop)
    actor = self.norm1(actor + drop(self.self_out(found)))

    weights = self.level_weights(actor, len(levels))
    context = self.context_norm(jnp.einsum("rnl,lrsd->rnsd", weights.astype(levels.dtype), levels))
    key_position = self.ca_kpos(positions)[:, None]
    query, key = self.ca_qcontent(actor), self.ca_kcontent(context)
    if self.ca_qpos is not None:
      query, key = query + self.ca_qpos(query_position), key + key_position
    query = side_by_side(query, self.ca_qpos_sine(place), self.heads)[:, :, None]
    key = side_by_side(key, jnp.broadcast_to(key_position, key.shape), self.heads)
    found, attention = attend(query, key, self.ca_v(context), self.heads, mask=mask[:, None], drop=drop)
    feature = self.norm2(actor + drop(self.cross_out(found[:, :, 0])))
    return {
      "actor_feature": feature,
      "output": self.norm3(feature + drop(self.mlp(feature, rngs))),
      "context": context,
      "level_weights": weights,
      "self_attention": self_attention,
      "attention": attention[:, :, 0],
    }

  def level_weights(self, actor: Array, levels: int) -> Array:
    """How much each level counts for each actor, ``[R, N, L]``."""
    if self.level is not None:
      return jax.nn.softmax(self.level(actor).astype(jnp.promote_types(actor.dtype, jnp.float32)))
    logits = jnp.zeros(levels) if self.level_logits is None else self.level_logits[...]
    return jnp.broadcast_to(jax.nn.softmax(logits), (*actor.shape[:2], levels))


class ClassifyingLayer(nnx.Module):
  """CDL: class queries look for their class in the context of each actor.

  With ``published`` the layer is that of the paper, else that of the released code, whose weights need it. The code
  differs in that

  * the actor's feature passes a feed-forward part, and gives no gradient to the localizing layer;
  * the three convolution blocks are one;
  * class queries look at each other first, without projections;
  * queries and keys have no common projection: half of the heads compare class and context, the others the places of
    actor and cell, which are the same for all classes. Values are of the context alone, without the actor;
  * class queries are replaced by what they found, rather than added to it.
  """

  def __init__(
    self,
    dim: int,
    heads: int,
    hidden: int,
    *,
    published: bool = False,
    positional: bool = True,
    combination: Combination = "sum",
    dropout: float,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    """Builds the layer.

    Args:
      dim: ``D``.
      heads: of the attentions.
      hidden: channels inside the feed-forward parts.
      published: see the class.
      positional: class queries know where the actor is, and keys where they are (Table 3).
      combination: of actor and context (Table 4): their sum; both beside each other, projected; the cells of the
        context look at the actors of the frame; or the cells and their actor look at each other.
      dropout: rate.
      dtype: computation type.
      rngs: source of the initial parameters.
    """

    def linear(inputs: int, features: int = dim) -> nnx.Linear:
      return nnx.Linear(inputs, features, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    self.heads, self.published, self.positional, self.combination = heads, published, positional, combination
    both = (1 + positional) * dim
    self.q_proj = linear(both if published else dim)  # the released code has it, and does not use it
    self.k_proj = linear(both if published else dim)
    self.v_proj, self.cross_out = linear(dim), linear(dim)
    self.place = linear(dim) if positional else None
    self.self_out = None if published else linear(dim)
    self.actor_mlp = None if published else FeedForward(dim, hidden, dropout, dtype=dtype, rngs=rngs)
    self.actor_norm = None if published else layer_norm(dim, dtype, rngs)
    self.combine = None if combination == "sum" else linear(2 * dim if combination == "concat" else dim)
    self.map_norm, self.norm1, self.norm2 = (layer_norm(dim, dtype, rngs) for _ in range(3))
    self.blocks = nnx.List([ConvolutionBlock(dim, dtype=dtype, rngs=rngs) for _ in range(3 if published else 1)])
    self.mlp = FeedForward(dim, hidden, dropout, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout)

  def __call__(
    self,
    classes: Array,
    actor: Array,
    context: Array,
    *,
    place: Array,
    positions: Array,
    grid: tuple[int, int],
    rngs: nnx.Rngs | None,
  ) -> dict[str, Array]:
    """Runs the layer.

    Args:
      classes: ``[R, N, K, D]`` class queries; 1 stands for ``R`` and ``N`` where they are the same.
      actor: ``[R, N, D]`` feature of each actor.
      context: ``[R, N, S, D]`` of each actor.
      place: ``[R, N, D]`` actor positional queries.
      positions: ``[R, S, D]`` of cells.
      grid: height and width of the map, of ``S`` cells.
      rngs: for dropout.

    Returns:
      ``output`` ``[R, N, K, D]``, the next layer's class queries; ``attention`` ``[R, N, K, S]`` of each class, the
      mean over heads; ``class_queries`` as they look at the map, ``actor``, and ``combined`` ``[R, N, S, D]`` before
      and ``z`` after the convolutions.
    """
    drop = lambda x: self.dropout(x, rngs=rngs)  # noqa: E731
    if self.actor_mlp is not None and self.actor_norm is not None:
      actor = jax.lax.stop_gradient(actor)
      actor = self.actor_norm(actor + drop(self.actor_mlp(actor, rngs)))
    combined = self.map_norm(self._combine(actor, context, drop))
    z = combined.reshape(-1, *grid, combined.shape[-1])
    for step in range(3):
      z = self.blocks[step % len(self.blocks)](z)
    z = z.reshape(context.shape)

    if self.self_out is not None:
      found, _ = attend(classes, classes, classes, self.heads, drop=drop)
      classes = self.norm1(classes + drop(self.self_out(found)))
    query, key = classes, z if self.published else self.k_proj(z)
    if self.place is not None:
      query = _beside(query, self.place(place)[:, :, None])
      key = _beside(key, positions[:, None])
    if self.published:
      query, key = self.q_proj(query), self.k_proj(key)
    query = jnp.broadcast_to(query, (*key.shape[:2], *query.shape[2:]))
    found, attention = attend(query, key, self.v_proj(z if self.published else context), self.heads, drop=drop)
    output = self.cross_out(found)
    if self.published:
      output = self.norm1(classes + drop(output))
    return {
      "output": self.norm2(output + drop(self.mlp(output, rngs))),
      "attention": attention,
      "class_queries": classes,
      "actor": actor,
      "combined": combined,
      "z": z,
    }

  def _combine(self, actor: Array, context: Array, drop: Callable[[Array], Array]) -> Array:
    """One map ``[R, N, S, D]`` of actor and context."""
    if self.combine is None:
      return actor[:, :, None] + context
    if self.combination == "concat":
      return self.combine(_beside(context, actor[:, :, None]))
    if self.combination == "cross_attention":
      query, key = context, actor[:, None]
    else:
      query = key = jnp.concatenate([actor[:, :, None], context], 2)
    found, _ = attend(query, key, key, self.heads, drop=drop)
    return context + drop(self.combine(found[:, :, -context.shape[2] :]))


class ConvolutionBlock(nnx.Module):
  """A ConvNeXt-like block of a full 3 x 3 convolution, for maps ``[B, h, w, D]``."""

  def __init__(self, dim: int, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
    self.conv = nnx.Conv(dim, dim, (3, 3), kernel_init=XAVIER, dtype=dtype, rngs=rngs)
    self.norm = nnx.LayerNorm(dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.fc1 = nnx.Linear(dim, 4 * dim, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
    self.fc2 = nnx.Linear(4 * dim, dim, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """``[B, h, w, D]`` to ``[B, h, w, D]``."""
    return x + self.fc2(jax.nn.gelu(self.fc1(self.norm(self.conv(x))), approximate=False))


def side_by_side(content: Array, place: Array, heads: int) -> Array:
  """Gives every head a share of the content and the same share of the place: ``[..., D]`` twice to ``[..., 2 D]``."""
  shares = [x.reshape(*x.shape[:-1], heads, -1) for x in (content, place)]
  return jnp.concatenate(shares, -1).reshape(*content.shape[:-1], -1)


def _beside(a: Array, b: Array) -> Array:
  """``[..., C]`` and ``[..., D]``, whose leading shapes broadcast, to ``[..., C + D]``."""
  shape = jnp.broadcast_shapes(a.shape[:-1], b.shape[:-1])
  return jnp.concatenate([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (a, b)], -1)


class Decoder(nnx.Module):
  """Layers of both kinds, with what is common to them; boxes are refined from layer to layer, as in DAB-DETR.

  ``kind`` "ldl" has localizing layers alone, "detr" plain ones, whose boxes are not refined; classes come of what is
  known of people then.
  """

  def __init__(
    self,
    dim: int,
    heads: int,
    hidden: int,
    layers: int,
    *,
    levels: int,
    kind: Literal["ldl_cdl", "ldl", "detr"],
    num_classes: int,
    num_queries: int,
    num_anchors: int,
    published: bool,
    aggregation: Aggregation,
    positional: bool,
    combination: Combination,
    dropout: float,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    parts: dict[str, Any] = {"dropout": dropout, "dtype": dtype, "rngs": rngs}
    mlp = functools.partial(Mlp, dtype=dtype, rngs=rngs)
    self.num_queries, self.kind = num_queries, kind
    self.anchors = nnx.Param(jax.random.normal(rngs.params(), (num_anchors, 4)))
    self.layers, self.class_layers = nnx.List(), nnx.List()
    for index in range(layers):
      if kind == "detr":
        self.layers.append(DecoderLayer(dim, heads, hidden, **parts))
      else:
        layer = LocalizingLayer(dim, heads, hidden, levels, first=not index, aggregation=aggregation, **parts)
        self.layers.append(layer)
      if kind == "ldl_cdl":
        options = {"published": published, "positional": positional, "combination": combination}
        self.class_layers.append(ClassifyingLayer(dim, heads, hidden, **options, **parts))
    self.norm = layer_norm(dim, dtype, rngs)
    self.position = mlp((2 * dim, dim, dim))
    self.scale = mlp((dim, dim, dim)) if kind != "detr" else None
    self.size = mlp((dim, dim, 2)) if kind != "detr" else None
    self.box = mlp((dim, dim, dim, 4), last=nnx.initializers.zeros)
    self.confidence = nnx.Linear(dim, 1 if published else 3, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
    asks = kind == "ldl_cdl"
    self.class_queries = nnx.Param(XAVIER(rngs.params(), (num_classes, dim))) if asks else None
    self.class_norm = layer_norm(dim, dtype, rngs) if asks else None
    self.unused_norm = layer_norm(dim, dtype, rngs) if asks else None  # released weights have it
    self.classifier = None if asks else nnx.Linear(dim, num_classes, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
    self.class_dropout = nnx.Dropout(0.5 if dropout else 0.0)

  def start_from_scratch(self, cells: Array, rngs: nnx.Rngs) -> None:
    """Makes first guesses that a small network can learn from, see ``vad_jax.layers.from_scratch``.

    Args:
      cells: ``[n, n, D]`` positions of the cells of a map.
      rngs: source of random numbers.
    """
    boxes = logit(jnp.asarray(spread_boxes(self.num_queries), jnp.float32))
    self.anchors[...] = jnp.repeat(boxes, len(self.anchors[...]) // self.num_queries, 0)
    outputs = self.confidence.out_features
    self.confidence.bias = nnx.Param(jnp.zeros(outputs).at[outputs // 2].set(RARE))
    if self.classifier is not None:
      self.classifier.bias = nnx.Param(jnp.full(self.classifier.out_features, RARE))
    if self.class_norm is not None:
      # The mean of what comes of a LayerNorm is zero unless channels weigh differently.
      channels = jnp.arange(self.class_norm.num_features)
      self.class_norm.scale = nnx.Param(jnp.where(channels % 2, 6.0, -6.0))
      self.class_norm.bias = nnx.Param(jnp.full(channels.shape, RARE))

    # People look around where they are: positions of boxes and cells become comparable, in random directions.
    side, _, dim = cells.shape
    centers = jnp.stack(jnp.meshgrid(*[(jnp.arange(side) + 0.5) / side] * 2), -1).reshape(-1, 2)
    wanted = box_positions(jnp.tile(centers, 2), dim)[:, :dim]
    as_box = jnp.linalg.lstsq(cells.reshape(-1, dim), wanted, rcond=1e-2)[0]
    for layer in self.layers:
      if isinstance(layer, LocalizingLayer):
        directions = nnx.initializers.orthogonal(2.0)(rngs.params(), (dim, dim))
        layer.ca_qpos_sine.kernel = nnx.Param(directions)
        layer.ca_kpos.kernel = nnx.Param(as_box @ directions)
    if self.scale is not None:
      last = self.scale.layers[-1]
      last.bias = nnx.Param(jnp.ones(last.out_features))

  def __call__(
    self,
    levels: Array,
    *,
    anchors: Array,
    positions: Array,
    mask: Array,
    grid: tuple[int, int],
    rngs: nnx.Rngs | None,
  ) -> dict[str, Any]:
    """Finds people in frames.

    Args:
      levels: ``[L, R, S, D]`` the feature map.
      anchors: ``[N, 4]`` logits of centre and size of the first boxes.
      positions: ``[R, S, D]`` of its cells.
      mask: ``[R, S]`` bool, False for cells of padding.
      grid: height and width of the map.
      rngs: for dropout.

    Returns:
      Of all layers, stacked: ``boxes`` ``[layers, R, N, 4]`` cxcywh in [0, 1], ``confidence_logits``
      ``[layers, R, N, 3 or 1]``, ``action_logits`` ``[layers, R, N, K]``, ``hidden`` ``[layers, R, N, D]``,
      ``class_hidden`` ``[layers, R, N, K, D]`` where there are classifying layers, and
      ``references`` ``[layers, R, N, 4]``, the boxes that each started from; and ``layers``, a list of what each of
      them said, with ``classifying`` in it.
    """
    rows, dim = levels.shape[1], levels.shape[-1]
    boxes = reference = jnp.broadcast_to(jax.nn.sigmoid(anchors), (rows, *anchors.shape))
    actor = jnp.zeros((rows, self.num_queries, dim), levels.dtype)
    classes = None if self.class_queries is None else self.class_queries[...][None, None].astype(levels.dtype)
    steps, found = [], []
    for index, layer in enumerate(self.layers):
      sines = box_positions(boxes, dim)
      shared = {"query_position": self.position(sines), "positions": positions, "mask": mask, "rngs": rngs}
      place = None
      if self.scale is None or self.size is None:
        step = layer(actor, levels, **shared)
      else:
        place = sines[..., :dim] * (self.scale(actor) if index else 1)
        # The larger the box, the wider the look: 1 / width for columns, 1 / height for rows.
        narrow = jax.nn.sigmoid(self.size(actor).astype(boxes.dtype)) / jnp.maximum(boxes[..., 2:], 1e-6)
        place = (place * jnp.repeat(narrow[..., ::-1], dim // 2, -1)).astype(levels.dtype)
        step = layer(actor, levels, place=place, **shared)
      actor = step["output"]
      hidden = self.norm(actor)
      told = None
      if classes is not None and self.class_norm is not None:
        said = self.class_layers[index](
          classes, step["actor_feature"], step["context"], place=place, positions=positions, grid=grid, rngs=rngs
        )
        classes, step["classifying"] = said["output"], said
        told = self.class_norm(classes)
        action = self.class_dropout(told, rngs=rngs).astype(boxes.dtype).mean(-1)
      else:
        assert self.classifier is not None
        action = self.classifier(hidden)
      steps.append({**step, "place": place, "query_position": shared["query_position"]})
      start = logit(reference) if self.kind != "detr" else 0
      found.append(
        {
          "boxes": jax.nn.sigmoid(self.box(hidden).astype(boxes.dtype) + start),
          "confidence_logits": self.confidence(hidden).astype(boxes.dtype),
          "action_logits": action.astype(boxes.dtype),
          "hidden": hidden,
          **({} if told is None else {"class_hidden": told}),
          "references": reference,
        }
      )
      if self.kind != "detr":
        # What the next layer adds to has a gradient, what it looks from has none.
        reference = jax.nn.sigmoid(self.box(actor).astype(boxes.dtype) + logit(boxes))
        boxes = jax.lax.stop_gradient(reference)
    return {**jax.tree.map(lambda *x: jnp.stack(x), *found), "layers": steps}


class Mlp(nnx.Module):
  """Linear layers with ReLU between them."""

  def __init__(
    self,
    widths: Sequence[int],
    *,
    last: nnx.Initializer = XAVIER,
    dtype: jnp.dtype | None,
    rngs: nnx.Rngs,
  ):
    inits = [XAVIER] * (len(widths) - 2) + [last]
    self.layers = nnx.List(
      [
        nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)
        for inputs, outputs, init in zip(widths[:-1], widths[1:], inits, strict=True)
      ]
    )

  def __call__(self, x: Array) -> Array:
    """``[..., widths[0]]`` to ``[..., widths[-1]]``."""
    for index, layer in enumerate(self.layers):
      x = layer(jax.nn.relu(x) if index else x)
    return x


def box_positions(boxes: Array, dim: int) -> Array:
  """Sines and cosines ``[..., 2 dim]`` of y, x, width and height of cxcywh boxes ``[..., 4]`` in [0, 1]."""
  half = np.arange(dim // 2)
  frequencies = 2 * math.pi / 10000 ** (2 * (half // 2) / (dim // 2))
  angles = boxes[..., (1, 0, 2, 3), None] * jnp.asarray(frequencies, boxes.dtype)
  return jnp.where(half % 2, jnp.cos(angles), jnp.sin(angles)).reshape(*boxes.shape[:-1], 2 * dim)


def logit(x: Array, epsilon: float = 1e-5) -> Array:
  """Inverse of the sigmoid, of numbers at least epsilon away from 0 and 1."""
  x = jnp.clip(x, 0, 1)
  return jnp.log(jnp.maximum(x, epsilon) / jnp.maximum(1 - x, epsilon))
