"""Writes the files of this folder with PyTorch 2.13."""

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

OUT = Path(__file__).parent


def normal(*shape: int, seed: int) -> torch.Tensor:
  return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def array(tensor: torch.Tensor) -> np.ndarray:
  return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn) else tensor).detach().numpy()


base = normal(4, 6, seed=0)
plain = OrderedDict(
  {
    "backbone.conv.weight": normal(2, 3, 2, 2, 2, seed=1),
    "backbone.norm.num_batches_tracked": torch.tensor(7),
    "head.weight": base.T,  # a transposed view
    "head.rows": base[1:3],  # of the same storage, further on
    "head.columns": base[:, ::2],
    "head.tied": base.T,
    "slice_of_large": normal(900, seed=3)[5:8],
    "expanded": torch.ones(1).expand(3, 2),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(normal(3, seed=4)),
  }
)
kinds = {
  "f64": normal(3, seed=5).double(),
  "f16": normal(3, seed=6).half(),
  "bf16": normal(2, 3, seed=7).bfloat16(),
  "i64": torch.tensor([-(2**40), 1]),
  "i32": torch.tensor([-3], dtype=torch.int32),
  "i16": torch.tensor([-300], dtype=torch.int16),
  "i8": torch.tensor([-5], dtype=torch.int8),
  "u8": torch.tensor([250], dtype=torch.uint8),
  "bool": torch.tensor([True, False]),
  "c64": torch.complex(normal(2, seed=8), normal(2, seed=9)),
}
kinds_new = {  # these have no typed storage
  "f32": normal(2, seed=13),
  "u16": torch.tensor([65000], dtype=torch.uint16),
  "f8": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
}
model = torch.nn.Linear(3, 2)
model.weight.data, model.bias.data = normal(2, 3, seed=10), normal(2, seed=11)
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
model(normal(4, 3, seed=12)).sum().backward()
optimizer.step()
state = model.state_dict()
beside = {
  "epoch": 12,
  "optimizer": optimizer.state_dict(),
  "lr_scheduler": scheduler.state_dict(),
  "rng_state": torch.get_rng_state()[:16].clone(),
  "args": argparse.Namespace(lr=0.1, depth=[1, 2]),
  "path": Path("a/b"),
  "cfg": "MODEL:\n  DEPTH: 2\n",
  "size": torch.Size([1, 2]),
  "device": torch.device("cpu"),
  "dtype": torch.bfloat16,
  "score": np.float64(0.5),
}
files = {
  "plain": plain,
  "kinds": kinds,
  "model_state": {"model_state": state, **beside},
  "model": {**beside, "model": state, "model_ema": {name: value + 1 for name, value in state.items()}},
  "module": {"module": state, **beside},
  "state_dict": {"state_dict": {f"module.{name}": value for name, value in state.items()}, **beside},
  "nested": {"state_dict": {"model": state, "epoch": 3}, "best": 0.5},
  "average": {"epoch": 1, "ema": state, "step": torch.tensor(4)},
}
for name, tree in files.items():
  torch.save(tree, OUT / f"{name}.pth")
  torch.save(tree, OUT / f"{name}_legacy.pth", _use_new_zipfile_serialization=False)
torch.save(kinds_new, OUT / "kinds_new.pth")
torch.serialization.set_crc32_options(False)
torch.save(state, OUT / "no_checksums.pth")
torch.serialization.set_crc32_options(True)

torch.save(state["weight"], OUT / "bare_tensor.pth")
torch.save({"epoch": 3}, OUT / "no_tensors.pth")
torch.save({"weight": torch.quantize_per_tensor(state["weight"], 0.1, 0, torch.qint8)}, OUT / "quantised.pth")
torch.save({"weight": state["weight"].to_sparse(), "bias": state["bias"]}, OUT / "sparse.pth")
torch.save(model, OUT / "whole_model.pth")
torch.jit.save(torch.jit.script(model), OUT / "torchscript.pth")

expected = {"plain": plain, "kinds": kinds, "kinds_new": kinds_new, "state": state}
arrays = {f"{file}/{name}": array(value) for file, tree in expected.items() for name, value in tree.items()}
np.savez_compressed(OUT / "expected.npz", **arrays)
