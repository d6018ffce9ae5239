"""Data sets from what disks hold: ``python -m vad_jax.datasets.prepare SET --source DIR --output DIR``.

Makes a folder in the layout of data/README.md out of AVA, JHMDB51-21, UCF101-24 or videos of one's own. After an
interruption of any kind the same command goes on where it stopped, and on a complete set it changes nothing.
"""

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vad_jax.datasets import SPLITS, ava, jhmdb_ucf, records, source_set, synthetic
from vad_jax.datasets.source_set import Problems, SourceSet


def _ava(options: argparse.Namespace) -> None:
  read = functools.partial(
    ava.read,
    options.source,
    annotation_dir=options.annotations,
    version=options.version,
    layout=options.layout,
    proposal_files=options.proposals,
  )
  _prepare("ava", read, options)


def _tubes(kind: str, options: argparse.Namespace) -> None:
  read = functools.partial(jhmdb_ucf.read, kind, options.source, annotation_file=options.annotations, fps=options.fps)
  _prepare(kind, read, options)


def _synthetic(options: argparse.Namespace) -> None:
  synthetic.make(
    options.output,
    level=options.level,
    num_train=options.num_train,
    num_val=options.num_val,
    size=options.size,
    seconds=options.seconds,
    fps=options.fps,
    seed=options.seed,
    workers=options.workers,
  )
  for split in SPLITS:
    records.build(options.output, options.output / "records", split, **_encoding(options))
  print(f"{options.output}: made")


def _prepare(kind: str, read: Callable[[Problems], SourceSet], options: argparse.Namespace) -> None:
  """Reads a set and writes it, and says what it found."""
  begun = time.monotonic()
  source_set.check_output(options.output, options.source, kind)
  problems = Problems()
  found = read(problems)
  videos = ", ".join(f"{len(sources):,} videos of {split}" for split, sources in found.videos.items())
  print(f"{options.source}: {videos}; layout: {found.made_from['layout']}", flush=True)
  source_set.write(found, options.output, problems, **_encoding(options))
  for name, rows in found.tables.items():
    keyframes = len(set(zip(rows.video.tolist(), rows.timestamp.tolist(), strict=True)))
    print(f"  {name}.csv: {len(rows.action):,} rows of {keyframes:,} keyframes")
  for line in problems.summary():
    print(f"  {line}")
  print(f"{options.output}: complete after {time.monotonic() - begun:.0f} s; all problems are in problems.json")


def _encoding(options: argparse.Namespace) -> dict[str, Any]:
  return {"workers": options.workers, "short_side": options.short_side, "quality": options.quality}


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise ValueError
  return value


def _quality(text: str) -> int:
  value = int(text)
  if not 1 <= value <= 100:
    raise argparse.ArgumentTypeError(f"{text} is not from 1 to 100")
  return value


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.datasets.prepare",
    description="Makes a data set in the layout of data/README.md. The same command goes on after an interruption.",
  )
  sets = parser.add_subparsers(required=True, metavar="SET", help="which set")
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the set that is made")
  common.add_argument("--workers", type=_positive, metavar="N", help="threads; by default one for each core")
  common.add_argument("--short-side", type=_positive, metavar="N", help="shrink larger frames to this, in pixels")
  common.add_argument("--quality", type=_quality, default=95, metavar="N", help="of JPEGs, 1 to 100; default 95")
  source = argparse.ArgumentParser(add_help=False)
  source.add_argument("--source", type=Path, required=True, metavar="DIR", help="what you have of the set")

  add = functools.partial(sets.add_parser, parents=[source, common])
  parser_ava = add("ava", help="AVA 2.1 or 2.2: movies, 15-minute cuts or extracted frames")
  parser_ava.add_argument("--annotations", type=Path, metavar="DIR", help="official CSVs; by default in the source")
  parser_ava.add_argument("--version", choices=("2.1", "2.2"), help="of the annotations, where there are several")
  parser_ava.add_argument("--layout", choices=ava.LAYOUTS, help="by default, what most videos are in")
  parser_ava.add_argument(
    "--proposals", type=Path, nargs="+", default=(), metavar="FILE", help="predicted boxes: PySlowFast CSV, LFB pickle"
  )
  parser_ava.set_defaults(run=_ava)
  for kind, title in (("jhmdb", "JHMDB51-21"), ("ucf101_24", "UCF101-24")):
    name = jhmdb_ucf.ANNOTATIONS[kind]
    parser_tubes = add(kind, help=f"{title}: frames or original videos, and {name}")
    parser_tubes.add_argument("--annotations", type=Path, metavar="FILE", help=f"by default {name} in the source")
    parser_tubes.add_argument("--fps", type=float, help="frames a second of folders of frames; default 25")
    parser_tubes.set_defaults(run=functools.partial(_tubes, kind))
  parser_custom = add("custom", help="your own videos, with boxes from an annotation tool")
  if "custom" in arguments:
    custom = importlib.import_module("vad_jax.datasets.custom")
    custom.add_arguments(parser_custom)
    parser_custom.set_defaults(run=custom.prepare)
  parser_synthetic = sets.add_parser("synthetic", parents=[common], help="rendered people; needs no source")
  synthetic.add_arguments(parser_synthetic)
  parser_synthetic.set_defaults(run=_synthetic)
  return parser


def main(arguments: list[str] | None = None) -> None:
  """Command line."""
  arguments = sys.argv[1:] if arguments is None else arguments
  options = _parser(arguments).parse_args(arguments)
  try:
    options.run(options)
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit("\ninterrupted; the same command goes on where it stopped")


if __name__ == "__main__":
  main()
