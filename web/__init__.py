"""A page that runs a packed network in the browser: one HTML file with all that it needs inside."""

from __future__ import annotations

import base64
from pathlib import Path

_HERE = Path(__file__).parent
KERNEL = _HERE / "kernel.wasm"


def page(network: bytes) -> bytes:
    """The page of a network; `network` is the content of its .ebnas file."""
    html = (_HERE / "page.html").read_text()
    data = f'const KERNEL = "{_base64(KERNEL.read_bytes())}";\nconst NETWORK = "{_base64(network)}";\n'
    script = "\n".join(
        [data, *((_HERE / name).read_text() for name in ("network.js", "pictures.js", "page.js"))]
    )
    for mark, content in (("/* style */", (_HERE / "page.css").read_text()), ("/* script */", script)):
        before, after = html.split(mark)
        html = before + content + after
    return html.encode()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
