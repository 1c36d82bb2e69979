"""Span corruption that tests can take back."""

from datamodules.corruption import SpanCorruption

END, SENTINELS = 65_001, list(range(65_535, 65_435, -1))


def make_corruption(row_length: int, density: float = 0.15, mean_span: float = 3) -> SpanCorruption:
    return SpanCorruption(
        row_length, density=density, mean_span=mean_span, sentinels=SENTINELS, end_token=END
    )


def reassemble(source: list[int], target: list[int]) -> list[int]:
    """Put the spans back into the places of their sentinels."""
    assert source[-1] == target[-1] == END
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[[*spans][-1]].append(token)
    assert [*spans] == SENTINELS[: len(spans)]
    assert all(spans.values())
    return [t for token in source[:-1] for t in spans.get(token, [token])]
