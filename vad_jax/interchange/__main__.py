"""Command line: ``python -m vad_jax.interchange FILE --to FORMAT``."""

import argparse
import logging
import sys
from pathlib import Path

from vad_jax import annotations, checkpoint, interchange, predictions
from vad_jax.interchange.cvat import labels_file

_SUFFIXES = {"json": ".json", "coco": ".coco.json", "ava": ".ava.csv", "cvat": ".cvat.xml"}


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  logging.basicConfig(format="warning: %(message)s")
  options = _parse(arguments)
  source, to = options.input, options.to
  output = options.output or source.with_name(source.stem + _SUFFIXES[to])
  try:
    if output.exists() and (options.output is None or output.samefile(source)):
      raise ValueError(f"{output}: is there already; choose another --output")
    label_map = _label_map(options.labels) if options.labels else None
    result = interchange.read(source, options.video, label_map)
    if to == "coco":
      interchange.write_coco(result, output, label_map)
    elif to == "cvat":
      interchange.write_cvat(result, output, label_map)
    elif to == "ava":
      interchange.write_ava(result, output)
    else:
      info = {"model": {"name": f"read from {source.name}"}, "step": None, "clip": None}
      predictions.write_json(result, output, info, {})
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  people = sum(len(keyframe.boxes) for keyframe in result.keyframes)
  print(f"{source}: {people} people in {len(result.keyframes)} keyframes of {result.source}")
  print(f"  {output}")
  if to == "cvat":
    print(f"  {labels_file(output)}: the label, for the tab Raw of a new task of CVAT")
  return 0


def _label_map(name: str) -> dict[int, str]:
  if checkpoint.is_checkpoint(name):
    return checkpoint.load_arrays(name)[1]["label_map"]
  return annotations.read_label_map(name)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.interchange", description="Takes detections to the formats of other tools, and back."
  )
  parser.add_argument("input", type=Path, help="JSON of vad_jax.predict, COCO-video JSON, AVA CSV or CVAT XML")
  parser.add_argument("--to", choices=_SUFFIXES, required=True, help="format to write")
  parser.add_argument(
    "--output", type=Path, metavar="FILE", help="default: like the input, with the suffix of the format"
  )
  parser.add_argument(
    "--video", type=Path, metavar="FILE", help="the video; JSON of vad_jax.predict says itself where it was"
  )
  parser.add_argument(
    "--labels",
    metavar="NAME",
    help="all actions there are: the checkpoint that was used, a .pbtxt, `ava_60` or `ava_80`; AVA CSV has no names "
    "without, CVAT offers only the actions that somebody does",
  )
  return parser.parse_args(arguments)


if __name__ == "__main__":
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit("stopped; the output is not complete")
