"""Parity adapters of the face recognition package: data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from taskkd.face.alignment import similarity_transform
from taskkd.face.datasets import collate
from taskkd.face.metrics import VerificationMetric
from taskkd.face.pairs import Pairs
from taskkd.face.verification import identify, ijb_templates, ijb_verify, squared_distances, tar_at_far, verify
from taskkd.images import in_memory

Inputs = Mapping[str, Tensor]
Params = Mapping[str, Any]


def folds(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    """Pair i is rows 2i and 2i + 1; their rates are every tenth of the thresholds'."""
    rows = inputs["in_embeddings"].numpy()
    found = verify(squared_distances(rows[::2], rows[1::2]), inputs["in_issame"].numpy(), params["nrof_folds"])
    assert len(found.accuracies) == params["nrof_folds"]
    return {
        "accuracy": torch.from_numpy(found.accuracies),
        "mean": torch.tensor(found.accuracy),
        "std": torch.tensor(found.std),
        "best_threshold": torch.from_numpy(found.thresholds),
        "tpr": torch.from_numpy(found.tpr[::10].copy()),
        "fpr": torch.from_numpy(found.fpr[::10].copy()),
    }


def flip_test(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    """Their backbone is tanh(0.2 W x) of pixels in -1..1.

    Theirs saw the images of a pair before they were rounded to whole numbers, so that its embeddings are not ours;
    `test_face_metric.py` measures the embeddings of the case itself.
    """
    images = [
        in_memory(
            f"image {n}", b"P6 %d %d 255\n" % (image.shape[2], image.shape[1]) + image.movedim(0, 2).numpy().tobytes()
        )
        for n, image in enumerate(inputs["in_images"])
    ]
    numbers = range(len(images))
    pairs = Pairs(images, numbers[::2], numbers[1::2], inputs["in_issame"].numpy())
    metric = VerificationMetric(pairs, folds=params["nfolds"])
    for batch in DataLoader(pairs.table, batch_size=params["batch_size"], collate_fn=collate):
        pixels = (batch["images"].double() / 255 - 0.5) / 0.5
        metric.update({"embeddings": torch.tanh(0.2 * pixels.flatten(1) @ inputs["w_W"].double().T)}, batch)
    result = metric.compute()
    return {"acc": torch.tensor(result["accuracy"]), "std": torch.tensor(result["accuracy_std"])}


def ijb_one_to_one(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    arrays = {name.removeprefix("in_"): value.numpy() for name, value in inputs.items()}
    numbers, features = ijb_templates(arrays["feats"], arrays["template"], arrays["media"], arrays["score"])
    scores = ijb_verify(numbers, features, arrays["p1"], arrays["p2"])
    rates = {
        strict: tar_at_far(scores, arrays["label"], params["fpr_targets"], strict=strict) for strict in (True, False)
    }
    return {
        "template_feats": torch.from_numpy(features),
        "unique_templates": torch.from_numpy(numbers),
        "score": torch.from_numpy(scores),
        "tpr_nearest": torch.from_numpy(rates[False]),
        "tpr_strict": torch.from_numpy(rates[True]),
    }


def ijb_one_to_many(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    probes, gallery, mates = (inputs[f"in_{name}"].numpy() for name in ("probe", "gallery", "mask"))
    found = identify(probes, gallery, mates, fpir=params["fars"], legacy=True)
    return {
        **{f"top{k}": torch.tensor(found[f"rank@{k}"]) for k in (1, 5, 10)},
        "recall": torch.tensor([found[f"tpir@{far:.0e}"] for far in params["fars"]]),
        "threshold": torch.tensor([found[f"threshold@{far:.0e}"] for far in params["fars"]]),
    }


def alignment(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    """Their pictures are formulas; of the crops there is every fourth pixel, which `test_alignment.py` compares."""
    sizes = inputs["in_size"].tolist()
    return {
        "M": torch.stack(
            [
                torch.from_numpy(similarity_transform(points.numpy(), size))
                for points, size in zip(inputs["in_landmarks"], sizes, strict=True)
            ]
        )
    }


ADAPTERS: dict[str, Callable[..., Any]] = {
    "face/10_fold_verification": folds,
    "face/test": flip_test,
    "face/ijb_1_1_template_verification": ijb_one_to_one,
    "face/ijb_1_n_identification": ijb_one_to_many,
    "face/5_point_similarity_alignment": alignment,
}
