"""What was published: how each kind of file names its tensors, what they are for, under which licence."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vad_jax.backbones import csn, hiera, i3d, mvit, slowfast, vit
from vad_jax.models import class_query, evad, st_context

Name = str | tuple[str, ...]  # several published tensors are stacked along their first axis
NameRules = Sequence[tuple[str, Name | Callable[[re.Match[str]], Name]]]


class Source(NamedTuple):
  """How one kind of published file names its tensors, and what they are.

  Attributes:
    title: what it is, in words.
    licence: of the published weights.
    marks: patterns that all have to occur among the ``name (shape)`` of a file of this kind.
    names: rules from our path (with PyTorch's leaf names) to published names; the first that matches wholly counts.
    builds: what the weights are for: a name in ``models.MODELS`` or ``BACKBONES``.
    arguments: from the shapes of the published tensors to the arguments of its constructor.
    prefix: pattern of what stands before the names in some files.
    skip: patterns of published names that no model needs, with the reason.
    may_lack: patterns of our paths that the file need not have, with what becomes of them.
    ones: pattern of published scales that must all be one, since our network has none there.
    channels_last: kernels are ``[*window, in, out]`` as ours.
    positions: pattern of published tables of positions, which must be those that we compute.
    same: pattern of published names of tensors that are there twice, to the other name, whose values must be equal.
    info: from the arguments to what inference has to know beside the model, see ``checkpoint.Loaded``.
  """

  title: str
  licence: str
  marks: tuple[str, ...]
  names: NameRules
  builds: str
  arguments: Callable[[Mapping[str, Sequence[int]]], dict[str, Any]]
  prefix: str = ""
  skip: Mapping[str, str] = {}
  may_lack: Mapping[str, str] = {}
  ones: str = ""
  channels_last: bool = False
  positions: str = "pos_embed"
  same: Mapping[str, str] = {}
  info: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda arguments: {}


class Backbone(NamedTuple):
  """A network that detectors use parts of.

  Attributes:
    make: its class.
    homes: names of a detector's attributes that its parameters may live in.
    spare: pattern of names, published or ours, of what a detector may have no part for.
    resize: from our path and a published table of positions to the table of another shape, or None where it is no such
      table.
  """

  make: type[Any]
  homes: tuple[str, ...] = ("backbone",)
  spare: str = ""
  resize: Callable[[str, np.ndarray, Sequence[int]], np.ndarray | None] | None = None


BACKBONES = {
  "vit": Backbone(vit.ViT),
  "mvit": Backbone(mvit.MViT, resize=mvit.resize_table),
  "hiera": Backbone(hiera.Hiera, resize=hiera.resize_table),
  "i3d": Backbone(i3d.I3D, homes=("backbone", "i3d_head"), spare=r"(Mixed_5[bc]|(?i:logits))[./].*"),
  "slowfast": Backbone(slowfast.SlowFast),
  "csn": Backbone(csn.CSN),
}
_NON_COMMERCIAL = "CC-BY-NC 4.0: no commercial use"
_CLASSIFIER = "classifies whole clips"
_RECONSTRUCTION = {r"(decoder|encoder_to_decoder)\..*|mask_token": "reconstructs masked pixels"}
_VIDEOMAE = Source(
  "VideoMAE ViT, fine-tuned",
  _NON_COMMERCIAL,
  (r"patch_embed\.proj\.weight \(\d+, 3, \d+, \d+, \d+\)", r"blocks\.0\.attn\.q_bias .*"),
  vit.REFERENCE_NAMES,
  "vit",
  vit.reference_arguments,
  prefix=r"((module|model|backbone|encoder)\.)*",
  skip={r"(head|fc_norm)\.(weight|bias)": _CLASSIFIER},
  may_lack={r"norm\.(scale|bias)": "not in these files, which normalise the mean of tokens; starts as 1 and 0"},
)

_HIERA = Source(
  "Hiera for video",
  _NON_COMMERCIAL,
  (r"pos_embed_spatial .*", r"pos_embed_temporal .*"),
  hiera.REFERENCE_NAMES,
  "hiera",
  hiera.reference_arguments,
  skip={r"head\.projection\.(weight|bias)": _CLASSIFIER},
)

_COUNTERS = {r".*\.num_batches_tracked": "counts the batches of training"}
_CAFFE2_TRAINING = {r"(.*_)?(momentum|lr)|model_iter": "state of the training"}
_REGIONS = "classifies clips or regions"
_I3D = Source(
  "Inception-I3D (RGB) of kinetics-i3d",
  "Apache 2.0",
  (r"Conv3d_1a_7x7/conv_3d/w \(7, 7, 7, 3, \d+\)",),
  i3d.TENSORFLOW_NAMES,
  "i3d",
  i3d.reference_arguments,
  prefix=r"(RGB/inception_i3d/)?",
  skip={r"Logits/.*": _CLASSIFIER, r".*/Momentum": "state of the training"},
  channels_last=True,
)
_CSN = Source(
  "ir-CSN-152, trained on IG-65M or Kinetics, in Caffe2 blobs",
  "Apache 2.0",
  (r"conv1_spatbn_relu_s .*", r"shortcut_projection_47_w .*"),
  csn.caffe2_names(csn.VARIANTS["csn152"]["depths"]),
  "csn",
  csn.reference_arguments,
  skip={
    r"last_out_L\d+_[wb]": _CLASSIFIER,
    r"__(header|version|globals)__": "says what wrote the file",  # SciPy adds it to what it reads
    **_CAFFE2_TRAINING,
  },
)
_SLOWFAST = Source(
  "SlowFast of PySlowFast",
  "Apache 2.0",
  (r"s1\.pathway1_stem\.conv\.weight .*", r"s1_fuse\.conv_f2s\.weight .*"),
  slowfast.REFERENCE_NAMES,
  "slowfast",
  slowfast.reference_arguments,
  prefix=r"((module|model|backbone)\.)*",
  skip={r"head\.projection\.(weight|bias)": _REGIONS, **_COUNTERS},
)
_SLOWFAST_DETECTOR = _SLOWFAST._replace(
  title="SlowFast detector of PySlowFast, trained on AVA",
  marks=(*_SLOWFAST.marks, r"head\.projection\.bias \(80,\)"),
  names=st_context.REFERENCE_NAMES,
  builds="st_context",
  arguments=st_context.reference_arguments,
  prefix=r"((module|model)\.)*",
  skip=_COUNTERS,
  info=lambda _: {"clip": {"num_frames": 32, "frame_stride": 2, "fps": 30.0}, "canvas": (256, 480), "short_side": 256},
)

# A file is of the first kind whose marks it has.
SOURCES = {
  "evad": Source(
    "EVAD detector",
    _NON_COMMERCIAL,
    (r"det_head\.s0_headseries\.0\.inst_interact\.dynamic_layer\.weight .*",),
    evad.REFERENCE_NAMES,
    "evad",
    evad.reference_arguments,
    skip={r"criterion\.empty_weight": "a constant of the loss"},
    info=lambda _: {
      "clip": {"num_frames": 16, "frame_stride": 4, "fps": 30.0},
      "canvas": (288, 512),
      "short_side": 288,
    },
  ),
  "class_query": Source(
    "class-query detector",
    _NON_COMMERCIAL,
    (r"transformer\.decoder\.class_queries\.weight .*",),
    class_query.REFERENCE_NAMES,
    "class_query",
    class_query.reference_arguments,
    prefix=r"(module\.)*",
    skip=_COUNTERS,
    same={
      r"(transformer\.decoder\.cls_layers\.\d+\.conv_blocks)\.[01](\..*)": r"\1.2\2",
      r"transformer\.decoder\.(bbox_embed\..*)": r"\1",
    },
    info=class_query.reference_info,
  ),
  "videomae_hf": _VIDEOMAE._replace(
    title="VideoMAE ViT in Hugging Face layout",
    marks=(r"encoder\.layer\.0\.attention\.attention\.query\.weight .*",),
    names=vit.HUGGING_FACE_NAMES,
    prefix=r"(videomae\.)?",
    skip={r"(classifier|fc_norm)\.(weight|bias)": _CLASSIFIER, **_RECONSTRUCTION},
    positions=r"(embeddings\.)?position_embeddings",
  ),
  "videomae_pretrained": _VIDEOMAE._replace(
    title="VideoMAE ViT, pre-trained only",
    marks=(*_VIDEOMAE.marks, r"encoder_to_decoder\.weight .*"),
    skip=_RECONSTRUCTION,
    may_lack={},
  ),
  "videomae_v2": _VIDEOMAE._replace(
    title="VideoMAE V2 ViT, distilled on Kinetics-710", marks=(*_VIDEOMAE.marks, r"head\.weight \(710, \d+\)")
  ),
  "videomae": _VIDEOMAE,
  "mvit": Source(
    "MViTv2 of PySlowFast",
    "Apache 2.0",
    (r"blocks\.0\.attn\.rel_pos_t .*", r"patch_embed\.proj\.weight .*"),
    mvit.REFERENCE_NAMES,
    "mvit",
    mvit.reference_arguments,
    skip={r"head\.projection\.(weight|bias)": _CLASSIFIER},
  ),
  "mvit_torchvision": Source(
    "MViTv2 of torchvision",
    "BSD 3-Clause",
    (r"blocks\.0\.attn\.rel_pos_t .*", r"conv_proj\.weight .*"),
    mvit.TORCHVISION_NAMES,
    "mvit",
    mvit.reference_arguments,
    skip={r"head\.1\.(weight|bias)": _CLASSIFIER},
  ),
  "hiera_pretrained": _HIERA._replace(
    title="Hiera for video, pre-trained only",
    marks=(*_HIERA.marks, r"encoder_norm\.weight .*"),
    names=hiera.PRETRAINED_NAMES,
    skip={r"(decoder_|multi_scale_fusion_heads\.).*|mask_token": "reconstructs masked pixels"},
  ),
  "hiera": _HIERA,
  "i3d": _I3D,
  "i3d_pytorch": _I3D._replace(
    title="Inception-I3D (RGB), converted to PyTorch",
    marks=(r"Conv3d_1a_7x7\.conv3d\.weight \(\d+, 3, 7, 7, 7\)",),
    names=i3d.PYTORCH_NAMES,
    prefix=r"((module|model|backbone)\.)*",
    skip={r"logits\..*": _CLASSIFIER, **_COUNTERS},
    ones=r".*\.bn\.weight",
    channels_last=False,
  ),
  "csn152": _CSN,
  "csn50": _CSN._replace(
    title="ir-CSN-50, trained on IG-65M or Kinetics, in Caffe2 blobs",
    marks=(r"conv1_spatbn_relu_s .*", r"shortcut_projection_13_w .*"),
    names=csn.caffe2_names(csn.VARIANTS["csn50"]["depths"]),
  ),
  "slowfast_detector": _SLOWFAST_DETECTOR,
  "slowfast_detector_pytorchvideo": _SLOWFAST_DETECTOR._replace(
    title="SlowFast detector of PyTorchVideo, trained on AVA",
    marks=(r"blocks\.0\.multipathway_blocks\.1\.conv\.weight .*", r"detection_head\.proj\.bias \(80,\)"),
    names=st_context.PYTORCHVIDEO_NAMES,
  ),
  "slowfast_pytorchvideo": _SLOWFAST._replace(
    title="SlowFast of PyTorchVideo",
    marks=(r"blocks\.0\.multipathway_blocks\.1\.conv\.weight .*",),
    names=slowfast.PYTORCHVIDEO_NAMES,
    prefix=r"(model\.)?",
    skip={r"(blocks\.6|detection_head)\.proj\.(weight|bias)": _REGIONS, **_COUNTERS},
  ),
  "slowfast_caffe2": _SLOWFAST._replace(
    title="SlowFast of PySlowFast's model zoo, in Caffe2 blobs",
    marks=(r"t_conv1_w .*", r"t_pool1_subsample_w .*"),
    names=slowfast.CAFFE2_NAMES,
    prefix="",
    skip={r"pred_[wb]": _CLASSIFIER, **_CAFFE2_TRAINING},
  ),
  "slowfast": _SLOWFAST,
}
