"""Optional libraries: found before they are needed, with one error that says how to install them."""

from __future__ import annotations

from importlib.util import find_spec


def require(*modules: str) -> None:
    """Raise `ImportError` naming the extra to install when one of `modules` is not installed.

    The modules are looked up, not imported, so the check itself costs nothing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(f"crbp.data needs {', '.join(missing)}, not installed here; run: pip install 'crbp[data]'")
