"""The headers of a response with predictions: who gave them and how long each stage took."""

import time

import flask

from web.pipeline import STAGES, Classified


def describe(response: flask.Response, classified: list[Classified]) -> None:
    """Add Server-Timing, X-Model and X-Model-Version to a response, and its figures to the log.

    The times are milliseconds for each stage, the longest of all images.
    """
    ms = {stage: 1000 * max((each.seconds[stage] for each in classified), default=0) for stage in STAGES}
    batch = max((each.batch for each in classified), default=0)
    total = 1000 * (time.monotonic() - flask.g.begun)
    flask.g.log_fields = {f"{stage}_ms": round(ms[stage], 1) for stage in STAGES}
    flask.g.log_fields |= {"batch": batch, "images": len(classified)}
    for header, values in (
        ("X-Model", {each.model for each in classified}),
        ("X-Model-Version", {each.version for each in classified}),
    ):
        if named := ", ".join(sorted(filter(None, values))):
            response.headers[header] = named
    response.headers["Server-Timing"] = (
        f"prepare;dur={ms['prepare']:.1f}, queue;dur={ms['queue']:.1f}, "
        f'compute;dur={ms["compute"]:.1f};desc="batch of {batch}", total;dur={total:.1f}'
    )
