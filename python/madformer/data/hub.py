"""Hugging Face data sets as a source of undecoded samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from madformer.data import fields
from madformer.data.sources import RawSample, check_size, read_picture
from madformer.files.text import first_line
from madformer.objects import read_object

__all__ = ["HuggingFaceSource", "is_saved"]

IMAGE_COLUMNS = ("image", "img", "picture", "photo", *fields.IMAGE_EXTENSIONS)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder, or began to, or somebody has removed a part."""
    if (folder / "dataset_dict.json").is_file():
        return True
    parts = [(folder / name).is_file() for name in ("dataset_info.json", "state.json")]
    return all(parts) or (any(parts) and any(folder.glob("data-*.arrow")))


class HuggingFaceSource:
    """Rows of a ``datasets.Dataset``: its image column, class label and caption-like text column.

    The image is the column of that type that is named as in ``IMAGE_COLUMNS``, or else the first, or else a column of
    such a name that holds encoded bytes. Labels are of a ``ClassLabel``, one named as in ``LABEL_FIELDS``
    before others, or else of a column of such a name: numbers, or names, which become classes in sorted order.
    """

    root, shard_lengths = None, None

    def __init__(self, name: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("hf: sources need the package datasets: pip install 'madformer[hf]'") from error
        self.title = f"hf:{name}"
        rows = _load_rows(name)
        kinds = rows.features
        self.image_column = self._find_images(kinds)
        labels = [column for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        labels.sort(key=lambda column: column not in fields.LABEL_FIELDS)
        self.class_names = list(kinds[labels[0]].names) if labels else []
        self.label_column = labels[0] if labels else next((c for c in fields.LABEL_FIELDS if c in kinds), None)
        self.caption_column = next((c for c in fields.CAPTION_FIELDS if c in kinds and _holds_text(kinds[c])), None)
        # Undecoded: damage is then met in one place, and every source resizes alike.
        self.rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        if self.label_column and not labels:
            self._read_labels(kinds[self.label_column])

    def _find_images(self, kinds: Any) -> str:
        import datasets

        images = [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]
        if not images:
            # as pandas writes what `datasets` would have called an image
            encoded = [{"bytes", "path"}, {"bytes"}]
            images = [
                column
                for column, kind in kinds.items()
                if column.lower() in IMAGE_COLUMNS
                and (set(kind) in encoded if isinstance(kind, dict) else "binary" in str(getattr(kind, "dtype", "")))
            ]
        if not images:
            raise ValueError(f"{self.title} has no image column, only {', '.join(kinds)}")
        return min(images, key=lambda c: IMAGE_COLUMNS.index(c.lower()) if c.lower() in IMAGE_COLUMNS else 99)

    def _read_labels(self, kind: Any) -> None:
        """Take names for classes; refuse at once what is not one class for each row."""
        import datasets

        dtype = str(getattr(kind, "dtype", "list"))
        looked_at = dtype in ("string", "large_string") or "float" in dtype
        values = [value for value in self.rows.unique(self.label_column) if value is not None] if looked_at else []
        try:
            if dtype in ("string", "large_string"):
                names = sorted({name.strip() for name in values} - {""})
                if not all(name.isdecimal() for name in names):
                    self.class_names = names
            elif "float" in dtype:
                for value in values:
                    fields.label_of(value)
            elif "int" not in dtype and dtype != "bool":
                raise ValueError(f"it holds {'lists' if isinstance(kind, (list, datasets.Sequence)) else dtype}")
        except ValueError as error:
            raise ValueError(
                f"{self.title}: its column '{self.label_column}' is not one class for each image ({error}); "
                "rename it where it is not meant"
            ) from error

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return f"{index:08d}"

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def read(self, index: int) -> RawSample:
        row = self._row(self.rows, index)
        image = row[self.image_column]
        if image is None:
            raise ValueError("the row has no image")
        data = read_picture(Path(image["path"])) if image["bytes"] is None else check_size(image["bytes"])
        label, caption = self._annotations(row)
        return RawSample(self.key(index), data, caption, label)

    def summary(self, limit: int) -> fields.DataSummary:
        columns = [column for column in (self.label_column, self.caption_column) if column]
        rows = self.rows.select_columns(columns) if columns else None
        return fields.summarize(
            len(self), lambda index: self._annotations(self._row(rows, index) if rows else {}), self.class_names, limit
        )

    def _row(self, rows: Any, index: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = rows[index]
        except Exception as error:
            # damaged files make the libraries below raise errors of many types
            raise ValueError(first_line(error)) from error
        return row

    def _annotations(self, row: dict[str, Any]) -> tuple[int, str]:
        caption = row[self.caption_column] if self.caption_column else None
        label = row[self.label_column] if self.label_column else None
        return fields.label_of(label, self.class_names), fields.caption_of(caption)


def _holds_text(kind: Any) -> bool:
    """Whether a column is of texts, or of lists of texts."""
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return "string" in str(getattr(inner, "dtype", ""))


def _load_rows(name: str) -> Any:
    """The ``datasets.Dataset`` of ``NAME[:SPLIT]``."""
    import datasets

    path, _, split = (name, "", "") if Path(name).is_dir() else name.partition(":")
    if is_saved(Path(path)):
        rows = _load_saved(Path(path), split)
    else:
        try:
            rows = datasets.load_dataset(path, split=split or "train")
        except Exception as error:
            # An unknown name, split or absent network; the messages have several lines.
            raise FileNotFoundError(f"no data set at hf:{name}: {first_line(error)}") from error
    if not len(rows):
        raise FileNotFoundError(f"hf:{name} is empty")
    return rows


def _load_saved(folder: Path, split: str) -> Any:
    """A split that ``save_to_disk`` wrote, ``train`` unless it is named or the only one; no other is looked at."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder, "dataset_dict.json", "splits")
        split = split or (splits[0] if len(splits) == 1 else "train")
        if split not in splits:
            listed = f"it has the splits {', '.join(splits)}: hf:{folder}:SPLIT names one" if splits else "it is empty"
            raise FileNotFoundError(f"no data set at hf:{folder}:{split}: {listed}")
        folder = folder / split
    elif split:
        raise FileNotFoundError(f"hf:{folder} is saved as one split; leave out ':{split}'")
    if not _listed(folder, "state.json", "_data_files"):
        raise FileNotFoundError(f"hf:{folder} is empty")
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:
        # of any type, from the libraries below
        raise _not_whole(folder, first_line(error)) from error


def _listed(folder: Path, file: str, key: str) -> list[Any]:
    try:
        found = read_object(folder / file).get(key)
    except (OSError, ValueError) as error:
        raise _not_whole(folder, first_line(error)) from error
    if not isinstance(found, list):
        raise _not_whole(folder, f"{file} lists no {key}")
    return found


def _not_whole(folder: Path, reason: str) -> ValueError:
    return ValueError(f"{folder} is not whole, as save_to_disk writes it ({reason}): save the data set again")
