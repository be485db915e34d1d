"""Look-alikes whose difference a trial would not show: masks of the source, zeros, half precision, dropout."""

from __future__ import annotations

import functools

import pytest
import torch
from published_tiny import assert_same, data, loss_and_gradients, published, published_model, settings, wrappers
from torch import nn

import layalign


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


@pytest.mark.parametrize("form", FORMS)
def test_a_wrapper_that_may_know_a_mask_of_the_source_is_left(form: type) -> None:
    model, twin = wrapped_as(form), wrapped_as(form)
    left = dict(layalign.swap_modules(model).left)
    assert "the published one knows no mask" in left["model_llm.model.model.layers.1.self_attn"]
    for one in (model, twin):
        wrappers(one)[0].source_mask = data()["attention_mask_mt"].bool()
    assert_same(loss_and_gradients(twin, data()), loss_and_gradients(model, data()))


def test_what_cannot_be_looked_through_is_left_and_the_llms_own_mask_is_none_of_the_source() -> None:
    class Partial(published.AdaptedAttention):
        forward = functools.partialmethod(published.AdaptedAttention.forward)

    class Named(published.AdaptedAttention):
        """Names the LLM's own attention_mask."""

        def forward(self, hidden_states, attention_mask=None, **kwargs):
            kwargs.setdefault("attention_mask", attention_mask)
            return super().forward(hidden_states=hidden_states, **kwargs)

    left = dict(layalign.swap_modules(wrapped_as(Partial)).left)
    assert "it cannot be looked through" in left["model_llm.model.model.layers.1.self_attn"]
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
