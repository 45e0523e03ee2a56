"""Files in `<root>/<modality>/<class>/<stem>.<ext>`, as ADVANCE has them; one example is what shares class and stem.

Roots are found by the modality's name; `vision` and `sound`, or `Dataset_v3_vision` and `Dataset_v3_sound`, serve image and
audio. With one modality, `<root>/<class>/<file>` will do. ADVANCE's stems, such as 07090_2, name a recording before the
underscore; what comes from one recording stays in one split.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from lamina.data.convert import IMAGES
from lamina.data.faults import Faults
from lamina.data.items import Item
from lamina.errors import DataError
from lamina.plans.model import ModelDescription

_RECORDING = re.compile(r"(\d{5})_\d+")
_ALIASES = {"image": ("vision", "Dataset_v3_vision"), "audio": ("sound", "Dataset_v3_sound")}
Key = tuple[str, str]


class PairedSource:
    """Lists all names at once (they are needed for pairing); reads files only when an example is converted."""

    def __init__(self, root: Path, model: ModelDescription, names: Mapping[str, str]) -> None:
        """Raises DataError for a modality without a folder."""
        self._root = root
        self._folders = {modality: _find_root(root, modality, model, names) for modality in model.modalities}
        self._files = {modality: _list(folder) for modality, folder in self._folders.items()}
        self._keys = sorted({key for files in self._files.values() for key in files})
        self._by_recording = bool(self._keys) and all(_RECORDING.fullmatch(stem) for _, stem in self._keys)

    @property
    def words(self) -> str:
        grouped = ", one recording in one split" if self._by_recording else ""
        return f"class folders in {', '.join(str(folder) for folder in self._folders.values())}{grouped}"

    @property
    def labels(self) -> Counter[str] | None:
        return Counter(label.strip() for label, _ in self._keys)

    def count(self) -> int | None:
        return len(self._keys)

    def items(self, faults: Faults) -> Iterator[Item]:
        for label, stem in self._keys:
            there = {modality: files[label, stem] for modality, files in self._files.items() if (label, stem) in files}
            lacking = [modality for modality in self._files if modality not in there]
            first = next(iter(there.values()))[0]
            twice = next((paths for paths in there.values() if len(paths) > 1), None)
            if lacking:
                where = self._folders[lacking[0]].relative_to(self._root) / label
                faults.add(
                    str(first.relative_to(self._root)), f"has no {lacking[0]}: expected {where}/{stem}.*", items_left_out=1
                )
            elif twice:
                names = ", ".join(path.name for path in twice)
                faults.add(
                    str(twice[0].relative_to(self._root)), f"is one of {len(twice)} files of the stem {stem!r}: {names}", 1
                )
            else:
                match = _RECORDING.fullmatch(stem) if self._by_recording else None
                yield Item(
                    name=str(first.relative_to(self._root)),
                    values={modality: paths[0] for modality, paths in there.items()},
                    label=label,
                    group=match[1] if match else None,
                )


def _find_root(root: Path, modality: str, model: ModelDescription, names: Mapping[str, str]) -> Path:
    kind = model.encoder(modality).input.kind
    sort = "image" if kind in IMAGES or modality == "vision" else "audio" if kind in ("audio_frames", "values") else ""
    tried = [names[modality]] if modality in names else [modality, *_ALIASES.get(sort, ())]
    for name in tried:
        if (root / name).is_dir():
            return root / name
    if len(model.modalities) == 1 and modality not in names:
        return root
    there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    raise DataError(
        f"{root} has no folder for {modality!r} (looked for {', '.join(tried)}), it has {', '.join(there) or 'none'}; "
        f"say which one it is: --rename {modality}=FOLDER"
    )


def _list(folder: Path) -> dict[Key, list[Path]]:
    """The files of each class and stem."""
    found: dict[Key, list[Path]] = {}
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith("."):
            for file in sorted(inner.iterdir()):
                if file.is_file() and not file.name.startswith("."):
                    found.setdefault((inner.name, file.stem), []).append(file)
    return found
