"""What `describe` says: counts against official ones and against arithmetic, the command line, the README's table."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import bmvit_mvitv2s, custom, evad_vitb, evad_vitl, quickstart
from tests import golden_files
from vad_jax import describe, papers
from vad_jax.ops.roi_align import roi_align
from vad_jax.rngs import make_rngs

ROOT = Path(__file__).parents[1]
PARAMETERS = {
  "B": dict(backbone=86_227_200, fpn=3_147_776, proposals=26_000, head=79_292_196, decoder=16_666_464),
  "L": dict(backbone=303_860_736, fpn=3_409_920, proposals=26_000, head=79_292_196, decoder=52_946_368),
}
SIZES = golden_files.load("evad/gflops")

CONFIGS = {"vit_b": evad_vitb, "vit_l": evad_vitl, "quickstart": quickstart}
build = functools.cache(lambda variant, build=describe.build: build(CONFIGS[variant].get_config()))


@pytest.fixture
def built_once(monkeypatch: pytest.MonkeyPatch) -> None:
  """Building a large model takes seconds even without numbers; the rate at which it keeps tokens can be changed."""

  def build_once(config: Any, build_any: Any = describe.build) -> Any:
    if config.model.name != "evad":
      return build_any(config)
    model = build(config.model.variant)
    model.keep_rate = config.model.get("keep_rate", 0.7)
    return model

  monkeypatch.setattr(describe, "build", build_once)


def published(name: str) -> tuple[Any, tuple[int, int, int]]:
  """Config and input of an entry such as ``B_224x320_keep0.7``."""
  letter, height, width, keep_rate = re.fullmatch(r"([BL])_(\d+)x(\d+)_keep(.*)", name).groups()  # type: ignore
  return CONFIGS[f"vit_{letter.lower()}"].get_config(f"keep_rate={keep_rate}"), (16, int(height), int(width))


@pytest.mark.parametrize(
  "name, paper",
  [
    *(
      (f"B_224x224_keep{rate}", gflops)
      for rate, gflops in zip((1.0, 0.9, 0.8, 0.7, 0.6), (223.8, 186.3, 157.0, 134.2, 116.3), strict=True)
    ),
    ("B_288x288_keep1.0", 424.5),
    ("B_288x288_keep0.7", 242.8),
    ("B_224x320_keep0.6", None),
    ("L_224x224_keep1.0", 707.9),
  ],
)
@pytest.mark.usefixtures("built_once")
def test_official_counts(name: str, paper: float | None) -> None:
  config, size = published(name)
  found = describe.describe(config, size, training=False)
  wanted, parts = SIZES[name], {part: numbers["exact"] / 1e9 for part, numbers in found["parts"].items()}
  gmacs, parameters = wanted["gmacs"], PARAMETERS[name[0]]
  assert {part: found["parts"][part]["parameters"] for part in parameters} == parameters
  assert found["total"]["parameters"] == sum(parameters.values()) == {"B": 185_359_636, "L": 439_535_220}[name[0]]
  assert parts["backbone"] == pytest.approx(gmacs["patch_embed"] + gmacs["encoder"], abs=2e-3)
  assert parts["decoder"] == pytest.approx(gmacs["encoder_to_decoder"] + gmacs["crd"], abs=2e-3)
  assert (parts["fpn"], parts["head"]) == pytest.approx((gmacs["fpn"], gmacs["loc_head"]), abs=1e-3)
  assert found["total"]["exact"] / 1e9 == pytest.approx(wanted["total"], abs=0.006)
  assert found["total"]["paper"] / 1e9 == pytest.approx(wanted["fvcore_convention"], abs=0.01)
  assert (found["paper"] or {"gflops": None})["gflops"] == paper
  if paper:
    assert found["total"]["paper"] / 1e9 == pytest.approx(paper, rel=3e-4)


@pytest.mark.parametrize(
  "arguments, figure",
  [
    ("keep_rate=0.7", (134.2, 30.7)),
    ("ablation=random_pruning", (158.9, 29.9)),
    ("ablation=all_tokens", (156.1, 30.2)),
    ("ablation=weight_4", None),
    ("ablation=decoder_4", None),
    ("keep_rate=0.65", None),
    ("tiny", None),
  ],
)
def test_figures_belong_to_the_same_model(arguments: str, figure: tuple | None) -> None:
  found = [f for f in describe.figures(evad_vitb.get_config(arguments)) if f.size == (16, 224, 224)]
  assert [(f.gflops, f.mean_ap) for f in found] == ([figure] if figure else [])


class Base(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.kernel = nnx.Param(jnp.zeros((6, 10)))
    self.norm = nnx.LayerNorm(10, rngs=rngs)

  def __call__(self, x: Any) -> Any:
    return self.norm(x @ self.kernel[...])


class Inherits(Base):
  pass


@jax.custom_vjp
def own_gradient(x: Any) -> Any:
  return x @ x.T


own_gradient.defvjp(lambda x: (own_gradient(x), x), lambda x, g: (g @ x,))


class Toy(nnx.Module):
  """Everything that multiplies, in all that can hold it."""

  def __init__(self, rngs: nnx.Rngs):
    self.plain, self.looped = Base(rngs), Inherits(rngs)
    self.blocks = nnx.List([nnx.Linear(10, 10, rngs=rngs) for _ in range(2)])
    self.conv = nnx.Conv(4, 8, (3, 3, 3), strides=2, feature_group_count=2, rngs=rngs)

  def __call__(self, batch: Any, *, rngs: Any = None) -> dict[str, Any]:
    x = batch["x"]  # [5, 6]
    rows = self.plain(x)
    for block in self.blocks:
      rows = nnx.remat(nnx.Linear.__call__)(block, rows)
    rows += jax.lax.scan(lambda carry, _: (carry + self.looped(x), None), rows, length=7)[0]
    either = jax.lax.cond(rows[0, 0] > 0, lambda: x @ x.T, lambda: (x @ x.T) @ (x @ x.T))
    whole = jax.jit(own_gradient)(x) + either
    maps = self.conv(batch["maps"])  # [2, 4, 8, 6, 4]
    pooled = roi_align(batch["maps"][0], jnp.zeros((4, 3, 4)), scale=1.0)
    return {"rows": rows, "whole": whole, "maps": maps, "pooled": pooled, "list": [rows, rows, {"a": whole}]}

  def detections(self, out: dict[str, Any], batch: Any) -> tuple:
    return (out["rows"],)


TOY_BATCH: Any = {
  "x": jax.ShapeDtypeStruct((5, 6), jnp.float32),
  "maps": jax.ShapeDtypeStruct((2, 4, 8, 6, 4), jnp.float32),
}


def test_every_product_counts_where_it_happens() -> None:
  model = nnx.eval_shape(lambda: Toy(make_rngs(0)))
  call = Base.__call__
  jaxpr, _, out = describe.trace(model, TOY_BATCH)
  assert Base.__call__ is call  # was only wrapped meanwhile
  rules = (papers.Rule(r"blocks\.1", 3, 0),)
  counts = describe.multiply_adds(jaxpr, model, papers.Paper(5, rules, ()))
  roi = counts.pop("roi_align")
  assert roi["run"] > 0 == roi["exact"] == roi["paper"]
  matmul, linear, norm = 5 * 6 * 10, 5 * 10 * 10, 5 * 5 * 10
  conv = (2 * 2 * 4 * 3 * 8) * 27 * 2
  own = 5 * 5 * 6 + (2 * 5 * 5 * 6 + 5 * 5 * 5)  # and the dearer of two branches
  assert counts == {
    "plain": {"exact": matmul, "paper": matmul + norm, "run": matmul},
    "looped": {"exact": 7 * matmul, "paper": 7 * (matmul + norm), "run": 7 * matmul},
    "blocks": {"exact": 4 * linear, "paper": linear, "run": 2 * linear},
    "conv": {"exact": conv, "paper": conv, "run": conv},
    "model": {"exact": own, "paper": own, "run": own},
  }
  assert describe.shape_text(out["list"]) == "(2 x float32[5, 10], {a: float32[5, 5]})"


def test_peak_memory() -> None:
  def peak(function: Any) -> int:
    return describe.peak_memory(jax.make_jaxpr(function)(jnp.zeros(100)).jaxpr)

  assert peak(lambda x: x + 1) == 400
  assert peak(lambda x: jnp.sin(jnp.sin(jnp.sin(x)))) == 800  # two at a time
  assert peak(lambda x: [y := jnp.sin(x), jnp.cos(y), jnp.tan(y)]) == 1200
  assert peak(lambda x: (jnp.outer(x, x), x + 1)[1]) == 400  # not needed, not computed
  assert peak(jax.jit(lambda x: jnp.outer(x, x).sum())) >= 40_000
  # A loop stacks what its body makes, and needs what the body needs.
  stacked = peak(lambda x: jax.lax.scan(lambda c, _: (c, jnp.sin(jnp.sin(x))), 0.0, length=10)[1])
  assert 4_000 + 800 <= stacked <= 4_000 + 900


def test_training_memory_honours_remat_and_microbatch() -> None:
  config, model = quickstart.get_config(), build("quickstart")

  def of(clips: int = 2, *, remat: bool = False, averaged: bool = False) -> dict[str, int]:
    model.remat = remat
    batch = describe.abstract_batch(config, (8, 32, 32), clips=clips)
    return describe.training_memory(model, batch, averaged=averaged)

  plain, remat, single, averaged = of(), of(remat=True), of(1), of(averaged=True)
  gradients = plain["gradients"]
  assert plain["moments"] == 2 * gradients
  assert plain["training"] > 3 * gradients + max(gradients, plain["kept"])
  assert (plain["microbatch"], single["microbatch"]) == (2, 1)
  assert 0.4 * plain["kept"] < single["kept"] < 0.7 * plain["kept"]
  assert remat["kept"] < 0.8 * plain["kept"]
  assert remat["training"] < plain["training"]
  assert averaged["training"] == plain["training"] + gradients


def test_command_line(tmp_path: Path) -> None:
  """In a process of its own: no TensorFlow, overrides count, the rest is printed as JSON."""
  arguments = ["--config", "configs/evad_vitb.py:tiny", "--config.model.keep_rate=0.9", "--input", "8x64x64", "--json"]
  code = f"import sys; from vad_jax import describe; describe.main({arguments}); assert 'tensorflow' not in sys.modules"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert (found["input"], found["model"]["keep_rate"], found["paper"]) == ([8, 64, 64], 0.9, None)
  assert found["inputs"]["video"] == "uint8[1, 8, 64, 64, 3]"
  assert found["detections"]["action_score"] == "float32[1, 20, 80]"
  assert found["outputs"]["boxes"] == "float32[2, 1, 20, 4]"
  assert found["total"]["exact"] == sum(part["exact"] for part in found["parts"].values())


@pytest.mark.usefixtures("built_once")
def test_tables(capsys: Any) -> None:
  assert describe.main(["--config", str(ROOT / "configs/quickstart.py"), "--config.microbatch=2"]) == 0
  printed = capsys.readouterr().out
  for text in (
    "backbone",
    "total",
    "as the paper counts",
    "weights",
    "the paper prints no figure",
    "training on 2 clips",
    "detections",
  ):
    assert text in printed
  assert "  video: uint8[1, 8, 96, 128, 3]\n" in printed


def test_label_map_of_ones_own_set_tells_the_classes(tmp_path: Path) -> None:
  (tmp_path / "annotations").mkdir()
  (tmp_path / "annotations" / "label_map.pbtxt").write_text('item {name: "run" id: 1} item {name: "sit" id: 3}')
  found = describe.describe(custom.get_config(f"tiny,data={tmp_path}"), training=False)
  assert (found["inputs"]["labels"], found["detections"]["action_score"]) == ("float32[1, 4, 3]", "float32[1, 10, 3]")


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config", "none.py"], "config none.py: no such file"),
    (["--config", "configs/custom.py:data=none"], "none: no data set here, so the number of classes is not known; pr"),
    (["--config", "README.md"], "config README.md: "),
    (["--config", "configs/common.py"], "config configs/common.py: it defines no get_config"),
    (["--config", "configs/evad_vitb.py:keep=1"], "config argument 'keep' is not known"),
    (["--config", "configs/evad_vitb.py", "--config.batch_siz=1"], "no such config key: 'batch_siz'"),
    (["--config", "configs/evad_vitb.py", "--config.batch_size=x"], "--config.batch_size=x: invalid literal"),
    (["--config", "configs/evad_vitb.py", "--config.data.name=kinetics"], "'kinetics': choose one of ava, "),
    (["--config", "configs/evad_vitb.py", "surplus"], "unexpected argument 'surplus'"),
    (["--config", "configs/evad_vitb.py:tiny", "--config.model.variant=vit_x"], "variant 'vit_x': choose one of"),
    (["--config", "configs/evad_vitb.py:tiny", "--input=8x72x64"], "height and width must be multiples of 32"),
    (["--markdown", "none.py"], "config none.py: no such file"),
  ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: Any, monkeypatch: Any) -> None:
  monkeypatch.chdir(ROOT)
  assert describe.main(arguments) == 1
  printed = capsys.readouterr()
  assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", printed.err)
  assert not printed.out


@pytest.mark.parametrize(
  "arguments",
  [
    [],
    ["--config", "configs/evad_vitb.py", "--input", "288x288"],
    ["--config", "configs/evad_vitb.py", "--input", "16x0x288"],
    ["--config", "configs/evad_vitb.py", "--jsn"],
    ["--markdown", "configs/evad_vitb.py", "--json"],
    ["--markdown", "configs/evad_vitb.py", "--config.batch_size=1"],
  ],
)
def test_wrong_usage(arguments: list[str], capsys: Any) -> None:
  with pytest.raises(SystemExit, match="2"):
    describe.main(arguments)
  assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
  ("argument", "gflops"), [("", 121.2), ("last_pool", 90.7), ("side=224", 87.9), ("side=224,last_pool", 65.0)]
)
def test_bmvit_costs_what_its_paper_prints(argument: str, gflops: float) -> None:
  """Table 1a; its four figures do not fit one another better than this."""
  found = describe.describe(bmvit_mvitv2s.get_config(argument), training=False)
  assert found["total"]["paper"] / 1e9 == pytest.approx(gflops, rel=0.015)
  assert found["paper"]["gflops"] == gflops


@pytest.mark.usefixtures("built_once")
def test_readme_table(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(ROOT)
  readme = re.search(r"<!-- sizes -->\n(.*?)\n<!-- end of sizes -->", Path("README.md").read_text(), re.DOTALL)
  assert readme, "the README lost its markers"
  table = describe.markdown([str(path) for path in sorted(Path("configs").glob("*.py"))])
  assert readme[1] == table, "run python -m vad_jax.describe --markdown configs/*.py and put the table into the README"
