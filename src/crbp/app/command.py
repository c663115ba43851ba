"""`crbp app`: the options, the models, and the server on this machine."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from crbp._checkpoint import add_trust, named_file, trusted
from crbp._command import Parser
from crbp.app.models import Models
from crbp.errors import CrbpError
from crbp.hub import shipped

if TYPE_CHECKING:
    from crbp.app.panoptic import Panoptic

LARGEST = "20mb"  # of an upload
PANOPTIC = "shapes_rfpn_crbp20"  # what segments where nothing else is given


def main(arguments: list[str]) -> None:
    """Serve the page until the user breaks it off.

    Raises:
        CrbpError: if the options are wrong, a checkpoint cannot be had, or the port is taken.
    """
    options = _options(arguments)
    models = Models.with_files(map(named_file, options.checkpoint), trust=trusted(options))
    panoptic = _panoptic(options)
    _see_port(options.host, options.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    from crbp.app.page import STATIC, THEME, page

    blocks = page(models, panoptic)
    try:
        _, address, _ = blocks.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=options.open,
            max_file_size=LARGEST,
            footer_links=[],
            theme=THEME,
            css_paths=STATIC / "app.css",
            head=f"<script>{(STATIC / 'app.js').read_text(encoding='utf-8')}</script>",
        )
    except OSError as error:
        raise CrbpError(f"the page cannot be served on {options.host}:{options.port} ({error})") from error
    print(f"Open {address} in a browser; Ctrl+C ends it.", flush=True)
    try:
        blocks.block_thread()
    finally:
        blocks.close(verbose=False)


def parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    made = Parser(
        prog="crbp app",
        description="Watch trained models trace contours, step by step and side by side, in the browser. Offline.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="contour-tracing models of your own, besides those that come with crbp; NAME=… says what to call one",
    )
    made.add_argument("--panoptic", type=Path, metavar="FILE", help="an R-FPN of your own for the panoptic tab")
    made.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in (default: 127.0.0.1)")
    made.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    made.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    add_trust(made)
    return made


def _options(arguments: list[str]) -> argparse.Namespace:
    options = parser().parse_args(arguments)
    if not 1 <= options.port <= 65535:
        raise CrbpError(f"--port must lie in 1 … 65535, not {options.port}")
    return options


def _panoptic(options: argparse.Namespace) -> Panoptic | None:
    try:
        from crbp.app.panoptic import load_panoptic
    except ImportError as error:
        if options.panoptic is None:
            return None  # the tab says what to install
        raise CrbpError(f"--panoptic: {error}; run: pip install 'crbp[panoptic]'") from error
    return load_panoptic(options.panoptic or shipped()[PANOPTIC], trust=trusted(options))


def _see_port(host: str, port: int) -> None:
    """Say in one line that an address cannot be served at, before anything is built."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise CrbpError(f"{host}:{port} cannot be served at ({error.strerror}); choose another --port") from error
