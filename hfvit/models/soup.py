"""Model soups, means of the weights of several models (arXiv:2203.05482)."""

from collections.abc import Callable, Sequence

import torch

from hfvit.artifacts.run_sections import Soup, SoupMember
from hfvit.recipe.arguments import GREEDY

Weights = dict[str, torch.Tensor]


def cook_soup(
    kind: str,
    names: Sequence[str],
    read: Callable[[str], Weights],
    score: Callable[[Weights, str | None], float],
    *,
    metric: str,
    greater_is_better: bool = True,
) -> tuple[Soup, Weights]:
    """Average the weights of several models.

    Args:
        kind: "uniform" for the mean of all models; "greedy" to add one after the other, the best first, as long as the
            score does not become worse.
        names: names of the models.
        read: reads the weights of a model, on the CPU. Not all are in memory at once.
        score: evaluates weights on the validation split; it gets the name of the model, too, or None for a mean.
        metric: name of the score.
        greater_is_better: whether a larger score is better.

    Returns:
        Members and scores, and the averaged weights.
    """
    sign = 1 if greater_is_better else -1
    scores = {name: score(read(name), name) for name in names}
    best, *others = sorted(names, key=lambda name: sign * scores[name], reverse=True)
    used = [best]
    soup = read(best)
    reached = scores[best]
    for name in others:
        candidate = mean_with(soup, len(used), read(name))
        if kind == GREEDY:
            found = score(candidate, None)
            if sign * found < sign * reached:
                continue
            reached = found
        used.append(name)
        soup = candidate
    if kind != GREEDY:
        reached = score(soup, None)
    members = [SoupMember(name=name, score=scores[name], is_used=name in used) for name in names]
    return Soup(kind=kind, metric=metric, members=members, score=reached), soup


def mean_with(mean: Weights, count: int, weights: Weights) -> Weights:
    """Return the mean of `count + 1` models.

    Args:
        mean: mean of `count` models.
        count: their number.
        weights: weights of the model to add. Integer buffers are those of `mean`.
    """
    return {
        name: value.lerp(weights[name], 1 / (count + 1)) if value.is_floating_point() else value
        for name, value in mean.items()
    }
