"""What setuptools cannot read from pyproject.toml here: the explicit list of packages, and the compiled extension.

The list is explicit because automatic discovery would also ship folders that only look like packages; a test compares
it with the tree.

The extension ``layalign._C`` (csrc/) is optional: where it cannot be built the installation goes on without it, one
line says why, and `layalign doctor` says it again. LAYALIGN_EXTENSION=0 leaves all of it out, LAYALIGN_CUDA=0 its CUDA
part; LAYALIGN_EXTENSION=1 and LAYALIGN_CUDA=1 make what cannot be built an error.
"""

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import builder  # noqa: E402  (csrc/builder.py)

PACKAGES = [
    "layalign",
    "layalign.cli",
    "layalign.data",
    "layalign.evaluation",
    "layalign.experiments",
    "layalign.experiments.analysis",
    "layalign.experiments.bench",
    "layalign.experiments.controlled",
    "layalign.experiments.demo",
    "layalign.experiments.made_up",
    "layalign.experiments.real",
    "layalign.experiments.weights",
    "layalign.modeling",
    "layalign.nn",
    "layalign.ops",
    "layalign.ops.backends",
    "layalign.published",
    "layalign.serving",
    "layalign.serving.http",
    "layalign.serving.vllm",
    "layalign.training",
    "layalign.utils",
    "layalign_kernels",
]


def switch(name: str) -> str:
    """An environment variable that is "0", "1" or unset ("")."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value


class BuildExtension(build_ext):
    """Compiles with csrc/builder.py, and records beside the module what was built and what was not."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        wanted, cuda = switch("LAYALIGN_EXTENSION"), switch("LAYALIGN_CUDA")
        try:
            if wanted == "0":
                raise builder.BuildError("LAYALIGN_EXTENSION=0")
            # In the checkout, not in the temporary folder of an isolated build: the next one compiles what changed.
            objects = ROOT / "build" / f"csrc-{sys.implementation.cache_tag}"
            notes = builder.extension(target, objects, cuda)
        except builder.BuildError as error:
            if wanted == "1" or cuda == "1":
                raise SystemExit(f"layalign: the extension cannot be built: {error}") from None
            notes = {"cpp": f"not built: {error}", "cuda": f"not built: {error}"}
        for backend, note in notes.items():
            print(f"layalign: {backend} kernels {note.splitlines()[0]}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / "_build.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            record = Path(self.get_ext_fullpath(ext.name)).resolve().with_name("_build.json")
            built = Path(self.build_lib).resolve() / "layalign" / "_build.json"
            if built.is_file() and built != record:
                self.copy_file(str(built), str(record))


setup(
    packages=PACKAGES,
    # The folder has no __init__.py: with one it would shadow Hugging Face's own package `kernels` for whoever runs from
    # the root of the checkout.
    package_dir={"layalign_kernels": "kernels"},
    package_data={
        "layalign": ["py.typed"],
        "layalign.data": ["*.csv"],
        "layalign.experiments.made_up": ["*.json", "templates/*.json"],
        "layalign.experiments.controlled": ["presets/*.yaml"],
        "layalign.experiments.demo": ["page.css", "sentences/README.md", "sentences/*/*.tsv", "checkpoint/*"],
        "layalign.experiments.real": ["*.yaml"],
        "layalign.experiments.weights": ["sentences.json"],
        "layalign.training": ["presets/*.yaml", "presets/accelerate/*.yaml", "presets/deepspeed/*.json"],
    },
    include_package_data=False,
    ext_modules=[Extension("layalign._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
