"""What all pages of results share: the layout, charts, and the same numbers as JSON beside them.

A page opens offline and needs no JavaScript: charts and pictures are part of it, and so is a small video.
"""

import base64
import json
import math
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

import vad_jax
from vad_jax.annotations import PathLike

_INLINE_VIDEO_BYTES = 6 << 20  # larger videos stay a file beside the page


class Chart(NamedTuple):
  """Bars in percent."""

  title: str
  axis: str
  bars: list[tuple[str, float, str]]  # name, value, note
  top: float  # of the scale
  ticks: list[float]
  colored: bool = False  # each bar in the colour of the mistake that it is named after


def write_page(
  path: PathLike,
  template: str,
  *,
  title: str,
  headline: Sequence[tuple[str, str]],
  facts: Mapping[str, Any],
  numbers: Mapping[str, Any],
  video: PathLike | None,
  maps: Sequence[PathLike],
  config: Mapping[str, Any] | None,
  warnings: Sequence[str],
  **parts: Any,
) -> None:
  """Writes a page, and its numbers to a file of the same name that ends in ``.json``.

  Args:
    path: the HTML file; its directory has to exist.
    template: name of the file in this folder that fills the layout ``page.html``.
    title: heading.
    headline: names and numbers in large type.
    facts: what was scored and how; a table at the end.
    numbers: what the JSON holds besides title, warnings and settings.
    video: an mp4; becomes part of the page when it is small, else a link relative to the page.
    maps: pictures of what the model sees where in that video.
    config: settings of the run, shown folded.
    warnings: sentences that the reader should know before the numbers.
    **parts: what the template needs besides.

  Raises:
    FileNotFoundError: there is no such video or directory.
  """
  path = Path(path)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("vad_jax.metrics", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {"percent": percent, "points": _points, "number": _number}
  page = environment.get_template(template).render(
    title=title,
    headline=headline,
    warnings=warnings,
    facts=facts,
    video=None if video is None else _video_source(Path(video), path),
    maps=[data_uri("image/png", Path(picture).read_bytes()) for picture in maps],
    config=None if config is None else json.dumps(config, indent=2, default=str),
    json_name=path.with_suffix(".json").name,
    version=vad_jax.__version__,
    **parts,
  )
  content = {"title": title, **numbers, "warnings": warnings, "config": config}
  _write(path, page)
  _write(path.with_suffix(".json"), json.dumps(to_json(content), indent=1, default=str, allow_nan=False) + "\n")


def chart(title: str, axis: str, bars: list[tuple[str, float, str]], colored: bool = False) -> Chart:
  """A chart of bars ``(name, value, note)``, with a scale that fits them."""
  largest = max((value for _, value, _ in bars if not math.isnan(value)), default=0.0)
  step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if largest <= 4 * step or step == 0.25)
  return Chart(title, axis, bars, 4 * step, [index * step for index in range(5)], colored)


def to_json(value: Any) -> Any:
  """Turns results into what `json.dump` writes: arrays and tuples to lists or objects, NaN to null."""
  if hasattr(value, "_asdict"):
    return to_json(value._asdict())
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, np.ndarray | np.generic):
    return to_json(value.tolist())
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(value: float) -> str:
  """Seconds in words."""
  minutes, seconds = divmod(round(value), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def percent(value: float) -> str:
  """A fraction as a percentage; a dash for NaN."""
  return "–" if math.isnan(value) else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _points(value: float) -> str:
  return "–" if math.isnan(value) else f"{100 * value:+.1f}".replace("-", "−")


def _number(value: Any) -> str:
  if isinstance(value, int | np.integer):
    return f"{int(value):,}"
  return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _video_source(video: Path, page: Path) -> str:
  if video.stat().st_size <= _INLINE_VIDEO_BYTES:
    return data_uri("video/mp4", video.read_bytes())
  return urllib.parse.quote(Path(os.path.relpath(video, page.parent)).as_posix())


def data_uri(kind: str, data: bytes) -> str:
  """A file of a MIME type as part of a page."""
  return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _write(path: Path, text: str) -> None:
  unfinished = path.with_name(path.name + ".part")
  unfinished.write_text(text, encoding="utf-8")
  unfinished.replace(path)
