"""The script of docs/clusters.md runs on two processes as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests import tiny
from tests.test_docs import DOCS, python_blocks


@pytest.mark.slow
def test_the_script_trains_under_torchrun_as_it_stands(tmp_path: Path) -> None:
    (script,) = python_blocks("clusters.md").values()
    (tmp_path / "train.py").write_text(script)
    tiny.write_csv(tmp_path / "train.csv", [(text, str(i % 2)) for i, (text, _) in enumerate(tiny.sentences(16))])
    tiny.save_teacher(tmp_path / "teacher")
    tiny.classifier(layers=2, seed=1).save_pretrained(tmp_path / "student")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(DOCS.parent)}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        launcher, check=False, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[:6000]
    assert "train_loss" in done.stdout
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "a" / "student")
