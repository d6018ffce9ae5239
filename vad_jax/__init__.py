"""Video action detection in JAX: who is doing what, where, in a video.

Glossary, used in every docstring and shape of the library:

* Axes: ``B`` batch, ``T H W C`` video (channels last), ``N`` queries, proposals or candidate actors, ``M`` padded
  ground-truth actors, ``K`` action classes, ``L`` layers or pyramid levels.
* Boxes between modules: float32 **xyxy in [0, 1] of the unpadded frame**. Pixels or cxcywh live only inside one
  function or one model.
* Time: seconds, unless a name ends in ``_frames``.
* Keyframe: the annotated frame of a clip. A clip of ``T`` frames has it at index ``T // 2``.
* Action classes: index ``k`` of a label or score vector is the class with id ``k + 1`` of the label map.

Importing this module is cheap: it pulls in neither JAX nor TensorFlow.
"""

__version__ = "0.1.0"
