"""Which tokens of BMViT should detect, and which classify? Table 1b of the paper, on rendered people.

    python benchmarks/bmvit_tokens.py
    python benchmarks/bmvit_tokens.py --steps 3000 --seeds 3 --workdir runs/tokens

Trains ``configs/bmvit_mvitv2s.py:tiny`` once for each selection, all else equal, and prints one table. A run that is
complete is not made again, and one that was interrupted goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import rich.console
import rich.table

REPOSITORY = Path(__file__).parent.parent
PAPER = {"centre": 29.1, "2(c+t)": 30.0, "tubelet": 28.7, "singleton": 28.5, "max_class": 28.3}  # mAP on AVA 2.2


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=500, help="training steps of each run; default: %(default)s")
  parser.add_argument("--seeds", type=int, default=1, help="runs of each selection; default: %(default)s")
  parser.add_argument("--workdir", type=Path, default=Path("runs/bmvit_tokens"), help="default: %(default)s")
  options = parser.parse_args()
  table = rich.table.Table(title=f"{options.steps} steps, {options.seeds} seeds, rendered people")
  for column in ("tokens", "frame-mAP@0.5 %", "person AP@0.5 %", "steps/s", "paper: mAP on AVA %"):
    table.add_column(column, justify="left" if column == "tokens" else "right")
  for tokens, published in PAPER.items():
    runs = [train(tokens, seed, options.steps, options.workdir) for seed in range(options.seeds)]
    scores = [spread([100 * run[key] for run in runs]) for key in ("frame_map_50", "person_ap_50")]
    speed = spread([run["steps_per_second"] for run in runs])
    table.add_row(tokens, *scores, speed, f"{published}")
  rich.console.Console().print(table)


def train(tokens: str, seed: int, steps: int, workdir: Path) -> dict[str, float]:
  """Trains and evaluates one model; returns its numbers."""
  directory = workdir / f"{tokens}_{steps}_{seed}"
  if not (directory / "metrics.json").exists():
    command = [sys.executable, "-m", "vad_jax.main", "--config", f"configs/bmvit_mvitv2s.py:tiny,tokens={tokens}"]
    command += ["--workdir", str(directory.absolute()), f"--config.num_steps={steps}", f"--config.seed={seed}"]
    print(f"{tokens}, seed {seed}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
  return json.loads((directory / "metrics.json").read_text())


def spread(values: list[float]) -> str:
  """Mean, and the standard deviation where there are several."""
  return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
  main()
