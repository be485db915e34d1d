"""These tests need vLLM, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import os
from importlib.util import find_spec

# Before vLLM is imported: one process, little memory, no network.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1",
)  # fmt: skip
collect_ignore_glob = [] if find_spec("vllm") else ["test_*"]
