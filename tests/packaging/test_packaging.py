"""What is shipped: every package, the presets, the typing marker, one version."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import layalign
from layalign.training.config import STAGES
from layalign.training.loading import load_train_config, preset_names

ROOT = Path(__file__).parents[2]


def _pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def _setup_list(name: str) -> list[str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == name]  # type: ignore[attr-defined]
    return list(ast.literal_eval(values[0]))


def test_every_package_is_listed() -> None:
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "layalign").rglob("*.py")
        if "__pycache__" not in file.parts
    }
    assert found | {"layalign_kernels"} == set(_setup_list("PACKAGES"))
    for package in found:
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file(), package


def test_kernels_shadow_nobody() -> None:
    """Flat, without __init__.py, and imported under its own name: Hugging Face's package is called `kernels` too."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert 'package_dir={"layalign_kernels": "kernels"}' in (ROOT / "setup.py").read_text(encoding="utf-8")
    if importlib.util.find_spec("layalign_kernels") is not None:
        found = importlib.util.find_spec("layalign_kernels.common")
        assert found is not None and Path(str(found.origin)).resolve() == ROOT / "kernels" / "common.py"


def test_kernels_import_torch_and_triton_only() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        imports = re.findall(r"^(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(imports) <= sys.stdlib_module_names | {"layalign_kernels", "torch", "triton"}, file


@pytest.mark.slow
def test_plain_torch_is_enough_for_the_modules_and_operations() -> None:
    """Neither transformers nor triton: reference, operations and modules import and run."""
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['triton'] = None\n"
        "import torch, layalign, layalign.reference\n"
        "from types import SimpleNamespace as Settings\n"
        "from layalign import EncoderAligner, GatedCrossAttention, Adapter, build_inputs\n"
        "config = Settings(encoder_hidden_dim=4, language_hidden_dim=6, num_encoder_layers=3, num_language_layers=2,\n"
        "                  structure='MLP')\n"
        "print(EncoderAligner(config)([torch.ones(1, 5, 4)] * 3)[1][0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "torch.Size([1, 5, 6])", done.stderr


def test_data_files_are_shipped() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    patterns: dict[str, list[str]] = next(
        ast.literal_eval(keyword.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "package_data"
    )
    shipped = {
        file
        for package, globs in patterns.items()
        for pattern in globs
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    wanted = {
        file
        for file in (ROOT / "layalign").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc") and "__pycache__" not in file.parts
        if file.suffix not in (".so", ".pyd") and file.name != "_build.json"  # what an installation compiles
    }
    assert wanted == shipped
    assert (ROOT / "layalign" / "py.typed") in shipped


def test_one_version() -> None:
    declared = re.search(r'^version = "(.+)"$', _pyproject(), re.MULTILINE)
    assert declared is not None
    assert declared.group(1) == layalign.__version__
    assert f"[{layalign.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        installed = metadata.version("layalign")
    except metadata.PackageNotFoundError:
        pytest.skip("layalign is run from the source tree, not installed")
    assert installed == layalign.__version__


def test_building_needs_no_torch() -> None:
    requires = re.search(r"^requires = \[(.+?)\]", _pyproject(), re.MULTILINE)
    assert requires is not None
    names = re.findall(r'"([A-Za-z0-9_-]+)', requires.group(1))
    assert set(names) <= {"setuptools", "pybind11", "ninja"}


def test_constraints_pin_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {
        re.split(r"[=; ]", line)[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")
    }
    wanted = {
        name.lower().replace("_", "-")
        for name in re.findall(r'"([A-Za-z0-9_-]+)>=', _pyproject().split("[build-system]")[1].split("[project]")[1])
    }
    assert wanted - pinned == set()
    assert all("==" in line for line in lines if line and not line.startswith("#"))


def test_presets_are_the_three_published_set_ups() -> None:
    assert preset_names() == ["math", "x-csqa", "xnli"]
    llms = {name: load_train_config(preset=name).llm for name in preset_names()}
    assert llms == {
        "math": "meta-math/MetaMath-7B-V1.0",
        "x-csqa": "LLaMAX/LLaMAX2-7B-X-CSQA",
        "xnli": "LLaMAX/LLaMAX2-7B-XNLI",
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", ["math", "x-csqa", "xnli"])
def test_presets_have_the_published_values(preset: str, stage: str) -> None:
    config = load_train_config(preset=preset, stage=stage)
    assert (config.encoder, config.task, config.structure) == ("google/mt5-xl", preset, "Linear")
    assert config.encoder_layers == list(range(24))
    assert config.language_layers is None
    assert config.learning_rate == {"translation": 4e-5, "task": 3e-5}[stage]
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.8, 0.999, 1e-8)
    assert (config.weight_decay, config.max_grad_norm, config.warmup_ratio) == (3e-7, 1.0, 0.05)
    assert (config.epochs, config.lr_scheduler, config.dev_size) == (3, "cosine", 3000)
    longest = 512 if (preset, stage) == ("math", "task") else 200
    assert (config.max_source_length, config.max_prompt_length, config.max_target_length) == (longest,) * 3
    # 8 GPUs, as the published scripts: 128 in all.
    micro, accumulation = config.batch_plan(8)
    assert micro * accumulation * 8 == 128
    assert micro == (2 if longest == 512 else 8)
    if stage == "task":
        assert config.init_checkpoint == load_train_config(preset=preset, stage="translation").output_dir


def test_presets_name_languages_that_exist() -> None:
    from layalign.data import language_of

    for preset in preset_names():
        for stage in STAGES:
            for name in load_train_config(preset=preset, stage=stage).languages or []:
                assert language_of(name).name == name


def test_at_most_twelve_rooms_and_no_private_modules() -> None:
    top = {path.stem for path in (ROOT / "layalign").iterdir() if path.suffix in ("", ".py") and path.stem[0] != "_"}
    assert len(top) <= 12, sorted(top)
    private = [path for path in (ROOT / "layalign").rglob("_*.py") if path.stem not in ("__init__", "__main__")]
    assert not private  # every module may be imported from another room, as far as the floors allow
