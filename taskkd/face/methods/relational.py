"""Relations between the embeddings of a batch: RKD, similarity preserving, correlation congruence, PKT, DarkRank."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from torch import nn

from taskkd import losses
from taskkd.face.methods.beside import EMBEDDINGS
from taskkd.stages import Method, Stage
from taskkd.terms import Match

__all__ = ["relational"]


def relational(
    student: nn.Module,  # noqa: ARG001
    teacher: nn.Module,  # noqa: ARG001
    *,
    kind: Literal["rkd", "similarity", "correlation", "pkt", "darkrank"] = "rkd",
    weight: Annotated[float, Gt(0)] | None = None,
    distance: Annotated[float, Ge(0)] = 25.0,
    angle: Annotated[float, Ge(0)] = 50.0,
    gather: bool = False,
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """How the faces of a batch relate to each other, beside the margin softmax: sizes of embeddings may differ.

    Source: the losses of `taskkd.losses` in the forms that face recognition uses: TFace's (Huang et al. 2022, EKD, who
    compare with them) and, for "pkt", FaceX-Zoo's. "rkd": Park et al. 2019; "similarity": Tung & Mori 2019, on cosines
    (TFace); "correlation": Peng et al. 2019, gamma 0.4 and order 2 (TFace's loop leaves out the last order); "pkt":
    Passalis & Tefas 2018; "darkrank": Chen et al. 2018, the hard variant on unit vectors, 3 neighbours.

    Scaling: equal, but "pkt", whose FaceX-Zoo form is divided by the number of samples once more.

    Args:
        student, teacher: face models.
        kind: which relation.
        weight: of the whole. None: 50 for "similarity", which gained on our procedural identities, else 1.
        distance, angle: weights of the two parts of "rkd".
        gather: relate the samples of all ranks. The angles of "rkd" take memory with the cube of their number.
        task_weight: of the margin softmax; 0: labels are not needed.
    """
    share = weight if weight is not None else 50.0 if kind == "similarity" else 1.0
    kinds: dict[str, dict[str, tuple[Any, float, dict[str, Any]]]] = {
        "rkd": {
            "distance": (losses.relational_distance, distance, {}),
            "angle": (losses.relational_angle, angle, {}),
        },
        "similarity": {"similarity": (losses.similarity_preserving, 1.0, {"normalise": "samples"})},
        "correlation": {"correlation": (losses.correlation_congruence, 1.0, {"gamma": 0.4, "order": 2})},
        "pkt": {"affinity": (losses.probabilistic_transfer, 1.0, {"eps": 1e-6})},
        "darkrank": {"rank": (losses.dark_rank, 1.0, {"length": 3, "normalise": True})},
    }
    terms = [
        Match(name, loss, EMBEDDINGS, gather=gather, weight=share * own, **options)
        for name, (loss, own, options) in kinds[kind].items()
        if own > 0
    ]
    return Method("relational", [Stage("distil", terms, task_weight)], ("labels",) if task_weight > 0 else ())
