"""Display of results in Jupyter: a figure with a caption."""

import base64
import html
import io

from matplotlib.figure import Figure

from pulmo_jax.host.console import printable
from pulmo_jax.reporting.figures import drawing

NOTEBOOK_DPI = 110


def figure_html(figure: Figure, caption: str) -> str:
    """Render a figure with its caption as HTML.

    Args:
        figure: Figure.
        caption: Caption as plain text; it is HTML-escaped.

    Returns:
        HTML `<figure>` element with an embedded PNG.
    """
    buffer = io.BytesIO()
    with drawing():
        figure.savefig(buffer, format="png", dpi=NOTEBOOK_DPI)
    data = base64.b64encode(buffer.getvalue()).decode()
    shown = html.escape(printable(caption))
    return f'<figure><img src="data:image/png;base64,{data}"><figcaption>{shown}</figcaption></figure>'
