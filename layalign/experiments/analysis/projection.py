"""Sentence vectors in two dimensions: PCA and t-SNE."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from layalign.experiments.analysis.result import Projection

MOST_PERPLEXITY = 30.0  # scikit-learn's default
_SIZE_BEFORE = 50  # PCA before t-SNE, for speed and against noise, as van der Maaten and Hinton did


def project(states: Mapping[str, Tensor], seed: int) -> Projection:
    """PCA and t-SNE of the sentence vectors of all languages together.

    Args:
        states: (N, D) floating point per language, at least three rows in total.
        seed: seed of the t-SNE.

    Source: t-SNE: van der Maaten and Hinton, JMLR 2008; scikit-learn's implementation.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points = np.concatenate([rows.double().numpy() for rows in states.values()])
    points = points - points.mean(axis=0)
    # The scale is arbitrary, and the steps below lose the digits of tiny numbers.
    points = points / max(float(np.abs(points).max()), 1e-300)
    count = min(_SIZE_BEFORE, *points.shape)
    pca = PCA(n_components=count, svd_solver="full").fit(points)
    reduced = pca.transform(points)
    perplexity = min(MOST_PERPLEXITY, (len(points) - 1) / 3)
    tsne = TSNE(n_components=2, perplexity=perplexity, init="random" if count < 2 else "pca", random_state=seed)
    placed = tsne.fit_transform(reduced)
    plane = np.pad(reduced[:, :2], ((0, 0), (0, max(0, 2 - count))))
    explained = [float(share) for share in np.nan_to_num(pca.explained_variance_ratio_[:2])]
    return Projection(_split(plane, states), _split(placed, states), explained, perplexity)


def _split(points: np.ndarray, states: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    """Split the points by language again."""
    found, start = {}, 0
    for name, rows in states.items():
        found[name] = [[float(x), float(y)] for x, y in points[start : start + len(rows)]]
        start += len(rows)
    return found
