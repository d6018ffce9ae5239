"""The training loop: any system, any data, any mesh.

The state is a plain dictionary ``{step, params, rest, opt, ema?}`` of arrays; a step is a pure function of
state and batch, and its randomness is derived from seed and step. So a checkpoint is numbers only, and a run
that was stopped goes on exactly as if it had not been.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vad_jax import progress
from vad_jax.batch import Array, Batch, Detections
from vad_jax.checkpoint import Checkpoints, Info, State, split_model
from vad_jax.ops.matching import Method, match
from vad_jax.rngs import make_rngs
from vad_jax.sharding import infer_sharding, to_global

PredictFn = Callable[[Batch], Detections]
EvaluateFn = Callable[[int, PredictFn, Callable[[], bool]], dict[str, float] | None]

# Most bfloat16 operations a second without sparsity, by the name that JAX gives a device; vendors' data sheets.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}
_TRACED = (5, 10)  # steps after which a profile begins and ends, counted from the start of this process
_MOST_SKIPPED = 10  # steps in a row


class NonFiniteError(RuntimeError):
  """A loss term or the gradient became NaN or infinite; the message names step, terms and batch keys."""


class ScalarWriter(Protocol):
  """Where numbers go; CLU's metric writers are of this form."""

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None: ...


class Result(NamedTuple):
  """How a training ended.

  Attributes:
    state: the final state.
    stopped: ``interrupted`` (ctrl-C), ``preempted`` (SIGTERM), or empty where all steps were made.
    compile_seconds: compilation of the step.
    train_seconds: time in steps of this process, without compilation, evaluation and saving.
    steps: steps made by this process.
  """

  state: State
  stopped: str
  compile_seconds: float
  train_seconds: float
  steps: int


def train(
  make_model: Callable[[nnx.Rngs], Any],
  make_batches: Callable[[int], Iterator[Batch]],
  *,
  num_steps: int,
  make_optimizer: Callable[[Any], optax.GradientTransformation],
  learning_rate: optax.Schedule,
  mesh: Mesh,
  checkpoints: Checkpoints,
  info: Info,
  writer: ScalarWriter,
  sharding: str = "replicate",
  matcher: Method = "device",
  microbatch: int | None = None,
  ema_decay: float | None = None,
  nonfinite: Literal["stop", "skip"] = "stop",
  seed: int = 0,
  load_weights: Callable[[Any], None] | None = None,
  log_every: int = 50,
  save_every: int = 500,
  evaluate_every: int = 0,
  evaluate: EvaluateFn | None = None,
  monitor: str = "frame_map_50",
  peak_steps_per_second: float | None = None,
  profile: str | None = None,
) -> Result:
  """Trains until ``num_steps``, from the last checkpoint where there is one.

  Args:
    make_model: builds the system; see ``vad_jax.models.System``.
    make_batches: makes the endless stream of this process's share of the batches, from the one with this number on.
      One belongs to each step, so that the step says where to go on, whatever the number of processes was before.
    num_steps: steps in all, those before a resume included.
    make_optimizer: from (abstract) parameters to the optimizer.
    learning_rate: what the optimizer uses, to be logged.
    mesh: see ``vad_jax.sharding.make_mesh``.
    checkpoints: where to resume from and save to.
    info: stored with the checkpoints; see ``vad_jax.checkpoint.Loaded``.
    writer: gets the mean of every loss term, gradient norm and so on over the last ``log_every`` steps.
    sharding: ``replicate`` or ``fsdp``.
    matcher: ``device`` or ``scipy``.
    microbatch: examples that a device takes at once, to save memory; gradients are means over all such parts of
      a batch. None takes all at once.
    ema_decay: keeps an exponential moving average of the parameters, which is then evaluated and saved as the
      best.
    nonfinite: whether a loss term or gradient that is not finite stops the training, or the step is left out, with a
      line about it and a count in ``skipped``; ten such steps in a row stop it in any case.
    seed: of the parameters and of all randomness in the steps.
    load_weights: fills the new model in place, where there is no checkpoint to resume from.
    log_every: steps.
    save_every: steps.
    evaluate_every: steps; the last step is evaluated in any case.
    evaluate: from the step, a function that predicts, and one that says whether to stop, to scores; None where it was
      stopped.
    monitor: the score by which the best checkpoint is chosen.
    peak_steps_per_second: what the devices could do at their best; the share of it that is reached is written as
      ``mfu``.
    profile: directory for a trace of some early steps, made by the first process.

  Raises:
    NonFiniteError: a loss term or the gradient is not finite; nothing is saved after it.
    CheckpointError: the checkpoint does not fit, or none is whole, or saving failed.
  """
  graphdef, optimizer, abstract, init = prepare(make_model, make_optimizer, mesh, sharding, ema_decay is not None, seed)
  restored = checkpoints.restore(abstract)
  state, info = restored or (init(), {**info, "metrics": {}})
  if load_weights and not restored:
    state = _with_weights(state, graphdef, load_weights)
  step = first = int(state["step"])
  batches = make_batches(step)
  train_step = make_train_step(
    graphdef,
    optimizer,
    learning_rate,
    seed=seed,
    matcher=matcher,
    microbatch=microbatch,
    ema_decay=ema_decay,
    skip=nonfinite == "skip",
  )
  compiled, compile_seconds = {}, 0.0  # by the shape of the video, of which there are as many as canvases
  predict = jax.jit(make_predict(graphdef))
  best = (checkpoints.best_info() or {"metrics": {}})["metrics"].get(monitor, -np.inf)
  meter = _Meter(writer, peak_steps_per_second, skip=nonfinite == "skip")
  if restored:
    print(f"resumed from step {step}", file=sys.stderr, flush=True)

  with jax.set_mesh(mesh), StopRequest() as stop, contextlib.ExitStack() as traced, contextlib.ExitStack() as shown:
    advance = None  # of the progress bar, which is not shown while something else is done
    changed = False  # since the last save
    while True:
      due = step == num_steps or (evaluate_every and step % evaluate_every == 0)
      if evaluate and step and due and info["metrics"].get("step") != step:  # a resume makes up for a missed one
        meter.flush(step)
        shown.close()
        advance = None
        scores = evaluate(step, functools.partial(predict, state.get("ema", state["params"]), state["rest"]), stop)
        if scores is not None:
          writer.write_scalars(step, {f"eval/{name}": value for name, value in scores.items()})
          info, changed = {**info, "metrics": {"step": step, **scores}}, True
          if scores[monitor] > best:
            best = scores[monitor]
            checkpoints.save_best(state, {**info, "step": step})
        meter.restart()
      done = step == num_steps or stop()
      if changed and (done or step % save_every == 0):
        meter.flush(step)  # raises rather than save a state that is not finite
        checkpoints.save(state, {**info, "step": step})
        meter.restart()
        changed = False
      if done:
        break
      begun = time.perf_counter()
      host_batch = next(batches)
      meter.waited(time.perf_counter() - begun)
      batch = to_global(host_batch, mesh)
      shape = batch["video"].shape
      if shape not in compiled:
        meter.flush(step)
        compiled[shape], seconds = compile_step(train_step, state, batch)
        compile_seconds += seconds
        meter.restart()
      if profile and step - first in _TRACED:
        meter.flush(step)  # waits for the steps before
        traced.close()
        if step - first == _TRACED[0] and jax.process_index() == 0:
          traced.enter_context(jax.profiler.trace(profile))
      if advance is None:
        advance = shown.enter_context(progress.bar("train", num_steps, start=step))
      state, metrics = compiled[shape](state, batch)
      step, changed = step + 1, True
      meter.add(step, metrics, host_batch["key"])
      advance(note=meter.flush(step) if step % log_every == 0 or step == first + 1 else "")
    meter.flush(step)
    checkpoints.wait()
  return Result(state, stop.reason, compile_seconds, meter.train_seconds, step - first)


def make_train_step(
  graphdef: Any,
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  *,
  seed: int,
  matcher: Method,
  microbatch: int | None,
  ema_decay: float | None,
  skip: bool = False,
) -> Callable[[State, Batch], tuple[State, dict[str, Array]]]:
  """Makes the pure function of one step: state and batch to the next state and scalars.

  Where ``skip`` is set, a step with scalars that are not finite changes nothing but the number of the step.
  """

  def loss_fn(params: Any, rest: Any, batch: Batch, key: Array) -> tuple[Array, tuple[dict[str, Array], Any]]:
    model = nnx.merge(graphdef, params, rest)
    model = nnx.view(model, raise_if_not_found=False, deterministic=False)
    out = model(batch, rngs=make_rngs(key))
    costs = model.costs(out, batch)
    mask = None if costs is None else match(costs, batch["box_mask"], matcher)
    loss, terms = model.loss(out, batch, mask)
    return loss, (terms, split_model(model)[2])

  def train_step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state["step"])
    (loss, (terms, rest)), grads = _mean_gradients(loss_fn, state["params"], state["rest"], batch, key, microbatch)
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    scalars = {
      **terms,
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": learning_rate(state["step"]),
    }
    after = {**state, "params": params, "rest": rest, "opt": opt}
    if ema_decay is not None:
      after["ema"] = optax.incremental_update(params, state["ema"], 1 - ema_decay)
    if skip:
      finite = jnp.isfinite(jnp.stack(jax.tree.leaves(scalars))).all()
      after = jax.tree.map(functools.partial(jnp.where, finite), after, state)
    return {**after, "step": state["step"] + 1}, scalars

  return train_step


def _mean_gradients(
  loss_fn: Callable[..., Any], params: Any, rest: Any, batch: Batch, key: Array, microbatch: int | None
) -> tuple[tuple[Array, tuple[dict[str, Array], Any]], Any]:
  """Value and gradients of the loss, means over the parts that a batch is taken in.

  Raises:
    ValueError: a device's share of the batch does not divide into such parts.
  """
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  devices = max(jax.sharding.get_abstract_mesh().size, 1)
  rows = batch["key"].shape[0] // devices
  if microbatch is None or microbatch >= rows:
    return value_and_grad(params, rest, batch, key)
  if rows % microbatch:
    raise ValueError(f"the {rows} examples of a device do not divide into parts of {microbatch} (config.microbatch)")
  count = rows // microbatch

  def split(x: Array) -> Array:  # every device splits its own rows: none moves
    parts = jnp.asarray(x).reshape(devices, count, microbatch, *x.shape[1:]).swapaxes(0, 1)
    return parts.reshape(count, devices * microbatch, *x.shape[1:])

  def add(carry: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
    sums, rest = carry
    (loss, (terms, rest)), grads = value_and_grad(params, rest, part[1], jax.random.fold_in(key, part[0]))
    return (jax.tree.map(jnp.add, sums, (loss, terms, grads)), rest), None

  parts = jax.tree.map(split, batch)
  first = jax.tree.map(lambda x: x[0], parts)
  (loss, (terms, _)), grads = jax.eval_shape(value_and_grad, params, rest, first, key)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, terms, grads))
  (sums, rest), _ = jax.lax.scan(add, (zeros, rest), (jnp.arange(count), parts))
  loss, terms, grads = jax.tree.map(lambda x: x / count, sums)
  return (loss, (terms, rest)), grads


def make_predict(graphdef: Any) -> Callable[[Any, Any, Batch], Detections]:
  """Makes the pure function from parameters, other arrays of the model and a batch to detections."""

  def predict(params: Any, rest: Any, batch: Batch) -> Detections:
    model = nnx.view(nnx.merge(graphdef, params, rest), raise_if_not_found=False, deterministic=True)
    return model.detections(model(batch), batch)

  return predict


def prepare(
  make_model: Callable[[nnx.Rngs], Any],
  make_optimizer: Callable[[Any], optax.GradientTransformation],
  mesh: Mesh,
  sharding: str,
  ema: bool,
  seed: int,
) -> tuple[Any, optax.GradientTransformation, State, Callable[[], State]]:
  """Finds out the structure of model and state without computing either.

  Returns:
    Graph definition, optimizer, abstract state with shardings, and a function that makes the initial state in
    place.
  """
  graphdef, params, _ = split_model(nnx.eval_shape(lambda: make_model(make_rngs(0))))
  optimizer = make_optimizer(params)

  def init() -> State:
    _, params, rest = split_model(make_model(make_rngs(jax.random.key(seed))))
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "rest": rest, "opt": optimizer.init(params)}
    return {**state, "ema": jax.tree.map(jnp.copy, params)} if ema else state

  abstract = jax.eval_shape(init)
  shardings = infer_sharding(abstract, mesh, sharding)
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
  return graphdef, optimizer, abstract, jax.jit(init, out_shardings=shardings)


def _with_weights(state: State, graphdef: Any, load_weights: Callable[[Any], None]) -> State:
  """The state with parameters that were filled from elsewhere, lying where those before lay."""
  model = nnx.merge(graphdef, state["params"], state["rest"])
  load_weights(model)
  _, params, rest = split_model(model)
  weights = {"params": params, "rest": rest, **({"ema": params} if "ema" in state else {})}

  def place(new: Array, old: Array) -> Array:
    if isinstance(new, jax.Array) and new.sharding == old.sharding:
      return jnp.copy(new)
    # From host memory, since devices of another process take nothing from those of this one.
    return jax.device_put(np.asarray(new), old.sharding)

  return {**state, **jax.tree.map(place, weights, {name: state[name] for name in weights})}


def compile_step(train_step: Callable[..., Any], state: State, batch: Batch) -> tuple[Callable[..., Any], float]:
  """Compiles the step ahead of time, for the shapes and shardings of these arguments, which may be abstract."""
  print("compiling the training step (once; this can take a minute) ...", file=sys.stderr, flush=True)
  begun = time.perf_counter()
  shardings = jax.tree.map(lambda x: x.sharding, state)
  replicated = NamedSharding(shardings["step"].mesh, PartitionSpec())
  step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated))
  compiled = step.lower(state, batch).compile()
  seconds = time.perf_counter() - begun
  print(f"compiled in {seconds:.1f} s", file=sys.stderr, flush=True)
  return compiled, seconds


class _Meter:
  """Gathers the scalars of every step on the device and looks at them only now and then.

  The host runs at most one step ahead of the device: enough to keep it busy, without piling up batches.
  """

  def __init__(self, writer: ScalarWriter, peak_steps_per_second: float | None, *, skip: bool):
    self.train_seconds = 0.0
    self._writer = writer
    self._peak = peak_steps_per_second
    self._skip = skip
    self._skipped = 0  # steps in a row
    self._pending: list[tuple[int, dict[str, Array], np.ndarray]] = []
    self._note = ""
    self.restart()

  def restart(self) -> None:
    """Starts the clock again after work that is not training."""
    self._begun = time.perf_counter()
    self._waited = 0.0

  def waited(self, seconds: float) -> None:
    """Counts time in which the loop stood still for want of data."""
    self._waited += seconds

  def add(self, step: int, scalars: dict[str, Array], keys: np.ndarray) -> None:
    """Counts one step that was sent off."""
    if self._pending:
      jax.block_until_ready(self._pending[-1][1])
    self._pending.append((step, scalars, np.asarray(keys)))

  def flush(self, step: int) -> str:
    """Waits for all steps so far, writes the means and returns a note for the progress bar.

    Raises:
      NonFiniteError: a scalar of one of the steps is not finite, and may not be or was not in the last ones either.
    """
    if not self._pending:
      return self._note
    values = jax.device_get([scalars for _, scalars, _ in self._pending])
    finite = [scalars for pending, scalars in zip(self._pending, values, strict=True) if self._check(*pending, scalars)]
    seconds = time.perf_counter() - self._begun
    self.train_seconds += seconds
    mean = {name: float(np.mean([scalars[name] for scalars in finite])) for name in values[0]} if finite else {}
    mean["steps_per_second"] = len(values) / seconds
    mean["data_wait_share"] = self._waited / seconds
    if self._peak:
      mean["mfu"] = mean["steps_per_second"] / self._peak
    if self._skip:
      mean["skipped"] = len(values) - len(finite)
    self._writer.write_scalars(step, {f"train/{name}": value for name, value in mean.items()})
    self._pending.clear()
    self.restart()
    self._note = f"loss {mean.get('loss', np.nan):.4g}, {mean['steps_per_second']:.3g} steps/s"
    return self._note

  def _check(self, step: int, _: Any, keys: np.ndarray, scalars: dict[str, Array]) -> bool:
    """Whether the scalars of a step are finite."""
    bad = [name for name, value in scalars.items() if not np.isfinite(value)]
    self._skipped = self._skipped + 1 if bad else 0
    if not bad:
      return True
    what = f"step {step}: {', '.join(bad)} not finite, for the batch with keys {keys.tolist()}"
    if self._skip and self._skipped < _MOST_SKIPPED:
      print(f"\n{what}: skipped", file=sys.stderr, flush=True)
      return False
    already = f", and so were {self._skipped - 1} steps before" if self._skip else ""
    raise NonFiniteError(
      f"{what}{already}; nothing of it was saved. Look at these examples, lower the learning rate or clip the gradient"
    )


class StopRequest:
  """Turns ctrl-C and SIGTERM into a request that the loop asks for between steps; a second ctrl-C aborts.

  With several processes all must stop at the same step, so there only the notice of JAX's coordination
  service counts, which passes on a SIGTERM that any of them got; ctrl-C becomes one.
  """

  def __init__(self) -> None:
    self.reason = ""
    self._asked = False
    self._polls = 0
    self._handlers: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      # That of SIGTERM belongs to the coordination service where there is one.
      numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
      self._handlers = {number: signal.signal(number, self._request) for number in numbers}
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def __call__(self) -> bool:
    """Whether to stop. Every process has to ask equally often."""
    if jax.process_count() > 1 and not self.reason:
      self._polls += 1
      if multihost_utils.reached_preemption_sync_point(self._polls):
        self.reason = "preempted"
    return bool(self.reason)

  def _request(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self._asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked = True
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.reason = "interrupted" if number == signal.SIGINT else "preempted"
    print("\nstopping after this step, then saving (ctrl-C again aborts) ...", file=sys.stderr, flush=True)
