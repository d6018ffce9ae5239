"""What the papers print about their models, and how their counters counted; see ``vad_jax.describe``."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Size = tuple[int, int, int]  # frames, height, width

# Arguments that do not decide which figure of a paper a model belongs to.
FREE_OPTIONS = {"name", "drop_path", "remat", "dtype", "action_loss", "token_order", "dropout"}


class Figure(NamedTuple):
  """What a paper prints for one model and input; ``options`` are those of the model's constructor."""

  options: dict[str, Any]
  size: Size
  gflops: float | None
  mean_ap: float | None
  parameters: str | None


class Rule(NamedTuple):
  """How often what a module multiplies counts; projections of an attention are modules of their own."""

  path: str  # regular expression of the module's whole path
  exact: int
  paper: int


class Paper(NamedTuple):
  """Figures of a system, and how they were counted."""

  norm: int  # what the authors' counter adds for each element that a layer norm gets
  rules: Sequence[Rule]
  figures: Sequence[Figure]


def _evad_figures() -> Iterator[Figure]:
  """Tables 1a, 1b, 1d, 2, 3, 4 and 6; all inputs are square."""
  for side, keep_rate, gflops, mean_ap in (
    (224, 1.0, 223.8, 30.5),
    (224, 0.9, 186.3, 30.6),
    (224, 0.8, 157.0, 30.5),
    (224, 0.7, 134.2, 30.7),
    (224, 0.6, 116.3, 30.2),
    (256, 1.0, 311.9, 31.2),
    (256, 0.7, 182.3, 31.4),
    (288, 1.0, 424.5, 32.1),
    (288, 0.9, 346.3, 32.2),
    (288, 0.8, 287.4, 32.1),
    (288, 0.7, 242.8, 32.3),
    (288, 0.6, 208.9, 31.4),
  ):
    yield Figure({"variant": "vit_b", "keep_rate": keep_rate}, (16, side, side), gflops, mean_ap, "185M")
  for side, keep_rate, gflops, mean_ap in ((224, 1.0, 707.9, None), (224, 0.7, 409.4, None), (288, 0.7, 737.0, 39.7)):
    yield Figure({"variant": "vit_l", "keep_rate": keep_rate}, (16, side, side), gflops, mean_ap, None)
  yield Figure({"pruning": "random"}, (16, 224, 224), 158.9, 29.9, "185M")
  yield Figure({"decoder_tokens": "all"}, (16, 224, 224), 156.1, 30.2, "185M")


def _bmvit_figures() -> Iterator[Figure]:
  """Tables 1a and 2. Their own numbers do not agree: the rows of 224 and of 8 x 8 imply heads of 5.8 M multiply-adds a
  token, that of 16 x 16 implies 2.1 M, and the network as described has 3.6 M."""
  for side, last_pool, gflops, mean_ap in (
    (256, False, 121.2, 30.0),
    (256, True, 90.7, 27.5),
    (224, False, 87.9, 27.4),
    (224, True, 65.0, 26.8),
  ):
    yield Figure({"variant": "mvitv2_s", "last_pool": last_pool}, (16, side, side), gflops, mean_ap, None)
  yield Figure({"variant": "vit_b"}, (16, 288, 288), 350.0, 31.4, None)
  # Hiera-L is printed as 650 without the size of its input. The trunk alone takes 412 at 224 and 579 at 256 pixels, and
  # without its last pooling 503 and 705: no size of those that were tried fits.


def _action_transformer_figures() -> Iterator[Figure]:
  """Tables 1, 2, 3 and 5; multiply-adds are not printed. The last three (Table 2) are AP of persons."""
  size = (64, 400, 400)
  for query, proposals, boxes, parameters, mean_ap in (
    ("low_res", 64, "rpn", "13.9M", 17.8),
    ("high_res", 64, "rpn", "19.3M", 18.9),
    ("low_res", 64, "ground_truth", "13.9M", 28.5),
    ("high_res", 64, "ground_truth", "19.3M", 27.6),
    ("high_res", 300, "rpn", None, 24.4),
  ):
    yield Figure({"query": query, "proposals": proposals, "boxes": boxes}, size, None, mean_ap, parameters)
  for options, parameters, mean_ap in (
    ({"head": "i3d", "proposals": 64}, "16.2M", 21.3),
    ({"head": "i3d", "proposals": 64, "boxes": "ground_truth"}, "16.2M", 23.4),
    ({"head": "i3d", "proposals": 300}, None, 20.5),
    ({"head": "tx_i3d", "proposals": 300}, None, 24.9),
    ({"head": "i3d", "proposals": 64, "class_boxes": True}, None, 19.2),
    ({"head": "i3d", "proposals": 64, "norm": "batch"}, None, 19.1),
    ({"head": "i3d", "proposals": 64, "class_agnostic": True}, None, 92.9),
    ({"query": "low_res", "proposals": 64, "class_agnostic": True}, None, 77.5),
    ({"query": "high_res", "proposals": 64, "class_agnostic": True}, None, 87.7),
  ):
    yield Figure(options, size, None, mean_ap, parameters)


def _st_context_figures() -> Iterator[Figure]:
  """Table 1, mean AP alone, at a short side of 256 pixels."""
  for context, actor_grid, mean_ap in (
    ("none", True, 24.80),
    ("spatial", False, 26.50),
    ("spatial", True, 26.75),
    ("spatial_temporal", False, 26.65),
    ("spatial_temporal", True, 27.02),
  ):
    yield Figure({"context": context, "actor_grid": actor_grid}, (32, 256, 256), None, mean_ap, None)


def _class_query_figures() -> Iterator[Figure]:
  """Tables 1 to 4 (CSN-152 on AVA), 5 and 6; f-mAP. Multiply-adds are of frames of 256 x 360, of which ViT sees 352."""
  tubes = {"tubes": True, "layers": 3}
  for options, frames, gflops, mean_ap in (
    ({"num_frames": 40, "num_queries": 5, "empty_frames": False}, 40, 3260.0, 86.9),
    ({"num_frames": 32}, 32, 3730.0, 85.9),
  ):
    yield Figure({**tubes, **options}, (frames, 256, 352), gflops, mean_ap, "117.8M")
  yield Figure({}, (16, 256, 352), None, 32.9, None)
  for options, mean_ap in (
    ({}, 33.5),
    ({"encoder": "transformer", "decoder": "detr"}, 28.6),
    ({"encoder": "transformer", "decoder": "ldl"}, 29.1),
    ({"encoder": "transformer"}, 31.4),
    ({"decoder": "ldl"}, 31.3),
    ({"aggregation": "weighted_sum"}, 32.9),
    ({"aggregation": "mean"}, 32.0),
    ({"positional_queries": False}, 31.7),
    ({"combination": "concat"}, 31.8),
    ({"combination": "cross_attention"}, 31.3),
    ({"combination": "self_attention"}, 30.8),
  ):
    yield Figure({"variant": "csn152", "num_frames": 32, **options}, (32, 256, 352), None, mean_ap, None)


PAPERS = {
  "action_transformer": Paper(norm=0, rules=(), figures=tuple(_action_transformer_figures())),
  "bmvit": Paper(norm=5, rules=(), figures=tuple(_bmvit_figures())),
  "class_query": Paper(norm=0, rules=(), figures=tuple(_class_query_figures())),
  "evad": Paper(
    norm=5,
    rules=(
      Rule(r"fpn\.lateral\.0", 16, 16),
      Rule(r"fpn\.lateral\.1", 4, 4),
      Rule(r"decoder\.classifiers\.\d+\.hidden", 1, 0),
      Rule(r"head\.\d+\.self_attn", 1, 0),
    ),
    figures=tuple(_evad_figures()),
  ),
  "st_context": Paper(norm=0, rules=(), figures=tuple(_st_context_figures())),
}
