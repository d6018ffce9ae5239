"""What the papers print about their models, and how their counters counted; see ``vad_jax.describe``."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Size = tuple[int, int, int]  # frames, height, width

# Arguments that do not decide which figure of a paper a model belongs to.
FREE_OPTIONS = {"name", "drop_path", "remat", "dtype", "action_loss", "token_order"}


class Figure(NamedTuple):
  """What a paper prints for one model and input; ``options`` are those of the model's constructor."""

  options: dict[str, Any]
  size: Size
  gflops: float
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


PAPERS = {
  "bmvit": Paper(norm=5, rules=(), figures=tuple(_bmvit_figures())),
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
}
