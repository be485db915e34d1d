"""One training step of LayAlign on real weights against the bare LLM's forward and backward on the same tokens.

``python benchmarks/training_step.py FOLDER`` takes a folder with ``encoder`` and ``llm``, as ``layalign weights``
writes it. The step is one of the translation stage, over all encoder states, including the optimizer. The bare LLM's
backward goes to its input embeddings, with logits only where labels are. The encoder's forward has a separate row,
since the bare LLM does not need it. The calls take turns. Times are CPU time of one thread; times and ratios are
medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from layalign import LayAlignForCausalLM
from layalign.data import Example, LayAlignCollator
from layalign.modeling.llm_inputs import IGNORE_INDEX
from layalign.modeling.tokenization import load_tokenizers
from layalign.training import build_model, load_train_config

LENGTH = 48  # tokens of a source or target, at most
PAIRS = (
    ("Der Hund schläft unter dem alten Tisch.", "The dog is sleeping under the old table."),
    ("Ich habe gestern einen langen Brief geschrieben.", "I wrote a long letter yesterday."),
    ("Wo ist der nächste Bahnhof?", "Where is the nearest train station?"),
    ("Elle a acheté du pain et du fromage.", "She bought bread and cheese."),
    ("Nous partirons demain matin très tôt.", "We will leave very early tomorrow."),
    ("Il fait froid dans cette maison.", "It is cold in this house."),
    ("El niño juega con una pelota roja.", "The boy plays with a red ball."),
    ("¿Cuánto cuesta este libro?", "How much does this book cost?"),
    ("Mi hermana trabaja en un hospital.", "My sister works in a hospital."),
    ("Мой отец любит крепкий чай.", "My father likes strong tea."),
    ("Поезд опоздал на двадцать минут.", "The train was twenty minutes late."),
    ("Watoto wanacheza karibu na mto.", "The children are playing near the river."),
    ("Mama anapika chakula jikoni.", "Mother is cooking food in the kitchen."),
    ("Bahçede üç tane elma ağacı var.", "There are three apple trees in the garden."),
    ("Yarın okula gitmek istemiyorum.", "I do not want to go to school tomorrow."),
    ("今日はとても天気がいいです。", "The weather is very nice today."),
    ("彼は毎朝公園を走ります。", "He runs in the park every morning."),
    ("我们明天去看电影吧。", "Let us go to the cinema tomorrow."),
    ("这条河里没有鱼。", "There are no fish in this river."),
    ("Kedi pencerenin önünde oturuyor.", "The cat is sitting by the window."),
    ("Gli studenti leggono in silenzio.", "The students read in silence."),
    ("Ho perso le chiavi della macchina.", "I lost the keys of the car."),
    ("O menino tem medo do escuro.", "The boy is afraid of the dark."),
    ("Choveu durante toda a noite.", "It rained all night."),
    ("मेरी माँ बाज़ार गई है।", "My mother has gone to the market."),
    ("यह कमरा बहुत छोटा है।", "This room is very small."),
    ("তুমি কোথায় থাকো?", "Where do you live?"),
    ("Tôi muốn uống một cốc nước.", "I want to drink a glass of water."),
    ("Anh ấy không biết bơi.", "He cannot swim."),
    ("Saya belum makan siang.", "I have not had lunch yet."),
    ("الطقس حار جدا اليوم.", "The weather is very hot today."),
    ("Hän lukee kirjaa junassa.", "She is reading a book on the train."),
)
STEP, BARE, ENCODER = "LayAlign, one step", "bare LLM, forward and backward", "encoder, forward"


def batch_of(model: LayAlignForCausalLM, weights: Path) -> dict[str, torch.Tensor]:
    """The pairs as one batch."""
    encoder, llm = load_tokenizers(None, encoder=str(weights / "encoder"), llm=str(weights / "llm"))
    limits = dict(max_source_length=LENGTH, max_target_length=LENGTH)
    collator = LayAlignCollator.from_model(model, encoder, llm, stage="translation", **limits)
    return dict(collator([Example(source, target, "any") for source, target in PAIRS]))


def calls(model: LayAlignForCausalLM, batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """The calls to time, by name."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    mask, source = batch["attention_mask"], batch["encoder_attention_mask"]
    with torch.no_grad():  # only the shapes matter
        embeds = model.get_input_embeddings()(batch["input_ids"])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    labelled = (targets != IGNORE_INDEX).nonzero().flatten()
    llm: Any = model.llm

    def step() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def bare() -> None:
        inputs = embeds.clone().requires_grad_()
        body = llm.model(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
        logits = llm.lm_head(body.last_hidden_state.flatten(0, 1)[labelled])
        F.cross_entropy(logits.float(), targets[labelled]).backward()

    @torch.no_grad()
    def encode() -> None:
        model.encoder(input_ids=batch["encoder_input_ids"], attention_mask=source, output_hidden_states=True)

    return {STEP: step, BARE: bare, ENCODER: encode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="folder with encoder and llm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the training configuration")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights = arguments.weights
    parts = {name: str(weights / name) for name in ("encoder", "llm")}
    settings = {"encoder_layers": "all", "frozen_dtype": "float32", **parts}
    model = build_model(load_train_config(settings, overrides=arguments.set)).train()
    batch = batch_of(model, weights)
    timed = calls(model, batch)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(arguments.rounds + 1):  # the first warms up
        for name, call in timed.items():
            begin = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - begin)
    tokens, labels = int(batch["attention_mask"].sum()), int((batch["labels"] != IGNORE_INDEX).sum())
    print(f"{len(PAIRS)} pairs, {tokens} of {batch['attention_mask'].numel()} LLM tokens real, {labels} labels")
    print(f"last layer: {model.last_layer.last}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[BARE], strict=True))
        print(f"{name:32} {statistics.median(times):7.3f} s  {ratio:.3f} of the bare LLM")
    rounds = zip(*(seconds[name] for name in (STEP, ENCODER, BARE)), strict=True)
    own = statistics.median((step - encoder) / bare for step, encoder, bare in rounds)
    print(f"{'LayAlign without the encoder':32} {'':9}  {own:.3f} of the bare LLM")


if __name__ == "__main__":
    main()
