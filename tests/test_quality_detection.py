"""The quality tables of detection: their rows are recipes, their data are honest, their pair is of the sizes said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import detection_data, quality, quality_detection
from taskkd import recipes
from taskkd.detection import DetectionDataset, read


def table(name: str, folder: Path) -> quality_detection.DetectionTable:
    return quality_detection.TABLES[name]([0, 1], folder)


@pytest.mark.parametrize("name", quality_detection.TABLES)
def test_every_row_and_its_search_are_recipes_of_as_many_steps(name: str, tmp_path: Path) -> None:
    own = table(name, tmp_path)
    alone = own.recipe(None)
    assert alone.baseline.epochs == alone.training.epochs
    for row, way in quality_detection.ROWS.items():
        recipe = own.recipe(row)
        assert (recipe.student, recipe.training, recipe.data) == (alone.student, alone.training, alone.data)
        assert recipes.method_options(recipe)
        for key, values in way.search.items():
            for value in values:
                data = recipe.model_dump(by_alias=True)
                recipes.set_key(data, key, value)
                recipes.validate(data, key)
    assert set(own.found) <= set(quality_detection.ROWS)


def test_the_student_is_a_sixth_of_the_teacher_or_less(tmp_path: Path) -> None:
    own = table("digits", tmp_path)
    teacher, student = map(own.parameters, own.networks)
    assert teacher >= 6 * student


def nuclei(folder: Path) -> None:
    """Twelve images: a nucleus in the middle of a tile, one cut at a tile's border, one of a single pixel."""
    instances = np.zeros((12, 256, 256), np.uint16)
    instances[:, 30:40, 50:64] = 1
    instances[:, 60:70, 120:140] = 2  # 8 columns in the first tile, 12 in the second
    instances[:, 10, 10] = 3
    images = np.arange(12, dtype=np.uint8)[:, None, None].repeat(256, 1).repeat(256, 2)
    folder.mkdir()
    np.savez(folder / detection_data.NUCLEI, images=images, instances=instances)


def test_nuclei_are_boxes_and_no_image_is_in_two_parts(tmp_path: Path) -> None:
    nuclei(tmp_path / "source")
    detection_data.write_nuclei(tmp_path / "source", tmp_path / "out", (6, 2, 4))
    seen: list[set[float]] = []
    for part, tiles in zip(detection_data.PARTS, (24, 8, 16), strict=True):
        data = DetectionDataset(read(tmp_path / "out" / f"{part}.json"), ignored=True)
        assert len(data) == tiles and data.classes == ["nucleus"]
        seen.append({round(float(s["images"].max()) * 255) for s in (data[i] for i in range(tiles))})
        first, second = data[0]["targets"], data[1]["targets"]
        assert first["boxes"].tolist() == [[50, 30, 64, 40]]
        assert sorted(first["ignored_boxes"].tolist()) == [[10, 10, 11, 11], [120, 60, 128, 70]]
        assert second["boxes"].tolist() == [[0, 60, 12, 70]]
    assert not (seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2])
    with pytest.raises(SystemExit, match=r"dsb2018_gray256.npz is missing: name its folder with --source"):
        detection_data.write_nuclei(tmp_path, tmp_path / "other")


def test_scenes_of_digits_are_seeded_and_overlap_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(200, 28, 28)
    drawn[:, 4:24, 8:20] = 0.5 + torch.rand(200, 20, 12, generator=generator) / 2
    labels = torch.arange(200) % 10
    monkeypatch.setattr(detection_data, "_mnist", lambda: (drawn, labels))
    for name in ("a", "b"):
        detection_data.write_digits(tmp_path / name, (3, 2, 2))
    for part in detection_data.PARTS:
        contents = [json.loads((tmp_path / name / f"{part}.json").read_text()) for name in ("a", "b")]
        assert contents[0] == contents[1]
        for image in contents[0]["images"]:
            files = [(tmp_path / name / "images" / image["file_name"]).read_bytes() for name in ("a", "b")]
            assert files[0] == files[1]
    data = DetectionDataset(read(tmp_path / "a" / "train.json"))
    assert data.classes == [str(i) for i in range(10)]
    for sample in (data[i] for i in range(3)):
        boxes = sample["targets"]["boxes"]
        overlap = detection_data.box_iou(boxes, boxes).fill_diagonal_(0)
        assert 1 <= len(boxes) <= 7 and float(overlap.max()) <= 0.1
        assert float(boxes.min()) >= 0 and float(boxes.max()) <= detection_data.SIDE


def report(part: str, values: list[float], **more: Any) -> dict[str, Any]:
    runs = {
        str(s): {"test": {"AP": v, "AP50": v + 0.2}, "setting": "0.002", "steps": 640} for s, v in enumerate(values)
    }
    grouped = runs if part == "alone" else {"distilled": runs}
    return {"metric": "AP", "seeds": [0, 1], part: grouped, **more}


def test_a_table_has_both_metrics_and_stands_under_its_heading(tmp_path: Path) -> None:
    page, own = tmp_path / "results.md", table("nuclei", tmp_path)
    first = report("alone", [0.40, 0.42], teacher={"test": {"AP": 0.6, "AP50": 0.9}}, data="640 images")
    text = own.markdown({"alone": first, "gid": report("distilled", [0.45, 0.47])})
    assert "times smaller); 640 images; 640 steps of 8; seeds 0, 1." in text
    assert "| GID (Dai 2021) | 46.00 ± 1.00 | +5.00 ± 0.00 | gain | 66.00 ± 1.00 | +5.00 ± 0.00 |" in text
    page.write_text("# Results\n\n## NLP\n\nBy hand.\n")
    for _ in range(2):
        quality.publish(own, text, page, heading="## Detection")
    after = page.read_text()
    assert after.count("## Detection") == after.count("<!-- quality.py detection --data nuclei -->") == 1
    assert after.index("By hand.") < after.index("## Detection")


def test_the_command_of_quality_leads_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["detection", "--methods", "no_such"])
    assert "no row 'no_such'; there are mimic, chen" in capsys.readouterr().err
