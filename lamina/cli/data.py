"""`lamina data`: a user's own examples as the file that a device trains from, and what is wrong with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lamina.cli.progress import counting
from lamina.errors import ConfigError, DataError
from lamina.printable import printable

if TYPE_CHECKING:
    from lamina.data.card import DataCard
    from lamina.data.models import Target
    from lamina.data.pack import Options, Report
    from lamina.plans.model import ModelDescription

T = TypeVar("T", bound=str)
_WIDEST = 600

data = typer.Typer(
    name="data",
    no_args_is_help=True,
    help="Bring your own data: turn a table of files, arrays, a Python class, COCO captions or class folders into the .npz "
    "file that a device reads, and see what is wrong with which example. Runs where the data is; nothing is sent.",
)

Source = Annotated[
    str,
    typer.Argument(
        help="A CSV table or its folder, .npz or .npy arrays or their folder, COCO captions (.json), a folder of class "
        "folders, or a Python class as package.module:Name (docs/data.md has each form)."
    ),
]
For = Annotated[Path, typer.Option("--for", metavar="PLAN", help="Plan file or bundle folder: the model that the data is for.")]
Kind = Annotated[
    str | None,
    typer.Option(help="Form of the source: folder, arrays, class, coco or advance. Default: seen from the path."),
]
Classes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|A,B,..",
        help="Class names: a file with one a line, or separated by commas. Their place, from 0, is the class. Default: the "
        "names of the source, sorted, if it has all of them.",
    ),
]
Rename = Annotated[
    list[str] | None,
    typer.Option(metavar="MODALITY=NAME", help="What the source calls a modality of the model (column, array, key, folder)."),
]
Mean = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[MODALITY=]A,B,..",
        help="Subtract this: one number, or one for each channel. Without a modality: every image. Repeat for others.",
    ),
]
Std = Annotated[list[str] | None, typer.Option(metavar="[MODALITY=]A,B,..", help="Then divide by this, likewise.")]
FitOption = Annotated[
    str | None,
    typer.Option("--fit", help="Images of other proportions: stretch them, or crop their centre. Default: stretch."),
]
Rate = Annotated[
    int | None, typer.Option(min=1, max=768_000, help="Samples a second to which sounds are brought. Default: 16000.")
]
WindowMs = Annotated[
    float | None, typer.Option(min=0.1, max=60_000, help="Window of a spectral frame, in milliseconds. Default: 25.")
]
HopMs = Annotated[
    float | None, typer.Option(min=0.1, max=60_000, help="From one spectral frame to the next, in milliseconds. Default: 10.")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Texts to token ids: words (hashed), bytes, or a tokenizer.json. Default: words.")
]
Card = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A packed .npz of another device, or its card as .json: the same class names, scaling, rates and tokenizer, and "
        "refused where anything differs. Default: what the plan says, if it does.",
    ),
]
Captions = Annotated[Path | None, typer.Option(help="COCO captions file, relative to the source or to this folder.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images of --captions.")]
TestCaptions = Annotated[Path | None, typer.Option(help="COCO captions file of the test examples.")]
TestImages = Annotated[Path | None, typer.Option(help="Folder of the images of --test-captions.")]
Caption = Annotated[str, typer.Option(help="Captions of an image: first, all (an example each), or random (one, by --seed).")]
TestShare = Annotated[
    float | None,
    typer.Option(help="Share of each class that becomes test examples, if the source has no splits. Default: 0.2."),
]
AllTrain = Annotated[bool, typer.Option("--all-train", help="No test examples.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the choice of test examples and random captions.")]
MaxFaults = Annotated[int, typer.Option(min=1, help="Faults and warnings to show; all are counted.")]


@data.command()
def pack(
    source: Source,
    plan: For,
    out: Annotated[Path, typer.Option(help="The .npz file to write. It appears when it is complete, and never half.")],
    kind: Kind = None,
    classes: Classes = None,
    test_share: TestShare = None,
    all_train: AllTrain = False,
    seed: Seed = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave faulty examples out, and say how many, instead of refusing the source.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    rename: Rename = None,
    mean: Mean = None,
    std: Std = None,
    fit: FitOption = None,
    rate: Rate = None,
    window_ms: WindowMs = None,
    hop_ms: HopMs = None,
    tokenizer: Tokenizer = None,
    card: Card = None,
    captions: Captions = None,
    images: Images = None,
    test_captions: TestCaptions = None,
    test_images: TestImages = None,
    caption: Caption = "first",
    max_faults: MaxFaults = 20,
) -> None:
    """Write the file for `lamina join --data`: converted to what the model takes, checked, split into train and test.

    Images are resized and scaled to 0..1, sounds resampled or made into log-mel frames, texts made into token ids. One example
    is in memory at a time; while it writes, the disk needs twice the size of the file. If anything is wrong, nothing is written
    and every fault is named with its file, row or index.
    """
    given = dict(locals())
    from lamina.data.pack import classes_path
    from lamina.data.pack import pack as pack_data

    if out.suffix != ".npz":
        raise ConfigError(f"--out {out} must end in .npz")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; pass --overwrite to replace it (not while a device trains from it)")
    target = _target(plan)
    model = target.model
    options = _options(model, _wanted_card(card, plan, target), source, **{name: given[name] for name in _OPTIONS})
    with counting("packing") as show:
        report = pack_data(source, model, out, options, skip_bad, lambda done, total: show("packing", done, total))
    _print(report)
    if report.left_out:
        typer.echo(
            f"left out: {report.left_out} of {report.left_out + sum(report.examples.values())} examples, for the faults above"
        )
    if report.names:
        typer.echo(f"class names: {classes_path(out)}")
    typer.echo("On the other devices, pack with --card of this file: class names, scaling, rates and tokenizer must be equal.")
    typer.echo(f"{out}: {out.stat().st_size:,} bytes")


@data.command()
def check(
    source: Source,
    plan: For,
    kind: Kind = None,
    classes: Classes = None,
    test_share: TestShare = None,
    all_train: AllTrain = False,
    seed: Seed = 0,
    rename: Rename = None,
    mean: Mean = None,
    std: Std = None,
    fit: FitOption = None,
    rate: Rate = None,
    window_ms: WindowMs = None,
    hop_ms: HopMs = None,
    tokenizer: Tokenizer = None,
    card: Card = None,
    captions: Captions = None,
    images: Images = None,
    test_captions: TestCaptions = None,
    test_images: TestImages = None,
    caption: Caption = "first",
    max_faults: MaxFaults = 20,
) -> None:
    """Show what a source, or a packed file, holds and all that is wrong with it; status 1 if anything is.

    A packed .npz file is read as a device reads it, without conversion. Any other source is converted as `pack` would do, and
    nothing is written. Warnings do not change the status.
    """
    given = dict(locals())
    from lamina.data.pack import check as check_data

    target = _target(plan)
    model = target.model
    options = _options(model, _wanted_card(card, plan, target), source, **{name: given[name] for name in _OPTIONS})
    with counting("checking") as show:
        report = check_data(source, model, options, lambda done, total: show("checking", done, total))
    _print(report)
    if report.faults.total:
        raise typer.Exit(1)
    if not report.examples["train"]:
        raise DataError(f"{source} has no training example")
    typer.echo("no faults")


@data.command()
def card(
    file: Annotated[Path, typer.Argument(help="A packed .npz file.")],
    out: Annotated[Path | None, typer.Option(help="Write the card to this .json file, for --card or for a plan.")] = None,
) -> None:
    """Show what packing decided that must be equal on all devices: class names, scaling, rates, channels, tokenizer.

    A coordinator compares it when the device checks in. Example: lamina data card examples.npz --out card.json
    """
    from lamina.data.card import load_card, shown_value
    from lamina.files import write_durably

    found = load_card(file)
    for name, value in found.fields().items():
        typer.echo(f"{name:<24} {shown_value(value)}")
    typer.echo(f"{'sha256':<24} {found.sha256}")
    if out is not None:
        write_durably(out, found.to_json())


_OPTIONS = (
    *("kind", "classes", "test_share", "all_train", "seed", "rename", "mean", "std", "fit", "rate", "window_ms", "hop_ms"),
    *("tokenizer", "captions", "images", "test_captions", "test_images", "caption", "max_faults"),
)


def _target(plan: Path) -> "Target":
    """The model that the data is for. A recipe's factories are called, which needs torch as `lamina export` does."""
    from lamina.data.models import load_target

    def call_factories(path: Path) -> "ModelDescription":
        try:
            from export.plans.resolve import resolve
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{path} says what shape an example has once its model is made, and {error.name} is not installed here: "
                "give the bundle that `lamina export` made of it, or pip install 'lamina[export]'"
            ) from error
        typer.echo(f"making the model of {path}, to see what shape an example has ...", err=True)
        model: ModelDescription = resolve(str(path), check=False).plan.model
        return model

    return load_target(plan, call_factories)


def _wanted_card(file: Path | None, plan: Path, target: "Target") -> "tuple[DataCard | None, str]":
    """What the data has to agree with, and where that stands."""
    from lamina.data.card import load_card

    if file is None:
        return target.card, f"in {plan}"
    return load_card(file), f"in {file}"


def _options(
    model: "ModelDescription",
    wanted: "tuple[DataCard | None, str]",
    source: str,
    kind: str | None,
    classes: str | None,
    test_share: float | None,
    all_train: bool,
    seed: int,
    rename: list[str] | None,
    mean: list[str] | None,
    std: list[str] | None,
    fit: str | None,
    rate: int | None,
    window_ms: float | None,
    hop_ms: float | None,
    tokenizer: str | None,
    captions: Path | None,
    images: Path | None,
    test_captions: Path | None,
    test_images: Path | None,
    caption: str,
    max_faults: int,
) -> "Options":
    """Options of the command, and those of the wanted card in place of what was not given.

    Raises ConfigError for values that are none of an option's, or options that exclude each other.
    """
    from typing import get_args

    from lamina.data.convert import IMAGES, Settings
    from lamina.data.image import Fit
    from lamina.data.pack import Options, card_of
    from lamina.data.sound import SoundSettings
    from lamina.data.sources import KINDS, SourceSettings
    from lamina.data.sources.coco import Caption as CaptionName

    if all_train and test_share is not None:
        raise ConfigError("--all-train and --test-share exclude each other")
    if test_share is not None and not 0 < test_share < 1:
        raise ConfigError(f"--test-share {test_share} is outside of 0..1; for no test examples pass --all-train")
    names = dict(_pair(text, "--rename") for text in rename or ())
    unknown = [name for name in names if name not in model.modalities]
    if unknown:
        raise ConfigError(f"--rename names {unknown[0]!r}; the model has {', '.join(model.modalities)}")
    pictures = [encoder.modality for encoder in model.encoders if encoder.input.kind in IMAGES]
    card, card_words = wanted
    before = card_of(source)
    # What was packed before is scaled already, and has its names.
    fill = _from_card(card if before is None else None)
    has_names = before is not None and before.classes is not None
    return Options(
        kind=None if kind is None else _one_of(kind, KINDS, "--kind"),
        source=SourceSettings(
            names=names,
            captions=captions,
            images=images,
            test_captions=test_captions,
            test_images=test_images,
            caption=_one_of(caption, get_args(CaptionName), "--caption"),
            seed=seed,
        ),
        convert=Settings(
            mean=_scaling("mean", card, fill) | _numbers(mean, pictures, "--mean"),
            std=_scaling("std", card, fill) | _numbers(std, pictures, "--std"),
            fit=_one_of(fit or fill.get("fit", "stretch"), get_args(Fit), "--fit"),
            sound=SoundSettings(
                rate or fill.get("rate", 16000), window_ms or fill.get("window_ms", 25.0), hop_ms or fill.get("hop_ms", 10.0)
            ),
            tokenizer=_tokenizer(tokenizer or fill.get("tokenizer", "words"), card_words),
        ),
        classes=classes if classes is not None or has_names else _class_names(card, card_words),
        test_share=None if all_train else 0.2 if test_share is None else test_share,
        seed=seed,
        max_faults=max_faults,
        card=card,
        card_words=card_words,
    )


def _from_card(card: "DataCard | None") -> "dict[str, Any]":
    """How a card's values were made, of whatever modality."""
    return {name: value for each in (card.modalities.values() if card else ()) for name, value in each if value is not None}


def _scaling(name: str, card: "DataCard | None", fill: "dict[str, Any]") -> dict[str, tuple[float, ...]]:
    """The means or the deviations of a card by modality; those that change nothing are left out."""
    if card is None or name not in fill:
        return {}
    values = {modality: getattr(each, name) for modality, each in card.modalities.items()}
    nothing = {1.0 if name == "std" else 0.0}
    return {m: numbers for m, numbers in values.items() if isinstance(numbers, tuple) and set(numbers) != nothing}


def _tokenizer(name: str, card_words: str) -> str:
    if name.startswith("sha256:"):
        raise ConfigError(f"the tokenizer {card_words} is a file with the hash {name[7:]}: give it as --tokenizer FILE")
    return name


def _class_names(card: "DataCard | None", card_words: str) -> tuple[str, ...] | None:
    if card is None or card.classes is None:
        return None
    if isinstance(card.classes, str):
        raise ConfigError(f"the class names {card_words} are too many for a card: give its .classes.txt as --classes FILE")
    return card.classes


def _one_of(value: str, known: tuple[T, ...], option: str) -> T:
    found = next((name for name in known if name == value), None)
    if found is None:
        raise ConfigError(f"{option} is one of {', '.join(known)}, given {value!r}")
    return found


def _pair(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise ConfigError(f"{option} {text!r} is not of the form MODALITY=NAME")
    return name, value


def _numbers(texts: list[str] | None, pictures: list[str], option: str) -> dict[str, tuple[float, ...]]:
    """Numbers by modality; those without one are for every image."""
    result: dict[str, tuple[float, ...]] = {}
    for text in texts or ():
        name, _, values = text.rpartition("=")
        try:
            numbers = tuple(float(value) for value in values.split(","))
        except ValueError as error:
            raise ConfigError(f"{option} {text!r} is not of the form [MODALITY=]0.5,0.4,0.4") from error
        if not name and not pictures:
            raise ConfigError(f"{option} {text!r}: the model takes no images; write {option} MODALITY={values}")
        result.update(dict.fromkeys([name] if name else pictures, numbers))
    return result


def _print(report: "Report") -> None:
    """Tables of modalities and classes, then notes, warnings and faults."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    examples = ", ".join(f"{count:,} {split}" for split, count in report.examples.items())
    values = Table(title=f"{report.source}: {examples}", box=box.SIMPLE, pad_edge=False)
    for heading in ("modality", "row", "dtype", "least", "most", "mean", "std"):
        values.add_column(heading, justify="left" if heading == "modality" else "right")
    for name, column in report.columns.items():
        row = " x ".join(map(str, column.shape))
        seen = (column.low, column.high, column.mean, column.std) if column.values else ()
        values.add_row(name, row, column.dtype, *(f"{number:.4g}" for number in seen))
    console.print(values)
    if report.classes:
        counts = Table(box=box.SIMPLE, pad_edge=False)
        counts.add_column("class")
        for split in report.classes:
            counts.add_column(split, justify="right")
        for index, numbers in enumerate(zip(*report.classes.values(), strict=True)):
            name = f"{index} {printable(report.names[index])}" if report.names and index < len(report.names) else str(index)
            counts.add_row(name, *(f"{number:,}" for number in numbers))
        console.print(counts)
    for note in report.notes:
        typer.echo(f"note     {printable(note, _WIDEST)}")
    for line in report.warnings.lines():
        typer.echo(f"warning  {printable(line, _WIDEST)}")
    for line in report.faults.lines():
        typer.echo(f"fault    {printable(line, _WIDEST)}")
    if report.faults.total:
        typer.echo(f"faults: {report.faults.total}, examples that cannot be used: {report.left_out}")
