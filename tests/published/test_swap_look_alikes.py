"""Look-alikes whose difference a trial would not show: masks of the source, zeros, half precision, dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published_tiny import (  # noqa: F401
    assert_same,
    calls_of_operations,
    data,
    loss_and_gradients,
    published,
    published_model,
    settings,
    wrappers,
)
from torch import nn

import layalign
from layalign import ArgumentError


class Masking(published.AdaptedAttention):
    """The published term, where a mask of the source may be given."""

    source_mask: torch.Tensor | None = None

    def _attend(self, hidden, where):
        attention = self.model
        output, *_ = attention(**hidden)
        key, value = (
            self._heads(linear(state))
            for linear, state in zip((attention.k_proj, attention.v_proj), self.adapter_states, strict=True)
        )
        query = self._heads(attention.q_proj(hidden["hidden_states"]))
        query = published.rotate(query, *hidden["position_embeddings"])
        scores = query @ key.transpose(2, 3) / attention.head_dim**0.5
        if where is not None:
            scores = torch.where(where[:, None, None], scores, -torch.inf)
        extra = self.adaption_gate * scores.softmax(-1) @ value
        return output + attention.o_proj(extra.transpose(1, 2).reshape(*output.shape[:2], -1)), None


class Direct(Masking):
    def forward(self, **kwargs):
        return self._attend(kwargs, self.source_mask)


class ByName(Masking):
    def forward(self, **kwargs):
        return self._attend(kwargs, getattr(self, "source_mask", None))


class ByMethod(Masking):
    def _where(self):
        return self.source_mask

    def forward(self, **kwargs):
        return self._attend(kwargs, self._where())


class ByProperty(Masking):
    @property
    def where(self):
        return self.source_mask

    def forward(self, **kwargs):
        return self._attend(kwargs, self.where)


def tokens(wrapper):
    return wrapper.source_mask


class ByFunction(Masking):
    def forward(self, **kwargs):
        return self._attend(kwargs, tokens(self))


def passed_on(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def hidden_away(function):
    return lambda *args, **kwargs: function(*args, **kwargs)


class Wrapped(Masking):
    @passed_on
    def forward(self, **kwargs):
        return self._attend(kwargs, self.source_mask)


class WrappedWithoutName(Masking):
    forward = hidden_away(Direct.forward)


class Inner(Masking):
    def forward(self, **kwargs):
        return (lambda: self._attend(kwargs, self.source_mask))()


class ByArgument(Masking):
    def forward(self, source_mask=None, **kwargs):
        return self._attend(kwargs, source_mask)


class BySuper(Direct):
    def forward(self, **kwargs):
        return super().forward(**kwargs)


FORMS = [Direct, ByName, ByMethod, ByProperty, ByFunction, Wrapped, WrappedWithoutName, Inner, ByArgument, BySuper]


def wrapped_as(kind: type) -> nn.Module:
    model = published_model(layers=(1,))
    old = wrappers(model)[0]
    new = kind(old.model)
    new.adaption_gate = old.adaption_gate
    model.model_llm.model.model.layers[1].self_attn = new
    return model


NAME = "model_llm.model.model.layers.1.self_attn"


@pytest.mark.parametrize("form", FORMS)
def test_a_wrapper_that_may_know_a_mask_of_the_source_is_left(form: type) -> None:
    model, twin = wrapped_as(form), wrapped_as(form)
    reason = dict(layalign.swap_modules(model).left)[NAME]
    assert reason.startswith("it has source_mask") and "the published one, which knows no mask of the source" in reason
    assert f"allow=['{form.__name__}']" in reason
    for one in (model, twin):
        wrappers(one)[0].source_mask = data()["attention_mask_mt"].bool()
    assert_same(loss_and_gradients(twin, data()), loss_and_gradients(model, data()))


class Undeclared(published.AdaptedAttention):
    """Where nothing tells of a mask until there is one."""

    _attend = Masking._attend

    def forward(self, **kwargs):
        where = kwargs.pop("source_mask", None)
        where = getattr(self, "source_mask", where)
        where = getattr(self.model, "source_mask", where)
        if len(self.adapter_states) == 3:
            *self.adapter_states, where = self.adapter_states
        return self._attend(kwargs, where)


@pytest.mark.parametrize("placeholder", [None, False, 0, (), torch.ones(1, 3)], ids=repr)
def test_an_instance_that_may_hold_a_mask_is_left_tried_or_not(placeholder: Any) -> None:
    for device in ("cpu", "meta"):
        model = wrapped_as(Undeclared)
        wrappers(model)[0].valid = placeholder
        wrappers(model)[0].model.to(device)
        assert dict(layalign.swap_modules(model).left)[NAME].startswith("it has valid beyond the published one")


def as_attribute(wrapper: nn.Module, mask: torch.Tensor) -> None:
    wrapper.source_mask = mask


def as_buffer(wrapper: nn.Module, mask: torch.Tensor) -> None:
    wrapper.register_buffer("source_mask", mask)


def on_the_attention(wrapper: nn.Module, mask: torch.Tensor) -> None:
    wrapper.model.source_mask = mask


def as_third_state(wrapper: nn.Module, mask: torch.Tensor) -> None:
    wrapper.adapter_states = (*wrapper.adapter_states, mask)


def as_keyword(wrapper: nn.Module, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"source_mask": mask}


PLACES = [as_attribute, as_buffer, on_the_attention, as_third_state, as_keyword]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("put", "compiled"), [*((put, False) for put in PLACES), (as_attribute, True), (as_keyword, True)]
)
def test_a_mask_that_comes_after_the_swap_is_used(put: Callable[..., Any], compiled: bool, calls) -> None:
    torch.compiler.reset()
    models = wrapped_as(Undeclared), wrapped_as(Undeclared)
    assert len(layalign.swap_modules(models[0]).swapped) == 2
    found: list[list[torch.Tensor]] = [[], []]
    mask = data()["attention_mask_mt"].bool()
    embeds = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    for model, logits in zip(models, found, strict=True):
        run = torch.compile(model.model_llm, backend="eager") if compiled else model.model_llm
        with torch.no_grad():
            model(**data())
            logits.append(run(inputs_embeds=embeds, use_cache=False).logits)
            calls.update(gated_cross_attention=0)
            given = put(wrappers(model)[0], mask) or {}
            logits.append(run(inputs_embeds=embeds, use_cache=False, **given).logits)
        assert calls["gated_cross_attention"] == 0
    for swapped, original in zip(*found, strict=True):
        torch.testing.assert_close(swapped, original, rtol=1e-5, atol=1e-5)
    assert (found[1][0] - found[1][1]).abs().max() > 1e-3


def test_allow_is_the_users_word_and_the_trial_is_made_all_the_same(calls) -> None:
    class Other(Masking):
        def forward(self, **kwargs):
            output, _ = self._attend(kwargs, self.source_mask)
            return 1.1 * output, None

    for allow in (["Direct"], (Direct, "Inner")):
        model = wrapped_as(Direct)
        expected = loss_and_gradients(model, data())
        assert len(layalign.swap_modules(model, allow=allow).swapped) == 2
        calls.update(gated_cross_attention=0)
        assert_same(expected, loss_and_gradients(model, data()))
        assert calls["gated_cross_attention"] == 1
    left = dict(layalign.swap_modules(wrapped_as(BySuper), allow=["Direct"]).left)
    assert "it has source_mask" in left[NAME]  # a subclass is another class
    left = dict(layalign.swap_modules(wrapped_as(Other), allow=[Other]).left)
    assert "differs from the published formula" in left[NAME]
    for wrong in (None, "Direct", [1], {"Direct"}):
        with pytest.raises(ArgumentError, match="^allow: expected a list of classes or their names, got"):
            layalign.swap_modules(model, allow=wrong)


def test_the_word_mask_alone_is_harmless(calls) -> None:
    class Wordy(Undeclared):
        """A mask of the source it has not."""

        unmasked = "all"

        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.num_masks = 4

        @staticmethod
        def _mask(states):
            return states

        def forward(self, **kwargs):
            masks = {"mask": self._mask(kwargs)}
            return self._attend(masks["mask"], None)

    model = wrapped_as(Wordy)
    expected = loss_and_gradients(model, data())
    assert len(layalign.swap_modules(model).swapped) == 2
    calls.update(gated_cross_attention=0)
    assert_same(expected, loss_and_gradients(model, data()))
    assert calls["gated_cross_attention"] == 1


class FromZeros(Undeclared):
    def forward(self, **kwargs):
        return self._attend(kwargs, self.adapter_states[0].ne(0).any(-1))


class FromTokens(Undeclared):
    def forward(self, **kwargs):
        before, _ = self.model(**kwargs)
        after, _ = self._attend(kwargs, None)
        padding = kwargs.get("attention_mask")
        return (after if padding is None else torch.where(padding[:, 0, -1, :, None] < 0, before, after)), None


@pytest.mark.parametrize("form", [FromZeros, FromTokens])
def test_padding_that_forward_finds_by_itself_is_told_by_the_trial(form: type) -> None:
    assert "differs from the published formula" in dict(layalign.swap_modules(wrapped_as(form)).left)[NAME]


def test_what_would_not_be_noticed_is_left_and_the_llms_own_mask_is_none_of_the_source() -> None:
    class Partial(published.AdaptedAttention):
        forward = functools.partialmethod(published.AdaptedAttention.forward)

    class Named(published.AdaptedAttention):
        """Names the LLM's own attention_mask."""

        def forward(self, hidden_states, attention_mask=None, **kwargs):
            kwargs.setdefault("attention_mask", attention_mask)
            return super().forward(hidden_states=hidden_states, **kwargs)

    left = dict(layalign.swap_modules(wrapped_as(Partial)).left)
    assert "another object at each access" in left[NAME]
    assert len(layalign.swap_modules(wrapped_as(Named)).swapped) == 2


# Projectors


class LeakyProjector(published.WeightedLinearProjector):
    def forward(self, hidden_states):
        return self.fc2(nn.functional.leaky_relu(self.fc1(hidden_states.permute(0, 2, 3, 1)).transpose(2, 3)))


class DroppingProjector(published.WeightedLinearProjector):
    def forward(self, hidden_states):
        slots = torch.relu(self.fc1(hidden_states.permute(0, 2, 3, 1)).transpose(2, 3))
        return self.fc2(nn.functional.dropout(slots, 0.5, self.training))


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("change", ["zeros", "half", "eval"])
def test_projectors_that_look_published_only_now_are_left(change: str, within: bool) -> None:
    config = settings().encoder_aligner_config
    for kind in (published.WeightedLinearProjector, DroppingProjector if change == "eval" else LeakyProjector):
        aligner = published.EncoderAligner(config)
        aligner.projector = kind(config)
        if change == "zeros":
            nn.init.zeros_(aligner.projector.fc2.weight)
        elif change == "half":
            aligner.to(torch.bfloat16)
        aligner.eval()
        weights = {name: id(p) for name, p in aligner.named_parameters()}
        report = layalign.swap_modules(aligner if within else aligner.projector)
        assert bool(report.swapped) == (kind is published.WeightedLinearProjector)
        assert bool(report.left) == (kind is not published.WeightedLinearProjector)
        assert {name: id(p) for name, p in aligner.named_parameters()} == weights
        assert not any(module.training for module in aligner.modules())
