"""The lm-evaluation-harness adapter: scores and answers against plain computations, and whole runs on local tasks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_text import byte_tokenizer, nllb_tokenizer, write_json_lines
from tiny import open_gates, tiny_encoder, tiny_llm
from torch import Tensor

from layalign import LayAlignForCausalLM
from layalign.modeling.tokenization import save_tokenizers
from layalign.utils.errors import ArgumentError, NonFiniteError

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'layalign[lm-eval]')")

from layalign.evaluation.lm_eval import LayAlignLM

LLM = byte_tokenizer()
ENCODER = byte_tokenizer(eos=True)
SIZE = len(LLM)
PAIRS = [
    ("Swali: moja na mbili?", " tatu"), ("Swali: moja na mbili?", " nne"), ("", "peke yake"), ("anga ni ", "bluu"),
    ("a", "b"), ("ขอบคุณ", "มาก"), ("a", "b"), ("a", "c"),
]  # fmt: skip
# The thousands of tasks that come with the harness take it half a minute to list.
COMMAND = """
import functools, sys
import lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
from layalign.cli import main
main(sys.argv[1:])
"""


def tiny(gates: bool = True, length: int = 256, **config: Any) -> LayAlignForCausalLM:
    parts = tiny_encoder(vocab_size=SIZE), tiny_llm(vocab_size=SIZE, max_position_embeddings=length)
    torch.manual_seed(2)
    model = LayAlignForCausalLM.from_encoder_and_llm(*parts, **config)
    if gates:
        open_gates(model)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LayAlignForCausalLM:
    return tiny()


def adapter(model: Any, encoder_tokenizer: Any = ENCODER, **options: Any) -> LayAlignLM:
    return LayAlignLM(model=model, encoder_tokenizer=encoder_tokenizer, llm_tokenizer=LLM, **options)


def requests(*arguments: tuple[Any, ...], docs: list[dict[str, Any]] | None = None, task: str = "t") -> list[Any]:
    pairs = zip(arguments, docs or [{}] * len(arguments), strict=True)
    return [SimpleNamespace(args=args, doc=doc, task_name=task, doc_id=i) for i, (args, doc) in enumerate(pairs)]


def ids(text: str) -> list[int]:
    return LLM(text)["input_ids"]


def plain_logits(model: LayAlignForCausalLM, source: str, tokens: list[int]) -> Tensor:
    """Logits (T, V) of one sequence without padding, its input laid out here."""
    source_ids = ENCODER(source)["input_ids"]
    config = model.config
    row = [config.llm_bos_token_id, *[config.source_token_id] * (len(source_ids) + 1), *tokens]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            encoder_input_ids=torch.tensor([source_ids]),
            encoder_attention_mask=torch.ones(1, len(source_ids), dtype=torch.long),
        ).logits[0]


def plain_score(model: LayAlignForCausalLM, source: str, prompt: list[int], target: list[int]) -> tuple[float, bool]:
    scores = plain_logits(model, source, prompt + target)[-len(target) - 1 : -1].log_softmax(-1)
    right = scores.argmax(-1).tolist() == target
    return sum(float(scores[i, token]) for i, token in enumerate(target)), right


def expected(model: LayAlignForCausalLM, context: str, continuation: str) -> tuple[float, bool]:
    # Spaces at the context's end belong to the continuation; bytes need no other care.
    kept = context.rstrip()
    return plain_score(model, context, ids(kept), ids(context[len(kept) :] + continuation))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loglikelihood_is_that_of_a_plain_forward(dtype: torch.dtype, tolerance: float, batch_size: int) -> None:
    model = tiny().to(dtype)
    found = adapter(model, batch_size=batch_size).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    wanted = [expected(model, *pair) for pair in PAIRS]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=tolerance, abs=tolerance)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert len({value for value, _ in wanted}) == len(PAIRS) - 1  # the two equal requests


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("loglikelihood", [("a", "b"), ("Z", "b"), ("c", "d")]),
        ("generate_until", [("a", {"until": ["."]}), ("Z", {"until": ["."]})]),
        ("loglikelihood_rolling", [("ab",), ("aZb" * 40,)]),
    ],
)
def test_a_document_whose_logits_are_not_finite_is_named(call: str, arguments: list[Any]) -> None:
    model = tiny(length=64)
    with torch.no_grad():  # read by the encoder, and for the perplexity by the LLM
        for part in (model.encoder, model.llm):
            part.get_input_embeddings().weight[ids("Z")[0]] = float("nan")
    lm = adapter(model, batch_size=2, max_gen_toks=3)
    named = r"expected finite logits, got NaN or infinity for document 1 of xnli_sw \('a?Z"
    with pytest.raises(NonFiniteError, match=named):
        getattr(lm, call)(requests(*arguments, task="xnli_sw"), disable_tqdm=True)


def test_what_greedy_search_writes_is_greedy(model: LayAlignForCausalLM) -> None:
    tokens: list[int] = []
    for _ in range(3):
        tokens.append(int(plain_logits(model, "habari", ids("habari") + tokens)[-1].argmax()))
    lm = adapter(model)
    other = [*tokens[:2], (tokens[2] + 1) % SIZE]
    triples = [(("habari", ""), ids("habari"), row) for row in (tokens, other, tokens[:1])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(triples, True)] == [True, False, True]


def test_the_first_token_sums_to_one(model: LayAlignForCausalLM) -> None:
    lm, seen = adapter(model, batch_size=4), []
    forward = model.forward
    model.forward = lambda **inputs: seen.append(len(inputs["input_ids"])) or forward(**inputs)  # type: ignore[method-assign]
    try:
        triples = [((context, ""), ids(context), [token]) for token in range(SIZE) for context in ("", "moja")]
        values = lm._loglikelihood_tokens(triples, disable_tqdm=True)
    finally:
        del model.forward  # type: ignore[method-assign]
    for start in (0, 1):
        assert sum(torch.tensor(value).exp() for value, _ in values[start::2]) == pytest.approx(1, abs=1e-5)
        assert sum(greedy for _, greedy in values[start::2]) == 1
    assert seen == [2]  # one row per context, not one per continuation


def test_closed_gates_leave_the_llm_with_soft_tokens() -> None:
    model = tiny(gates=False)
    (found, _), = adapter(model).loglikelihood(requests(("jua", "kali")), disable_tqdm=True)  # fmt: skip
    source = torch.tensor([ENCODER("jua")["input_ids"]])
    llm, target = model.llm, ids("kali")
    with torch.no_grad():
        soft = model.mapping(model.encoder(input_ids=source, attention_mask=torch.ones_like(source)).last_hidden_state)
        embed = llm.get_input_embeddings()
        bos, text = embed(torch.tensor([[model.config.llm_bos_token_id]])), embed(torch.tensor([ids("jua") + target]))
        embeds = torch.cat([bos, soft, model.mapping.get_embed().expand(1, 1, -1), text], dim=1)
        scores = model.unload()(inputs_embeds=embeds).logits[0, -len(target) - 1 : -1].log_softmax(-1)
    assert found == pytest.approx(sum(float(scores[i, token]) for i, token in enumerate(target)), abs=1e-4)


def test_the_encoder_matters(model: LayAlignForCausalLM) -> None:
    docs = [{"q": "moja", "z": "x"}, {"q": "mbili", "z": "y"}]
    pairs = [("Jibu:", " a"), ("Jibu:", " a")]
    lm = adapter(model, source="question", source_field="q", batch_size=2)
    found = lm.loglikelihood(requests(*pairs, docs=docs), disable_tqdm=True)
    wanted = [plain_score(model, doc["q"], ids("Jibu:"), ids(" a"))[0] for doc in docs]
    assert [value for value, _ in found] == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted[0] - wanted[1]) > 1e-3
    two = adapter(model, source="question", source_field="q+z").loglikelihood(requests(*pairs, docs=docs), True)
    assert two[0][0] == pytest.approx(plain_score(model, "moja\nx", ids("Jibu:"), ids(" a"))[0], abs=1e-5)
    with pytest.raises(ArgumentError, match="source_field: expected fields among q, z, got 'r'"):
        adapter(model, source="question", source_field="q+r").loglikelihood(requests(*pairs, docs=docs))


def test_the_translation_stage_gives_the_llm_no_context(model: LayAlignForCausalLM) -> None:
    (found, _), = adapter(model, stage="translation").loglikelihood(requests(("moja", " one")), True)  # fmt: skip
    assert found == pytest.approx(plain_score(model, "moja", [], ids(" one"))[0], abs=1e-5)


def test_models_without_adapter_or_prompt() -> None:
    model = tiny(use_prompt=False)
    (found, _), = adapter(model).loglikelihood(requests(("moja", " one")), True)  # fmt: skip
    assert found == pytest.approx(plain_score(model, "moja", [], ids(" one"))[0], abs=1e-5)
    model = tiny(use_adapter=False)
    source, target = torch.tensor([ENCODER("moja")["input_ids"]]), ids(" one")
    row = torch.tensor([[model.config.llm_bos_token_id, *ids("moja"), *target]])
    with torch.no_grad():
        scores = model(input_ids=row, encoder_input_ids=source).logits[0, -len(target) - 1 : -1].log_softmax(-1)
    (found, _), = adapter(model).loglikelihood(requests(("moja", " one")), True)  # fmt: skip
    assert found == pytest.approx(sum(float(scores[i, token]) for i, token in enumerate(target)), abs=1e-5)
    model.config.llm_bos_token_id = None
    with pytest.raises(ArgumentError, match="context: expected a text, this model has neither a first token"):
        adapter(model).loglikelihood(requests(("", "one")), True)


def test_texts_have_no_special_tokens_and_endless_answers_are_counted(model: LayAlignForCausalLM) -> None:
    lm = adapter(model)
    assert LLM.eos_token_id not in lm.tok_encode("a</s>b") and LLM.decode(lm.tok_encode("a</s>b")) == "a</s>b"
    assert lm._encode([("a</s>b", "English")])[0].count(ENCODER.eos_token_id) == 1
    settings = {"until": [], "max_gen_toks": 1, "do_sample": False}
    lm.generate_until([SimpleNamespace(args=("moja", settings), doc={}, task_name="t")], disable_tqdm=True)
    assert lm.get_model_info()["cut"]["answer"] == 1


def test_long_contexts_lose_their_start(caplog: pytest.LogCaptureFixture) -> None:
    model, context = tiny(length=40), "0123456789" * 6 + "mwisho"
    lm = adapter(model, max_source_length=8, batch_size=2)
    with caplog.at_level(logging.WARNING, "layalign"):
        found = lm.loglikelihood(requests((context, "xyz"), (context + "!", "xyz")), disable_tqdm=True)
    # [bos], 7 bytes and an end for the encoder, the boundary: 10 of 40; "xy" is read, "z" is only scored.
    wanted = plain_score(model, context[-7:], ids(context)[-28:], ids("xyz"))[0]
    assert found[0][0] == pytest.approx(wanted, abs=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "a source was cut to fit max_source_length=8; said only once",
        "a context was cut to fit max_length=40; said only once",
    ]
    assert lm.get_model_info() == {"cut": {"source": 2, "context": 2}}
    assert ENCODER.truncation_side == "right"
    with pytest.raises(ArgumentError, match="max_length: expected room for encoder tokens and what is scored, got 10"):
        lm.loglikelihood(requests((context, "x" * 40)), disable_tqdm=True)
    with pytest.raises(ArgumentError, match="continuation: expected at least one token"):
        lm.loglikelihood(requests((context, "")), disable_tqdm=True)


def test_a_question_that_is_too_long_loses_its_end(model: LayAlignForCausalLM) -> None:
    lm = adapter(model, source="question", source_field="q", max_source_length=4)
    (found, _), = lm.loglikelihood(requests(("a", "b"), docs=[{"q": "123456"}]), True)  # fmt: skip
    assert found == pytest.approx(plain_score(model, "123", ids("a"), ids("b"))[0], abs=1e-5)


@pytest.mark.parametrize("length", [256, 13])
def test_rolling_scores_every_token_once(length: int) -> None:
    model, text = tiny(length=256), "Jua linawaka sana leo"
    lm = adapter(model, max_length=length, batch_size=3)
    found = lm.loglikelihood_rolling(requests((text,), ("b",)), disable_tqdm=True)
    room, tokens = length - 3, ids(text)  # [bos], the end for the encoder, the boundary
    total, done = 0.0, 0
    while done < len(tokens):
        new = tokens[done : done + room]
        before = tokens[max(0, done + len(new) - room - 1) : done] if done else []
        total += plain_score(model, "", before, new)[0]
        done += len(new)
    assert found == pytest.approx([total, plain_score(model, "", [], ids("b"))[0]], abs=1e-4)


def write_plainly(model: LayAlignForCausalLM, text: str, new: int, stop: list[str]) -> str:
    tokens: list[int] = []
    for _ in range(new):
        tokens.append(int(plain_logits(model, text, ids(text) + tokens)[-1].argmax()))
        if tokens[-1] == LLM.eos_token_id:
            tokens.pop()
            break
    answer = LLM.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for mark in stop:
        answer = answer.split(mark)[0]
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_generate_until_is_greedy_search_cut_at_the_stops(model: LayAlignForCausalLM, batch_size: int) -> None:
    contexts = ["moja", "mbili na tatu", "a", "mbili na tatu", "nne nne nne nne"]
    free = [write_plainly(model, text, 9, []) for text in contexts]
    stops = [free[1][2:4], free[4][4]]
    settings = [{"until": stops, "max_gen_toks": 9}, {"until": [], "max_gen_toks": 9, "temperature": 0.0}]
    pairs = [(text, settings[i % 2]) for i, text in enumerate(contexts)]
    found = adapter(model, batch_size=batch_size).generate_until(requests(*pairs), disable_tqdm=True)
    wanted = [write_plainly(model, text, 9, stops if i % 2 == 0 else []) for i, text in enumerate(contexts)]
    assert found == wanted
    assert len(wanted[4]) < len(free[4])


def test_a_stop_string_ends_the_work(model: LayAlignForCausalLM) -> None:
    lm, seen = adapter(model), []
    text = write_plainly(model, "moja", 12, [])
    forward = model.llm.forward
    model.llm.forward = lambda *args, **inputs: seen.append(1) or forward(*args, **inputs)
    try:
        given = {"until": [text[2:4]], "max_gen_toks": 100}
        assert lm.generate_until(requests(("moja", given)), disable_tqdm=True) == [text.split(text[2:4])[0]]
    finally:
        del model.llm.forward
    assert len(seen) <= 8


def test_sampling_is_passed_on_or_refused(model: LayAlignForCausalLM) -> None:
    lm, given = adapter(model), {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
    torch.manual_seed(0)
    drawn = {lm.generate_until(requests(("moja", given)), disable_tqdm=True)[0] for _ in range(4)}
    assert len(drawn) > 1
    with pytest.raises(ArgumentError, match="temperature: expected > 0 with do_sample, got 0"):
        lm.generate_until(requests(("moja", {**given, "temperature": 0.0})), disable_tqdm=True)
    with pytest.raises(ArgumentError, match="max_gen_toks: expected at most 245 here, got 300"):
        lm.generate_until(requests(("mojamoja", {"until": [], "max_gen_toks": 300})), disable_tqdm=True)


def test_arguments(model: LayAlignForCausalLM) -> None:
    for options, message in [
        ({"source": "last"}, "source: expected one of context, question, got 'last'"),
        ({"source": "question"}, "source_field: expected with source=question and only there, got None"),
        ({"source_field": "q"}, "source_field: expected with source=question and only there, got 'q'"),
        ({"stage": "third"}, "stage: expected one of translation, task, got 'third'"),
        ({"batch_size": "auto"}, "batch_size: expected a number >= 1"),
        ({"language": "Klingon"}, "language: expected an English name"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            adapter(model, **options)
    with pytest.raises(ArgumentError, match="checkpoint: expected either"):
        LayAlignLM()
    bare = byte_tokenizer()
    bare.eos_token = None
    with pytest.raises(ArgumentError, match="context: expected a text, the encoder's tokenizer has no token"):
        adapter(model, bare).loglikelihood(requests(("", "a")))
    # Without special tokens of its own, the end-of-sequence token stands for an empty text.
    assert adapter(model, byte_tokenizer())._encode([("", "English")]) == [[ENCODER.eos_token_id]]


def test_the_task_names_the_language_for_encoders_that_want_one() -> None:
    model, nllb = tiny(), nllb_tokenizer()
    nllb.add_tokens(["swh_Latn", "eng_Latn"], special_tokens=True)
    named = adapter(model, nllb)
    for task in ("mgsm_direct_sw", "belebele_swh_Latn"):
        (row,) = named._encode([("a", named._named(task))])
        assert nllb.convert_tokens_to_ids("swh_Latn") in row
    assert adapter(model, nllb, language="en")._named("mgsm_direct_sw") == "English"
    with pytest.raises(ArgumentError, match="language: expected one for this encoder, the task 'chess' names none"):
        named._named("chess")


# Whole runs, offline. The sentences are made up; the shapes are those of xcopa, xnli and mgsm.

CHOICES = [
    {"premise": "Mvua ilinyesha.", "choice1": "Ardhi ililowa.", "choice2": "Jua liliwaka.", "label": 0},
    {"premise": "Alikimbia.", "choice1": "Alilala.", "choice2": "Alichoka.", "label": 1},
    {"premise": "Taa ilizimika.", "choice1": "Kulikuwa giza.", "choice2": "Kulikuwa na mwanga.", "label": 0},
    {"premise": "Walipika.", "choice1": "Walikula.", "choice2": "Walikimbia.", "label": 0},
]
ENTAILMENT = [
    {"premise": "Paka analala.", "hypothesis": "Mnyama analala.", "label": 0},
    {"premise": "Mtoto anacheka.", "hypothesis": "Mtoto analia.", "label": 2},
    {"premise": "Anasoma.", "hypothesis": "Anasoma gazeti.", "label": 1},
]
WORDS = ("Ndiyo", "Pia", "Hapana")
KEYS = ("choice1", "choice2")
QUESTIONS = [{"question": "Moja na moja?"}, {"question": "Mbili na tatu?"}, {"question": "Nne toa mbili?"}]


def write_tasks(folder: Path, model: LayAlignForCausalLM) -> None:
    """Three tasks. The gold answers of the generated one are what the model writes, save the last."""
    gold = [{**doc, "answer": write_plainly(model, f"Swali: {doc['question']}\nJibu:", 6, ["\n"])} for doc in QUESTIONS]
    gold[-1]["answer"] += "?"
    multiple = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    generated: dict[str, Any] = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    generated["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    labels = ", ".join(f"premise + ', sawa? {word}, ' + hypothesis" for word in WORDS)
    xcopa = {**multiple, "doc_to_text": "{{premise}} Kwa hiyo", "doc_to_choice": "{{[choice1, choice2]}}"}
    xnli = {**multiple, "doc_to_text": "", "doc_to_choice": "{{[" + labels + "]}}"}
    mgsm = {**generated, "doc_to_text": "Swali: {{question}}\nJibu:", "doc_to_target": "answer"}
    tasks = {"xcopa_like_sw": (CHOICES, xcopa), "xnli_like_sw": (ENTAILMENT, xnli), "mgsm_like_sw": (gold, mgsm)}
    for name, (documents, config) in tasks.items():
        data = write_json_lines(folder / f"{name}.jsonl", *documents)
        config = {"task": name, "dataset_path": "json", "test_split": "test", "doc_to_target": "label", **config}
        config["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML


def accuracy(documents: list[dict[str, Any]], scores: Callable[[dict[str, Any]], list[tuple[float, bool]]]) -> float:
    right = sum(max(range(len(found := scores(doc))), key=found.__getitem__) == doc["label"] for doc in documents)
    return right / len(documents)


def choice_scores(model: LayAlignForCausalLM, source: str, doc: dict[str, Any]) -> list[tuple[float, bool]]:
    return [plain_score(model, source, ids(f"{doc['premise']} Kwa hiyo"), ids(f" {doc[key]}")) for key in KEYS]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_run_of_local_tasks(model: LayAlignForCausalLM, tmp_path: Path, batch_size: int) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    write_tasks(tmp_path, model)
    names = ["xcopa_like_sw", "xnli_like_sw", "mgsm_like_sw"]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = adapter(model, batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    choices = accuracy(CHOICES, lambda doc: choice_scores(model, f"{doc['premise']} Kwa hiyo", doc))
    assert found["xcopa_like_sw"]["acc,none"] == pytest.approx(choices)
    texts = [" {premise}, sawa? %s, {hypothesis}" % word for word in WORDS]  # noqa: UP031
    labels = accuracy(ENTAILMENT, lambda doc: [plain_score(model, "", [], ids(t.format(**doc))) for t in texts])
    assert found["xnli_like_sw"]["acc,none"] == pytest.approx(labels)
    assert found["mgsm_like_sw"]["exact_match,none"] == pytest.approx(2 / 3)


@pytest.mark.slow
def test_the_command(model: LayAlignForCausalLM, tmp_path: Path) -> None:
    """`layalign lm-eval` knows the model by name, loads the checkpoint and passes the harness's arguments on."""
    write_tasks(tmp_path / "tasks", model)
    model.save_pretrained(tmp_path / "model", save_frozen=True)
    save_tokenizers(tmp_path / "model", ENCODER, LLM)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "lm-eval", "--model", "layalign", "--model_args",
         f"checkpoint={tmp_path / 'model'},source=question,source_field=premise", "--tasks", "xcopa_like_sw",
         "--include_path", str(tmp_path / "tasks"), "--batch_size", "2", "--output_path",
         str(tmp_path / "out.json")],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    if not torch.cuda.is_available():  # the harness asks for a GPU where nobody says what to use
        assert "device: cuda:0, the harness's default, is not here; the model runs on the CPU" in done.stderr
    (written,) = tmp_path.rglob("out*.json")
    wanted = accuracy(CHOICES, lambda doc: choice_scores(model, doc["premise"], doc))
    assert json.loads(written.read_text())["results"]["xcopa_like_sw"]["acc,none"] == pytest.approx(wanted)
