"""Speed and memory of distilling detectors.

    python -m benchmarks.detection [--only feature|second|dense|regions|memory] [--rounds N] [--device cpu|cuda]

Models are random, images random, boxes random but of sensible sizes; speed does not depend on what they show.

    feature  a step with a feature method (Pearson KD) over the sum of its parts: a step of the student alone, and the
             teacher's backbone and pyramid. RetinaNet and Faster R-CNN, ResNet-50 to ResNet-18, images of 160 pixels.
             Bar 1.03.
    second   the same with Chen's terms, of Faster R-CNN: the parts are the student's step, the teacher's backbone, its
             RPN head and its box head on the student's regions. The terms themselves are not among the parts.
    dense    the same with GID of RetinaNet: the parts are the student's step, the teacher's backbone and head.
    regions  FGFI's and FGD's masks, boxes as masks (DeFeat), and the general instances of GID, over loops over images
             and boxes as released code has them, at 100 boxes an image; both give the same masks and instances. Bar 10.
    memory   the peak of `feature`'s step over that of its parts, the teacher's maps being held: bar 1.1. It is what
             torch allocates above what models, optimiser and data have.

Times are CPU time of one thread (on a GPU wall time, synchronised), interleaved in one process in changing order,
medians of ratios with quartiles. Exits 1 if a bar is missed by more than the noise of 0.01.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

import taskkd as kd
from benchmarks.figures import Figure, Options, Part, parser, peak, run, take_turns
from taskkd.detection.methods import METHODS
from taskkd.detection.models import build
from taskkd.detection.shared import SharedImages
from taskkd.detection.teacher import DetectorTeacher

SIDE, BATCH, CLASSES = 160, 4, 10
NAMES = {"retinanet": "RetinaNet", "faster_rcnn": "Faster R-CNN"}
SMALL = {"min_size": SIDE, "max_size": SIDE, "rois_per_image": 64, "proposals": 400}


# ---- what is timed


def detector(architecture: str, backbone: str, device: str) -> nn.Module:
    """A detector that trains all of its parts."""
    return build({"architecture": architecture, "backbone": backbone, **SMALL}, CLASSES).to(device)


def random_boxes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, 4) boxes of 4 to 80 pixels, inside an image."""
    size = 4 + 76 * torch.rand(count, 2, generator=generator) ** 2
    corner = torch.rand(count, 2, generator=generator) * (side - size).clamp(min=1)
    return torch.cat([corner, corner + size], 1).clamp(max=side)


def batch(device: str, images: int = BATCH) -> dict[str, Any]:
    """Images with eight boxes each."""
    generator = torch.Generator().manual_seed(0)
    targets = [
        {
            "boxes": random_boxes(8, SIDE, generator).to(device),
            "labels": torch.randint(1, CLASSES + 1, (8,), generator=generator).to(device),
        }
        for _ in range(images)
    ]
    pictures = [torch.rand(3, SIDE, SIDE, generator=generator).to(device) for _ in range(images)]
    return {"images": pictures, "targets": targets, "id": torch.arange(images)}


class Pair:
    """A student that is distilled, and the parts of which that consists, each a function without arguments."""

    def __init__(self, architecture: str, method: str, device: str, options: dict[str, Any] | None = None) -> None:
        torch.manual_seed(0)
        self.batch = batch(device)
        self.teacher = detector(architecture, "resnet50", device).eval()
        self.student = detector(architecture, "resnet18", device)
        made = METHODS[method](self.student, self.teacher, **(options or {}))
        source = DetectorTeacher(self.teacher, self.student)
        self.distiller = kd.Distiller(self.student, source, made.stages[0].terms)
        self.distiller.to(device).prepare(self.batch)
        self.distiller.train()
        self.optimizer = torch.optim.SGD(self.distiller.parameters(), lr=1e-6)
        with torch.no_grad():
            images, targets = self.student.transform(self.batch["images"], self.batch["targets"])
            self.images = images
            self.regions: list[Tensor] = [t["boxes"].repeat(8, 1) for t in targets]  # as many as are sampled

    def distil(self) -> None:
        """One step of the distiller."""
        self.optimizer.zero_grad()
        self.distiller(**self.batch)["loss"].backward()
        self.optimizer.step()
        self.distiller.step()

    def alone(self, held: Any = None) -> None:
        """One step of the student."""
        self.optimizer.zero_grad()
        sum(self.student(self.batch["images"], self.batch["targets"]).values()).backward()
        self.optimizer.step()

    @torch.no_grad()
    def backbone(self) -> dict[str, Tensor]:
        """The teacher's backbone and pyramid."""
        maps: dict[str, Tensor] = self.teacher.backbone(self.images.tensors)
        return maps

    @torch.no_grad()
    def heads(self) -> Any:
        """The teacher's backbone, pyramid, and the heads that responses need."""
        maps = self.backbone()
        if hasattr(self.teacher, "head"):
            return self.teacher.head(list(maps.values()))
        self.teacher.rpn.head(list(maps.values()))
        pooled = self.teacher.roi_heads.box_roi_pool(maps, self.regions, self.images.image_sizes)
        return self.teacher.roi_heads.box_predictor(self.teacher.roi_heads.box_head(pooled))


Work = Callable[[], Any]


def over_parts(
    title: str, whole: Work, parts: Sequence[Work], rounds: int, options: Options, at_most: float | None = None
) -> Figure:
    """The time of `whole` over that of all `parts`, each timed by itself."""
    works = {"whole": whole, **{f"part {i}": part for i, part in enumerate(parts)}}
    taken = take_turns(works, options.count(rounds), device=options.device)
    together = [sum(times) for times in zip(*(taken[f"part {i}"] for i in range(len(parts))), strict=True)]
    return Figure.over(title, taken["whole"], together, at_most=at_most)


def feature(options: Options) -> list[Figure]:
    """A feature method."""
    found = []
    for architecture, name in NAMES.items():
        pair = Pair(architecture, "pearson_kd", options.device)
        title = f"{name}: Pearson KD over the student's step and the teacher's backbone and pyramid"
        found.append(over_parts(title, pair.distil, [pair.alone, pair.backbone], 10, options, at_most=1.03))
        found.append(
            over_parts(f"{name}: the student's step over itself: the noise", pair.alone, [pair.alone], 6, options)
        )
    return found


def second(options: Options) -> list[Figure]:
    """Responses of second stages."""
    pair = Pair("faster_rcnn", "chen", options.device)
    title = "Faster R-CNN: Chen 2017 over the student's step, the teacher's backbone and heads on the student's regions"
    return [over_parts(title, pair.distil, [pair.alone, pair.heads], 6, options)]


def dense(options: Options) -> list[Figure]:
    """Responses at anchors."""
    pair = Pair("retinanet", "gid", options.device)
    title = "RetinaNet: GID over the student's step, the teacher's backbone and head"
    return [over_parts(title, pair.distil, [pair.alone, pair.heads], 6, options)]


# ---- regions: loops over images and boxes, written from the formulas


def loop_fgfi(
    boxes: list[Tensor], anchors: list[Tensor], shapes: list[tuple[int, int]], levels: list[Tensor], psi: float = 0.5
) -> list[Tensor]:
    """Of each level: for every box the IoU of all anchors, and the cells with one above psi times the best."""
    masks = []
    for level, (own, (h, w)) in enumerate(zip(anchors, shapes, strict=True)):
        rows = []
        for image, image_boxes in enumerate(boxes):
            mask = torch.zeros(h, w, dtype=torch.bool, device=own.device)
            for number in range(len(image_boxes)):
                if int(levels[image][number]) != level:
                    continue
                overlap = box_iou(own, image_boxes[number : number + 1]).view(h, w, -1)
                mask |= (overlap > psi * overlap.max()).any(-1)
            rows.append(mask)
        masks.append(torch.stack(rows))
    return masks


def loop_fgd(boxes: list[Tensor], shapes: list[tuple[int, int]], side: int) -> list[tuple[Tensor, Tensor]]:
    """Of each level, image and box: the cells from floor to ceil, both included, have at least 1 over their number."""
    masks = []
    for h, w in shapes:
        front = torch.zeros(len(boxes), h, w, device=boxes[0].device)
        back = torch.ones_like(front)
        for i, image_boxes in enumerate(boxes):
            for x1, y1, x2, y2 in image_boxes:
                left, right = int(torch.floor(x1 / side * w)), int(torch.ceil(x2 / side * w))
                top, bottom = int(torch.floor(y1 / side * h)), int(torch.ceil(y2 / side * h))
                value = 1.0 / ((bottom - top + 1) * (right - left + 1))
                cells = front[i, top : bottom + 1, left : right + 1]
                front[i, top : bottom + 1, left : right + 1] = torch.maximum(cells, cells.new_tensor(value))
            back[i] = torch.where(front[i] > 0, 0, 1)
            if back[i].sum() > 0:
                back[i] /= back[i].sum()
        masks.append((front, back))
    return masks


def loop_inside(boxes: list[Tensor], shapes: list[tuple[int, int]], side: int, levels: list[Tensor]) -> list[Tensor]:
    """Of each level, image and box: the cells in the box."""
    masks = []
    for level, (h, w) in enumerate(shapes):
        mask = torch.zeros(len(boxes), h, w, dtype=torch.bool, device=boxes[0].device)
        for i, image_boxes in enumerate(boxes):
            for number, (x1, y1, x2, y2) in enumerate(image_boxes):
                if int(levels[i][number]) == level:
                    left, top = int(x1 * w / side), int(y1 * h / side)
                    right, bottom = max(int(x2 * w / side), left + 1), max(int(y2 * h / side), top + 1)
                    mask[i, top:bottom, left:right] = True
        masks.append(mask)
    return masks


def loop_instances(
    student: Tensor, teacher: Tensor, student_boxes: Tensor, teacher_boxes: Tensor, count: int, side: int
) -> list[Tensor]:
    """Of each image: sorted by score, a box is taken if it overlaps none of those taken before by more than 0.3."""
    found = []
    for s, t, own, other in zip(student, teacher, student_boxes, teacher_boxes, strict=True):
        score = (t - s).abs().amax(1)
        boxes = torch.where((t.amax(1) > s.amax(1))[:, None], other, own).clamp(0, side)
        taken: list[int] = []
        for i in score.topk(min(3000, len(score))).indices.tolist():
            if float((boxes[i, 2:] - boxes[i, :2]).min()) <= 1:
                continue
            if all(float(box_iou(boxes[i][None], boxes[j][None])) <= 0.3 for j in taken):
                taken.append(i)
            if len(taken) == count:
                break
        found.append(boxes[taken])
    return found


def regions(options: Options, count: int = 100, side: int = 640) -> list[Figure]:
    """Masks and instances of four images of 640 pixels, five levels, nine anchors in a cell of the dense ones."""
    from taskkd.detection.methods.gid import general_instances
    from taskkd.detection.regions import assign_levels, fgd_masks, fgfi_masks, inside_boxes

    device, generator = options.device, torch.Generator().manual_seed(0)
    boxes = [random_boxes(count, side, generator).to(device) for _ in range(BATCH)]
    shapes = [(side // s, side // s) for s in (8, 16, 32, 64, 128)]
    strides = [(float(side // h), float(side // w)) for h, w in shapes]
    model = build({"architecture": "retinanet", "backbone": "resnet18"}, 1)
    maps = [torch.zeros(1, 1, *shape) for shape in shapes]
    images = SharedImages(torch.zeros(1, 3, side, side), [(side, side)], [], [])
    grid = model.anchor_generator(images_of(images), maps)[0].to(device)
    sizes = [9 * h * w for h, w in shapes]
    anchors = list(grid.split(sizes))
    finest = 14 * strides[0][0]
    levels = [assign_levels(b, len(shapes), finest=finest) for b in boxes]
    dense = [torch.rand(BATCH, sum(sizes), CLASSES, generator=generator).to(device) ** 8 for _ in range(2)]
    moved = [(grid + 4 * torch.randn(grid.shape, generator=generator).to(device)).expand(BATCH, -1, -1) for _ in "st"]

    def ours_instances() -> list[Tensor]:
        return general_instances(*dense, *moved, sizes=[(side, side)] * BATCH, instances=count).boxes

    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "FGFI's masks": (
            lambda: fgfi_masks(boxes, anchors, shapes, finest=finest),
            lambda: loop_fgfi(boxes, anchors, shapes, levels),
        ),
        "FGD's masks": (
            lambda: fgd_masks(boxes, shapes, [(float(side), float(side))] * BATCH),
            lambda: loop_fgd(boxes, shapes, side),
        ),
        "boxes as masks (DeFeat)": (
            lambda: inside_boxes(boxes, shapes, strides, finest=finest),
            lambda: loop_inside(boxes, shapes, side, levels),
        ),
        "general instances (GID)": (ours_instances, lambda: loop_instances(*dense, *moved, count, side)),
    }
    found = []
    for name, (ours, loop) in cases.items():
        check_same(name, ours(), loop())
        taken = take_turns({"loop": loop, "ours": ours}, options.count(5), warm_up=1, device=device)
        found.append(Figure.over(f"{name}: a loop over boxes over ours", taken["loop"], taken["ours"], at_least=10))
    return found


def images_of(shared: SharedImages) -> Any:
    """torchvision's form."""
    from torchvision.models.detection.image_list import ImageList

    return ImageList(shared.tensors, shared.sizes)


def check_same(name: str, ours: Any, loop: Any) -> None:
    """Both compute the same.

    Raises:
        SystemExit: they do not.
    """
    pairs = [
        (a, b)
        for first, second in zip(ours, loop, strict=True)
        for a, b in zip(_each(first), _each(second), strict=True)
    ]
    for number, (a, b) in enumerate(pairs):
        if a.shape != b.shape or not torch.allclose(a.double(), b.double(), atol=1e-5):
            sys.exit(f"{name}: loops and ours differ at {number}: {tuple(a.shape)} and {tuple(b.shape)}.")


def _each(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


# ---- memory


def memory(options: Options) -> list[Figure]:
    """Without what models, optimiser and data take."""
    figures = []
    for architecture, name in NAMES.items():
        pair = Pair(architecture, "pearson_kd", options.device)

        def parts(pair: Pair = pair) -> None:
            held = pair.backbone()
            pair.alone(held)

        found = []
        for work in (pair.distil, parts):
            work()  # what is made once
            pair.optimizer.zero_grad()
            found.append(peak(work, options.device))
        detail = f"{found[0]:.1f} MB over {found[1]:.1f} MB"
        title = f"{name}: peak memory of a step with Pearson KD over that of its parts"
        figures.append(Figure(title, found[0] / found[1], at_most=1.1, detail=detail))
    return figures


PARTS = {
    "feature": Part("a step with a feature method over the sum of its parts", feature),
    "second": Part("a step with responses of second stages over the sum of its parts", second),
    "dense": Part("a step with responses at anchors over the sum of its parts", dense),
    "regions": Part("masks and instances of four images of 640 pixels, 100 boxes each, five levels", regions),
    "memory": Part("memory above that of models, optimiser and data", memory),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a bar is missed."""
    return run(PARTS, parser(__doc__, PARTS, device=True).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
