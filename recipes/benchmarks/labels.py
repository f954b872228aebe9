"""Names beside the points of a picture, each at a free place."""

import math
from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox


def label(panel: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write each name at the nearest free place around its point, with a thin line where that is not beside it."""
    pixel = panel.figure.dpi / 72
    places = {method: panel.transData.transform(point) for method, point in points.items()}
    taken = [Bbox.from_bounds(x - 3 * pixel, y - 3 * pixel, 6 * pixel, 6 * pixel) for x, y in places.values()]
    frame = panel.get_window_extent()
    for method, (x, y) in sorted(places.items(), key=lambda item: -item[1][1]):
        text = panel.annotate(method, points[method], (0, 0), textcoords="offset points", fontsize=6.5, ha="center",
                              va="center", annotation_clip=False,
                              bbox={"color": "white", "pad": 0.3, "alpha": 0.8})  # fmt: skip
        box = text.get_window_extent()
        dx, dy = next(
            (offset for offset in _offsets(box.width, box.height, pixel)
             if not any(_moved(box, *offset).overlaps(other) for other in taken)
             and _inside(_moved(box, *offset), frame)),
            (0.0, 10 * pixel),
        )  # fmt: skip
        text.set_position((dx / pixel, dy / pixel))
        taken.append(_moved(box, dx, dy))
        if max(abs(dx) - box.width / 2, abs(dy) - box.height / 2) > 6 * pixel:
            end = panel.transData.inverted().transform((x + dx, y + dy))
            panel.plot(*zip(points[method], end, strict=True), color="#909090", linewidth=0.4, zorder=0)


def _offsets(width: float, height: float, pixel: float) -> Iterator[tuple[float, float]]:
    """Offsets of a label's middle from its point, in pixels: sideways first, then in growing rings."""
    for ring in range(12):
        gap = (5 + 7 * ring) * pixel
        for angle in range(0, 360, 30):
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            yield across * (gap + width / 2), up * (gap + height / 2)


def _moved(box: Bbox, dx: float, dy: float) -> Bbox:
    return box.translated(dx, dy).padded(1)


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
