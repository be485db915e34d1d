"""The `layalign` command: one-line errors, and train, evaluate, generate, convert on tiny parts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_training import TinyParts, save_parts
from typer.testing import CliRunner

from layalign.cli import describe, main
from layalign.cli.app import app
from layalign.cli.environment import examine

COMMANDS = (
    "demo", "baselines", "train", "experiment", "evaluate", "compare", "analyze", "generate", "serve", "convert",
    "doctor", "bench", "weights",
)  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def config_file(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {
        "encoder": parts.encoder, "llm": parts.llm, "data": parts.data, "batch_size": 4, "dev_size": 4, "max_steps": 3,
        "learning_rate": 0.003, "save_steps": 0, "eval_steps": 0, "progress": False, "use_cpu": True,
        "stages": {"translation": {"seed": 1}, "task": {"task": "math", "dev_size": 2}},
    }  # fmt: skip
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def trained(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, run by the command itself."""
    output = tmp_path_factory.mktemp("trained")
    assert run("train", "--config", config_file, "--output", output) == 0
    return output


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with one line on stderr and exit code 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.slow
def test_help_and_version_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom layalign.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n"
        "    heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    sys.exit(f'{stop.code} {sorted(heavy)}')\n"
    )
    for arguments in (["--help"], ["train", "--help"], ["--version"], []):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ}, check=False
        )
        assert result.stderr.strip() == "0 []", (arguments, result.stderr)
        assert "layalign" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["brew"], "No such command 'brew' (see layalign --help)"),
        (["train", "--nope"], "No such option: --nope (see layalign train --help)"),
        (["evaluate"], "Missing option '--checkpoint' / '-c' (see layalign evaluate --help)"),
        (["train"], "preset: give --preset or --config (for a small run on a laptop see layalign demo)"),
        (["train", "--preset", "cooking"], "preset: expected one of math, x-csqa, xnli, got 'cooking'"),
        (["train", "--preset", "math", "--stage", "last"], "stage: expected one of translation, task, got 'last'"),
        (["train", "--preset", "math", "--set", "epoch=3"],
         "epoch: no such key in a training configuration; did you mean epochs?"),
        (["train", "--config", "none.yaml"], "config: no such file: none.yaml"),
        (["evaluate", "-c", "none", "-t", "mgsm", "-d", "x"], "checkpoint: no such folder: none"),
        (["evaluate", "-c", "none", "-t", "chess", "-d", "x"], "task: expected one of mgsm, "),
        (["generate", "-c", "none", "-s", "a", "--prompt", "p", "--task", "math"], "prompt: give either --prompt or"),
        (["generate", "-c", "none", "-s", "a", "--stream", "--num-beams", "2"], "stream: expected one"),
        (["generate", "-c", "none", "-s", "a", "--num-return-sequences", "2"], "num_return_sequences: expected"),
        (["generate", "-c", "none", "-s", "a", "-l", "Klingon"], ""),
        (["generate", "-c", "none", "-s", "a", "--dtype", "int3"], "dtype: expected one of auto, float32"),
        (["serve", "-c", "none"], "checkpoint: no such folder: none"),
        (["serve", "-c", "none", "--task", "chess"], "task: expected one of math, source, none, got 'chess'"),
        (["serve", "-c", "none", "--max-batch", "0"], "Invalid value for '--max-batch'"),
        (["convert", "none.bin", "-o", "x"], "source: no such file or folder: none.bin"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, *arguments)
    assert line.startswith(message)
    assert "Traceback" not in line
    if not message:
        assert "Klingon" in line


def test_debug_adds_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "train"], ["train", "--debug"]):
        assert run(*arguments) == 2
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_unforeseen_errors_are_one_line_too() -> None:
    line, code = describe(RuntimeError("broken\n  in two"))
    assert (line, code) == ("RuntimeError: broken in two", 1)
    assert describe(FileNotFoundError(2, "No such file", "x.tsv")) == ("[Errno 2] No such file: 'x.tsv'", 2)
    assert describe(yaml.YAMLError("bad"))[1] == 2
    assert len(describe(ValueError("x" * 5000))[0]) < 700


def test_interrupt_is_clean(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layalign.training.loading.load_train_config", interrupted)
    assert run("train", "--preset", "math") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_interrupt_while_importing_is_clean(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half second of a command; Ctrl-C came with a traceback then."""

    class Interrupted:
        def find_spec(self, name: str, *arguments: object) -> None:
            if name == "layalign.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "layalign.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert run("train", "--preset", "math") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_print_config_chains_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--preset", "math", "--output", "out", "--set", "batch_size=64", "--print-config") == 0
    first, second = (yaml.safe_load(text) for text in capsys.readouterr().out.split("# task\n"))
    assert (first["stage"], first["output_dir"], first["init_checkpoint"]) == ("translation", "out/translation", None)
    assert (second["stage"], second["init_checkpoint"]) == ("task", "out/translation")
    assert first["batch_size"] == second["batch_size"] == 64


@pytest.mark.slow
def test_train_runs_both_stages(trained: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("translation", "task"):
        saved = json.loads((trained / stage / "training.json").read_text())
        assert saved["steps"] == 3
        assert saved["loss_after"] != saved["loss_before"]
    line = error_line(capsys, "train", "--config", config_file, "--stage", "task", "--init-checkpoint", trained)
    assert str(trained) in line
    line = error_line(capsys, "train", "--config", config_file, "--data", trained, "--output", trained / "x")
    assert str(trained) in line
    line = error_line(
        capsys, "train", "--config", config_file, "--set", "llm=nowhere/at all", "--output", trained / "x"
    )
    assert "nowhere" in line


@pytest.mark.slow
def test_evaluate_goes_on_where_it_stopped(
    trained: Path, parts: TinyParts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "-c", trained / "task", "-t", "mgsm", "-d", parts.data, "-o", tmp_path / "r",
                 "--languages", "de,Swahili", "--max-new-tokens", "4", "--limit", "2", "--device", "cpu"]  # fmt: skip
    assert run(*arguments) == 0
    assert "average" in capsys.readouterr().out
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())
    assert {name: score["count"] for name, score in scores["languages"].items()} == {"German": 2, "Swahili": 2}
    assert run(*arguments) == 0
    assert run(*arguments, "--no-resume") == 0
    assert json.loads((tmp_path / "r" / "scores.json").read_text()) == scores


def test_evaluate_reports_bad_lines(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mgsm_de.tsv").write_text("eins?\t1\nno tab here\nzwei?\t2\n", encoding="utf-8")
    arguments = ["evaluate", "-c", trained / "task", "-t", "mgsm", "-d", tmp_path, "-o", tmp_path / "r",
                 "--max-new-tokens", "2", "--device", "cpu"]  # fmt: skip
    line = error_line(capsys, *arguments)
    assert f"{tmp_path / 'mgsm_de.tsv'}:2" in line
    assert run(*arguments, "--skip-bad") == 0
    captured = capsys.readouterr()
    assert "1 malformed" in captured.err
    assert json.loads((tmp_path / "r" / "scores.json").read_text())["languages"]["German"]["count"] == 2


@pytest.mark.slow
def test_generate(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["generate", "-c", trained / "task", "-l", "German", "--max-new-tokens", "6", "--device", "cpu", "--json"]
    capsys.readouterr()
    assert run(*common, "-s", "eins zwei", "-s", "Katze", "--task", "math") == 0
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [pair["source"] for pair in both] == ["eins zwei", "Katze"]
    monkeypatch.setattr("sys.stdin", io.StringIO("eins zwei\n\nKatze\n"))
    assert run(*common, "--task", "math", "--batch-size", "1") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == both
    assert run(*common, "-s", "Katze", "--num-beams", "3", "--num-return-sequences", "2", "--prompt", "{source}!") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    drawn = []
    for _ in range(2):
        assert run(*common, "-s", "Katze", "--sample", "--seed", "3", "--temperature", "2", "--top-k", "50") == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1]


def test_stream_prints_what_generate_prints(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "-c", trained / "task", "-s", "Katze", "--max-new-tokens", "6", "--device", "cpu"]
    capsys.readouterr()
    assert run(*common) == 0
    whole = capsys.readouterr().out
    assert run(*common, "--stream") == 0
    assert capsys.readouterr().out.strip() == whole.strip()


def test_convert_there_and_back(
    trained: Path, parts: TinyParts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    published = tmp_path / "pytorch_model.bin"
    assert run("convert", trained / "task", "-o", published) == 0
    line = error_line(capsys, "convert", published, "-o", tmp_path / "ours", "--llm", parts.llm)
    assert line.startswith("encoder: a published file does not name its encoder")
    assert run("convert", published, "-o", tmp_path / "ours", "--encoder", parts.encoder, "--llm", parts.llm) == 0
    there, back = (load_file(folder / "model.safetensors") for folder in (trained / "task", tmp_path / "ours"))
    assert set(there) == set(back)
    assert all((there[name] == back[name]).all() for name in there)


def test_doctor_tells_versions_devices_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == examine()
    assert report["versions"]["torch"]
    assert report["versions"]["transformers"]
    assert report["tested"] == {"transformers": "5.0 to 5.24", "torch": "2.6 to 2.15"}
    assert "cpu" in report["devices"]
    states = {backend["name"]: backend for backend in report["backends"]}
    assert states["torch"]["available"]
    assert all(backend["reason"] for backend in states.values())
    assert set(report["extension"]) == {"cpp", "cuda"} and all(report["extension"].values())
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert "Backends" in shown and "5.0 to 5.24" in shown


def test_as_a_process(tmp_path: Path) -> None:
    code = "from layalign.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "convert", "nothing.bin", "--output", "x"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "error: source: no such file or folder: nothing.bin\n"
