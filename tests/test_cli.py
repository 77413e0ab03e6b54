"""The command line as a user meets it: output, one sentence for each mistake, exit codes."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from taskkd import cli
from taskkd.__main__ import main
from tests import tiny


@pytest.fixture
def taskkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["taskkd", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    return call


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tiny.save_teacher(folder / "teacher")
    tiny.write_csv(folder / "train.csv", tiny.sentences(80))
    path = folder / "my.yaml"
    path.write_text(f"""schema: 1
task: nlp
data: {{files: {{train: {folder}/train.csv}}}}
teacher: {{model: {folder}/teacher}}
student: {{layers: [0, 2]}}
method: {{name: soft_targets}}
training: {{epochs: 1, batch_size: 16, learning_rate: 1e-3}}
baseline: {{learning_rates: [1e-3], epochs: 1}}
""")
    return path


def test_help_needs_no_torch() -> None:
    code = """
import sys
sys.argv = ["taskkd", "--help"]
from taskkd.__main__ import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    assert "distill" in subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout


def test_each_command_has_an_example_that_it_takes(taskkd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.main import get_command

    monkeypatch.setenv("COLUMNS", "100")
    group: Any = get_command(cli.app)
    code, out, _ = taskkd("--help")
    assert code == 0
    for number in (0, 2, 3, 4, 75, 130, 143):
        assert re.search(rf"\b{number}\b", out.partition("Exit codes")[2]), number
    for name, command in group.commands.items():
        (line,) = [e for e in str(command.help).splitlines() if e.startswith("Example: ")]
        _, prefix, own, *words = shlex.split(line.partition(" >")[0])
        assert (prefix, own) == ("taskkd", name)
        command.make_context(name, words)  # raises where an option is not the command's
        assert line.split()[-1] in taskkd(name, "--help")[1]


def test_lists(taskkd: Any) -> None:
    code, out, _ = taskkd("recipes")
    assert code == 0
    assert "nlp/sentiment-distil" in out
    code, out, _ = taskkd("recipes", "nlp/sentiment-distil")
    assert "schema: 1" in out
    code, out, _ = taskkd("methods")
    assert "patient_kd" in out
    assert "Hinton" in out
    code, out, _ = taskkd("methods", "patient_kd")
    assert "beta" in out
    assert "Sun" in out
    code, out, _ = taskkd("methods", "segmentation")
    assert "channel_wise" in out
    assert "patient_kd" not in out
    code, out, _ = taskkd("methods", "soft_targets")  # two tasks have it
    assert [line.partition("(")[0] for line in out.splitlines() if ": soft_targets(" in line] == [
        "nlp: soft_targets",
        "segmentation: soft_targets",
    ]
    code, out, _ = taskkd("doctor")
    assert code == 0
    assert "transformers" in out


def test_check_distil_evaluate_predict(
    taskkd: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = taskkd("check", str(recipe))
    assert code == 0, err
    assert "out.logits" in out
    folder = tmp_path / "run"
    code, out, err = taskkd("distill", str(recipe), "--output-dir", str(folder), "--seeds", "0,1")
    assert code == 0, err
    assert "student alone" in out
    assert "mean over 2 seeds" in out
    assert json.loads((folder / "report.json").read_text())["seeds"] == [0, 1]
    code, out, err = taskkd("evaluate", str(folder))
    assert code == 0, err
    assert "accuracy" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("the film was great\na dull plot\n"))
    code, out, err = taskkd("predict", str(folder))
    assert code == 0, err
    assert len(out.strip().splitlines()) == 2


def write(folder: Path, text: str) -> str:
    path = folder / "bad.csv"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("content", "overrides", "code", "sentence"),
    [
        (None, ["method.temprature=2"], 2, "unknown key 'method.temprature' (did you mean 'temperature'?)"),
        (None, ["student.layers=[0,9]"], 2, "expected numbers from 0 to 3"),
        ("text,lable\nx,1\n", [], 3, "no column 'label' (did you mean 'lable'?)"),
        ("", [], 3, "the file has no rows"),
        ("text,label\nx,maybe\n", ["data.labels=[negative,positive]"], 3, "'maybe' is not one of the 2 labels"),
        (None, ["teacher.model=/no/such/model"], 3, "model '/no/such/model' cannot be loaded"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_with_a_code(
    taskkd: Any, recipe: Path, tmp_path: Path, content: str | None, overrides: list[str], code: int, sentence: str
) -> None:
    if content is not None:
        if "maybe" in content:
            content += "".join(f"{t},{label}\n" for t, label in tiny.sentences(20))
        overrides = [*overrides, f"data.files.train={write(tmp_path, content)}"]
    got, _, err = taskkd("distill", str(recipe), "--output-dir", str(tmp_path / "run"), *overrides)
    assert got == code, err
    lines = [line for line in err.splitlines() if line.startswith("taskkd: ")]
    assert sentence in lines[-1]
    assert "Traceback" not in err


def test_a_run_folder_that_is_a_file(taskkd: Any, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    for folder in ("run", "run/deeper"):
        code, _, err = taskkd("distill", str(recipe), "--output-dir", str(tmp_path / folder))
        assert code == 2
        assert "is a file" in err
        assert "Traceback" not in err


def test_debug_shows_the_traceback(taskkd: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkd.errors import RecipeError

    monkeypatch.setattr(sys, "argv", ["taskkd", "check", str(recipe), "traning=1", "--debug"])
    with pytest.raises(RecipeError):
        main()


def test_no_number_of_a_wide_table_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    from taskkd import cli

    table = Table("model", *(f"column {n}" for n in range(20)))
    table.add_row("student alone", *(f"0.{n:04}" for n in range(20)))
    cli._show(table)
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(f"0.{n:04}" in out for n in range(20))


def test_usage_mistakes(taskkd: Any, tmp_path: Path) -> None:
    assert taskkd("distil")[0] == 2
    assert taskkd("distill", "nlp/none")[0] == 2
    assert taskkd("methods", "patient")[0] == 2
    code, _, err = taskkd("evaluate", str(tmp_path))
    assert code == 2
    assert "not the folder of a finished run" in err


def test_a_truncated_checkpoint_is_named(taskkd: Any, recipe: Path, tmp_path: Path) -> None:
    stage = tmp_path / "run" / "seed-0" / "alone-0.001"
    (stage / "checkpoint-3").mkdir(parents=True)
    (stage / "checkpoint-3" / "trainer_state.json").write_text("{")
    code, _, err = taskkd("distill", str(recipe), "--output-dir", str(tmp_path / "run"))
    assert code == 3
    assert "checkpoint-3 is incomplete" in err
    assert "Traceback" not in err
