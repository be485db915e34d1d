"""Tiny checkpoints that vLLM can run, what `generate` answers on them, and engines of vLLM in this process."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import tiny
import torch
from helpers_text import byte_tokenizer

from layalign import LayAlignForCausalLM
from layalign.modeling.tokenization import save_tokenizers

VOCABULARY, CONTEXT = 320, 512
# Sizes that vLLM's attention has kernels for.
_WIDE = dict(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=96, num_attention_heads=4, num_hidden_layers=4)
_CHANGES = {
    "gemma2": dict(tie_word_embeddings=True),  # vLLM's has no head of its own
    "gemma3_text": dict(tie_word_embeddings=True),
    "qwen2": dict(use_sliding_window=False),  # vLLM has no Qwen2 with windows in some layers
}
ENGINE = dict(
    dtype="float32", enforce_eager=True, max_model_len=CONTEXT, max_num_seqs=8, max_num_batched_tokens=1024,
)  # fmt: skip


def vllm_llm(name: str = "llama", **changes: Any) -> Any:
    """A tiny LLM with heads of 32."""
    wide = dict(_WIDE, max_position_embeddings=CONTEXT, **_CHANGES.get(name, {}), **changes)
    if "head_dim" in tiny.LLMS[name]:
        wide["head_dim"] = 32
    return tiny.tiny_llm(name, **wide)


def vllm_encoder(name: str = "xlm-roberta") -> Any:
    """A tiny encoder that reads sources of up to 298 tokens at least."""
    longer = {"max_position_embeddings": 300} if "max_position_embeddings" in tiny.ENCODERS[name] else {}
    return tiny.tiny_encoder(name, vocab_size=VOCABULARY, **longer)


def save(model: LayAlignForCausalLM, folder: Path | str, **settings: Any) -> None:
    """A checkpoint with tokenizers of bytes."""
    model.save_pretrained(folder, **settings)
    save_tokenizers(folder, byte_tokenizer(eos=True), byte_tokenizer())


def checkpoint(folder: Path | str, encoder: str = "xlm-roberta", llm: str = "llama", **config: Any) -> None:
    """A whole checkpoint, with gates far from zero."""
    torch.manual_seed(5)
    model = LayAlignForCausalLM.from_encoder_and_llm(vllm_encoder(encoder), vllm_llm(llm), **config).eval()
    tiny.open_gates(model)
    save(model, folder, save_frozen=True)


@dataclass(frozen=True)
class Case:
    """A request, and the ids that `generate` answers."""

    source: list[int]
    prompt: list[int]
    length: int
    answer: list[int]

    @property
    def request(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompt, "multi_modal_data": {"source": self.source}}


def greedy(model: LayAlignForCausalLM, source: list[int], prompt: list[int], length: int, **settings: Any) -> list[int]:
    """The ids that `generate` answers, of a fixed length."""
    ids = torch.tensor([source])
    inputs = model.build_inputs(torch.ones_like(ids), prompts=[prompt])
    lengths = dict(max_new_tokens=length, min_new_tokens=length, eos_token_id=None, pad_token_id=2)
    found = model.generate(
        **inputs, encoder_input_ids=ids, encoder_attention_mask=torch.ones_like(ids), do_sample=False, **lengths,
        **settings,
    )  # fmt: skip
    return found[0].tolist()[-length:]


SOURCES = (1, 3, 7, 31, 32, 33, 64, 100, 128, 150)
PROMPTS = (5, 1, 9, 2, 1, 3, 20, 30, 11, 60)
LENGTHS = (30, 12, 25, 8, 30, 21, 30, 17, 30, 5)


def cases(folder: Path | str, **settings: Any) -> list[Case]:
    """Requests of many lengths with the answers of a checkpoint."""
    random, model = Random(0), LayAlignForCausalLM.from_pretrained(folder)
    found = []
    for number, (sources, prompts, length) in enumerate(zip(SOURCES, PROMPTS, LENGTHS, strict=True)):
        source, prompt = ([random.randrange(4, 256) for _ in range(count)] for count in (sources, prompts))
        prompt = [] if number == 1 and model.config.use_adapter else prompt
        found.append(Case(source, prompt, length, greedy(model, source, prompt, length, **settings)))
    return found


@contextmanager
def engine(folder: Path | str, **settings: Any) -> Iterator[Any]:
    """`vllm.LLM` of a checkpoint."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(folder), **{**ENGINE, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory(shutdown_ray=False)


def answers(llm: Any, asked: list[Case], **sampling: Any) -> list[list[int]]:
    """The greedy ids of all requests at once."""
    from vllm import SamplingParams

    how = [SamplingParams(temperature=0, max_tokens=each.length, ignore_eos=True, **sampling) for each in asked]
    done = llm.generate([each.request for each in asked], how, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in done]


@contextmanager
def server(folder: Path | str, *flags: str, seconds: float = 180.0) -> Iterator[httpx.Client]:
    """vLLM's own server of a checkpoint, in a process of its own, and a client of it. Its log is FOLDER.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`, which asks for the version of a distribution of the name vllm.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32",
        "--max-model-len", str(CONTEXT), "--max-num-seqs", "8", "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "layalign", "--enforce-eager", *flags,
    ]  # fmt: skip
    environment = {name: text for name, text in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with (
        Path(f"{folder}.log").open("w") as log,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            until = time.monotonic() + seconds
            while not healthy(client):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(Path(log.name).read_text()[-3000:])
                time.sleep(0.5)
            yield client
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def healthy(client: httpx.Client) -> bool:
    """Whether a server answers that it is."""
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False
