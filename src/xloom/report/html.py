"""Numbers into one HTML file that needs nothing from elsewhere.

The charts' library and the numbers lie in the page packed (gzip, base64), and the browser unpacks them. A policy in the
page forbids every request, and every script but the page's own and the library, which it knows by their hashes: text
from prompts and tokens is only ever set as text, and could not run if it were not.
"""

import base64
import gzip
import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from xloom import __version__
from xloom.errors import ConfigError, MissingExtraError, TraceError
from xloom.report.findings import Findings
from xloom.report.maps import PRECISION
from xloom.report.numbers import COMPARED, page_data
from xloom.seeing.intervals import LEVEL

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("unpack", "looks", "charts", "overview", "tokens", "texts", "compare", "worth", "main")  # in this order
_LIBRARIES = ("torch", "transformers", "peft", "numpy", "plotly")


def check_plotly() -> None:
    """Raises MissingExtraError where the charts' library is not installed."""
    _plotly()


def write_report(findings: Findings, path: Path, *, command: str = "", notes: Sequence[str] = ()) -> None:
    """Writes the page; the same findings give the same bytes.

    Args:
        command: what makes the page, as it was typed.
        notes: more lines for the page's notes: what was left out, and why.

    Raises:
        TraceError: no trace. TraceMismatchError: traces of other sites or experts.
        MissingExtraError: plotly is not installed. ConfigError: the file cannot be written.
    """
    if not findings.traces:
        raise TraceError("expected traces to report on, found none")
    text = _page(findings, command, notes)
    staged = path.with_name(f".{path.name}")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def _page(findings: Findings, command: str, notes: Sequence[str]) -> str:
    data, maps = page_data(findings)
    script, plotly = _script(), _plotly()
    scripts = f"{_hash(script)} {_hash(plotly)}"
    return _pages().get_template("page.html.j2").render(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {scripts}",
        style=Markup((PAGE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        packed={
            "plotly": _packed(plotly.encode()),
            "data": _packed(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")),
            "maps": _packed(maps),
        },
        parts=[name for name in ("groups", "contributions", "worth") if data[name] is not None],
        facts=list(_facts(findings)),
        command=command,
        notes=notes,
        given=sum(findings.given),
        measured=len(findings.given),
        precision=f"{100 * PRECISION:.1g}",
        level=f"{LEVEL:.0%}",
        compared=COMPARED,
        against=bool(findings.against),
    )  # fmt: skip


@cache
def _pages() -> Environment:
    loader = FileSystemLoader(PAGE)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _facts(findings: Findings) -> Iterator[tuple[str, str]]:
    """What the page says about where it comes from."""
    about = findings.traces[0].about
    base = str(about.config.get("base_model_name_or_path") or "")
    words = list(findings.models) or [about.model] * (about.model != base)  # a trace may name no more than the base
    yield from zip(("model", "compared with"), map(plain_name, words))
    if base:
        yield "base model", plain_name(base)
    yield "router", about.router
    yield "experts", ", ".join(about.experts)
    layers = {site.split(".")[-1] for site in about.sites}
    yield "sites", f"{len(about.sites):,} modules, of {len(layers)} kinds"
    yield "versions", ", ".join(_versions())


def plain_name(word: str) -> str:
    """A model's name: of a whole path its end, which tells a reader as much and nothing of the machine."""
    return PurePath(word).name if PurePath(word).is_absolute() else word


def _versions() -> Iterator[str]:
    yield f"xloom {__version__}"
    for library in _LIBRARIES:
        try:
            yield f"{library} {version(library)}"
        except PackageNotFoundError:
            continue


@cache
def _plotly() -> str:
    """The library's source."""
    try:
        found: Any = importlib.import_module("plotly.offline")
    except ModuleNotFoundError:
        raise MissingExtraError('the report: its charts need the package plotly: pip install "xloom[report]"') from None
    return str(found.get_plotlyjs())


@cache
def _script() -> str:
    parts = [(PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
