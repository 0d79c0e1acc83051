"""Which images the report shows: the most uncertain, the most confidently wrong, and typical ones."""

import numpy as np

from training.data.reading import Split
from training.report.results import Example, Predictions

COUNT = 3
"""Images of each group at most."""


def chosen_examples(split: Split, predictions: Predictions) -> dict[str, list[Example]]:
    """Choose images by the predictions of one method. No image comes twice, and a group without images is left out.

    Typical ones are right, of different classes, and their confidence is near the median.
    """
    confidence, is_right = predictions.confidence, predictions.classes == split.labels
    taken: set[int] = set()

    def first(order: np.ndarray) -> list[Example]:
        chosen = [int(index) for index in order if int(index) not in taken][:COUNT]
        taken.update(chosen)
        return [Example(index, split.images[index], int(split.labels[index])) for index in chosen]

    rising = np.argsort(confidence, kind="stable")
    wrong = first(rising[::-1][~is_right[rising[::-1]]])
    uncertain = first(rising)
    nearest = np.argsort(np.abs(confidence - np.median(confidence)), kind="stable")
    nearest = nearest[is_right[nearest] & ~np.isin(nearest, list(taken))]
    _, one_a_class = np.unique(split.labels[nearest], return_index=True)
    typical = first(nearest[np.sort(one_a_class)])
    groups = {"most uncertain": uncertain, "most confidently wrong": wrong, "typical": typical}
    return {title: group for title, group in groups.items() if group}
