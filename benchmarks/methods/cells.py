"""What is run: cells of (data set, method, setting, seed), in the order in which time is best spent.

    main            labelled data: every method in the data set's usual setting, with the bounds
    options         AV-Digits MEDIUM and seglearn: a layer-wise plan with one option each, and the recipe of several
    skew            AV-Digits MEDIUM, 4 clients, Dirichlet 0.1 and 5 beside the usual 0.5
    participation   AV-Digits MEDIUM, 16 clients of which 25, 50 and 100 % train in a round
    pairs           Emoji-4Style, image and text, contrastive; a drawing style is a client
    self-supervised Fashion-MNIST without its labels, and a linear probe

The first seed of all cells comes first: whenever the work is stopped, what is there covers as much as it can.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.methods.plans import BASELINE, METHODS, OPTIONS, SELF_SUPERVISED

CENTRALISED, LINEAR, UNTRAINED = "centralised", "linear", "untrained"
"""Bounds: the baseline's plan on one client that has all data; a linear model on raw values; and, for self-supervised methods,
a linear probe on the features of a model that was never trained."""
ROUNDS = 18
SKEWS, SHARES = ("beta=0.1", "beta=5"), (0.25, 0.5, 1.0)
SUPERVISED = ("av_digits_medium", "av_digits_hard", "seglearn")


@dataclass(frozen=True)
class Setting:
    """How data are dealt (`data_sets.client_rows`), to how many clients, and which share of them trains in a round.

    `clients` is 0 where the split decides it.
    """

    split: str
    clients: int = 0
    participation: float = 1.0

    def __str__(self) -> str:
        clients = f", {self.clients} clients" if self.clients else ""
        return f"{self.split}{clients}" + (f", {self.participation:.0%} a round" if self.participation < 1 else "")


@dataclass(frozen=True)
class Cell:
    data: str
    method: str
    setting: Setting
    seed: int
    rounds: int = ROUNDS

    @property
    def key(self) -> str:
        """What stands for the cell on the command line and in the results."""
        return f"{self.data}/{self.method}/{self.setting}/{self.rounds} rounds/seed {self.seed}"

    def as_row(self) -> dict[str, Any]:
        return {"key": self.key, "data": self.data, "method": self.method, **asdict(self.setting)} | {
            "setting": str(self.setting),
            "rounds": self.rounds,
            "seed": self.seed,
        }


USUAL = Setting("beta=0.5", 4)
NATURAL = Setting("natural")
POOLED = Setting("pooled")


def usual_setting(data: str) -> Setting:
    """Natural clients where the data have them."""
    return NATURAL if data in ("seglearn", "emoji") else USUAL


def all_cells(seeds: Sequence[int]) -> list[Cell]:
    """All cells, the first seed of each first."""
    return [cell for seed in seeds for cell in _of_seed(seed)]


def _of_seed(seed: int) -> Iterator[Cell]:
    for data in SUPERVISED:
        for method in METHODS:
            yield Cell(data, method, usual_setting(data), seed)
        yield Cell(data, CENTRALISED, POOLED, seed)
        yield Cell(data, LINEAR, POOLED, seed)
    for method in OPTIONS:
        for data in ("av_digits_medium", "seglearn"):
            yield Cell(data, method, usual_setting(data), seed)
    for split in SKEWS:
        for method in METHODS:
            yield Cell("av_digits_medium", method, Setting(split, 4), seed)
    for share in SHARES:
        for method in (BASELINE, "layerwise", "layerwise_2"):
            yield Cell("av_digits_medium", method, Setting("beta=0.5", 16, share), seed)
    for method in METHODS:
        yield Cell("emoji", method, usual_setting("emoji"), seed)
    for method in SELF_SUPERVISED:
        yield Cell("fashion", method, USUAL, seed)
    for bound in (LINEAR, UNTRAINED):
        yield Cell("fashion", bound, POOLED, seed)


def chosen(cells: Sequence[Cell], only: str) -> list[Cell]:
    """The cells whose key has every word of one of the comma-separated choices; all of them for an empty text."""
    choices = [choice.split() for choice in only.split(",") if choice.strip()]
    return [cell for cell in cells if not choices or any(all(word in cell.key for word in words) for words in choices)]
