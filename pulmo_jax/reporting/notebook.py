"""Results in Jupyter: a picture with a caption."""

import base64
import html
import io

from matplotlib.figure import Figure

from pulmo_jax.reporting.figures import style

NOTEBOOK_DPI = 110


def figure_html(figure: Figure, caption: str) -> str:
    """An HTML figure with its caption."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=NOTEBOOK_DPI)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'
