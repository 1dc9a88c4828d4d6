"""How many of what, as a person says it."""


def counted(n: int, one: str, many: str = "") -> str:
    """`1 row`, `2,000 rows`; `many` where the plural is not `one` and an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
