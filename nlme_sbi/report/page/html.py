"""From the content of a report to one HTML file that needs nothing else: no network, no second file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from nlme_sbi.report.page.content import Picture, Report
from nlme_sbi.report.page.drawing import inline_svg

LIGHT_WORDS = {"green": "Passed", "amber": "Caution", "red": "Do not rely on this", "grey": "Not checked"}
_DIGITS = 5  # of coordinates on the page, which no screen resolves further


def page(report: Report, drawn: Mapping[str, bytes]) -> str:
    """The whole file as text.

    Args:
        report: what is on it.
        drawn: the SVG file of every picture that is drawn and not interactive, by its name.

    Whatever comes from data (ids, names of signals, messages) is escaped; the script and its figures are data to the
    page's own script only.
    """
    environment = Environment(
        loader=PackageLoader("nlme_sbi.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def svg(picture: Picture) -> Markup:
        return Markup(inline_svg(drawn[picture.name]))

    environment.filters |= {
        "svg": svg,
        "data_uri": _data_uri,
        "exact": repr,
        "plain": _plain,
    }
    environment.globals["light_words"] = LIGHT_WORDS
    loader = environment.loader
    assets = {name: Markup(_asset(loader, environment, name)) for name in ("report.css", "report.js")}
    figures = {picture.name: picture.interactive for picture in report.pictures if picture.interactive is not None}
    return environment.get_template("report.html").render(
        report=report,
        css=assets["report.css"],
        script=assets["report.js"],
        figures=embed_json(figures),
        figures_there=bool(figures),
        plotly=Markup(get_plotlyjs() if figures else ""),
    )


def _asset(loader: Any, environment: Environment, name: str) -> str:
    return str(loader.get_source(environment, name)[0])


def embed_json(value: Mapping[str, Any]) -> Markup:
    """JSON that may stand inside ``<script>``: nothing in it can end the element; coordinates to five digits."""
    text = json.dumps(shorten_numbers(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def shorten_numbers(value: Any) -> Any:
    """The same data with numbers to five significant digits, and None for those that are not finite."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): shorten_numbers(inner) for key, inner in value.items()}
    return [shorten_numbers(inner) for inner in value]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _plain(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
