"""Tables in a page that are set from what was measured, each between ``<!-- table NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """The page with its tables set anew.

    Raises:
        KeyError: if it has one that nothing is known of, or no place for one of them.
    """
    if missing := tables.keys() - {name for _, name in TABLE.findall(page)}:
        raise KeyError(f"the page has no place for {', '.join(sorted(missing))}: <!-- table NAME -->, <!-- end -->")
    return TABLE.sub(lambda at: at[1] + tables[at[2]], page)


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
