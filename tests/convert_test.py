"""Published weights, seeded under their official names and shapes, through every way in."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from flax import nnx
from safetensors.numpy import save_file

from tests import golden_files, seeded
from tests.models.class_query_parity_test import official_weights as released_weights
from tests.models.evad_parity_test import official_weights
from vad_jax import checkpoint, convert, models
from vad_jax.backbones import csn
from vad_jax.backbones.csn import CSN
from vad_jax.backbones.hiera import Hiera
from vad_jax.backbones.i3d import I3D
from vad_jax.backbones.mvit import MViT
from vad_jax.backbones.slowfast import SlowFast
from vad_jax.backbones.vit import ViT
from vad_jax.layers.position import linear_matrix, sincos_positions
from vad_jax.models import bmvit, class_query
from vad_jax.models.evad import EVAD
from vad_jax.models.st_context import SpatioTemporalContext

Weights = dict[str, np.ndarray]
TINY = {"width": 96, "depth": 3, "heads": 3}
MVIT = {"width": 32, "depths": (1, 1), "heads": 1}
SMALL = {"width": 16, "fast_width": 4, "depths": (1, 1, 1, 1)}
KINETICS_HEAD = {"head.projection.weight": np.zeros((400, 64)), "head.projection.bias": np.zeros(400)}
HIERA = {"width": 96, "depths": (1, 1), "heads": 1}


@pytest.fixture(scope="module")
def evad_weights() -> Weights:
  return official_weights(golden_files.load("evad/evad_tiny")["manifest"])


@pytest.fixture(scope="module")
def videomae() -> Weights:
  manifest = golden_files.load("videomae/tiny_8x64")["manifest"]
  return {name: seeded.fill(name, shape) for name, shape in manifest.items()}


def vit() -> ViT:
  return ViT(**TINY, rngs=nnx.Rngs(0))


def evad(**options: Any) -> EVAD:
  return EVAD(variant="tiny", rngs=nnx.Rngs(0), **options)


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
  return {".".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(model))}


def assert_same(a: nnx.Module, b: nnx.Module) -> None:
  a, b = parameters(a), parameters(b)
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


def to_hugging_face(weights: Weights) -> Weights:
  """The layout of the other publisher, as its files have it."""
  names = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.output.dense",
    "attn.q_bias": "attention.attention.q_bias",
    "attn.v_bias": "attention.attention.v_bias",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
  }
  found = {}
  for name, value in weights.items():
    if name.startswith(("fc_norm", "head")):
      found[name.replace("head", "classifier")] = value
      continue
    if name.endswith("qkv.weight"):
      layer = name.split(".")[1]
      for part, rows in zip(("query", "key", "value"), np.split(value, 3), strict=True):
        found[f"videomae.encoder.layer.{layer}.attention.attention.{part}.weight"] = rows
      continue
    for theirs, other in names.items():
      name = name.replace(theirs, other)
    found["videomae." + name.replace("blocks.", "encoder.layer.")] = value
  return found


def to_pretrained(weights: Weights) -> Weights:
  encoder = {f"encoder.{name}": value for name, value in weights.items() if not name.startswith(("fc_norm", "head"))}
  return {
    **encoder,
    "encoder.norm.weight": np.full(96, 2, np.float32),
    "encoder.norm.bias": np.full(96, 3, np.float32),
    "encoder_to_decoder.weight": np.zeros((48, 96), np.float32),
    "mask_token": np.zeros((1, 1, 48), np.float32),
    "decoder.blocks.0.norm1.weight": np.ones(48, np.float32),
    "decoder.head.bias": np.ones(1536, np.float32),
  }


def test_fine_tuned_videomae(videomae: Weights) -> None:
  model = vit()
  report = convert.load_reference(model, videomae)
  assert report.source == "videomae"
  assert "no commercial use" in report.licence
  assert report.named("skipped") == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
  assert report.named("missing") == ["norm.bias", "norm.scale"]
  assert len(report.named("loaded")) + len(report.named("transposed")) + 4 == len(videomae)
  values = parameters(model)
  np.testing.assert_array_equal(values["norm.scale"], 1)
  np.testing.assert_array_equal(values["blocks.1.attn.qkv.kernel"], videomae["blocks.1.attn.qkv.weight"].T)
  kernel = values["patch_embed.kernel"]
  assert kernel[1, 2, 3, 0, 5] == videomae["patch_embed.proj.weight"][5, 0, 1, 2, 3]


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone.", "encoder.", "model."])
def test_prefixes(videomae: Weights, prefix: str) -> None:
  plain, prefixed = vit(), vit()
  convert.load_reference(plain, videomae)
  convert.load_reference(prefixed, {prefix + name: value for name, value in videomae.items()})
  assert_same(plain, prefixed)


def test_hugging_face_layout(videomae: Weights) -> None:
  plain, other = vit(), vit()
  convert.load_reference(plain, videomae)
  report = convert.load_reference(other, to_hugging_face(videomae))
  assert report.source == "videomae_hf"
  assert len(report.named("merged")) == TINY["depth"]
  assert_same(plain, other)
  bare = {name.removeprefix("videomae."): value for name, value in to_hugging_face(videomae).items()}
  assert convert.load_reference(vit(), bare).source == "videomae_hf"


def test_pretrained_videomae(videomae: Weights) -> None:
  model = vit()
  report = convert.load_reference(model, to_pretrained(videomae))
  assert report.source == "videomae_pretrained"
  assert set(report.named("skipped")) == {
    "encoder_to_decoder.weight",
    "mask_token",
    "decoder.blocks.0.norm1.weight",
    "decoder.head.bias",
  }
  assert not report.named("missing")
  np.testing.assert_array_equal(parameters(model)["norm.scale"], 2)


def test_distilled_videomae_v2(videomae: Weights) -> None:
  weights = {**videomae, "head.weight": np.zeros((710, 96)), "head.bias": np.zeros(710)}
  assert convert.load_reference(vit(), weights).source == "videomae_v2"


def test_backbone_of_a_system(evad_weights: Weights) -> None:
  """The rest keeps what it started with, and the report says so."""
  weights = {name: value for name, value in evad_weights.items() if name.startswith(("patch_embed", "blocks", "norm"))}
  model, fresh = evad(), evad()
  report = convert.load_reference(model, weights)
  assert {name.split(".")[0] for name in report.named("missing")} == {"fpn", "proposals", "head", "decoder"}
  whole = evad()
  convert.load_reference(whole, evad_weights)
  assert_same(model.backbone, whole.backbone)
  assert_same(model.head, fresh.head)


def test_backbone_of_another_system() -> None:
  model = models.build("class_query", variant="tiny", num_queries=2, rngs=nnx.Rngs(0))
  before = jax.tree.map(jnp.copy, nnx.state(model.decoder))
  report = convert.load_reference(model, "quickstart")
  wanted, _ = checkpoint.load_arrays("quickstart")
  found = nnx.to_flat_state(nnx.state(model.backbone, nnx.Param))
  assert len(found) == len(report.named("loaded")) == sum(name.startswith("backbone.") for name in wanted)
  for path, variable in found:
    np.testing.assert_array_equal(variable[...], wanted[".".join(map(str, ("backbone", *path)))])
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model.decoder), before)
  assert str(report).startswith("backbone of evad of quickstart: ")

  model.backbone.blocks.pop()
  with pytest.raises(convert.ConversionError, match=r"unused: backbone\.blocks\.3\..*no parameter asks for"):
    convert.load_reference(model, "quickstart")


def test_positions_must_be_those_that_are_computed(videomae: Weights) -> None:
  table = sincos_positions(64, 96)[None]
  report = convert.load_reference(vit(), {**videomae, "pos_embed": table})
  assert "pos_embed" in report.named("skipped")
  with pytest.raises(convert.ConversionError, match=r"unused: pos_embed \(1, 64, 96\)"):
    convert.load_reference(vit(), {**videomae, "pos_embed": table + 0.1})


def test_strict(evad_weights: Weights) -> None:
  weights = dict(evad_weights)
  del weights["fpn_lateral2.bias"]
  weights["blocks.3.mlp.fc1.weight"] = weights["blocks.3.mlp.fc1.weight"][:5]
  weights["blocks.31.norm1.weight"] = np.ones(96)
  model = evad()
  with pytest.raises(convert.ConversionError) as error:
    convert.load_reference(model, weights)
  lines = str(error.value).splitlines()
  assert lines[0] == "3 tensors of EVAD detector do not fit EVAD:"
  assert sorted(line.strip() for line in lines[1:]) == [
    "missing: fpn_lateral2.bias, for fpn.lateral.0.bias (256,)",
    "shape: blocks.3.mlp.fc1.weight (5, 96) does not fit backbone.blocks.3.mlp.fc1.kernel (96, 384)",
    "unused: blocks.31.norm1.weight (96,), which no parameter asks for; nearest is blocks.3.norm1.weight",
  ]
  assert_same(model, evad())


def test_head_for_other_classes(evad_weights: Weights) -> None:
  with pytest.raises(convert.ConversionError, match="for other classes, have the head re-initialised"):
    convert.load_reference(evad(num_classes=24), evad_weights)
  model = evad(num_classes=24)
  report = convert.load_reference(model, evad_weights, reinit_head=True)
  names = [f"det_head.decoder.blocks.{i}.action_logits.{leaf}" for i in range(2) for leaf in ("bias", "weight")]
  assert sorted(report.named("re-initialised")) == sorted(names)
  same = evad()
  assert not convert.load_reference(same, evad_weights, reinit_head=True).named("re-initialised")


def test_weights_for_something_else(videomae: Weights) -> None:
  with pytest.raises(
    convert.ConversionError, match=r"1 tensors \(layer4.conv.weight \(3, 3\), ...\) that belong to no"
  ):
    convert.load_reference(vit(), {"layer4.conv.weight": np.zeros((3, 3))})
  with pytest.raises(convert.ConversionError, match="unknown source 'vmae'"):
    convert.load_reference(vit(), videomae, source="vmae")
  with pytest.raises(convert.ConversionError, match=r"EVAD detector have nothing for time\.bias: the model is another"):
    convert.published_names(("time", "bias"), convert.SOURCES["evad"])
  both = {**videomae, "backbone.head.bias": videomae["head.bias"]}
  with pytest.raises(convert.ConversionError, match="have the same name"):
    convert.load_reference(vit(), both)


def test_converted_detector(evad_weights: Weights, tmp_path: Path, capsys: Any) -> None:
  path, output = tmp_path / "model.bin", tmp_path / "weights" / "evad"
  save_file(evad_weights, path)
  assert convert.main([f"--input={path}", f"--output={output}", "--option", "keep_rate=0.6"]) == 0
  text = capsys.readouterr().out
  assert (output / "conversion.txt").read_text().splitlines() == text.splitlines()[:-1]
  assert text.splitlines()[-2].startswith("EVAD detector: ")
  report = json.loads((output / "conversion.json").read_text())
  assert len(report["tensors"]) == len(evad_weights)
  assert {"sha256", "size", "container"} < report["file"].keys()

  loaded = checkpoint.load_model(output)
  assert loaded.info["model"] == {
    **{"name": "evad", "variant": "tiny", "num_classes": 80, "num_queries": 20, "keep_rate": 0.6}
  }
  assert len(loaded.info["label_map"]) == 60
  whole = evad()
  convert.load_reference(whole, evad_weights)
  assert_same(loaded.model, whole)
  again = evad()
  report = convert.load_reference(again, output)
  assert report.source == "vad_jax"
  assert_same(again, whole)

  assert convert.main([f"--input={path}", f"--output={output}"]) == 1
  assert "exists already" in capsys.readouterr().err
  assert [entry.name for entry in output.parent.iterdir()] == ["evad"]


def test_converted_backbone(evad_weights: Weights, tmp_path: Path, capsys: Any) -> None:
  weights = {name: value for name, value in evad_weights.items() if name.startswith(("patch_embed", "blocks"))}
  path, output = tmp_path / "vit.safetensors", tmp_path / "vit"
  save_file(weights, path)
  assert convert.main([f"--input={path}", f"--output={output}", "--option=heads=3"]) == 0
  model, expected = evad(), evad()
  convert.load_reference(expected, weights)
  report = convert.load_reference(model, output)
  assert_same(model, expected)
  assert report.named("loaded")
  with pytest.raises(checkpoint.CheckpointError, match="which is no detector"):
    checkpoint.load_model(output)


def mvit_weights(trained_size: tuple[int, int, int]) -> Weights:
  """A file of PySlowFast for a small network: our values under its names, in its layout."""
  model = MViT(**MVIT, trained_size=trained_size, rngs=nnx.Rngs(1))
  found = dict(KINETICS_HEAD)
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    (name,) = convert.published_names(path, convert.SOURCES["mvit"])
    value = np.asarray(variable[...])
    value = np.moveaxis(value, (-1, -2), (0, 1)) if path[-1] == "kernel" else value
    found[name] = np.ascontiguousarray(value)  # safetensors writes others in the wrong order
  return found


def test_multiscale_backbones_of_a_detector(tmp_path: Path, monkeypatch: Any) -> None:
  """A file becomes a checkpoint, which a detector takes as its backbone, also for another size of video."""
  weights = mvit_weights((4, 64, 64))
  save_file(weights, tmp_path / "mvit.safetensors")
  convert.convert(tmp_path / "mvit.safetensors", tmp_path / "mvit")
  monkeypatch.setitem(bmvit.VARIANTS, "mini", bmvit.Variant(MViT, {**MVIT, "trained_size": (4, 64, 64)}))
  monkeypatch.setitem(bmvit.VARIANTS, "large", bmvit.Variant(MViT, {**MVIT, "trained_size": (8, 96, 128)}))
  mini, large = (models.build("bmvit", variant=name, num_classes=3, rngs=nnx.Rngs(0)) for name in ("mini", "large"))
  for origin in (weights, tmp_path / "mvit"):
    report = convert.load_reference(mini, origin)
    assert len(report.named("missing")) == len(parameters(mini)) - len(parameters(mini.backbone))
    values = parameters(mini.backbone)
    np.testing.assert_array_equal(values["blocks.1.attn.rel_pos_h"], weights["blocks.1.attn.rel_pos_h"])
    np.testing.assert_array_equal(values["blocks.1.mlp.fc1.kernel"], weights["blocks.1.mlp.fc1.weight"].T)

    with pytest.raises(convert.ConversionError, match=r"rel_pos_w .*for another size of video, have positions resized"):
      convert.load_reference(large, origin)
    report = convert.load_reference(large, origin, resize_positions=True)
    assert len(report.named("resized")) == 2 * 3
    rows, table = parameters(large.backbone)["blocks.0.attn.rel_pos_t"], weights["blocks.0.attn.rel_pos_t"]
    assert (len(table), len(rows)) == (3, 7)
    np.testing.assert_allclose(rows, linear_matrix(3, 7) @ table, atol=1e-6)


def test_hiera(tmp_path: Path) -> None:
  model = Hiera(**HIERA, trained_size=(4, 64, 64), rngs=nnx.Rngs(1))
  weights = {
    "head.projection.weight": np.zeros((400, 64), np.float32),
    "head.projection.bias": np.zeros(400, np.float32),
  }
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    (name,) = convert.published_names(path, convert.SOURCES["hiera"])
    value = np.asarray(variable[...])
    value = np.moveaxis(value, (-1, -2), (0, 1)) if path[-1] == "kernel" else value
    weights[name] = value[None] if name.startswith("pos_embed") else value
  again = Hiera(**HIERA, trained_size=(4, 64, 64), rngs=nnx.Rngs(0))
  report = convert.load_reference(again, weights)
  assert report.source == "hiera" and "no commercial use" in report.licence
  assert_same(model, again)

  pretrained = {name: value for name, value in weights.items() if not name.startswith(("head", "norm."))}
  pretrained |= {name.replace("norm.", "encoder_norm."): weights[name] for name in ("norm.weight", "norm.bias")}
  pretrained |= {
    "decoder_pred.bias": np.zeros(3),
    "mask_token": np.zeros(3),
    "multi_scale_fusion_heads.0.bias": np.zeros(3),
  }
  report = convert.load_reference(again, pretrained)
  assert report.source == "hiera_pretrained" and len(report.named("skipped")) == 3
  assert_same(model, again)

  wide = Hiera(**HIERA, trained_size=(8, 96, 96), rngs=nnx.Rngs(0))
  with pytest.raises(convert.ConversionError, match="have positions resized"):
    convert.load_reference(wide, weights)
  report = convert.load_reference(wide, weights, resize_positions=True)
  assert sorted(report.named("resized")) == ["pos_embed_spatial", "pos_embed_temporal"]
  # A network of the old size computes the same positions for the new size of video.
  np.testing.assert_allclose(wide.positions((4, 24, 24)), model.positions((4, 24, 24)), atol=1e-6)
  unequal = Hiera(**HIERA, trained_size=(4, 64, 96), rngs=nnx.Rngs(0))
  with pytest.raises(convert.ConversionError, match="pos_embed_spatial"):
    convert.load_reference(unequal, weights, resize_positions=True)


def published(model: nnx.Module, source: str) -> Weights:
  """A file of this kind that holds the values of a model."""
  kind, found = convert.SOURCES[source], {}
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    (name,) = convert.published_names(path, kind)
    value = np.asarray(variable[...])
    found[name] = value if kind.channels_last or path[-1] != "kernel" else np.moveaxis(value, (-1, -2), (0, 1))
  return found


def shuffled(model: nnx.Module) -> nnx.Module:
  """A model whose scales and statistics are not what they start as."""
  rng = np.random.default_rng(0)
  state = nnx.state(model)
  nnx.update(model, jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype), state))
  return model


@pytest.mark.parametrize(
  ("source", "extra"),
  [
    ("i3d", {"Logits/Conv3d_0c_1x1/conv_3d/w": (1, 1, 1, 1024, 400), "Mixed_3b/Branch_0/w/Momentum": (3,)}),
    ("i3d_pytorch", {"logits.conv3d.bias": (400,), "Mixed_3b.b0.bn.num_batches_tracked": ()}),
    ("slowfast", {"head.projection.bias": (400,), "s1_fuse.bn.num_batches_tracked": ()}),
    ("slowfast_pytorchvideo", {"blocks.6.proj.bias": (400,), "detection_head.proj.weight": (80, 2304)}),
    ("slowfast_caffe2", {"pred_w": (400, 2304), "conv1_w_momentum": (3,), "lr": (), "model_iter": ()}),
    ("csn50", {"last_out_L400_w": (400, 2048), "__globals__": (0,), "comp_0_conv_1_w_momentum": (3,)}),
  ],
)
def test_convolutional_backbones(source: str, extra: dict[str, tuple[int, ...]]) -> None:
  """Running statistics are loaded as well, and every layout gives the same network."""
  make = {
    "i3d": lambda: I3D(width=0.125, rngs=nnx.Rngs(0)),
    "slowfast": lambda: SlowFast(**SMALL, rngs=nnx.Rngs(0)),
    "csn50": lambda: CSN(**csn.VARIANTS["csn50"], width=4, rngs=nnx.Rngs(0)),
  }[source.split("_")[0]]
  model = shuffled(make())
  weights = published(model, source)
  if source == "i3d_pytorch":  # these files have scales, which are one
    norms = [name for name in weights if name.endswith("bn.bias")]
    weights |= {name.replace("bias", "weight"): np.ones_like(weights[name]) for name in norms}
  weights |= {name: np.zeros(shape, np.float32) for name, shape in extra.items()}
  again = make()
  report = convert.load_reference(again, weights)
  assert report.source == source and report.licence == "Apache 2.0"
  assert set(extra) <= set(report.named("skipped"))
  assert_same(model, again)
  if source == "i3d_pytorch":
    weights[norms[0].replace("bias", "weight")] *= 2
    with pytest.raises(convert.ConversionError, match="is not one everywhere"):
      convert.load_reference(again, weights)


def test_matlab_file(tmp_path: Path, capsys: Any) -> None:
  """In it, vectors are ``[1, C]``."""
  model = shuffled(CSN(**csn.VARIANTS["csn152"], width=2, rngs=nnx.Rngs(0)))
  weights = published(model, "csn152")
  path, output = tmp_path / "irCSN_152.mat", tmp_path / "weights" / "csn152"
  scipy.io.savemat(path, {**weights, "last_out_L359_b": np.zeros(359), "lr": 0.1, "iterations": "7"})
  assert convert.main([f"--input={path}", f"--output={output}"]) == 0
  lines = capsys.readouterr().out.splitlines()
  for line in (
    "         source  csn152",
    "    transposed  shortcut_projection_47_w -> stages.3.0.shortcut.layers.0.kernel (1, 1, 1, 32, 64)",
    "        loaded  shortcut_projection_11_spatbn_riv -> stages.2.0.shortcut.layers.1.var (32,)",
    "       skipped  lr (1, 1): state of the training",
  ):
    assert line.strip() in map(str.strip, lines)
  again = CSN(**csn.VARIANTS["csn152"], width=2, rngs=nnx.Rngs(1))
  convert.load_reference(again, output)
  assert_same(model, again)


@pytest.mark.parametrize("source", ["slowfast_detector", "slowfast_detector_pytorchvideo"])
def test_slowfast_detectors(source: str, tmp_path: Path) -> None:
  """A whole detector predicts as it is; asked for as a backbone, it is a start for other ones."""

  def make(context: str) -> SpatioTemporalContext:
    return SpatioTemporalContext(variant="tiny", context=context, rngs=nnx.Rngs(0))

  model = shuffled(make("none"))
  weights = {name: np.ascontiguousarray(value) for name, value in published(model, source).items()}
  weights["s1_fuse.bn.num_batches_tracked"] = np.zeros((), np.int64)
  save_file(weights, tmp_path / "detector.safetensors")
  report = convert.convert(tmp_path / "detector.safetensors", tmp_path / "detector")
  assert report.source == source and report.named("skipped") == ["s1_fuse.bn.num_batches_tracked"]
  loaded = checkpoint.load_model(tmp_path / "detector")
  assert loaded.info["clip"]["num_frames"] == 32 and loaded.info["model"]["num_classes"] == 80
  assert_same(model, loaded.model)

  spatial = make("spatial")
  with pytest.raises(convert.ConversionError, match="the model is another one"):
    convert.load_reference(spatial, weights)
  convert.load_reference(spatial, weights, source=source.replace("_detector", ""))
  assert_same(model.backbone, spatial.backbone)


def test_class_query_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """A released file, in which some tensors have several names; they must agree."""
  case = golden_files.load("class_query/cq_tiny")["cases"][0]
  sizes = class_query.Variant(class_query.ViT, {"width": 64, "depth": 2, "heads": 4}, 256, 8, 64, 2, 2)
  monkeypatch.setitem(class_query.VARIANTS, "golden", sizes)
  weights = {f"module.{name}": np.ascontiguousarray(value) for name, value in released_weights(case).items()}
  save_file(weights, tmp_path / "released.safetensors")
  (tmp_path / "ten.pbtxt").write_text("".join(f'item {{ name: "c{i}" id: {i} }}\n' for i in range(1, 11)))
  with pytest.raises(convert.ConversionError, match="the detector knows 10 classes: give their names"):
    convert.convert(tmp_path / "released.safetensors", tmp_path / "out")
  report = convert.convert(tmp_path / "released.safetensors", tmp_path / "out", label_map=tmp_path / "ten.pbtxt")
  assert report.source == "class_query" and not report.named("missing")
  assert set(report.named("skipped")) == case["aliases"].keys()
  loaded = checkpoint.load_model(tmp_path / "out")
  assert loaded.info["clip"] == {"num_frames": 16, "frame_stride": 4, "fps": 30.0}
  np.testing.assert_array_equal(
    loaded.model.decoder.class_queries[...], weights["module.transformer.decoder.class_queries.weight"]
  )

  weights["module.transformer.decoder.bbox_embed.layers.0.bias"] += 1
  with pytest.raises(convert.ConversionError, match=r"has other values than bbox_embed\.layers\.0\.bias"):
    convert.load_reference(loaded.model, weights)


def test_converted_statistics(tmp_path: Path) -> None:
  """What came from a file comes out of the checkpoint, running statistics included; a trunk takes its part."""
  model = shuffled(I3D(width=0.125, rngs=nnx.Rngs(0)))
  weights = published(model, "i3d_pytorch")
  save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, tmp_path / "i3d.safetensors")
  convert.convert(tmp_path / "i3d.safetensors", tmp_path / "i3d")
  again = I3D(width=0.125, rngs=nnx.Rngs(1))
  convert.load_reference(again, tmp_path / "i3d")
  assert_same(model, again)

  class Detector(nnx.Module):
    def __init__(self):
      self.backbone = I3D(width=0.125, final_endpoint="Mixed_4f", rngs=nnx.Rngs(1))
      self.head = nnx.Linear(3, 3, rngs=nnx.Rngs(1))

  for origin in (weights, tmp_path / "i3d"):
    detector = Detector()
    report = convert.load_reference(detector, origin)
    assert report.named("missing") == ["head.bias", "head.kernel"]
    assert all("Mixed_5" in name for name in report.named("skipped"))
    values, whole = parameters(detector.backbone), parameters(model)
    for name, value in values.items():
      np.testing.assert_array_equal(value, whole[name], err_msg=name)


@pytest.mark.parametrize(
  "content, message",
  [
    (None, "no such file"),
    (b"", "empty"),
    (b"hello, this is text\n" * 9, "text"),
    (b"\x00\x01\x02\x03" * 100, ""),
  ],
)
def test_bad_files(content: bytes | None, message: str, tmp_path: Path, capsys: Any) -> None:
  path = tmp_path / "model.pth"
  if content is not None:
    path.write_bytes(content)
  assert convert.main([f"--input={path}", f"--output={tmp_path / 'out'}"]) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert error.count("\n") == 1
  assert str(path) in error
  assert message in error.lower()
  assert not (tmp_path / "out").exists()


def test_options_that_do_not_exist(evad_weights: Weights, tmp_path: Path, capsys: Any) -> None:
  path = tmp_path / "model.safetensors"
  save_file(evad_weights, path)
  for option, message in (("keeprate=0.6", "keeprate"), ("keep_rate=7", "keep_rate must be in")):
    assert convert.main([f"--input={path}", f"--output={tmp_path / 'out'}", f"--option={option}"]) == 1
    assert message in capsys.readouterr().err
  assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
