"""What setuptools cannot read from pyproject.toml here: the explicit list of packages.

The list is explicit because automatic discovery would also ship folders that only look like packages; a test compares
it with the tree.
"""

from setuptools import setup

PACKAGES = [
    "layalign",
    "layalign.cli",
    "layalign.data",
    "layalign.evaluation",
    "layalign.demo",
    "layalign.nn",
    "layalign.ops",
    "layalign.training",
    "layalign_kernels",
]

setup(
    packages=PACKAGES,
    # The folder has no __init__.py: with one it would shadow Hugging Face's own package `kernels` for whoever runs from
    # the root of the checkout.
    package_dir={"layalign_kernels": "kernels"},
    package_data={
        "layalign": ["py.typed", "presets/*.yaml"],
        "layalign.demo": ["*.json", "templates/*.json"],
    },
    include_package_data=False,
)
