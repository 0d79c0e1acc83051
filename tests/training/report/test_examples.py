"""The images that a report shows are those that its titles promise."""

import numpy as np

from bnnlaplace.calibration import rejection_curve
from training.data.reading import Split
from training.report.examples import chosen_examples
from training.report.results import Predictions


def test_examples_are_what_their_titles_say():
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], np.int32)
    classes = np.array([0, 1, 2, 0, 1, 2, 1, 2, 0, 1])  # the last four are wrong
    confidence = np.array([0.4, 0.95, 0.8, 0.81, 0.82, 0.83, 0.99, 0.35, 0.9, 0.6])
    probs = np.full((10, 3), 0.0)
    probs[np.arange(10), classes] = 1.0
    predictions = Predictions(classes, confidence, confidence, rejection_curve(probs, labels))
    split = Split(np.arange(10, dtype=np.uint8).reshape(-1, 1, 1, 1), labels)
    groups = chosen_examples(split, predictions)
    indices = {title: [example.index for example in group] for title, group in groups.items()}
    assert indices["most confidently wrong"] == [6, 8, 9]
    assert indices["most uncertain"] == [7, 0, 2]  # 9 is shown among the wrong ones
    assert sorted(indices["typical"]) == [3, 4, 5]
    for group in groups.values():
        assert all(
            example.image.item() == example.index and example.label == labels[example.index] for example in group
        )
    right = predictions._replace(classes=labels)
    assert "most confidently wrong" not in chosen_examples(split, right)
