"""Similarity of two sets of sentence vectors; row i of one set is the translation of row i of the other."""

from __future__ import annotations

import torch
from torch import Tensor

from layalign.ops.checks import describe, is_floating
from layalign.utils.errors import ArgumentError

_TIE = 1e-12  # cosines of equal vectors differ by rounding


def _checked(first: Tensor, second: Tensor, same_size: bool) -> tuple[Tensor, Tensor]:
    """Check both and move them to the CPU, in float64."""
    for name, states in (("first", first), ("second", second)):
        if not is_floating(states) or states.dim() != 2 or len(states) < 2 or states.is_meta:
            raise ArgumentError(f"{name}: expected floating-point states (N, D) with N >= 2, got {describe(states)}")
        if not bool(torch.isfinite(states).all()):
            raise ArgumentError(f"{name}: expected finite states, got infinity or NaN")
    if len(first) != len(second) or (same_size and first.shape != second.shape):
        wanted = "the shape" if same_size else "as many rows"
        raise ArgumentError(f"second: expected {wanted} of first, {tuple(first.shape)}, got {tuple(second.shape)}")
    return first.to("cpu", torch.float64), second.to("cpu", torch.float64)


def _centred(states: Tensor) -> Tensor:
    return states - states.mean(dim=0)


def _unit(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states, dim=1, eps=torch.finfo(states.dtype).tiny)


def centred_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine of the pairs (first[i], second[i]), each set with its own mean subtracted.

    Without the subtraction, the direction that all states of a language model share makes every cosine nearly 1, and
    the offset of a language hides what its sentences have in common with their translations.

    Args:
        first, second: (N, D), any floating-point dtype; computed in float64.

    Returns:
        -1..1; a vector that equals the mean of its set counts as 0.

    Raises:
        ArgumentError: shapes that differ, fewer than two rows, no floating-point numbers, or infinite ones.

    Source: Libovický, Rosa and Fraser, Findings of EMNLP 2020, for the mean as the offset of a language.
    """
    first, second = _checked(first, second, same_size=True)
    return float((_unit(_centred(first)) * _unit(_centred(second))).sum(dim=1).mean())


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment, ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) with centred X and Y.

    It is invariant to rotation and uniform scaling of either set. With few rows for the size of the vectors it is
    biased towards 1; compare it with the value of shuffled rows.

    Args:
        first, second: (N, D) and (N, D'), any floating-point dtype; computed in float64.

    Returns:
        0..1; 0 if all rows of a set are equal.

    Raises:
        ArgumentError: different numbers of rows, fewer than two, no floating-point numbers, or infinite ones.

    Source: Kornblith, Norouzi, Lee and Hinton, ICML 2019.
    """
    first, second = _checked(first, second, same_size=False)
    x, y = _centred(first), _centred(second)
    for centred, states in ((x, first), (y, second)):
        if float(centred.norm()) <= 1e-12 * float(states.norm()):
            return 0.0
    x, y = x / x.norm(), y / y.norm()
    if len(x) <= max(x.shape[1], y.shape[1]):  # the same numbers by N x N matrices
        a, b = x @ x.T, y @ y.T
        return float((a * b).sum() / (a.norm() * b.norm()))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def retrieval_accuracy(queries: Tensor, candidates: Tensor) -> float:
    """Share of the rows of ``queries`` whose nearest candidate by cosine is the one in the same row.

    Args:
        queries, candidates: (N, D), any floating-point dtype; computed in float64.

    Returns:
        0..1; chance is 1 / N. A tie of k candidates that includes the right one counts 1 / k.

    Raises:
        ArgumentError: shapes that differ, fewer than two rows, no floating-point numbers, or infinite ones.

    Source: similarity search on Tatoeba, LASER: Artetxe and Schwenk, TACL 2019.
    """
    queries, candidates = _checked(queries, candidates, same_size=True)
    cosines = _unit(queries) @ _unit(candidates).T
    nearest = cosines >= cosines.amax(dim=1, keepdim=True) - _TIE
    return float((nearest.diagonal() / nearest.sum(dim=1)).mean())
