"""Every public callable with every kind of wrong argument: a result, or an error of ours that names the argument."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bad_inputs import tried
from tiny import batch, tiny_encoder, tiny_llm, tiny_model
from tiny_training import byte_tokenizer
from torch import nn

import layalign
from layalign import LayAlignError
from layalign.data import Example, LayAlignCollator, by_language, language_of, tokenizer_source_language
from layalign.evaluation import (
    EvalConfig,
    Task,
    compare_runs,
    evaluate,
    llm_alone,
    register_task,
    resource_level,
    unregister_task,
)
from layalign.experiments.analysis import analyze, centred_cosine, linear_cka, read_pairs, retrieval_accuracy
from layalign.nn import WeightedLinearProjector
from layalign.published.classes import LayAlign
from layalign.published.classes import LayAlignConfig as PublishedConfig
from layalign.training import build_model, read_dev_examples, read_examples, train, training_arguments
from layalign.training.baselines import baseline, with_baseline

PACKAGES = (
    "layalign", "layalign.ops", "layalign.nn", "layalign.data", "layalign.evaluation", "layalign.training",
    "layalign.experiments.controlled", "layalign.experiments.analysis", "layalign.experiments.made_up",
    "layalign.training.baselines", "layalign.published.classes", "layalign.cli",
)  # fmt: skip
WRONG: dict[str, Any] = {
    "None": None, "true": True, "zero": 0, "minus": -1, "large": 2**40, "larger": 2**70, "a fraction": 0.5,
    "nan": float("nan"),
    "infinity": float("inf"), "complex": 1j, "empty text": "", "text": "nonsense", "a null byte": "a\x00b",
    "surrogate": "\ud800",
    "bytes": b"x", "list": [], "list of None": [None], "list of text": ["x"], "list of numbers": [1, -2],
    "nested": [[1], ["a"]],
    "mapping": {}, "mapping of numbers": {1: 2}, "set": {1}, "object": object(), "type": int, "function": len,
    "array": np.ones((2, 2)),
    "scalar": torch.tensor(1.0), "matrix": torch.ones(2, 2), "integers": torch.ones(2, 3, dtype=torch.int64),
    "cube": torch.ones(2, 3, 4),
    "four": torch.ones(1, 2, 3, 4), "no rows": torch.ones(0, 3), "meta": torch.ones(2, 3, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
    "NaN tensor": torch.full((2, 3), float("nan")), "module": nn.Linear(2, 2), "empty module": nn.Module(),
    "namespace": SimpleNamespace(),
}  # fmt: skip


def registered(name: Any, task: Any) -> None:
    """Registers a task and removes it."""
    register_task(name, task)
    unregister_task(name)


def aligner_config(**changes: Any) -> SimpleNamespace:
    values = dict(
        encoder_hidden_dim=4, language_hidden_dim=6, num_encoder_layers=2, num_language_layers=3, structure="Linear"
    )
    return SimpleNamespace(**values | changes)


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def with_config(kind: type) -> Callable[..., Any]:
    return lambda **fields: kind(aligner_config(**fields))


def runs_forward(make: Callable[[], nn.Module]) -> Callable[..., Any]:
    return lambda **inputs: make()(**inputs)


TEXT = byte_tokenizer(add_eos=True)
EXAMPLES = [Example("paka", "1", "Swahili", "p", "1"), Example("mbwa", "2", "Swahili", "p", "2")]
MODEL, LLM, ENCODER = tiny_model(), tiny_llm(), tiny_encoder()
COLLATOR = dict(encoder_tokenizer=TEXT, llm_tokenizer=TEXT, bos_token_id=1, source_token_id=0)
ALIGNER = dict(
    encoder_hidden_dim=4,
    language_hidden_dim=6,
    num_encoder_layers=2,
    num_language_layers=3,
    structure="Linear",
    mix="shared",
)
CONFIG = dict(
    encoder_config=ENCODER.config, llm_config=LLM.config, encoder_name_or_path="a", llm_name_or_path="b",
    encoder_layers=[0],
    language_layers=[1], structure="MLP", mix="shared", use_adapter=True, adapter_size=3, use_prompt=True,
    fixed_gate=0.5, adapter_fusion="softmax", llm_bos_token_id=1, source_token_id=0, lora=None, frozen_saved=False,
    part_dtypes=None, impl="auto", fold_projections="auto", fused_loss="auto",
)  # fmt: skip
LAYERS = [states(2, 3, 4)] * 2

# name: (function, right arguments that are each replaced by everything wrong)
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "layalign.Adapter": (layalign.Adapter, dict(mt_dim=4, llm_dim=6, width=5, fusion="softmax", layers=3)),
    "layalign.Adapter.forward": (runs_forward(lambda: layalign.Adapter(4, 6)), dict(hidden_states=states(2, 3, 4))),
    "layalign.EncoderAligner": (with_config(layalign.EncoderAligner), ALIGNER),
    "layalign.EncoderAligner.forward": (runs_forward(lambda: layalign.EncoderAligner(aligner_config())),
    dict(hidden_states=LAYERS)),
    "layalign.nn.WeightedLinearProjector": (with_config(WeightedLinearProjector), ALIGNER),
    "layalign.nn.WeightedLinearProjector.forward": (
        runs_forward(lambda: WeightedLinearProjector(aligner_config())), dict(hidden_states=LAYERS),
    ),
    "layalign.GatedCrossAttention": (layalign.GatedCrossAttention, dict(gate=0.5)),
    "layalign.GatedCrossAttention.forward": (
        runs_forward(layalign.GatedCrossAttention),
        dict(query=states(1, 2, 3, 4), key=states(1, 2, 5, 4), value=states(1, 2, 5, 4), residual=states(1, 3, 2, 4),
        key_mask=None, scale=1.0),
    ),
    "layalign.LayAlignConfig": (layalign.LayAlignConfig, CONFIG),
    "layalign.LayAlignForCausalLM": (layalign.LayAlignForCausalLM, dict(config=layalign.LayAlignConfig(**CONFIG))),
    "layalign.LayAlignForCausalLM.from_encoder_and_llm": (
        layalign.LayAlignForCausalLM.from_encoder_and_llm, dict(encoder=ENCODER, llm=LLM),
    ),
    "layalign.LayAlignForCausalLM.from_pretrained": (
        lambda folder: layalign.LayAlignForCausalLM.from_pretrained(folder), dict(folder="no/such/folder/at/all"),
    ),
    "layalign.swap_modules": (
        layalign.swap_modules,
        dict(model=tiny_model(seed=5), impl="auto", fold_projections="auto", allow=["AdaptedAttention"]),
    ),
    "layalign.restore_modules": (layalign.restore_modules, dict(model=nn.Linear(1, 1))),
    "layalign.attach": (lambda **k: layalign.detach(k["llm"]) if layalign.attach(**k) else 0, dict(llm=tiny_llm(),
    layers=[0])),
    "layalign.detach": (layalign.detach, dict(llm=tiny_llm())),
    "layalign.build_inputs": (
        layalign.build_inputs,
        dict(source_lengths=[1, 2], prompts=[[1], [2, 3]], targets=[[1], [2]], bos_token_id=1, source_token_id=0,
        slots=True, device="cpu"),
    ),
    "layalign.data.LayAlignCollator": (
        LayAlignCollator, dict(COLLATOR, stage="task", max_source_length=5, max_prompt_length=5, max_target_length=5),
    ),
    "layalign.data.LayAlignCollator.call": (lambda examples: LayAlignCollator(**COLLATOR)(examples),
    dict(examples=EXAMPLES)),
    "layalign.data.LayAlignCollator.from_model": (
        lambda model: LayAlignCollator.from_model(model, TEXT, TEXT), dict(model=SimpleNamespace(config=MODEL.config)),
    ),
    "layalign.data.by_language": (by_language, dict(examples=EXAMPLES)),
    "layalign.data.language_of": (language_of, dict(text="sw")),
    "layalign.data.tokenizer_source_language": (tokenizer_source_language, dict(tokenizer=TEXT, language="sw")),
    "layalign.evaluation.resource_level": (resource_level, dict(language="sw", grouping="paper")),
    "layalign.evaluation.register_task": (registered, dict(name="own", task=Task("tsv", "text", 3))),
    "layalign.evaluation.unregister_task": (unregister_task, dict(name="own")),
    "layalign.evaluation.Task": (
        Task, dict(reader="tsv", scorer="text", max_new_tokens=3, stage="task", prompt="source")
    ),
    "layalign.evaluation.EvalConfig": (
        EvalConfig, dict(languages=["sw"], batch_size=2, max_new_tokens=3, limit=5, skip_bad=False, resume=False,
        scorer="number", label_match="exact", measures=None, stage="task", max_source_length=5, max_prompt_length=5,
        generation={}, model_name="x", non_finite="stop", progress=False),
    ),
    "layalign.evaluation.compare_runs": (compare_runs, dict(run_a="none", run_b="none", seed=0)),
    "layalign.evaluation.llm_alone": (llm_alone, dict(llm=LLM, tokenizer=TEXT, examples=EXAMPLES, max_new_tokens=3)),
    "layalign.experiments.analysis.centred_cosine": (centred_cosine, dict(first=states(3, 4), second=states(3, 4))),
    "layalign.experiments.analysis.linear_cka": (linear_cka, dict(first=states(3, 4), second=states(3, 4))),
    "layalign.experiments.analysis.retrieval_accuracy": (
        retrieval_accuracy, dict(queries=states(3, 4), candidates=states(3, 4))
    ),
    "layalign.experiments.analysis.read_pairs": (read_pairs, dict(pairs="none.tsv", languages=["sw"], limit=3)),
    "layalign.training.baselines.baseline": (baseline, dict(name="layalign")),
    "layalign.training.baselines.with_baseline": (with_baseline, dict(values={"output_dir": "a/b"}, name="layalign",
    stage="task")),
    "layalign.training.build_model": (build_model, dict(config=None)),
    "layalign.training.read_dev_examples": (read_dev_examples, dict(config=None)),
    "layalign.training.read_examples": (read_examples, dict(config=None)),
    "layalign.training.train": (train, dict(config=None)),
    "layalign.training.training_arguments": (training_arguments, dict(config=None)),
    "layalign.published.classes.LayAlign": (LayAlign, dict(config=PublishedConfig())),
}  # fmt: skip
ELSEWHERE = {
    "layalign.ops": "test_hostile_operations.py",
    "layalign.experiments.controlled": "test_hostile_settings.py: load_settings, every key of the settings",
    "layalign.data.load_examples": "test_hostile_data_files.py",
    "layalign.training.TrainConfig": "test_hostile_settings.py",
    "layalign.training.load_train_config": "test_hostile_settings.py",
    "layalign.evaluation.evaluate": "below, with its many arguments",
    "layalign.experiments.analysis.analyze": "below, with its many arguments",
    "layalign.cli.main": "test_hostile_commands.py",
    "layalign.experiments.made_up.run_demo": "writes its own inputs; folder, seed and flag are those of the command",
    "layalign.training.is_main_process": "no argument",
    "layalign.data.languages": "no argument",
    "layalign.nn.Mapping": "another name of Adapter",
    "layalign.published.classes.LayAlignConfig": "a record of fields, which LayAlign checks",
    **{f"layalign.{kind}": "an exception" for kind in layalign.__all__ if kind.endswith("Error")},
    **{
        f"layalign.data.{kind}": "a record, which checks nothing"
        for kind in ("Example", "Language", "ReadReport", "SkippedLine")
    },
    "layalign.evaluation.EvaluationResult": "a record that evaluate returns",
    "layalign.evaluation.LanguageScore": "a record that evaluate returns",
    "layalign.evaluation.MeasureScore": "a record that evaluate returns",
    "layalign.evaluation.MeasureScores": "a record that evaluate returns",
    "layalign.training.TrainSummary": "a record that train returns",
    "layalign.experiments.analysis.AnalysisResult": "a record that analyze returns",
    "layalign.training.baselines.Baseline": "a record",
}
# What an error may call an argument besides its own name.
NAMED_AS = {
    "model": ("config",), "llm": ("config", "language_layers"), "encoder": ("config",), "layers": ("language_layers",),
    "name": ("baseline",),
    "text": ("language",), "query": ("key", "residual"), "key": ("value",), "first": ("second",), "queries": ("first",
    "second"),
    "candidates": ("first", "second"), "folder": ("pretrained_model_name_or_path", "no readable LayAlign checkpoint"),
    "tokenizer": ("llm",),
    "values": ("output_dir",), "encoder_config": ("encoder_layers",), "llm_config": ("language_layers",
    "source_token_id", "llm_bos_token_id"),
    "adapter": ("prompt",), "run_a": ("run_b",), "run_b": ("run_a",), "hidden_states": ("hidden",),
    "languages": ("pairs",), "limit": ("pairs",), "source_lengths": ("prompts", "targets"),
    "bos_token_id": ("prompts",), "seed": ("run_a",),
}  # fmt: skip


def test_every_public_callable_is_tried_or_listed_with_the_reason() -> None:
    known = {id(getattr(importlib.import_module(n.rpartition(".")[0]), n.rpartition(".")[2], None)) for n in [*CASES,
    *ELSEWHERE]
             if n.count(".") and n not in PACKAGES and n.rpartition(".")[0] in PACKAGES}  # fmt: skip
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            full = f"{package}.{name}"
            assert (
                not callable(value) or full in CASES or full in ELSEWHERE or package in ELSEWHERE or id(value) in known
            ), full
    for name in ELSEWHERE:
        assert name in PACKAGES or hasattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]), (
            name
        )


def refused_or_served(function: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether there was a result; an error must be ours, on a line, and name one of `names` first."""
    try:
        function(**arguments)
    except LayAlignError as error:
        text = str(error)
        found = re.match(rf".*?\b({'|'.join(map(re.escape, names))})", text)
        assert found, text
        assert "\n" not in text and len(text) < 1500, text
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_wrong_arguments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    function, right = CASES[name]
    refused = 0
    for argument in right:
        for kind, wrong in WRONG.items():
            names = (argument, *NAMED_AS.get(argument, ()))
            try:
                refused += not refused_or_served(function, {**right, argument: wrong}, names)
            except Exception as error:
                raise AssertionError(f"{name}({argument}={kind}): {type(error).__name__}: {error}") from error
            tried("arguments of public functions")
    assert refused or name in ("layalign.data.tokenizer_source_language",)


FORWARD = ("input_ids", "attention_mask", "encoder_input_ids", "encoder_attention_mask", "labels")
IDS = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(0))
WRONG_IDS: dict[str, Any] = {
    **{kind: value for kind, value in WRONG.items() if kind not in ("None", "meta")},
    "out of the vocabulary": IDS + 1000, "negative": -IDS, "fractions": IDS.float(),
    "complex numbers": IDS.to(torch.complex64),
    "another batch": IDS[:2], "another length": IDS[:, :2], "no tokens": IDS[:, :0], "no samples": IDS[:0],
    "three dimensions": IDS[None],
    "one dimension": IDS[0], "huge": IDS[:, :1].expand(3, 2**45), "very large ids": torch.full((3, 7), 2**62),
    "smallest": torch.full((3, 7), -(2**63)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("argument", FORWARD)
def test_wrong_inputs_of_the_model(argument: str) -> None:
    """Right shapes with wrong numbers included: ids that are in no vocabulary, masks that mask nothing."""
    right = batch(model=MODEL)
    refused = 0
    for kind, wrong in WRONG_IDS.items():
        try:
            refused += not refused_or_served(MODEL, {**right, argument: wrong}, (argument, *FORWARD))
        except Exception as error:
            raise AssertionError(f"{argument}={kind}: {type(error).__name__}: {error}") from error
        tried("inputs of the model")
    assert refused > len(WRONG_IDS) - 8


EVALUATE = dict(
    model=lambda batch: ["1"] * len(batch), encoder_tokenizer=None, llm_tokenizer=None, task="mgsm", data=EXAMPLES,
    output_dir="out",
    languages=["sw"], batch_size=2, max_new_tokens=3, limit=5, skip_bad=False, resume=False, scorer="number",
    label_match="exact", measures=None,
    stage="task", max_source_length=5, max_prompt_length=5, generation={}, model_name="x",
)  # fmt: skip
ANALYZE = dict(
    model=MODEL, encoder_tokenizer=TEXT, llm_tokenizer=TEXT, pairs="none.tsv", languages=["sw"], limit=5, batch_size=2,
    max_length=9,
    before=None, layer=0, sentence=1, sentence_language="sw", generate=0, seed=0,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("function", "right"), [(evaluate, EVALUATE), (analyze, {**ANALYZE, "output_dir": None})])
def test_wrong_arguments_of_the_long_functions(
    function: Callable[..., Any], right: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    others = ("data", "spec", "languages", "task", "pairs", "model", "examples", "format", "no such file", "language")
    for argument in right:
        for kind, wrong in WRONG.items():
            if argument == "model" and kind in ("function", "module", "empty module"):
                continue  # functions of the user's: what they raise comes through
            try:
                refused_or_served(function, {**right, argument: wrong}, (argument, *others))
            except Exception as error:
                raise AssertionError(
                    f"{function.__name__}({argument}={kind}): {type(error).__name__}: {error}"
                ) from error
            tried("arguments of public functions")
