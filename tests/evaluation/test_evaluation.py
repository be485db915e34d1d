import json
from types import SimpleNamespace

import pytest
import torch
from helpers_text import byte_tokenizer, write_json_lines, write_lines
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

from layalign.data import Example, load_examples
from layalign.evaluation import TASKS, evaluate, llm_alone
from layalign.evaluation.answering import evaluation_mode, model_fingerprint
from layalign.utils.errors import ArgumentError, DataError

TOKENIZER = byte_tokenizer()


class Interrupted(Exception):
    """Stands for a crash in the middle of a run."""


class Recorder:
    """Answers by a rule, and remembers what it was asked; stops after some batches."""

    def __init__(self, rule, stop_after=None):
        self.rule, self.stop_after, self.batches = rule, stop_after, []

    def __call__(self, examples):
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise Interrupted
        self.batches.append([example.source for example in examples])
        return [self.rule(example) for example in examples]

    @property
    def asked(self):
        return [source for batch in self.batches for source in batch]


def mgsm(folder):
    write_lines(folder / "mgsm_sw.tsv", "Moja?\t1", "Elfu mbili na mia moja?\t2,100", "Tatu, sivyo?\t3")
    write_lines(folder / "mgsm_th.tsv", "หนึ่ง?\t1")
    return folder


def right(example):
    return f"The answer is {example.target}"


def gold(examples):
    return [right(example) for example in examples]


def run(model, data, out, task="mgsm", **options):
    return evaluate(model, None, None, task, data, out, model_name="test", **options)


def test_scores_predictions_and_files(tmp_path):
    answers = Recorder(lambda e: "so 2,100 it is" if "Elfu" in e.source else "I say 1.0")
    result = run(answers, mgsm(tmp_path / "data"), tmp_path / "out", batch_size=2)
    assert {name: (s.correct, s.count) for name, s in result.scores.items()} == {"Swahili": (2, 3), "Thai": (1, 1)}
    swahili = result.scores["Swahili"]
    assert swahili.accuracy == pytest.approx(66.67, abs=0.01)
    assert (swahili.low, swahili.high) == pytest.approx((20.77, 93.85), abs=0.01)
    assert result.average == pytest.approx((100 * 2 / 3 + 100) / 2)
    # The longest first, and the results in file order all the same.
    assert answers.batches == [["Elfu mbili na mia moja?", "Tatu, sivyo?"], ["Moja?"], ["หนึ่ง?"]]
    predictions = json.loads((tmp_path / "out/predictions/Swahili.json").read_text())
    assert [p["question"] for p in predictions] == ["Moja?", "Elfu mbili na mia moja?", "Tatu, sivyo?"]
    assert predictions[1]["prompt"].startswith("Below is an instruction")
    assert [(p["gold"], p["parsed"], p["correct"]) for p in predictions] == [
        (1, 1, True),
        (2100, 2100, True),
        (3, 1, False),
    ]
    assert predictions[1]["output"] == "so 2,100 it is"
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["languages"]["Thai"]["count"] == 1
    assert (tmp_path / "out/scores.tsv").read_text().split("\n")[:3] == [
        "language\taccuracy\tcorrect\tcount\tlow\thigh",
        "Swahili\t66.67\t2\t3\t20.77\t93.85",
        "Thai\t100.00\t1\t1\t20.65\t100.00",
    ]


def test_table(tmp_path):
    from rich.console import Console

    result = run(gold, mgsm(tmp_path / "data"), tmp_path / "out")
    console = Console(width=100, record=True)
    console.print(result.table())
    text = console.export_text()
    assert "mgsm: accuracy" in text
    assert "Swahili" in text
    assert "43.9 - 100.0" in text
    assert "average" in text


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_rerun_goes_on(tmp_path, stop_after):
    data = mgsm(tmp_path / "data")
    first = Recorder(right, stop_after)
    with pytest.raises(Interrupted):
        run(first, data, tmp_path / "out", batch_size=1)
    second = Recorder(right)
    result = run(second, data, tmp_path / "out", batch_size=1)
    assert len(first.asked) == stop_after
    assert sorted(first.asked + second.asked) == sorted(e.source for e in load_examples(f"mgsm:{data}")[0])
    assert {s.accuracy for s in result.scores.values()} == {100.0}
    third = Recorder(right)
    assert run(third, data, tmp_path / "out").scores == result.scores
    assert third.asked == []


def test_a_half_written_line_is_dropped(tmp_path):
    data, log = mgsm(tmp_path / "data"), tmp_path / "out/predictions/Swahili.jsonl"
    run(gold, data, tmp_path / "out")
    whole = log.read_bytes()
    log.write_bytes(whole[:-5])
    again = Recorder(right)
    run(again, data, tmp_path / "out")
    assert again.asked == ["Moja?"]
    assert log.read_bytes() == whole


def test_a_damaged_line_is_an_error(tmp_path):
    data, log = mgsm(tmp_path / "data"), tmp_path / "out/predictions/Swahili.jsonl"
    run(gold, data, tmp_path / "out")
    log.write_bytes(b"{}\n" + log.read_bytes())
    with pytest.raises(DataError, match=r"Swahili.jsonl:1: a damaged line"):
        run(gold, data, tmp_path / "out")
    assert run(gold, data, tmp_path / "out", resume=False).average == 100.0


def test_other_settings_or_data_are_refused(tmp_path):
    data = mgsm(tmp_path / "data")
    run(gold, data, tmp_path / "out", max_new_tokens=7)
    with pytest.raises(
        ArgumentError, match="outputs made with max_new_tokens 7, not 8; expected another folder, or resume"
    ):
        run(gold, data, tmp_path / "out", max_new_tokens=8)
    with pytest.raises(ArgumentError, match="outputs for other Swahili examples than these 2"):
        run(gold, data, tmp_path / "out", max_new_tokens=7, limit=2)
    with pytest.raises(ArgumentError, match="outputs made with model test, not other"):
        evaluate(gold, None, None, "mgsm", data, tmp_path / "out", model_name="other", max_new_tokens=7)
    anew = Recorder(right)
    run(anew, data, tmp_path / "out", max_new_tokens=8, resume=False)
    assert len(anew.asked) == 4
    (tmp_path / "out/settings.json").write_text("{")
    with pytest.raises(DataError, match=r"settings.json:1: not the settings of an evaluation"):
        run(gold, data, tmp_path / "out")


def test_languages_one_after_the_other(tmp_path):
    data = mgsm(tmp_path / "data")
    assert list(run(gold, data, tmp_path / "out", languages=["th"]).scores) == ["Thai"]
    other = Recorder(right)
    assert list(run(other, data, tmp_path / "out", languages=["th", "Swahili"]).scores) == ["Thai", "Swahili"]
    assert "หนึ่ง?" not in other.asked


def test_labels(tmp_path):
    row = {"premise": "P", "choice1": "x", "choice2": "y", "question": "cause", "label": 1}
    write_json_lines(tmp_path / "val.sw.jsonl", row, row, row, {**row, "label": 0})
    replies = iter([" B\n", "B. y", "b", "Because"])
    answers = {"texts": [next(replies) for _ in range(4)]}

    def model(examples):
        return answers["texts"]

    exact = run(model, tmp_path, tmp_path / "a", task="xcopa")
    start = run(model, tmp_path, tmp_path / "b", task="xcopa", label_match="start")
    assert (exact.scores["Swahili"].correct, start.scores["Swahili"].correct) == (1, 3)
    assert json.loads((tmp_path / "b/predictions/Swahili.json").read_text())[3]["parsed"] is None


def test_xnli_counts_exact_labels(tmp_path):
    write_lines(tmp_path / "test/sw.tsv", "P\tH\tneutral", "Q\tH\t0")
    result = run(lambda examples: [" neutral "] * len(examples), tmp_path, tmp_path / "out", task="xnli")
    assert result.scores["Swahili"].correct == 1


def test_signed_numbers_and_free_text(tmp_path):
    examples = [Example("a", "-5", "Thai"), Example("b", "5", "Thai")]
    say = {"a": "-5", "b": "-5"}

    def model(batch):
        return [say[e.source] for e in batch]

    published = run(model, examples, tmp_path / "a", task="math")
    signed = run(model, examples, tmp_path / "b", task="math", scorer="signed-number")
    text = run(model, examples, tmp_path / "c", task="tsv")
    assert [r.scores["Thai"].correct for r in (published, signed, text)] == [2, 1, 1]


def test_endless_digits_and_half_surrogates_are_written_as_json(tmp_path):
    examples = [Example("a", "1", "Thai"), Example("b", "1", "Thai")]
    say = {"a": "9" * 500, "b": "\ud83d 1"}
    run(lambda batch: [say[e.source] for e in batch], examples, tmp_path, task="math")
    predictions = json.loads((tmp_path / "predictions/Thai.json").read_text(), parse_constant=pytest.fail)
    assert [(p["parsed"], p["correct"]) for p in predictions] == [("inf", False), (1.0, True)]


def test_malformed_lines(tmp_path):
    data = mgsm(tmp_path / "data")
    write_lines(data / "mgsm_th.tsv", "one column", "หนึ่ง?\t1")
    with pytest.raises(DataError, match="mgsm_th.tsv:1: 1 columns, expected 2"):
        run(gold, data, tmp_path / "out")
    result = run(gold, data, tmp_path / "out", skip_bad=True)
    assert len(result.report.skipped) == 1
    assert "mgsm_th.tsv:1" in json.loads((tmp_path / "out/scores.json").read_text())["skipped"][0]
    assert "1 malformed lines left out" in result.table().title


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "poetry"}, "task: expected one of mgsm, msvamp"),
        ({"scorer": "taste"}, "scorer: expected one of number"),
        ({"label_match": "loose"}, "label_match: expected 'exact' or 'start', got 'loose'"),
        ({"batch_size": 0}, "batch_size: expected a number >= 1, got 0"),
        ({"limit": 0}, "limit: expected a number >= 1, got 0"),
        ({"languages": ["sw", "ta"]}, "languages: expected some of Swahili, got Tamil"),
    ],
)
def test_impossible_arguments(tmp_path, options, message):
    with pytest.raises(ArgumentError, match=message):
        run(gold, [Example("a", "1", "Swahili")], tmp_path, **options)


def test_models_that_cannot_answer(tmp_path):
    examples = [Example("a", "1", "Swahili", "p"), Example("b", "1", "Swahili", "p")]
    with pytest.raises(ArgumentError, match="model: expected something with generate, or a function, got int"):
        run(3, examples, tmp_path)
    with pytest.raises(ArgumentError, match="model: expected 2 texts, one per example, got 1"):
        run(lambda batch: ["1"], examples, tmp_path)
    with pytest.raises(ArgumentError, match="model: expected a LayAlign model with its config, got SimpleNamespace"):
        run(SimpleNamespace(generate=None), examples, tmp_path)


class Parrot(nn.Module):
    """Has the model's `generate`: answers 42, an end, and padding with a token that is text."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Dropout().eval()
        self.config = SimpleNamespace(llm_bos_token_id=1, source_token_id=0)
        self.calls = []

    def generate(self, *, input_ids, attention_mask, encoder_input_ids, encoder_attention_mask, **options):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append((encoder_input_ids.shape, options))
        letters = TOKENIZER("42")["input_ids"] + [TOKENIZER.eos_token_id] + TOKENIZER("7")["input_ids"]
        return torch.cat([input_ids, torch.tensor([letters] * len(input_ids))], dim=1)


def test_an_object_with_generate(tmp_path):
    model = Parrot().train()
    model.frozen.eval()
    examples = [Example(text, "42", "Thai", prompt=text) for text in ("a", "bcd", "ef")]
    result = evaluate(model, TOKENIZER, TOKENIZER, "math", examples, tmp_path, batch_size=2, max_new_tokens=5)
    assert result.average == 100.0
    assert json.loads((tmp_path / "predictions/Thai.json").read_text())[0]["output"] == "42"
    assert [tuple(shape) for shape, _ in model.calls] == [(2, 3), (1, 1)]
    assert model.calls[0][1] == {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": [2]}
    assert model.training
    assert not model.frozen.training
    with torch.no_grad():
        model.weight += 1  # trained further: the old outputs are not its own
    with pytest.raises(ArgumentError, match="outputs made with model"):
        evaluate(model, TOKENIZER, TOKENIZER, "math", examples, tmp_path, batch_size=2, max_new_tokens=5)


def test_evaluation_mode_is_undone_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    seen = []

    def fail():
        with evaluation_mode(model):
            seen.extend(module.training for module in model)
            raise Interrupted

    with pytest.raises(Interrupted):
        fail()
    assert seen == [False, False]
    assert [module.training for module in model] == [True, False]


def test_fingerprint_sees_every_parameter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2))
    before = model_fingerprint(model)
    assert before == model_fingerprint(model)
    with torch.no_grad():
        model[1].bias += 1e-3
    assert before != model_fingerprint(model)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_llm_alone_does_not_depend_on_the_batch(tmp_path):
    llm, tokenizer = llama(), byte_tokenizer(bos=True, eos=True)
    examples = [Example(text, "1", "Thai", prompt=text) for text in ("a", "bcdefgh", "ij?")]
    answer = llm_alone(llm, tokenizer, max_new_tokens=6)
    together, one_by_one = answer(examples), [answer([example])[0] for example in examples]
    assert together == one_by_one
    expected = llm.generate(torch.tensor([[1, *TOKENIZER("ij?")["input_ids"]]]), max_new_tokens=6, do_sample=False)
    assert together[2] == TOKENIZER.decode(expected[0, 4:], skip_special_tokens=True)
    evaluate(answer, None, None, "math", examples, tmp_path)
    with torch.no_grad():
        llm.lm_head.weight += torch.randn_like(llm.lm_head.weight)
    with pytest.raises(ArgumentError, match="outputs made with model llm alone"):
        evaluate(answer, None, None, "math", examples, tmp_path)


def test_the_real_model(tmp_path):
    from layalign import LayAlignForCausalLM

    torch.manual_seed(0)
    config = MT5Config(vocab_size=len(TOKENIZER), d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    model = LayAlignForCausalLM.from_encoder_and_llm(MT5EncoderModel(config), llama())
    with torch.no_grad():
        for module in model.cross_attention:
            module.adaption_gate.fill_(0.5)
    data, options = mgsm(tmp_path / "data"), {"max_new_tokens": 4}
    encoder_tokenizer = byte_tokenizer(eos=True)
    outputs = []
    for batch_size in (1, 3):
        out = tmp_path / f"out{batch_size}"
        result = evaluate(model, encoder_tokenizer, TOKENIZER, "mgsm", data, out, batch_size=batch_size, **options)
        assert {name: score.count for name, score in result.scores.items()} == {"Swahili": 3, "Thai": 1}
        outputs.append([p["output"] for p in json.loads((out / "predictions/Swahili.json").read_text())])
    assert outputs[0] == outputs[1]
    assert all(outputs[0])

    def again(first=encoder_tokenizer, second=TOKENIZER):
        return evaluate(model, first, second, "mgsm", data, tmp_path / "out1", batch_size=1, **options)

    with pytest.raises(ArgumentError, match="holds outputs made with tokenizers"):
        again(second=byte_tokenizer(eos=True))
    model.config.mix = "shared"
    with pytest.raises(ArgumentError, match="holds outputs made with model_settings"):
        again()
    model.config.mix = "layer-wise"
    file = tmp_path / "out1" / "settings.json"
    old = json.loads(file.read_text())
    for key in ("tokenizers", "model_settings"):  # as an earlier layalign wrote it
        del old["settings"][key]
    file.write_text(json.dumps(old))
    again()
    assert json.loads(file.read_text())["settings"].keys() > old["settings"].keys()


def test_every_task_reads_its_own_format():
    from layalign.data import FORMATS

    assert {task.reader for task in TASKS.values()} <= set(FORMATS)
