"""Pictures as files: the same numbers give the same bytes."""

import io
from typing import TYPE_CHECKING, Any

from etils import epath

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's "bright" scheme, which colour-blind readers can tell apart."""


_MARKERS = ("o", "s", "^", "D", "v")


def line_style(index: int) -> dict[str, Any]:
    """Colour and marker of the line of a number: 35 that can be told apart."""
    marker = _MARKERS[index // len(COLOURS) % len(_MARKERS)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": marker}


def write_figure(figure: "Figure", path: epath.PathLike) -> None:
    """Writes `<path>.png` and `<path>.svg`; `path` is without the ending."""
    from matplotlib import rc_context

    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed salt and no date.
    with rc_context({"svg.hashsalt": "flix_jax"}):
        for ending, metadata in (("png", {}), ("svg", {"Date": None})):
            picture = io.BytesIO()
            figure.savefig(picture, format=ending, dpi=160, bbox_inches="tight", metadata=metadata)
            (path.parent / f"{path.name}.{ending}").write_bytes(picture.getvalue())
