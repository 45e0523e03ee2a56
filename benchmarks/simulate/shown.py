"""What a person sees of a simulated run."""

from typing import TYPE_CHECKING

from rich.table import Table

from benchmarks.simulate.simulation import SimulationResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table_of(result: SimulationResult) -> Table:
    """A row for each round: where it stands, who trained, losses and accuracy, and the bytes of its cohort."""
    table = Table("stage", "round", "devices", "train loss", "test loss", "test accuracy", "MB down", "MB up")
    for row in result.rounds:
        table.add_row(
            str(row.stage),
            str(row.round),
            str(len(row.cohort)),
            f"{row.train_loss:.3f}",
            "" if row.test_loss is None else f"{row.test_loss:.3f}",
            "" if row.test_accuracy is None else f"{row.test_accuracy:.3f}",
            f"{sum(row.bytes_down.values()) / 1e6:.2f}",
            f"{sum(row.bytes_up.values()) / 1e6:.2f}",
        )
    return table


def figure_of(result: SimulationResult) -> "Figure":
    """Train loss on the left axis, test accuracy on the right one, a grey line where a stage begins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    numbers = range(1, len(result.rounds) + 1)
    left.plot(numbers, [row.train_loss for row in result.rounds], color="tab:blue", marker="o")
    tested = [(number, row.test_accuracy) for number, row in zip(numbers, result.rounds, strict=True) if row.test_examples]
    right.plot([number for number, _ in tested], [accuracy for _, accuracy in tested], color="tab:orange", marker="s")
    for number, (row, before) in enumerate(zip(result.rounds[1:], result.rounds, strict=False), start=2):
        if row.stage != before.stage:
            left.axvline(number - 0.5, color="lightgrey")
    left.set(xlabel="round", title=result.manifest.plan.name)
    left.set_ylabel("train loss", color="tab:blue")
    right.set(ylim=(0, 1))
    right.set_ylabel("test accuracy", color="tab:orange")
    return figure
