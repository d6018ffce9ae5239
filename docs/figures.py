"""Draws the figures of the five systems: `python docs/figures.py` writes docs/figures/*.svg.

Text takes the colour of the page around it and boxes are tinted, so that figures are readable on light and dark pages.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "figures"
WIDTH = 980
# One colour for each role, the same in all figures.
COLORS = {"video": "#7c8798", "features": "#3b82f6", "place": "#10a37f", "action": "#f08c00", "result": "#a855f7"}
_CELL, _GAP = 8, 2


class Box(NamedTuple):
  """A step of a system.

  Attributes:
    x, y, width, height: in pixels; corner at the upper left.
    role: one of ``COLORS``.
    title: what it is.
    text: shapes and remarks below it, in lines that ``|`` separates.
  """

  x: float
  y: float
  width: float
  height: float
  role: str
  title: str
  text: str = ""

  def svg(self) -> str:
    color, middle = COLORS[self.role], self.x + self.width / 2
    lines = self.text.split("|") if self.text else []
    top = self.y + self.height / 2 - 8 * len(lines) + 5
    parts = [
      f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="9" fill="{color}" '
      f'fill-opacity=".13" stroke="{color}" stroke-width="1.5"/>',
      _text(middle, top, self.title, 13.5, weight=600),
    ]
    parts += [_text(middle, top + 16 * n, line, 11.5) for n, line in enumerate(lines, 1)]
    return "\n".join(parts)


class Arrow(NamedTuple):
  """What flows along ``points``, corners of a path; ``label`` stands at ``place``, near its middle by default."""

  points: Sequence[tuple[float, float]]
  label: str = ""
  place: tuple[float, float] | None = None

  def svg(self) -> str:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in self.points)
    line = f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity=".65" stroke-width="1.5" '
    (x0, y0), (x1, y1) = self.points[0], self.points[-1]
    x, y = self.place or ((x0 + x1) / 2, (y0 + y1) / 2 - 7)
    return line + 'marker-end="url(#tip)"/>' + (f"\n{_text(x, y, self.label, 11.5)}" if self.label else "")


class Slices(NamedTuple):
  """Tokens of a clip, one grid for each moment.

  Attributes:
    x, y: corner at the upper left.
    role: one of ``COLORS``.
    grids: of each moment the rows, separated by ``|``; ``#`` is a token in colour.
    caption: below.
  """

  x: float
  y: float
  role: str
  grids: Sequence[str]
  caption: str

  def svg(self) -> str:
    parts, x = [], self.x
    rows = [grid.split("|") for grid in self.grids]
    for grid in rows:
      for row, cells in enumerate(grid):
        for column, cell in enumerate(cells):
          left, top = x + column * (_CELL + _GAP), self.y + row * (_CELL + _GAP)
          fill = f'fill="{COLORS[self.role]}"' if cell == "#" else 'fill="currentColor" fill-opacity=".13"'
          parts.append(f'<rect x="{left:g}" y="{top:g}" width="{_CELL}" height="{_CELL}" rx="1.5" {fill}/>')
      x += len(grid[0]) * (_CELL + _GAP) + 9
    bottom = self.y + len(rows[0]) * (_CELL + _GAP) + 15
    return "\n".join([*parts, _text((self.x + x - 9) / 2, bottom, self.caption, 12)])


class Frame(NamedTuple):
  """A dashed frame around other parts, with its ``label`` at the upper left."""

  x: float
  y: float
  width: float
  height: float
  label: str

  def svg(self) -> str:
    return (
      f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="12" fill="none" '
      f'stroke="currentColor" stroke-opacity=".5" stroke-dasharray="5 4"/>\n'
      f"{_text(self.x + self.width / 2, self.y + 19, self.label, 11.5)}"
    )


class Note(NamedTuple):
  """Text that stands alone; ``x`` is its middle."""

  x: float
  y: float
  text: str

  def svg(self) -> str:
    return _text(self.x, self.y, self.text, 12.5)


def _text(x: float, y: float, text: str, size: float, weight: int = 400) -> str:
  return (
    f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" text-anchor="middle" fill="currentColor">'
    f"{escape(text)}</text>"
  )


Part = Box | Arrow | Slices | Frame | Note


def draw(height: float, label: str, parts: Sequence[Part]) -> str:
  """The figure as SVG, in the HTML element that pages show it in; ``label`` is for those who cannot see it."""
  body = "\n".join(part.svg() for part in parts)
  return f"""<figure class="diagram">
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img"
 aria-label="{escape(label)}" font-family="system-ui, sans-serif">
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L8 4 L0 8 z" fill="currentColor" fill-opacity=".65"/></marker></defs>
{body}
</svg>
</figure>
"""


def evad() -> str:
  """Token pruning, localisation in the keyframe, and actions from the rebuilt clip."""
  kept = ["....#|.##..|.#...|.....", ".....|.#...|.##..|....#", "#####|#####|#####|#####", "#....|..##.|...#.|....."]
  return draw(
    330,
    "EVAD: a ViT drops tokens; those of the keyframe give boxes, and all that are kept give the actions in these boxes",
    [
      Box(8, 110, 88, 62, "video", "Clip", "T frames"),
      Box(
        128,
        84,
        196,
        114,
        "features",
        "ViT",
        "three of its blocks drop|tokens of other moments,|those that get|least attention",
      ),
      Slices(84, 226, "features", kept, "tokens that are left; the keyframe keeps all"),
      Box(388, 24, 140, 80, "place", "Feature pyramid", "keyframe tokens|of four blocks"),
      Box(572, 24, 160, 80, "place", "Localisation", "learnt proposals look at|their regions, six times"),
      Box(872, 32, 100, 64, "result", "Boxes", "[B, N, 4]"),
      Box(388, 186, 140, 80, "features", "Map of the clip", "kept tokens; a learnt|one in the gaps"),
      Box(572, 186, 120, 80, "action", "Actor features", "RoIAlign of|every moment"),
      Box(726, 186, 114, 80, "action", "Refinement", "actors attend|to kept tokens"),
      Box(872, 194, 100, 64, "result", "Actions", "[B, N, K]"),
      Arrow([(96, 141), (126, 141)]),
      Arrow([(324, 120), (356, 120), (356, 64), (386, 64)]),
      Arrow([(324, 162), (356, 162), (356, 226), (386, 226)]),
      Arrow([(356, 226), (356, 296), (783, 296), (783, 268)], "kept tokens", (600, 290)),
      Arrow([(528, 64), (570, 64)]),
      Arrow([(732, 64), (870, 64)]),
      Arrow([(632, 104), (632, 184)], "boxes, made wider", (690, 150)),
      Arrow([(528, 226), (570, 226)]),
      Arrow([(692, 226), (724, 226)]),
      Arrow([(840, 226), (870, 226)]),
    ],
  )


def class_query() -> str:
  """Queries for people and, of each person, for classes."""
  looks = ["......|.##...|.#....|......", "....#.|...##.|......|......", "......|......|.###..|..#..."]
  return draw(
    332,
    "Class queries: an encoder mixes space, time and scales; a decoder finds people, and every class looks at each",
    [
      Box(8, 110, 88, 62, "video", "Clip", "T frames"),
      Box(130, 92, 130, 98, "features", "ViT or CSN", "four levels|[B, t, h, w, D]"),
      Box(
        296,
        92,
        176,
        98,
        "features",
        "Deformable encoder",
        "each cell looks at a few|places of each level,|in space and time",
      ),
      Slices(282, 232, "action", looks, "one person, three classes"),
      Frame(520, 10, 290, 312, "decoder layer, repeated"),
      Box(
        540, 40, 250, 86, "place", "Localizing layer", "N boxes and embeddings look at|the levels; each finds a person"
      ),
      Box(
        540,
        204,
        250,
        98,
        "action",
        "Classifying layer",
        "K class queries of each person|look at that person's context:|a map of attention for each class",
      ),
      Box(868, 50, 104, 66, "result", "Boxes", "[B, F, N, 4]"),
      Box(868, 220, 104, 66, "result", "Actions", "[B, F, N, K]"),
      Arrow([(96, 141), (128, 141)]),
      Arrow([(260, 141), (294, 141)]),
      Arrow([(472, 141), (498, 141), (498, 83), (538, 83)]),
      Arrow([(600, 126), (600, 202)], "context of each person", (682, 168)),
      Arrow([(790, 83), (866, 83)]),
      Arrow([(790, 253), (866, 253)]),
    ],
  )


def bmvit() -> str:
  """Tokens are the detections."""
  none, full = "....|....|....|....", "####|####|####|####"
  return draw(
    270,
    "BMViT: tokens of the two slices at the keyframe give boxes; the means of past and future give actions",
    [
      Box(8, 100, 88, 62, "video", "Clip", "T frames"),
      Box(130, 78, 150, 106, "features", "Backbone", "MViTv2, ViT or Hiera|tokens|[B, t, h, w, C]"),
      Slices(
        330, 30, "place", [none] * 3 + [full] * 2 + [none] * 3, "detection tokens: the two slices at the keyframe"
      ),
      Note(522, 134, "N = 2 h w tokens of each kind; they belong together one to one"),
      Slices(330, 186, "action", [full] * 8, "action tokens: the mean of the past and that of the future"),
      Box(758, 14, 100, 50, "place", "Box head"),
      Box(758, 82, 100, 50, "place", "Actor head"),
      Box(758, 180, 100, 50, "action", "Action head"),
      Box(886, 8, 88, 62, "result", "Boxes", "[B, N, 4]"),
      Box(886, 76, 88, 62, "result", "Actor?", "[B, N, 2]"),
      Box(886, 174, 88, 62, "result", "Actions", "[B, N, K]"),
      Arrow([(96, 131), (128, 131)]),
      Arrow([(280, 110), (304, 110), (304, 49), (326, 49)]),
      Arrow([(280, 152), (304, 152), (304, 205), (326, 205)]),
      Arrow([(718, 49), (738, 49), (738, 39), (756, 39)]),
      Arrow([(718, 49), (738, 49), (738, 107), (756, 107)]),
      Arrow([(718, 205), (756, 205)]),
      Arrow([(858, 39), (884, 39)]),
      Arrow([(858, 107), (884, 107)]),
      Arrow([(858, 205), (884, 205)]),
    ],
  )


def action_transformer() -> str:
  """A person's region asks the whole clip."""
  looks = [
    "......|..#...|..##..|......",
    "......|..##..|..#...|...#..",
    "....#.|..###.|..#...|......",
    "....#.|...#..|......|......",
  ]
  return draw(
    310,
    "Video Action Transformer: proposals of the centre slice become queries that attend to the whole clip",
    [
      Box(8, 110, 88, 62, "video", "Clip", "T frames"),
      Box(130, 88, 150, 106, "features", "I3D, to Mixed_4f", "features|[B, t, h, w, C]"),
      Slices(258, 232, "action", looks, "where one person looks, at all times"),
      Box(340, 14, 170, 86, "place", "Proposal network", "people in the centre slice|[B, N, 4]"),
      Box(580, 14, 170, 86, "action", "Query", "RoIPool: 7 x 7 cells of|each person [B, N, D]"),
      Box(580, 186, 170, 106, "action", "Tx head", "3 layers of 2 units:|each person attends to|all cells of the clip"),
      Box(852, 116, 120, 66, "result", "Boxes", "refined [B, N, 4]"),
      Box(852, 206, 120, 66, "result", "Actions", "[B, N, 1 + K]"),
      Arrow([(96, 141), (128, 141)]),
      Arrow([(280, 120), (310, 120), (310, 57), (338, 57)], "centre slice", (268, 76)),
      Arrow([(510, 57), (578, 57)]),
      Arrow([(665, 100), (665, 184)]),
      Arrow([(280, 162), (555, 162), (555, 212), (578, 212)], "keys and values, with place and time", (420, 155)),
      Arrow([(750, 239), (850, 239)]),
      Arrow([(750, 239), (800, 239), (800, 149), (850, 149)]),
    ],
  )


def st_context() -> str:
  """Given people attend to places, then to moments."""
  return draw(
    300,
    "Spatio-Temporal Context: tokens of given people attend to the places of the scene, then to its moments",
    [
      Box(8, 150, 88, 62, "video", "Clip", "T frames"),
      Box(130, 122, 150, 118, "features", "SlowFast", "slow [B, t, h, w, C]|fast [B, T, h, w, C']"),
      Box(130, 24, 150, 68, "video", "Given people", "boxes [B, P, 4]"),
      Box(324, 16, 136, 84, "action", "Actor tokens", "RoIAlign of both|maps: 7 x 7 each"),
      Box(500, 16, 136, 84, "action", "Spatial context", "tokens attend to|h w places"),
      Box(676, 16, 140, 84, "action", "Temporal context", "tokens attend to|T moments"),
      Box(856, 16, 116, 84, "result", "Actions", "of each actor's|largest values|[B, P, K]"),
      Slices(533, 162, "features", ["#######|#######|#######|#######"], "slow map, mean over time"),
      Slices(676, 192, "features", ["##############"], "fast map, mean over space"),
      Arrow([(96, 181), (128, 181)]),
      Arrow([(280, 58), (322, 58)]),
      Arrow([(280, 146), (392, 146), (392, 102)]),
      Arrow([(280, 181), (529, 181)]),
      Arrow([(568, 158), (568, 102)]),
      Arrow([(280, 222), (310, 222), (310, 262), (746, 262), (746, 222)]),
      Arrow([(746, 188), (746, 102)]),
      Arrow([(460, 58), (498, 58)]),
      Arrow([(636, 58), (674, 58)]),
      Arrow([(816, 58), (854, 58)]),
    ],
  )


FIGURES = (evad, class_query, bmvit, action_transformer, st_context)

if __name__ == "__main__":
  for figure in FIGURES:
    (FOLDER / f"{figure.__name__}.svg").write_text(figure(), encoding="utf-8")
