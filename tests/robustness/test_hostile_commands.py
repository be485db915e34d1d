"""Every command with bad arguments, missing files and mutated inputs: one line on stderr, exit code 1 or 2."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from bad_inputs import times, tried
from mutate import mutated

from layalign.cli import main
from layalign.data import Example
from layalign.evaluation import evaluate

PRESET = Path(__file__).resolve().parents[2] / "layalign" / "training" / "presets" / "math.yaml"
# For each command the right way to call it up to what is missing here, so that one word can be made wrong.
COMMANDS: dict[str, list[str]] = {
    "train": ["--config", "config.yaml", "--stage", "task", "--output", "out", "--set", "batch_size=4"],
    "experiment": ["--config", "smoke", "--output", "none", "--seeds", "0", "--jobs", "1"],
    "evaluate": ["-c", "none", "-t", "mgsm", "-d", "mgsm:none", "-o", "out", "-l", "sw", "-b", "2", "--limit", "3",
    "--device", "cpu", "--scorer", "number", "--measures", "chrf"],
    "compare": ["none", "none", "--by", "level", "--grouping", "joshi", "--seed", "1"],
    "analyze": ["none", "--pairs", "sw=none.tsv", "-o", "out", "--limit", "5", "--sentence", "sw:1", "--before",
    "untrained"],
    "generate": ["-c", "none", "-s", "text", "-l", "sw", "--task", "math", "--max-new-tokens", "3", "--temperature",
    "0.5", "--seed", "1"],
    "convert": ["none.bin", "-o", "out", "--encoder", "none", "--llm", "none"],
    "bench": ["--compare", "none", "none", "--threshold", "1.1"],
    "lm-eval": ["--model", "layalign", "--model_args", "checkpoint=none", "--tasks", "none"],
}  # fmt: skip
# Checks alone: a command that was made right by chance must not train.
CHECKED = {"train": ["--print-config"], "experiment": ["--report"]}
WORDS = [
    "", " ", "-", "--", "--nope", "-x", "0", "-1", "1e400", "nan", "9" * 5000, "\x00", "a\x00b", "\n", "a\nb",
    "\ud800", "ß" * 300, "[/red]",
    "../..", "/", "/dev/null", "/etc/passwd", ".", "~", "*", "a=b=c", "=", "key=", "learning_rate=nan", "lora=[1]",
    "none/none", "a/b/c",
    "{}", "[", "null", "sw,,de", ",", "Klingon", "cuda:99", "meta", "tpu", "%s", "$(id)", "pairs:", ":", "datasets:",
    "--help=x",
]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> int:
    """The exit code; after an error one line on stderr and no traceback anywhere."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    code = stop.value.code
    assert code in (0, 1, 2), (arguments, code)
    assert "Traceback" not in captured.err + captured.out, arguments
    if code:
        lines = captured.err.strip().split("\n")
        assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, captured.err
        assert len(lines[-1]) < 800
        assert code == 2, (arguments, captured.err)
    tried("command lines")
    return int(code)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, without a network, without anything on the keyboard."""
    import io

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "config.yaml").write_bytes(PRESET.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "lm-eval"])
def test_one_wrong_word(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    right, refused, head = COMMANDS[command], 0, [command, *CHECKED.get(command, [])]
    draw = random.Random(command)
    for word in WORDS:
        for place in draw.sample(range(len(right)), min(len(right), max(1, times(1)))):
            refused += run(capsys, [*head, *right[:place], word, *right[place + 1 :]]) != 0
    assert refused > len(WORDS) / 2
    for place in range(len(right)):
        run(capsys, [*head, *right[:place], *right[place + 1 :]])
        run(capsys, [*head, *right[:place]])


@pytest.mark.slow
def test_mutated_files_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random("commands")
    examples = [Example(f"q{i}", str(i), "Swahili", "p", str(i)) for i in range(3)]
    for name in ("a", "b"):
        evaluate(
            lambda batch: [e.target for e in batch], None, None, "mgsm", examples, tmp_path / name, model_name=name
        )
    files = [tmp_path / "config.yaml", *(path for path in (tmp_path / "b").rglob("*") if path.is_file())]
    for path in files:
        whole = path.read_bytes()
        for _ in range(times(15)):
            path.write_bytes(mutated(whole, draw, large=False))
            arguments = (
                ["train", "-c", str(path), "--print-config"] if path.suffix == ".yaml" else ["compare", "a", "b"]
            )
            run(capsys, arguments)
        path.write_bytes(whole)
    assert run(capsys, ["compare", "a", "b"]) == 0


def test_names_that_look_like_markup_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder may be called [/red]; read as markup, it would end the command after all its work."""
    name = "[/red]"
    for folder in ("[/bold]a", "[red]b"):
        examples = [Example("q", "1", name, "p", "1")]
        evaluate(lambda batch: ["1"], None, None, "mgsm", examples, tmp_path / folder, model_name="x").table()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["compare", "[/bold]a", "[red]b"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and name in printed and "[red]b" in printed
    settings = json.loads((tmp_path / "[red]b" / "settings.json").read_text())
    assert list(settings["languages"]) == [name]
    tried("command lines", 3)
