"""Whether the words of a figure can be read."""

import itertools


def texts(figure):
    """Return all texts that are in view, with their boxes in pixels."""
    figure.canvas.draw()
    visible = list(figure.texts)
    for legend in figure.legends + [panel.get_legend() for panel in figure.axes if panel.get_legend()]:
        visible += legend.get_texts()
    for panel in figure.axes:
        visible += [panel.title, panel.xaxis.label, panel.yaxis.label, *panel.texts]
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high and tick.label1.get_visible():
                    visible.append(tick.label1)
    return [(text.get_text(), text.get_window_extent()) for text in visible if text.get_text().strip()]


def assert_readable(figure):
    """Assert that all texts lie inside the figure and do not overlap; return them."""
    width, height = figure.canvas.get_width_height()
    boxes = texts(figure)
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{text!r} leaves the figure"
    for (text, box), (other, box_other) in itertools.combinations(boxes, 2):
        # Neighbouring tick labels at a corner may touch by a pixel of their padding.
        shrunk = box.padded(-1)
        assert not (shrunk.overlaps(box_other.padded(-1))), f"{text!r} overlaps {other!r}"
    return [text for text, _ in boxes]
