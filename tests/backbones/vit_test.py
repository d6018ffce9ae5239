"""The video ViT against VideoMAE's official code, on seeded weights in the official names and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden_files, seeded
from vad_jax import convert
from vad_jax.backbones.vit import ViT
from vad_jax.layers.position import sincos_positions, video_positions

FLOAT32, FLOAT64 = 2e-4, 1e-6  # of the tap's standard deviation


def official_taps(recorded: dict, dtype: jnp.dtype) -> dict[str, np.ndarray]:
  """Runs our network, and after it the official classifier, which we do not have, from its weights."""
  config = recorded["config"]
  weights = {name: seeded.fill(name, shape) for name, shape in recorded["manifest"].items()}
  (clip,) = recorded["inputs"]
  video = seeded.seeded(clip["key"], clip["shape"]).transpose(0, 2, 3, 4, 1).astype(dtype)
  model = ViT(
    width=config["embed_dim"],
    depth=config["depth"],
    heads=config["heads"],
    trained_side=config["img_size"][0] // config["patch"],
    rngs=nnx.Rngs(0),
  )
  mean_first = config["use_mean_pooling"]
  norm = {f"norm.{leaf}": weights[f"{'fc_' * mean_first}norm.{leaf}"] for leaf in ("weight", "bias")}
  convert.load_reference(model, weights | norm)
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, video):
    model = nnx.merge(graphdef, state)
    patches = model.patch_embed(video)
    x = model.embed(video).reshape(len(video), -1, model.width)
    blocks = []
    positions = jnp.asarray(video_positions(model.width, patches.shape[1:4], model.trained_side))
    taps = {"patch_embed": patches.reshape(x.shape), "tokens_in": x, "pos_embed": positions.reshape(1, *x.shape[1:])}
    for block in model.blocks:
      x = block(x)
      blocks.append(x)
    return taps, blocks, model.norm(x), model.norm(x.mean(1))

  state = jax.tree.map(lambda x: x.astype(dtype), state)
  taps, blocks, normed, norm_of_mean = run(state, video)
  taps |= {f"block{index:02d}": x for index, x in enumerate(blocks)}
  features = norm_of_mean if mean_first else normed[:, 0]
  taps |= {
    "tokens_pre_norm": blocks[-1],
    "tokens_normed": normed,
    "norm_of_mean": norm_of_mean,
    "forward_features": features,
  }
  taps["logits"] = features @ weights["head.weight"].T.astype(dtype) + weights["head.bias"]
  return taps


@pytest.mark.parametrize("name", ["tiny_8x64", "vit_s_16x112_tokennorm", "vit_s_16x224", "vit_b_16x224"])
def test_equals_official_code(name: str) -> None:
  recorded = golden_files.load(f"videomae/{name}")
  with jax.default_matmul_precision("highest"):
    taps = official_taps(recorded, jnp.float32)
  check(taps, recorded, FLOAT32)


@pytest.mark.parametrize("name", ["tiny_8x64", "vit_s_16x112_tokennorm"])
def test_equals_official_code_in_float64(name: str) -> None:
  """Only here a LayerNorm's epsilon and the kind of GELU show."""
  recorded = golden_files.load(f"videomae/{name}")
  with jax.enable_x64(True):
    check(official_taps(recorded, jnp.float64), recorded, FLOAT64)


def check(taps: dict, recorded: dict, limit: float) -> None:
  for name, tap in recorded["taps"].items():
    golden_files.assert_tap(taps[name], tap, limit, name)


def test_positions_are_resized_as_in_evad() -> None:
  """EVAD resizes the table of 224 pixels; a table computed for the other grid is not the same."""
  recorded = golden_files.load("videomae/pos_resize")["taps"]
  golden_files.assert_tap(sincos_positions(1568, 768)[None], recorded["table_1568x768"], 1e-6)
  for grid in ("18x18", "16x16", "14x20"):
    h, w = map(int, grid.split("x"))
    resized, fresh = video_positions(768, (8, h, w), 14), sincos_positions(8 * h * w, 768)
    golden_files.assert_tap(resized.reshape(recorded[f"bicubic_{grid}"]["shape"]), recorded[f"bicubic_{grid}"], 1e-5)
    golden_files.assert_tap(
      fresh.reshape(recorded[f"fresh_table_{grid}"]["shape"]), recorded[f"fresh_table_{grid}"], 1e-6
    )
