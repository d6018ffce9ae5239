"""How a body moves: the joints of a walking, sitting, waving... person over time.

An act is a pair of names: what legs and trunk do (`STANCES`) and what the arms do (`GESTURES`). Lengths are
in standing heights of the person, angles in radians; the body's axes are x forward, y up from the floor, z
to its left.

Acts that happen once (lift, put down, throw) are repeated every second with their turning point at whole
seconds, where the keyframes are, and are at rest half-way between them, where a script may change.
"""

from typing import NamedTuple

import numpy as np

# Joints; those of both sides are slices, left first.
HEAD, NECK, HIP = 0, 1, 2
SHOULDERS, ELBOWS, HANDS = slice(3, 5), slice(5, 7), slice(7, 9)
HIPS, KNEES, ANKLES, TOES = slice(9, 11), slice(11, 13), slice(13, 15), slice(15, 17)
NUM_JOINTS = 17

ANKLE_HEIGHT, SHIN, THIGH, TRUNK, UPPER_ARM, FOREARM = 0.04, 0.235, 0.245, 0.285, 0.165, 0.155
SIDES = np.array([1.0, -1.0])
LEFT, RIGHT = 0, 1
_BEHIND_SHOULDER = np.array([-0.4, -1.0, 0.0])


class Style(NamedTuple):
  """What makes two performances of one act differ.

  Attributes:
    tempo: multiplies the frequency of everything that repeats.
    vigour: multiplies the amplitude.
    phase: of everything that repeats, radians; two who act together share it.
    side: which hand acts, LEFT or RIGHT.
    variant: in [0, 1), chooses among forms of one act.
    reach: half the distance to the partner.
    meet: height above the floor where hands meet.
  """

  tempo: float
  vigour: float
  phase: float
  side: int
  variant: float
  reach: float = 0.3
  meet: float = 0.6


class Stance(NamedTuple):
  """Legs and trunk over time; ``[T]``, those with two sides ``[T, 2]``.

  Attributes:
    thigh: angle forward of straight down.
    shin: the same; smaller than the thigh's, as knees bend backward.
    lean: of the trunk, forward of upright.
    swing: angle of arms that have nothing else to do, forward of straight down.
    elbow: how far such arms are bent.
    rise: height of the lower foot above the floor.
  """

  thigh: np.ndarray
  shin: np.ndarray
  lean: np.ndarray
  swing: np.ndarray
  elbow: np.ndarray
  rise: np.ndarray


def joints(stance: str, gesture: str, times: np.ndarray, style: Style) -> np.ndarray:
  """Joint positions of a person performing an act.

  Args:
    stance: a key of `STANCES`.
    gesture: a key of `GESTURES`.
    times: ``[T]`` seconds.
    style: how it is performed.

  Returns:
    ``[T, NUM_JOINTS, 3]`` in the body's axes; the floor below the hips is the origin.
  """
  legs = STANCES[stance](times, style)
  body = np.zeros((len(times), NUM_JOINTS, 3))
  body[:, HIP, 0] = -0.14 * np.maximum(np.sin(legs.lean) - 0.2, 0)  # keeps the balance of who bends
  body[:, HIPS] = body[:, HIP, None]
  body[:, HIPS, 2] = 0.055 * SIDES
  body[:, KNEES] = body[:, HIPS] + THIGH * _direction(legs.thigh, 0.04 * SIDES)
  body[:, ANKLES] = body[:, KNEES] + SHIN * _direction(legs.shin, 0.02 * SIDES)
  floor = body[:, ANKLES, 1].min(1) - ANKLE_HEIGHT - legs.rise
  body[:, : ANKLES.stop, 1] -= floor[:, None]
  body[:, TOES] = body[:, ANKLES]
  body[:, TOES, 0] += 0.085 * np.cos(0.5 * legs.shin)
  body[:, TOES, 1] += 0.085 * np.sin(0.5 * legs.shin) - 0.5 * ANKLE_HEIGHT
  up = np.stack([np.sin(legs.lean), np.cos(legs.lean), np.zeros_like(legs.lean)], -1)
  body[:, NECK] = body[:, HIP] + TRUNK * up
  head_lean = 0.6 * legs.lean + (0.35 if gesture == "text" else 0.0)
  body[:, HEAD, :2] = body[:, NECK, :2] + 0.11 * np.stack([np.sin(head_lean), np.cos(head_lean)], -1)
  body[:, HEAD, 0] += 0.012
  body[:, SHOULDERS] = body[:, NECK, None] - 0.02 * up[:, None]
  body[:, SHOULDERS, 2] = 0.105 * SIDES
  body[:, ELBOWS], body[:, HANDS] = GESTURES[gesture](times, style, legs, body)
  return body


def travel_speed(stance: str, style: Style) -> float:
  """Standing heights a second that a person moves forward."""
  return style.tempo * {"walk": 0.5, "run": 1.0}.get(stance, 0.0)


def event_phase(times: np.ndarray) -> np.ndarray:
  """Time since the turning point of an act that happens once a second, in [-0.5, 0.5)."""
  return (times + 0.5) % 1.0 - 0.5


def _direction(forward: np.ndarray, aside: np.ndarray) -> np.ndarray:
  """Unit vectors of a limb: straight down, turned forward, then aside (positive is left)."""
  forward, aside = np.broadcast_arrays(forward, aside)
  return np.stack([np.sin(forward) * np.cos(aside), -np.cos(forward) * np.cos(aside), np.sin(aside)], -1)


def _wave(times: np.ndarray, style: Style, hertz: float, shift: float = 0.0) -> np.ndarray:
  return np.sin(2 * np.pi * hertz * style.tempo * times + style.phase + shift)


# Stances.


def _still(
  times: np.ndarray,
  style: Style,
  *,
  thigh=(0.03, -0.03),
  knee=(0.03, 0.03),
  lean=0.02,
  swing=(0.0, 0.0),
  elbow=0.2,
):
  ones = np.ones((len(times), 2))
  sway = 0.012 * _wave(times, style, 0.3)
  thigh = ones * thigh + sway[:, None]
  return Stance(thigh, thigh - knee, lean + sway, ones * swing, ones * elbow, np.zeros(len(times)))


def _stand(times, style):
  return _still(times, style, thigh=(0.12 * style.variant, -0.08 * style.variant))


def _stride(times, style):
  """Somebody who stands as if caught in the middle of a step."""
  step = style.vigour * (0.25 + 0.3 * style.variant) * np.sign(np.sin(style.phase + 0.1))
  return _still(
    times, style, thigh=(step, -step), knee=(0.1, 0.3), lean=0.05, swing=(-0.8 * step, 0.8 * step), elbow=0.4
  )


def _sit(times, style):
  return _still(
    times,
    style,
    thigh=(1.5, 1.42),
    knee=(1.45, 1.3),
    lean=0.05 + 0.1 * style.variant,
    swing=(0.35, 0.35),
    elbow=0.9,
  )


def _guard(times, style):
  """The stance of a fighter, swaying forward and back."""
  stance = _still(times, style, thigh=(0.4, -0.25), knee=(0.35, 0.2), lean=0.08)
  return stance._replace(lean=stance.lean + 0.12 * style.vigour * _wave(times, style, 1.2, 1.5))


def _ready(times, style):
  """The same stance without the motion."""
  return _still(times, style, thigh=(0.4, -0.25), knee=(0.35, 0.2), lean=0.08)


def _gait(times, style, *, hertz, stride, knee, bend, lean, elbow, swing, bounce):
  phase = 2 * np.pi * hertz * style.tempo * times[:, None] + style.phase + np.array([0, np.pi])
  thigh = style.vigour * stride * np.sin(phase) + 0.3 * lean
  shin = thigh - bend - knee * np.maximum(np.cos(phase), 0)
  flat = np.ones(len(times))
  rise = bounce * np.abs(np.sin(phase[:, 0]))
  return Stance(thigh, shin, lean * flat, -swing * style.vigour * np.sin(phase), elbow * np.ones_like(thigh), rise)


def _walk(times, style):
  return _gait(times, style, hertz=1.0, stride=0.5, knee=0.75, bend=0.05, lean=0.06, elbow=0.3, swing=0.5, bounce=0.0)


def _run(times, style):
  return _gait(times, style, hertz=1.3, stride=0.75, knee=1.5, bend=0.35, lean=0.28, elbow=1.5, swing=0.85, bounce=0.05)


def _jump(times, style):
  beat = (1.0 * style.tempo * times + style.phase / (2 * np.pi)) % 1.0
  air = np.clip((beat - 0.4) / 0.5, 0, 1)
  height = 0.9 * style.vigour * air * (1 - air)
  crouch = np.interp(beat, [0, 0.2, 0.4, 0.9, 1.0], [0.45, 1.0, 0.0, 0.0, 0.45]) * style.vigour
  thigh = np.stack([0.75 * crouch + 0.05, 0.75 * crouch - 0.05], -1)
  arms = np.interp(beat, [0, 0.2, 0.5, 0.8, 1.0], [0.3, -0.7, 2.7, 2.2, 0.3])[:, None] * np.ones(2)
  return Stance(thigh, thigh - 1.35 * crouch[:, None], 0.05 + 0.45 * crouch, arms, 0.2 * np.ones_like(arms), height)


def _bend(times, style):
  """Bowing: from half-way to deep down and back, never upright."""
  lean = 1.15 + 0.3 * style.vigour * _wave(times, style, 0.6)
  stance = _still(times, style, thigh=(0.12, 0.05), knee=(0.15, 0.12), swing=(0.25, 0.15), elbow=0.1)
  return stance._replace(lean=lean)


def _stoop(times, style):
  """Down to the floor and up again once a second."""
  down = _depth(times)
  thigh = np.stack([0.15 + 0.55 * down, 0.05 + 0.5 * down], -1)
  arms = np.zeros_like(thigh)
  return Stance(thigh, thigh - 0.1 - 1.0 * down[:, None], 0.15 + 1.1 * down, arms, arms, np.zeros(len(times)))


def _lunge(times, style):
  """Feet apart; the trunk goes back and then forward with a throw."""
  lean = np.interp(event_phase(times), [-0.5, -0.15, 0.08, 0.5], [0.05, -0.25, 0.4, 0.05])
  thigh = (0.35, -0.3) if style.side == RIGHT else (-0.3, 0.35)
  stance = _still(times, style, thigh=thigh, knee=(0.2, 0.2), swing=(0.3, 0.3), elbow=0.6)
  return stance._replace(lean=lean)


def _depth(times: np.ndarray) -> np.ndarray:
  """How far down who stoops is: 1 at whole seconds, 0 half-way between."""
  return (0.5 + 0.5 * np.cos(2 * np.pi * times)) ** 0.8


# Gestures: elbows and hands, each [T, 2, 3].


def _hang(shoulders, swing, elbow):
  elbows = shoulders + UPPER_ARM * _direction(swing, 0.12 * SIDES)
  return elbows, elbows + FOREARM * _direction(swing + elbow, 0.02 * SIDES)


def _reach(shoulder, target, pole=_BEHIND_SHOULDER):
  """Elbow and hand of an arm that reaches for a point, as far as it can; the elbow bends to the pole."""
  offset = target - shoulder
  distance = np.linalg.norm(offset, axis=-1, keepdims=True)
  along = offset / np.maximum(distance, 1e-6)
  length = np.clip(distance, 0.05, 0.999 * (UPPER_ARM + FOREARM))
  foot = (UPPER_ARM**2 - FOREARM**2 + length**2) / (2 * length)
  side = pole - along * np.sum(pole * along, -1, keepdims=True)
  side /= np.maximum(np.linalg.norm(side, axis=-1, keepdims=True), 1e-6)
  elbow = shoulder + along * foot + side * np.sqrt(np.maximum(UPPER_ARM**2 - foot**2, 0))
  return elbow, shoulder + along * length


def _idle(times, style, legs, body):
  return _hang(body[:, SHOULDERS], legs.swing, legs.elbow)


def _one_hand(style, arms, elbow, hand):
  """Replaces the acting arm among arms that idle."""
  elbows, hands = arms
  elbows[:, style.side], hands[:, style.side] = elbow, hand
  return elbows, hands


def _one_arm(times, style, legs, body, forward, aside, forearm_forward, forearm_aside):
  side = SIDES[style.side]
  elbow = body[:, SHOULDERS][:, style.side] + UPPER_ARM * _direction(forward, aside * side)
  hand = elbow + FOREARM * _direction(forearm_forward, forearm_aside * side)
  return _one_hand(style, _idle(times, style, legs, body), elbow, hand)


def _raised(times, style, legs, body):
  """One arm up as if to wave, but still."""
  still = np.zeros(len(times))
  return _one_arm(times, style, legs, body, still + 0.3, 1.4, still + np.pi, 0.9 * np.sin(style.phase))


def _wave_hand(times, style, legs, body):
  still = np.zeros(len(times))
  swing = 0.9 * style.vigour * _wave(times, style, 1.4)
  return _one_arm(times, style, legs, body, still + 0.3, 1.4, still + np.pi, swing)


def _throw(times, style, legs, body):
  since = event_phase(times)
  forward = np.interp(since, [-0.5, -0.3, -0.12, 0.0, 0.12, 0.5], [0.3, 2.6, 3.9, 1.9, 0.8, 0.3])
  bend = np.interp(since, [-0.5, -0.3, -0.12, 0.0, 0.12, 0.5], [0.8, 0.9, 1.2, 0.1, 0.1, 0.8])
  return _one_arm(times, style, legs, body, forward, 0.2, forward + bend, 0.1)


def _to_ear(times, style, legs, body):
  side = SIDES[style.side]
  ear = body[:, HEAD] + np.array([0.015, -0.01, 0.085 * side])
  arm = _reach(body[:, SHOULDERS][:, style.side], ear, np.array([0.5, -1.0, 1.2 * side]))
  return _one_hand(style, _idle(times, style, legs, body), *arm)


def _text(times, style, legs, body):
  side = SIDES[style.side]
  typing = 0.006 * np.sign(_wave(times, style, 1.1))
  point = body[:, NECK] + np.stack([0.2 + 0 * times, -0.09 + typing, 0.03 * side + 0 * times], -1)
  return _one_hand(style, _idle(times, style, legs, body), *_reach(body[:, SHOULDERS][:, style.side], point))


def _both(body, forward, up, aside):
  """Both hands in front of the breast, at offsets from the neck."""
  forward, up, aside = (np.broadcast_to(value, (len(body),)) for value in (forward, up, aside))
  offset = np.stack([np.stack([forward, up, side * aside], -1) for side in SIDES], 1)
  return _reach(body[:, SHOULDERS], body[:, NECK, None] + offset)


def _carry(times, style, legs, body):
  return _both(body, 0.23, -0.2 + 0.01 * _wave(times, style, 1.0), 0.06)


def _grasp(times, style, legs, body):
  """Hands go down to the floor with the trunk, then come up to the breast."""
  down = _depth(times)
  return _both(body, 0.23 - 0.15 * down, -0.2 - 0.1 * down, 0.06)


def _clap(times, style, legs, body):
  return _both(body, 0.2, -0.06, 0.02 + 0.1 * style.vigour * (1 + _wave(times, style, 1.4)))


def _shake(times, style, legs, body):
  point = np.zeros((len(times), 3))
  point[:, 0] = style.reach
  point[:, 1] = style.meet + 0.05 * style.vigour * _wave(times, style, 1.4)
  shoulder = body[:, SHOULDERS][:, RIGHT]
  return _one_hand(style._replace(side=RIGHT), _idle(times, style, legs, body), *_reach(shoulder, point))


def _punch(times, style, legs, body):
  beat = np.stack([_wave(times, style, 1.2), -_wave(times, style, 1.2)], -1)
  return _fists(style, body, np.maximum(beat, 0) ** 0.7)


def _still_fists(times, style, legs, body):
  return _fists(style, body, np.zeros((len(times), 2)))


def _fists(style, body, out):
  guard = body[:, NECK, None] + np.stack([0.17 + 0 * out, -0.02 + 0 * out, 0.07 * SIDES + 0 * out], -1)
  blow = body[:, NECK, None] + np.stack([2 * style.reach - 0.08 + 0 * out, 0.03 + 0 * out, 0.03 * SIDES + 0 * out], -1)
  return _reach(body[:, SHOULDERS], guard + out[..., None] * (blow - guard))


def _talk(times, style, legs, body):
  up = np.stack([_wave(times, style, 1.1), _wave(times, style, 1.1, 2.2)], -1)
  forearm = 1.6 + 0.65 * style.vigour * up
  elbows = body[:, SHOULDERS] + UPPER_ARM * _direction(0.35 + 0.15 * up, 0.25 * SIDES)
  return elbows, elbows + FOREARM * _direction(forearm, 0.15 * SIDES)


STANCES = {
  "stand": _stand,
  "stride": _stride,
  "sit": _sit,
  "guard": _guard,
  "ready": _ready,
  "walk": _walk,
  "run": _run,
  "jump": _jump,
  "bend": _bend,
  "stoop": _stoop,
  "lunge": _lunge,
}
GESTURES = {
  "idle": _idle,
  "watch": _idle,
  "raised": _raised,
  "wave": _wave_hand,
  "throw": _throw,
  "phone": _to_ear,
  "hand_at_ear": _to_ear,
  "text": _text,
  "carry": _carry,
  "lift": _grasp,
  "put_down": _grasp,
  "clap": _clap,
  "shake": _shake,
  "hit": _punch,
  "fists": _still_fists,
  "talk": _talk,
}
