"""The task loss of segmentation networks: torch's own where there are labels, 0 where there are none."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from taskkd.errors import DataError, TaskkdError
from taskkd.segmentation import PixelCrossEntropy

WEIGHTS = [0.5, 2.0, 1.0, 3.0]


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits, aux = (torch.randn(2, 4, size, size, dtype=torch.float64, requires_grad=True) for size in (5, 3))
    labels = torch.randint(4, (2, 10, 12))
    labels[:, :3] = 255
    return logits, aux, labels


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_it_is_the_mean_over_labelled_pixels(weights: list[float] | None) -> None:
    logits, aux, labels = data()
    loss = PixelCrossEntropy(aux_weight=0.3, class_weights=weights)({"logits": logits, "aux": aux}, {"labels": labels})
    own = None if weights is None else torch.tensor(weights).double()
    shown = [F.interpolate(x, labels.shape[1:], mode="bilinear", align_corners=False) for x in (logits, aux)]
    main, second = (F.cross_entropy(x, labels, weight=own, ignore_index=255) for x in shown)
    torch.testing.assert_close(loss, main + 0.3 * second, rtol=1e-12, atol=0)
    (found,), (expected,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (loss, main))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_nothing_labelled_gives_0_with_a_gradient_of_0(weights: list[float] | None) -> None:
    logits, _, labels = data()
    loss = PixelCrossEntropy(class_weights=weights)({"logits": logits}, {"labels": labels.fill_(255)})
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_images_of_several_sizes_are_one_mean_over_all_pixels() -> None:
    """As the evaluation of a student has them in a batch."""
    logits, _, labels = data()
    loss = PixelCrossEntropy(class_weights=WEIGHTS)
    sizes = [(slice(0, 10), slice(0, 12)), (slice(0, 6), slice(0, 6))]
    some = {"labels": [labels[i][size] for i, size in enumerate(sizes)]}
    found = loss({"logits": [logits[0], logits[1]]}, some)
    shown = [F.interpolate(logits[i][None], label.shape, mode="bilinear")[0] for i, label in enumerate(some["labels"])]
    flat, known = (torch.cat(x, -1) for x in ([x.flatten(1) for x in shown], [x.flatten() for x in some["labels"]]))
    expected = F.cross_entropy(flat.T, known, weight=torch.tensor(WEIGHTS).double(), ignore_index=255)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_what_is_refused() -> None:
    logits, _, labels = data()
    labels[0, 5, 5] = 4
    with pytest.raises(DataError, match=r"label 4: expected 0 to 3, or 255"):
        PixelCrossEntropy()({"logits": logits}, {"labels": labels})
    with pytest.raises(DataError, match=r"label -1: expected 0 to 3, or 255"):
        PixelCrossEntropy()({"logits": logits}, {"labels": labels.masked_fill(labels == 4, -1)})
    with pytest.raises(TaskkdError, match="2 class_weights for 4 classes"):
        PixelCrossEntropy(class_weights=[1.0, 2.0])({"logits": logits}, {"labels": labels.clamp(max=3)})
    with pytest.raises(TaskkdError, match="not negative"):
        PixelCrossEntropy(aux_weight=-1.0)
