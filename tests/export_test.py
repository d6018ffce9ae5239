"""Exported models, run in processes that know nothing of this library."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tests.seeded import seeded
from vad_jax import checkpoint, export, models
from vad_jax.rngs import make_rngs

SYSTEMS = {  # config and its argument
  "evad": ("quickstart", "tiny"),
  "class_query": ("class_query_vitb", "tiny"),
  "bmvit": ("bmvit_mvitv2s", "tiny"),
  "action_transformer": ("action_transformer_i3d", "tiny"),
  "st_context": ("st_context_slowfast_r50", "tiny"),
}
PEOPLE = 3
CLIPS = 2

JAX_ALONE = """
import sys, pathlib, numpy as np
from jax import export

for name in sys.argv[2:]:
  folder = pathlib.Path(sys.argv[1])
  program = export.deserialize((folder / f"{name}.stablehlo").read_bytes())
  np.savez(folder / f"{name}_stablehlo.npz", **program.call(dict(np.load(folder / f"{name}_inputs.npz"))))
assert not {"vad_jax", "flax"} & set(sys.modules)
"""

TENSORFLOW_ALONE = """
import sys, pathlib, numpy as np, tensorflow as tf

for name in sys.argv[2:]:
  folder = pathlib.Path(sys.argv[1])
  detect = tf.saved_model.load(str(folder / f"{name}.saved_model")).signatures["serving_default"]
  found = detect(**{key: tf.constant(value) for key, value in np.load(folder / f"{name}_inputs.npz").items()})
  np.savez(folder / f"{name}_saved_model.npz", **{key: value.numpy() for key, value in found.items()})
assert "vad_jax" not in sys.modules
"""


def load(system: str) -> checkpoint.Loaded:
  """A small model with weights that are not those of its beginning, as if from a checkpoint."""
  module, argument = SYSTEMS[system]
  config = importlib.import_module(f"configs.{module}").get_config(argument)
  kwargs = {**config.model.to_dict(), "num_classes": 5, **({"layers": 1} if system == "class_query" else {})}
  graphdef, *state = checkpoint.split_model(nnx.eval_shape(lambda: models.build(**kwargs, rngs=make_rngs(0))))
  model = nnx.merge(graphdef, *jax.tree.map_with_path(weight, state))
  stretched = config.resize == "stretch"
  info = {"model": kwargs, "clip": config.clip.to_dict(), "canvas": list(config.canvas)}
  info |= {"short_side": None if stretched else config.short_side, "label_map": {1: "stand", 5: "wave"}}
  return checkpoint.Loaded(nnx.view(model, raise_if_not_found=False, deterministic=True), info)


def weight(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
  """Numbers that are made in no time, and with which the answer depends on the video."""
  noise = seeded(jax.tree_util.keystr(path), x.shape)
  kind = path[-1].key
  if kind == "kernel":
    return noise * np.sqrt(2 / np.prod(x.shape[:-1], dtype=np.float32))
  return 1 + 0.1 * np.abs(noise) if kind in ("scale", "var") else 0.1 * noise


def inputs_of(loaded: checkpoint.Loaded) -> dict[str, np.ndarray]:
  """Two clips, the second one with padding."""
  random = np.random.default_rng(0)
  height, width = loaded.info["canvas"]
  tiles = random.integers(0, 256, (CLIPS, loaded.info["clip"]["num_frames"], height // 16, width // 16, 3), np.uint8)
  video = tiles.repeat(16, 2).repeat(
    16, 3
  )  # of noise, all places look alike, and the best of them are a matter of luck
  video[1, :, :, width - 16 :] = 0
  inputs = {"video": video, "video_size": np.array([[height, width], [height, width - 16]], np.int32)}
  if hasattr(loaded.model, "takes_proposals"):
    corners = random.uniform(0, 0.5, (CLIPS, PEOPLE, 2))
    inputs["proposals"] = np.concatenate([corners, corners + 0.4], -1).astype(np.float32)
    inputs["proposal_mask"] = np.arange(PEOPLE) < np.array([[2], [PEOPLE]])
    inputs["proposal_score"] = random.uniform(size=(CLIPS, PEOPLE)).astype(np.float32)
  return inputs


def run_alone(program: str, folder: Path) -> None:
  """Runs a program in a fresh process from which the library cannot be imported."""
  command = [sys.executable, "-c", program, str(folder), *SYSTEMS]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A folder with all systems in all formats, their inputs, and what the models and the files answer."""
  folder = tmp_path_factory.mktemp("exported")
  for system in SYSTEMS:
    loaded = load(system)
    inputs = inputs_of(loaded)
    np.savez(folder / f"{system}_inputs.npz", **inputs)
    batch = inputs | {"key": np.zeros(CLIPS, np.int32)}
    found = nnx.jit(lambda model, batch: model.detections(model(batch), batch))(loaded.model, batch)
    np.savez(folder / f"{system}_expected.npz", **found._asdict())
    program = export.make_program(loaded, loaded.info["canvas"], people=PEOPLE)
    for form, write in export.FORMATS.items():
      write(program, folder / f"{system}.{form}")
  run_alone(JAX_ALONE, folder)
  run_alone(TENSORFLOW_ALONE, folder)
  return folder


@pytest.mark.parametrize("form", export.FORMATS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_files_detect_what_the_model_detects(exported, system, form):
  expected, found = (np.load(exported / f"{system}_{name}.npz") for name in ("expected", form))
  assert set(found) == set(expected)
  assert expected["valid"].any() and (expected["action_score"][0] != expected["action_score"][1]).any()
  for name in expected:
    assert found[name].dtype == expected[name].dtype
    np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=export.TOLERANCE, err_msg=name)


def quickstart(*arguments: object) -> int:
  return export.main(["--checkpoint", "quickstart", *map(str, arguments)])


def test_command_line_describes_what_it_wrote(tmp_path, capsys):
  path = tmp_path / "made" / "quickstart.stablehlo"
  assert quickstart("--format", "stablehlo", "--output", path, "--size", "64x96", "--batch", 2) == 0
  assert capsys.readouterr().out.split() == [str(path), f"{path}.json"]
  said = json.loads(Path(f"{path}.json").read_text())
  written = jax.export.deserialize(path.read_bytes())
  assert [tuple(x["shape"]) for x in said["inputs"]] == [x.shape for x in written.in_avals]
  assert [(tuple(x["shape"]), x["dtype"]) for x in said["outputs"]] == [(x.shape, x.dtype) for x in written.out_avals]
  assert [x["name"] for x in said["inputs"]] == ["video", "video_size"]
  assert said["inputs"][0]["shape"] == [2, 8, 64, 96, 3]
  assert said["clip"]["seconds_from_keyframe"][said["clip"]["num_frames"] // 2] == 0
  assert said["label_map"]["1"] == "bend/bow (at the waist)"
  assert set(said["platforms"]) == {"cpu", "cuda", "tpu"}


def test_what_cannot_be_is_said_in_one_line(tmp_path, capsys, monkeypatch):
  path = tmp_path / "out"
  assert quickstart("--format", "stablehlo", "--output", path, "--size", "100x128") == 1
  assert capsys.readouterr().err == "error: --size 100x128: height and width must be multiples of 32\n"
  assert not path.exists()
  path.mkdir()
  assert quickstart("--format", "saved_model", "--output", path) == 1
  assert capsys.readouterr().err == f"error: {path}: exists already; remove it or choose another --output\n"
  monkeypatch.setattr(export, "_LARGEST_STABLEHLO", 1e6)
  assert quickstart("--format", "stablehlo", "--output", tmp_path / "large", "--batch", 1) == 1
  assert "do not fit a StableHLO file (2 GB); use --format saved_model" in capsys.readouterr().err
  with pytest.raises(SystemExit) as wrong_usage:
    quickstart("--format", "stablehlo", "--output", path, "--size", "64")
  assert wrong_usage.value.code == 2
  assert "'64' is not a height and width such as 288x512" in capsys.readouterr().err


def test_models_of_stretched_frames_have_one_size():
  loaded = load("bmvit")
  with pytest.raises(ValueError, match="the model takes frames stretched to 96x96 only"):
    export.export_model(loaded, "stablehlo", "unused", size=(128, 128))
