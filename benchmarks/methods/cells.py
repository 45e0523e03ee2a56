"""What is run: cells of (data set, method, setting, seed), in the order in which time is best spent.

    main            labelled data: every method in the data set's usual setting, with lamina's recipe and the bounds
    self-supervised Fashion-MNIST without its labels, and a linear probe; 4 clients, in 18 rounds and in 54, with one layer
                    too, and 32 of which 8 train in a round, in 18 rounds and in 90, and with 12 layers
    pairs           Emoji-4Style, image and text, contrastive; a drawing style is a client. AV-Digits MEDIUM without its head,
                    whose pairs were made by class, and a linear probe
    real            AV-Digits MEDIUM, layer-wise, through real processes: the same scores as in simulation
    participation   AV-Digits MEDIUM, 16 clients of which 25, 50 and 100 % train in a round; HARD with 25 %; blending and other
                    rates of end to end with 25 %
    skew            AV-Digits MEDIUM, 4 clients, Dirichlet 0.1 and 5 beside the usual 0.5
    deep            12 layers instead of 6, and a lean plan: micro-batches, small encodings. 16 layers of Fashion-MNIST, in
                    whole batches, and of Emoji: where samples are compared, micro-batches take a further forward pass
    options         AV-Digits MEDIUM and seglearn: a layer-wise plan with one option each, end to end with other rates;
                    blending and rates with HARD too
    lacking         half of the clients have one modality; left out, or taking part; also with pairs
    small           half of the clients can hold one layer at a time and no more: end to end goes without them
    pretrained      seglearn with six clients, whose model starts at random, or from training on two other subjects
                    MiniLM, whose layers come from elsewhere, on captions of emoji in 8 groups
    modalities      seglearn with one, three and four modalities beside the usual two

The first seed of all cells comes first: whenever the work is stopped, what is there covers as much as it can.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.methods.plans import (
    BASELINE,
    BLENDED,
    ELSEWHERE,
    METHODS,
    OPTIONS,
    PARTIAL,
    PRETRAINED,
    REAL,
    RECIPE,
    SELF_SUPERVISED,
)

CENTRALISED, LINEAR, UNTRAINED = "centralised", "linear", "untrained"
"""Bounds: the baseline's plan on one client that has all data; a linear model on raw values (`benchmarks.methods.bounds`); and,
for self-supervised methods, a linear probe on the features of a model that was never trained."""
ROUNDS, DEEP_ROUNDS, MORE_ROUNDS, LONG_ROUNDS = 18, 20, 54, 90
SKEWS, SHARES = ("beta=0.1", "beta=5"), (0.25, 0.5, 1.0)
SUPERVISED = ("av_digits_medium", "av_digits_hard", "seglearn")


@dataclass(frozen=True)
class Setting:
    """How data are dealt (`data_sets.client_rows`), to how many clients, and which share of them trains in a round.

    `clients` is 0 where the split decides it. `lacking` is the share of the clients that have one modality only; a method
    without programs for them goes without them. `small` is the share that can hold one layer at a time and no more; they take
    part in layer-wise training alone.
    """

    split: str
    clients: int = 0
    participation: float = 1.0
    lacking: float = 0.0
    small: float = 0.0

    def __str__(self) -> str:
        parts = [self.split]
        parts += [f"{self.clients} clients"] if self.clients else []
        parts += [f"{self.participation:.0%} a round"] if self.participation < 1 else []
        parts += [f"{self.lacking:.0%} with one modality"] if self.lacking else []
        parts += [f"{self.small:.0%} small"] if self.small else []
        return ", ".join(parts)


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

    @property
    def compared_within(self) -> str:
        """The setting, and the rounds where there are more: rows are compared with those that have the same."""
        return f"{self.setting}, {self.rounds} rounds" if self.rounds in (MORE_ROUNDS, LONG_ROUNDS) else str(self.setting)

    def as_row(self) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(self.setting).items() if value or name == "clients"}
        return {"key": self.key, "data": self.data, "method": self.method, **settings} | {
            "setting": self.compared_within,
            "rounds": self.rounds,
            "seed": self.seed,
        }


USUAL = Setting("beta=0.5", 4)
NATURAL = Setting("natural")
POOLED = Setting("pooled")
MANY = Setting("beta=0.5", 32, 0.25)


def usual_setting(data: str) -> Setting:
    """Natural clients where the data have them."""
    return NATURAL if data.startswith(("seglearn", "emoji")) else USUAL


def all_cells(seeds: Sequence[int]) -> list[Cell]:
    """All cells, the first seed of each first."""
    return [cell for seed in seeds for cell in _of_seed(seed)]


def _of_seed(seed: int) -> Iterator[Cell]:
    for data in SUPERVISED:
        for method in METHODS:
            yield Cell(data, method, usual_setting(data), seed)
        yield Cell(data, RECIPE, usual_setting(data), seed)
        yield Cell(data, CENTRALISED, POOLED, seed)
        yield Cell(data, LINEAR, POOLED, seed)
    for method in (name for name in SELF_SUPERVISED if name not in ELSEWHERE):
        yield Cell("fashion", method, USUAL, seed)
    for method in ("fedsimclr", "fedsimclr_half_rate", "fedsimclr_batch_64", "lw_fedsimclr", "lamina_simclr"):
        yield Cell("fashion", method, USUAL, seed, MORE_ROUNDS)
    for rounds in (ROUNDS, MORE_ROUNDS):
        yield Cell("fashion_shallow", "lamina_simclr", USUAL, seed, rounds)
    for method in ("fedssl", "lw_fedssl", "prog_fedssl", "lw_fedssl_ours"):
        yield Cell("fashion", method, MANY, seed)
        yield Cell("fashion", method, MANY, seed, LONG_ROUNDS)
    for method in ("lw_fedssl_2", "fedssl_half_rate", "fedssl_double_rate", "fedssl_triple_rate"):
        yield Cell("fashion", method, MANY, seed)
    for method in ("fedsimclr", "fedsimclr_half_rate", "fedsimclr_double_rate", "lw_fedsimclr", "lamina_simclr"):
        yield Cell("fashion", method, MANY, seed)
    for method in ("fedssl", "fedssl_half_rate", "lw_fedssl", "lw_fedssl_ours"):
        yield Cell("fashion_12", method, MANY, seed, DEEP_ROUNDS)
    for bound in (CENTRALISED, LINEAR, UNTRAINED):
        yield Cell("fashion", bound, POOLED, seed)
    for method in (*METHODS, RECIPE, "e2e_half_rate", "e2e_double_rate"):
        yield Cell("emoji", method, usual_setting("emoji"), seed)
    for bound in (CENTRALISED, LINEAR):
        yield Cell("emoji", bound, POOLED, seed)
    for method in (BASELINE, "layerwise", "lw_classes"):
        yield Cell("av_digits_pairs", method, USUAL, seed)
    for method in REAL:
        yield Cell("av_digits_medium", method, USUAL, seed)
    for share in SHARES:
        for method in (BASELINE, "layerwise", "layerwise_2"):
            yield Cell("av_digits_medium", method, Setting("beta=0.5", 16, share), seed)
    for method in (BASELINE, "layerwise"):
        yield Cell("av_digits_hard", method, Setting("beta=0.5", 16, 0.25), seed)
    for data in ("av_digits_medium", "av_digits_hard"):
        for method in ("e2e_blend", "e2e_half_rate", "e2e_double_rate", RECIPE):
            yield Cell(data, method, Setting("beta=0.5", 16, 0.25), seed)
    for split in SKEWS:
        for method in (*METHODS, "e2e_blend", RECIPE):
            yield Cell("av_digits_medium", method, Setting(split, 4), seed)
    for data in (*SUPERVISED, "emoji"):
        for method in (BASELINE, "layerwise", "lw_lean"):
            yield Cell(f"{data}_12", method, usual_setting(data), seed, DEEP_ROUNDS)
    for data in SUPERVISED:
        for method in ("e2e_half_rate", "e2e_blend", RECIPE):
            yield Cell(f"{data}_12", method, usual_setting(data), seed, DEEP_ROUNDS)
    for method in (
        "fedsimclr",
        "fedsimclr_half_rate",
        "lw_fedsimclr",
        "lw_fedsimclr_lean",
        "lw_fedsimclr_lean_ours",
        "lamina_simclr",
    ):
        yield Cell("fashion_12", method, USUAL, seed, DEEP_ROUNDS)
    for method in ("fedsimclr", "fedsimclr_half_rate", "lw_fedsimclr_whole_ours", "lamina_simclr"):
        yield Cell("fashion_16", method, USUAL, seed, DEEP_ROUNDS)
    for method in ("fedsimclr", "fedsimclr_half_rate", "lamina_simclr"):
        yield Cell("fashion_16", method, USUAL, seed, MORE_ROUNDS)
    for method in (BASELINE, "e2e_half_rate", "lw_lean"):
        yield Cell("emoji_16", method, NATURAL, seed, DEEP_ROUNDS)
    for method in (name for name in OPTIONS if name != RECIPE):
        for data in ("av_digits_medium", "seglearn"):
            yield Cell(data, method, usual_setting(data), seed)
    for method in (*BLENDED, "e2e_half_rate", "e2e_double_rate"):
        yield Cell("av_digits_hard", method, usual_setting("av_digits_hard"), seed)
    for data, clients, split in (("av_digits_medium", 8, "beta=0.5"), ("seglearn", 0, "natural")):
        for method in (BASELINE, "layerwise", *PARTIAL):
            yield Cell(data, method, Setting(split, clients, lacking=0.5), seed)
        for method in (BASELINE, "layerwise"):
            yield Cell(data, method, Setting(split, clients, small=0.5), seed)
    for method in ("lw_views", "lw_partial"):
        yield Cell("emoji", method, Setting("natural", lacking=0.5), seed)
    for method in (BASELINE, "layerwise"):
        yield Cell("seglearn_six", method, NATURAL, seed)
    for method in (BASELINE, "layerwise", "progressive", "lw_zero_init", "lw_warm_up"):
        yield Cell("seglearn_pretrained", method, NATURAL, seed)
    for method in (BASELINE, "layerwise", *PRETRAINED):
        yield Cell("minilm", method, USUAL, seed)
    for data in ("seglearn_1", "seglearn_3", "seglearn_4"):
        for method in (BASELINE, "layerwise"):
            yield Cell(data, method, NATURAL, seed)


def chosen(cells: Sequence[Cell], only: str) -> list[Cell]:
    """The cells whose key has every word of one of the comma-separated choices; all of them for an empty text."""
    choices = [choice.split() for choice in only.split(",") if choice.strip()]
    return [cell for cell in cells if not choices or any(all(word in cell.key for word in words) for words in choices)]
