"""The timeline of a result as HTML: who is seen when, and when each does what."""

import itertools
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from vad_jax import visualize
from vad_jax.predictions import Prediction

_TICKS = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600)  # seconds
_MOST_TICKS = 7

_TEMPLATE = jinja2.Environment(
  autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string(Path(__file__).with_name("timeline.html").read_text(encoding="utf-8"))


class Segment(NamedTuple):
  """Seconds in a row, with the mean score there."""

  start: float
  end: float
  score: float


class Row(NamedTuple):
  """One action of one person."""

  action: int
  name: str
  segments: list[Segment]


class Person(NamedTuple):
  """One person of the video: number, colour of the boxes, when seen, and what is done, most of it first."""

  number: int
  color: str
  seen: list[Segment]
  rows: list[Row]


def people(result: Prediction, seconds: float) -> list[Person]:
  """Who does what when, by the number of the person.

  Args:
    result: what was found.
    seconds: length of the video; the last keyframe holds until then.
  """
  ends = [keyframe.time for keyframe in result.keyframes[1:]] + [seconds]
  seen: dict[int, list[Segment]] = {}
  done: dict[tuple[int, int, str], list[Segment]] = {}
  for keyframe, end in zip(result.keyframes, ends, strict=True):
    for person, score, actions in zip(keyframe.person, keyframe.actor_score, keyframe.actions, strict=True):
      seen.setdefault(int(person), []).append(Segment(keyframe.time, end, float(score)))
      for action in actions:
        done.setdefault((int(person), action.id, action.name), []).append(Segment(keyframe.time, end, action.score))
  return [
    Person(
      number,
      "rgb({}, {}, {})".format(*visualize.color_of(number - 1)),
      _joined(seen[number]),
      sorted(
        (Row(action, name, _joined(parts)) for (person, action, name), parts in done.items() if person == number),
        key=lambda row: -sum((part.end - part.start) * part.score for part in row.segments),
      ),
    )
    for number in sorted(seen)
  ]


def html(result: Prediction, seconds: float) -> str:
  """The timeline to show beside the video; what it does when it is clicked is in ``timeline.js``."""
  step = next((step for step in _TICKS if seconds / step <= _MOST_TICKS), seconds)
  ticks = np.arange(0, seconds, step).tolist()
  return _TEMPLATE.render(people=people(result, seconds), seconds=seconds, ticks=ticks)


def _joined(parts: list[Segment]) -> list[Segment]:
  """Joins the segments that follow each other without a gap."""
  joined, group = [], [parts[0]]
  for before, part in [*itertools.pairwise(parts), (parts[-1], Segment(np.inf, np.inf, 0))]:
    if part.start > before.end:
      score = float(np.mean([member.score for member in group]))
      joined.append(Segment(group[0].start, before.end, score))
      group = []
    group.append(part)
  return joined
