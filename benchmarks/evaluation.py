"""What does frame-mAP cost at the size of AVA's validation set?

    python benchmarks/evaluation.py

writes annotations and detections of 57,408 keyframes (and of a half and a quarter of them) and scores the same files
with `vad_jax.evaluate` and with `plain_frame_map`, which works as the official evaluator does: keyframe by keyframe
and class by class. Each run is a process of its own; its processor time and its peak memory count, start-up included.
Takes some minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table

from vad_jax import progress
from vad_jax.annotations import read_label_map

NUM_VIDEOS = 64
TIMESTAMPS = range(902, 1799)
ROWS_OF_A_BOX = 20  # detected; annotated are 1.5 on average


class Cost(NamedTuple):
  cpu_seconds: float
  peak_mb: float


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--videos", type=int, default=NUM_VIDEOS, help="of 897 keyframes each; default: %(default)s")
  options = parser.parse_args()
  table = rich.table.Table(
    *("keyframes", "rows", "seconds", "plain", "ratio", "MB", "plain", "ratio"),
    title="processor time and peak memory of frame-mAP",
  )
  with tempfile.TemporaryDirectory() as directory, progress.bar("benchmark", 3) as advance:
    truth, found, result = (Path(directory) / name for name in ("truth.csv", "found.csv", "result.json"))
    for num_videos in (options.videos // 4, options.videos // 2, options.videos):
      num_rows = write_files(truth, found, num_videos)
      _, ours = measure(
        *("-m", "vad_jax.evaluate", "--label-map", "ava_80", "--json", str(result)),
        *("--ground-truth", str(truth), "--detections", str(found)),
      )
      mean_ap = json.loads(result.read_text())["mAP"]
      output, plain = measure(str(Path(__file__).with_name("plain_frame_map.py")), str(truth), str(found))
      if abs(mean_ap - float(output)) > 1e-12:
        sys.exit(f"error: mAP differs: {mean_ap!r}, and by the plain implementation {output}")
      table.add_row(
        f"{num_videos * len(TIMESTAMPS):,}",
        f"{num_rows:,}",
        *(f"{ours.cpu_seconds:.1f}", f"{plain.cpu_seconds:.1f}", f"{ours.cpu_seconds / plain.cpu_seconds:.3f}"),
        *(f"{ours.peak_mb:.0f}", f"{plain.peak_mb:.0f}", f"{ours.peak_mb / plain.peak_mb:.3f}"),
      )
      advance(note=f"mAP {mean_ap:.6f}")
  rich.console.Console().print(table)


def write_files(truth: Path, found: Path, num_videos: int) -> int:
  """Writes annotations like AVA's and noisy detections of the same people; returns the number of detections."""
  rng = np.random.default_rng(0)
  classes = sorted(read_label_map("ava_60"))
  num_rows = 0
  with truth.open("w") as truth_file, found.open("w") as found_file:
    for video in range(num_videos):
      for timestamp in TIMESTAMPS:
        for person in range(rng.choice((1, 2, 3), p=(0.4, 0.32, 0.28))):
          corner, size = rng.uniform(0, 0.5, 2), rng.uniform(0.1, 0.5, 2)
          box = np.concatenate([corner, corner + size])
          own = rng.choice(classes, rng.integers(1, 3), replace=False)
          place = f"video{video:06d},{timestamp:04d}"
          text = ",".join(f"{value:.3f}" for value in box)
          truth_file.writelines(f"{place},{text},{action},{person}\n" for action in own)
          text = ",".join(f"{value:.3f}" for value in box + rng.normal(0, 0.02, 4))
          guesses = rng.choice(classes, ROWS_OF_A_BOX, replace=False)
          guesses[: len(own)] = own
          scores = rng.beta(1, 4, len(guesses))
          scores[: len(own)] += 0.2
          found_file.writelines(
            f"{place},{text},{action},{score:.4f}\n" for action, score in zip(guesses, scores, strict=True)
          )
          num_rows += len(guesses)
  return num_rows


def measure(*arguments: str) -> tuple[str, Cost]:
  """Runs Python with these arguments; returns what it printed and what it cost."""
  with tempfile.TemporaryFile("w+") as output:
    process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
      sys.exit(f"error: {' '.join(arguments)} failed; run it by itself to see why")
    output.seek(0)
    peak_mb = usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    return output.read(), Cost(usage.ru_utime + usage.ru_stime, peak_mb)


if __name__ == "__main__":
  main()
