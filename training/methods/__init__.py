"""Training methods, by the name that a recipe gives: one file for each that needs code of its own."""

from fot.compare import rope
from training.methods import landmark, longlora, memorizing
from training.methods.method import Method

METHODS = {
    method.name: method
    for method in (
        Method("crossbatch", whole=False),
        Method("memorizing", whole=False, prepare=memorizing.add_gates, switch=memorizing.Memorizing,
               settings=memorizing.settings_of, trains=(memorizing.GATE,)),
        # SuperHOT (kaiokendev 2023) and arXiv 2306.15595.
        Method("interpolation", rope=rope.interpolation),
        Method("yarn", rope=rope.yarn),
        Method("longlora", rope=rope.interpolation, attention=longlora.NAME, trains=longlora.TRAINS),
        Method("landmark", attention=landmark.NAME, prepare=landmark.add_landmark, rows=landmark.insert_landmarks,
               trains=landmark.TRAINS),
    )
}  # fmt: skip

__all__ = ["METHODS", "Method"]
