"""Explains an mAP of zero: compares detections with ground truth and names what does not fit.

    python -m vad_jax.doctor --detections results.csv --ground-truth ava_val_v2.2.csv

Each mistake is reported with the numbers that show it, how to undo it and, where that can be tried, the mAP before
and after. Large files are judged by a sample of keyframes. The exit code is 0 where nothing is wrong, else 1.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from vad_jax.annotations import read_excluded, read_label_map
from vad_jax.metrics.checks import CHECKS, Case, Finding, check_reading, edit_command, holds_scores
from vad_jax.metrics.repairs import percent, search
from vad_jax.metrics.trials import Bench, File, Plan, read


class Diagnosis(NamedTuple):
  """What is wrong with files.

  Attributes:
    findings: mistakes, the one that costs most first, and then notes.
    mean_ap: mAP of the files as they are; fraction.
    person_ap: class-agnostic AP of the files as they are; fraction.
    repaired: mAP with all repairs that were tried and helped.
    commands: shell commands that make these repairs; empty where there are none.
    num_sampled: annotated keyframes that all this was computed on.
    num_keyframes: annotated keyframes.
  """

  findings: list[Finding]
  mean_ap: float = 0.0
  person_ap: float = 0.0
  repaired: float = 0.0
  commands: tuple[str, ...] = ()
  num_sampled: int = 0
  num_keyframes: int = 0


def diagnose(
  truth: File, found: File, label_map: dict[int, str], *, excluded: set[tuple[str, float]] | None = None
) -> Diagnosis:
  """Names what is wrong with files of detections and ground truth.

  Args:
    truth: annotations.
    found: detections.
    label_map: class id to name; the classes to score.
    excluded: video and timestamp of keyframes to leave out.
  """
  findings = [*check_reading(truth), *check_reading(found)]
  for file, what in ((found, "detections"), (truth, "annotations")):
    if np.isnan(file.rows.boxes[:, 0]).all():
      cure = "lower the thresholds of the detector" if file is found else "give the annotations of these videos"
      return Diagnosis([*findings, Finding(f"there are no {what}", f"{file.path} holds no box", cure)])
  if holds_scores(truth.rows) and (found.rows.extra == np.rint(found.rows.extra)).all():
    swapped = diagnose(found, truth, label_map, excluded=excluded)
    before = Bench(truth, found, label_map).result(Plan())[0]
    finding = Finding(
      "files are swapped",
      f"{found.path} ends in whole numbers (person ids), {truth.path} in fractions (scores)",
      f"--detections {shlex.quote(truth.path)} --ground-truth {shlex.quote(found.path)}",
      before,
      swapped.mean_ap,
    )
    return swapped._replace(findings=[finding, *swapped.findings], mean_ap=before)
  bench = Bench(truth, found, label_map)
  plan = search(bench)
  case = Case(bench, plan, *bench.rows(plan), bench.result(plan)[0], excluded or set())
  for check in CHECKS:
    findings += check(case)
  findings.sort(key=_order)
  mean_ap, person = bench.result(Plan())
  commands = tuple(
    edit_command(file, *(repair.filters[side] for repair in plan if repair and repair.filters[side]))
    for side, file in enumerate((found, truth))
    if all(any(repair.filters) for repair in plan if repair) and any(r.filters[side] for r in plan if r)
  )
  return Diagnosis(findings, mean_ap, person, case.mean_ap, commands, len(bench.sample), len(bench.annotated))


def _order(finding: Finding) -> tuple[bool, float]:
  """Mistakes before notes, and what takes the largest share of the mAP first."""
  left = finding.before / finding.after if finding.before is not None and finding.after else 0.95
  return finding.note, left


# --- command line -------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m vad_jax.doctor", description="Names what is wrong with detections whose mAP is zero or low."
  )
  parser.add_argument("--detections", required=True, type=Path, help="AVA result CSV")
  parser.add_argument("--ground-truth", required=True, type=Path, help="AVA annotation CSV")
  parser.add_argument(
    "--label-map", default="ava_60", help="pbtxt file, ava_60 or ava_80: the classes to score; default: %(default)s"
  )
  parser.add_argument("--excluded", type=Path, help="CSV of video_id,timestamp: keyframes to leave out")
  parser.add_argument("--json", action="store_true", help="print JSON")
  options = parser.parse_args(arguments)
  try:
    label_map = read_label_map(options.label_map)
    excluded = read_excluded(options.excluded) if options.excluded else None
    truth, found = read(options.ground_truth), read(options.detections)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  diagnosis = diagnose(truth, found, label_map, excluded=excluded)
  if options.json:
    content = diagnosis._asdict() | {"findings": [finding._asdict() for finding in diagnosis.findings]}
    print(json.dumps(content, indent=2, ensure_ascii=False))
  else:
    _print(diagnosis)
  return 0 if all(finding.note for finding in diagnosis.findings) else 1


def _print(diagnosis: Diagnosis) -> None:
  console = Console(highlight=False, soft_wrap=True)
  sampled = "" if diagnosis.num_sampled == diagnosis.num_keyframes else f"a sample of {diagnosis.num_sampled:,} of "
  console.print(
    f"mAP@0.5 {percent(diagnosis.mean_ap)}, person AP {percent(diagnosis.person_ap)} on {sampled}"
    f"{diagnosis.num_keyframes:,} annotated keyframes"
  )
  wrong = [finding for finding in diagnosis.findings if not finding.note]
  if not wrong:
    console.print("Everything fine: nothing is wrong with these files.", style="bold green")
  for number, finding in enumerate(wrong, 1):
    _print_finding(console, f"{number}. {finding.name}", finding, "bold red")
  if sum(finding.after is not None for finding in wrong) > 1:
    console.print(f"\nAll repairs together: mAP {percent(diagnosis.repaired)}", style="bold")
    for command in diagnosis.commands:
      console.print(Text(f"   {command}"))
  for finding in diagnosis.findings:
    if finding.note:
      _print_finding(console, f"note: {finding.name}", finding, "bold")


def _print_finding(console: Console, title: str, finding: Finding, style: str) -> None:
  console.print()
  console.print(Text(title, style))
  console.print(Text(f"   evidence: {finding.evidence}"))
  if finding.before is not None and finding.after is not None:
    console.print(Text(f"   mAP:      {percent(finding.before)} -> {percent(finding.after)} with this undone"))
  console.print(Text(f"   cure:     {finding.cure}"))


if __name__ == "__main__":
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit("stopped")
