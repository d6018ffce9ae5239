"""The shape of the code: who may import whom, and how long files and functions may get."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "vad_jax").rglob("*.py"))

# What each part of vad_jax may import of the others, besides itself, and which may be used everywhere.
EVERYWHERE = {"", "batch", "annotations", "progress", "rngs", "safe_pickle", "tubes"}
ALLOWED = {
  "ops": set(),
  "layers": {"ops"},
  "backbones": {"layers", "ops"},
  "models": {"backbones", "layers", "ops"},
  "datasets": {"ops", "visualize"},
  "metrics": {"ops"},
  "visualize": set(),
  "optim": set(),
  "sharding": set(),
  "processes": set(),
  "logs": {"visualize"},
  "checkpoint": {"models", "optim"},
  "torch_files": set(),
  "weight_files": {"torch_files"},
  "interchange": {"checkpoint", "datasets", "person_boxes", "predictions"},
  "convert": {"models", "layers", "checkpoint", "published", "weight_files"},
  "published": {"models", "backbones"},
  "papers": set(),
  "describe": {"models", "checkpoint", "papers", "sharding", "topology"},
  "topology": {"optim", "sharding", "train"},
  "train": {"checkpoint", "optim", "sharding", "ops"},
  "evaluate": {"sharding", "metrics"},
  "doctor": {"metrics"},
  "person_boxes": {"datasets", "ops"},
  "detect": {"datasets", "person_boxes"},
  "predictions": {"datasets", "ops", "person_boxes", "visualize"},
  "export": {"checkpoint", "datasets"},
  "live": {"checkpoint", "datasets", "detect", "person_boxes", "predictions"},
  "predict": {"checkpoint", "datasets", "detect", "live", "metrics", "person_boxes", "predictions", "visualize"},
  "demo": {"checkpoint", "datasets", "person_boxes", "predict", "predictions", "visualize"},
  "main": {
    *("checkpoint", "convert", "datasets", "evaluate", "metrics", "models", "optim", "predict", "sharding", "train"),
    *("describe", "logs", "person_boxes", "processes", "visualize"),
  },
}
# Packages that only these modules may import.
KEPT_IN = {
  "clu": {"logs"},
  "tensorflow": {"export", "logs", "weight_files"},
  "safetensors": {"weight_files"},
  "orbax": {"checkpoint"},
  "grain": {"datasets/loader"},
  "torch": {"convert"},
  "av": {"datasets/sound", "datasets/video", "live", "predictions"},
  "gradio": {"demo/__main__", "demo/page"},
  "configs": set(),
  "data": set(),
}
TRAINING_LOOP = ("train", "train")  # reads best in one piece


def name_of(path: Path) -> str:
  return path.relative_to(ROOT / "vad_jax").with_suffix("").as_posix()


def part_of(path: Path) -> str:
  return name_of(path).split("/")[0].replace("__init__", "")


def imported(path: Path) -> Iterator[str]:
  """Dotted names of all modules that a file imports, at its top or later; `from a import b` gives `a.b`."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
  part = part_of(path)
  assert not part or part in ALLOWED | dict.fromkeys(EVERYWHERE), f"say in this test what {part} may import"
  for name in imported(path):
    package, _, rest = name.partition(".")
    if package in KEPT_IN:
      assert name_of(path) in KEPT_IN[package], f"{name} is imported; only {KEPT_IN[package]} may"
    if package == "vad_jax":
      other = rest.partition(".")[0]
      assert other in EVERYWHERE | {part, "__version__"} | ALLOWED.get(part, set()), f"{part} may not import {other}"


@pytest.mark.parametrize("path", [f for f in FILES if part_of(f) in ("metrics", "visualize")], ids=name_of)
def test_scoring_and_drawing_need_no_jax(path: Path) -> None:
  assert not {"jax", "flax"} & {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_too_long(path: Path) -> None:
  text = path.read_text()
  assert len(text.splitlines()) <= 600
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef) and (name_of(path), node.name) != TRAINING_LOOP:
      length = (node.end_lineno or 0) - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
      assert length <= 80, f"{node.name} has {length} lines besides its docstring"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("configs/*.py")), ids=lambda path: path.name)
def test_configs_import_no_library_code(path: Path) -> None:
  assert {name.partition(".")[0] for name in imported(path)} <= {
    "configs",
    "ml_collections",
    "typing",
    "difflib",
  }


def test_training_names_no_model_and_no_data_set() -> None:
  names = "|".join((*(f.stem for f in (ROOT / "vad_jax/models").glob("[!_]*.py")), "ava", "synthetic", "jhmdb"))
  for module in ("train", "evaluate", "checkpoint", "optim", "sharding"):
    found = re.findall(rf"\b({names})\b", (ROOT / f"vad_jax/{module}.py").read_text(), re.IGNORECASE)
    assert not set(found) - {"AVA"}, module  # the protocol may be named
