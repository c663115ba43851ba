"""What the folder of a run has logged, as curves."""

from __future__ import annotations

from pathlib import Path

Curve = list[tuple[int, float]]


def scalars(run: Path, *, tags: tuple[str, ...]) -> dict[str, Curve]:
    """The curves whose names begin with one of ``tags``, each as (optimiser step, value); none without a log."""
    if not any(run.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    found = (tag for tag in events.Tags()["scalars"] if tag.startswith(tags))
    return {tag: [(event.step, float(event.value)) for event in events.Scalars(tag)] for tag in found}
