"""The numerics watch over a grid of versions: ``make watch`` every night, or ``nox -s watch -- --all`` for every minor.

One environment per torch; transformers is exchanged inside it. Each combination adds its row to
benchmarks/results/watch/versions.json, and a failure in one does not keep the others from running. PyPI's torch brings
gigabytes of CUDA libraries along on Linux; point pip at another index (PIP_INDEX_URL) for CPU builds.
"""

import os
import re
from pathlib import Path

import nox
from nox.command import CommandFailed

PINNED = "2.13.0"
TORCH = ["2.6.0", PINNED, "2.15.0"]  # lowest, the pinned one, newest
TRANSFORMERS = ["5.0.0", "5.11.0", "5.24.0"]  # lowest, a middle one, newest
MINORS = [  # without 5.4, see docs/versions.md
    "5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.5.4", "5.6.2", "5.7.0", "5.8.1", "5.9.0", "5.10.4", "5.11.0",
    "5.12.1", "5.13.1", "5.14.1", "5.15.1", "5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2",
    "5.23.0", "5.24.0",
]  # fmt: skip
ACROSS = ["5.0.0", "5.3.0", "5.5.4", "5.24.0"]  # lowest, around what 5.4 changed, newest
CORE = [f"tests/{room}/test_{name}.py" for room, names in {
    "modeling": ("architectures", "model", "generation", "checkpoint", "embedding_scale"),
    "packaging": ("versions",), "published": ("compat",), "serving": ("serving",), "cli": ("cli",),
}.items() for name in names]  # fmt: skip
RESULTS = "benchmarks/results/watch"
# What changes with the two packages under watch; everything else stays as in constraints.txt.
FREE = {"torch", "triton", "transformers", "tokenizers", "huggingface_hub", "sympy"}

nox.options.sessions = ["watch"]
nox.options.reuse_venv = "yes"


def constraints(session: nox.Session) -> str:
    """constraints.txt without the packages under watch."""
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if re.split(r"[=; ]", line)[0] not in FREE]
    path = Path(session.create_tmp()) / "constraints.txt"
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return str(path)


@nox.session
@nox.parametrize("torch", TORCH)
def watch(session: nox.Session, torch: str) -> None:
    """Golden cases and numerics tests. Arguments: --all (minors), --core (the short set), or versions by name."""
    named = [argument for argument in session.posargs if not argument.startswith("-")]
    versions = named or (MINORS if "--all" in session.posargs else TRANSFORMERS)
    short = ["--core"] if "--core" in session.posargs else []
    pins = constraints(session)
    session.install("-c", pins, f"torch=={torch}")
    session.install("-c", pins, f"torch=={torch}", "-e", ".[dev,lora]", env={"LAYALIGN_CUDA": "0"})
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    failed = []
    for version in versions:
        session.install("-c", pins, f"torch=={torch}", f"transformers=={version}")
        try:
            session.run("python", "benchmarks/watch.py", f"{RESULTS}/versions.json", *short, env=environment)
        except CommandFailed:
            failed.append(version)
    if failed:
        session.error(f"torch {torch}: tests failed with transformers {', '.join(failed)}")


@nox.session
def across(session: nox.Session) -> None:
    """Checkpoints written with one version of transformers and read with another: every pair of ACROSS."""
    pins, torch = constraints(session), f"torch=={PINNED}"
    session.install("-c", pins, torch)
    session.install("-c", pins, torch, "-e", ".[dev,lora]", env={"LAYALIGN_CUDA": "0"})
    folder, environment = session.create_tmp(), {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    failed = []
    # All write before one reads: both directions of every pair.
    for turn in ("write", "read"):
        for version in ACROSS:
            session.install("-c", pins, torch, f"transformers=={version}")
            for writer in [version] if turn == "write" else [other for other in ACROSS if other != version]:
                try:
                    results = f"--results={RESULTS}/across.json"
                    session.run("python", "benchmarks/across.py", turn, f"{folder}/{writer}", results, env=environment)
                except CommandFailed:
                    failed.append(f"{turn} {writer} with {version}")
    if failed:
        session.error(f"differs: {', '.join(failed)}")


@nox.session
def newest(session: nox.Session) -> None:
    """What pip resolves today, unpinned: the made-up demo's fast form and the core tests. TORCH may name a build."""
    torch = os.environ.get("TORCH", "torch").split()
    session.install("--upgrade", *torch)
    session.install("--upgrade", *torch, "-e", ".[dev,lora,serve]", env={"LAYALIGN_CUDA": "0"})
    session.run("layalign", "doctor")
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    session.run("layalign", "demo", "--made-up", "--fast", "--output", session.create_tmp(), env=environment)
    session.run("python", "-m", "pytest", "-q", *CORE, env=environment)


@nox.session
def curves(session: nox.Session) -> None:
    """200 training steps with every backend that runs here; with LAYALIGN_EMULATE_CUDA the CUDA kernels too."""
    session.install("-c", "constraints.txt", "-e", ".[dev]", env={"LAYALIGN_CUDA": "0"})
    environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    session.run("python", "benchmarks/curves.py", "--output", RESULTS, env=environment)
