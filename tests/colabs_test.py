"""The notebooks: each runs from its first to its last cell, at small settings."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import nbclient
import nbformat
import pytest
from safetensors.numpy import save_file

import vad_jax
from tests import golden_files
from tests.models.evad_parity_test import official_weights

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
SMALL: dict[str, dict[str, object]] = {
  "look_inside": {},  # small as it is
  "own_videos": {"CONFIG": "configs/custom.py:data=data/custom,tiny", "STEPS": 2},
  "published_weights": {
    "FILE": "released.safetensors",
    "OPTIONS": "--option variant=tiny",
    "VIDEOS": "data/sample/videos/val/easy_val_00000.mp4",
  },
  "quickstart": {"CONFIG": "configs/quickstart.py:tiny", "STEPS": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
  """What a notebook finds on Colab beside the package, and a file as it is released."""
  folder = tmp_path_factory.mktemp("clone")
  (folder / "data").mkdir()
  for name in ("configs", "data/sample"):
    (folder / name).symlink_to(ROOT / name)
  save_file(official_weights(golden_files.load("evad/evad_tiny")["manifest"]), folder / "released.safetensors")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    patch.setenv("MPLBACKEND", "agg")
    yield folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, folder: Path) -> None:
  notebook = nbformat.read(path, 4)
  (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
  names = {line.split(" = ")[0] for line in notebook.cells[place].source.splitlines()}
  assert set(SMALL[path.stem]) <= names
  small = "\n".join(f"{name} = {value!r}" for name, value in SMALL[path.stem].items())
  notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(small))
  # TensorFlow would take an accelerator for itself.
  notebook.cells.append(nbformat.v4.new_code_cell("assert 'tensorflow' not in sys.modules"))
  nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
  shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  kind = "image/png" if path.stem == "look_inside" else "video/mp4"
  assert any(kind in str(output.get("data")) for output in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_as_it_should_be_shared(path: Path) -> None:
  notebook = nbformat.read(path, 4)
  assert f"/blob/main/colabs/{path.name}" in notebook.cells[0].source
  assert f'VERSION = "v{vad_jax.__version__}"' in notebook.cells[1].source
  for cell in notebook.cells:
    assert not cell.get("outputs")
    assert cell.get("execution_count") is None
  assert f"colabs/{path.name}" in (ROOT / "README.md").read_text()
