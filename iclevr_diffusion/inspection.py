"""What a set of labelled images holds, and what of it would harm a training."""

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from iclevr_diffusion.data import SPLITS, ImageSource, LabelledImages, split_of_scene
from iclevr_diffusion.data.metadata_folder import MetadataFolder
from iclevr_diffusion.data.source import check_resolution
from iclevr_diffusion.images import make_grid, on_white

RARE = 20  # training images of a label; with fewer it is told to be rare
MAX_COMPARED = 30_000  # distinct images that are compared each with each, which takes a minute
_THUMBNAIL_SIZE = 16  # height and width at which they are compared
_NEAR = 1.0  # root mean square difference of near duplicates, in values from 0 to 255
_NUM_THREADS = 4
_CHUNK_SIZE = 512  # images under way at a time
_NUM_SHOWN = 10  # lines of a list that a report shows


def inspect_images(source: ImageSource, *, resolution: int = 64, progress: bool = True) -> dict[str, Any]:
    """Reads every image of a source and counts what it holds; a broken one is noted, and the others are read on.

    Args:
        source: The images; rows that are wrong are left out if `open_source` was told to skip them, and reported.
        resolution: Height and width at which two images are compared: those that are equal there are duplicates to a
            model of that size.
        progress: Whether to show a progress bar.

    Returns:
        Ready for JSON: `num_images`, `labels` (images of each label by split), `combinations` (images of each label
        set, most first), `labels_per_image`, `imbalance` (images of the most frequent label by those of the rarest),
        `sizes`, `formats` (of files), `splits`, `row_faults` and `broken` (messages), `duplicates` (groups of file
        names), `duplicates_across_splits`, `near_duplicates` (pairs of an image and the first before it that is nearly
        the same; `None` of more than `MAX_COMPARED` images), `unlabelled`, `unlabelled_rows` (where they stand),
        `unnamed_files` (which lie beside a table and no row names), `rare_labels`, `likely_separator` (of labels, where
        it seems to be another one), `warnings`, and `refusals`, for which a training would not start.
    """
    check_resolution(resolution)
    names, splits = source.vocabulary.names, [split_of_scene(scene) for scene in source.scenes.tolist()]
    broken: list[str] = []
    sizes, formats = Counter(), Counter()
    by_pixels: dict[bytes, list[int]] = defaultdict(list)
    thumbnails: list[np.ndarray] = []  # of the first image of each of `by_pixels`

    def read(i: int) -> dict[str, Any] | str:
        try:
            return _examine(source, source.file_names[i], resolution)
        except (ValueError, OSError) as error:
            return str(error)

    num_images = len(source.file_names)
    with ThreadPoolExecutor(_NUM_THREADS) as pool, tqdm(total=num_images, unit="image", disable=not progress) as bar:
        for start in range(0, num_images, _CHUNK_SIZE):
            rows = range(start, min(start + _CHUNK_SIZE, num_images))
            for i, facts in zip(rows, pool.map(read, rows), strict=True):
                if isinstance(facts, str):
                    broken.append(facts)
                    continue
                sizes.update(facts["size"])
                formats.update(facts["format"])
                if facts["pixels"] not in by_pixels and len(thumbnails) <= MAX_COMPARED:
                    thumbnails.append(facts["thumbnail"])
                by_pixels[facts["pixels"]].append(i)
            bar.update(len(rows))

    duplicates = [group for group in by_pixels.values() if len(group) > 1]
    firsts = [group[0] for group in by_pixels.values()]
    near_duplicates = None
    if len(firsts) <= MAX_COMPARED:
        near_duplicates = _named(source, [(firsts[j], firsts[k]) for j, k in _near_pairs(thumbnails)])
    across = [group for group in duplicates if len({splits[i] for i in group}) > 1]
    in_split = {split: np.array(splits) == split for split in SPLITS}
    counts = {split: source.class_labels[rows].sum(axis=0, dtype=np.int64) for split, rows in in_split.items()}
    labels = {
        name: {"all": int(sum(counts[split][k] for split in SPLITS))}
        | {split: int(counts[split][k]) for split in SPLITS}
        for k, name in enumerate(names)
    }
    label_sets, images_of_sets = np.unique(source.class_labels, axis=0, return_counts=True)
    order = np.argsort(-images_of_sets, kind="stable")
    combinations = [
        {"labels": [names[k] for k in np.flatnonzero(label_sets[j])], "images": int(images_of_sets[j])} for j in order
    ]
    unlabelled = [source.file_names[i] for i in np.flatnonzero(source.class_labels.sum(axis=1) == 0)]
    is_table = isinstance(source, LabelledImages)
    found = {
        "data": source.name,
        "num_images": num_images,
        "resolution": resolution,
        "labels": labels,
        "combinations": combinations,
        "labels_per_image": _sorted_counts(source.class_labels.sum(axis=1, dtype=np.int64).tolist()),
        "imbalance": max(c["all"] for c in labels.values()) / max(1, min(c["all"] for c in labels.values())),
        "sizes": dict(sizes.most_common()),
        "formats": dict(formats.most_common()),
        "splits": {split: int(rows.sum()) for split, rows in in_split.items()},
        "row_faults": source.faults if is_table else [],
        "broken": broken,
        "duplicates": _named(source, duplicates),
        "near_duplicates": near_duplicates,
        "duplicates_across_splits": _named(source, across),
        "unlabelled": unlabelled,
        "unlabelled_rows": list(map(source.where, unlabelled)) if is_table else unlabelled,
        "unnamed_files": _unnamed_files(source),
        "rare_labels": [name for name in names if labels[name]["train"] < RARE],
        "likely_separator": source.likely_separator() if is_table else None,
    }
    return found | {"warnings": list(_warnings(found)), "refusals": list(_refusals(found))}


def format_inspection(found: dict[str, Any]) -> str:
    """Writes what `inspect_images` returns as lines to read."""
    width = max(len(name) for name in found["labels"])
    lines = [
        f"{found['num_images']:,} images: "
        + ", ".join(f"{count:,} {split}" for split, count in found["splits"].items()),
        *_lines_of_files(found),
        "Labels an image: " + ", ".join(f"{number}: {count:,}" for number, count in found["labels_per_image"].items()),
        "",
        f"{'Label':{width}}  {'images':>9} " + " ".join(f"{split:>11}" for split in SPLITS),
    ]
    for name, counts in found["labels"].items():
        lines.append(f"{name:{width}}  {counts['all']:9,} " + " ".join(f"{counts[split]:11,}" for split in SPLITS))
    combinations = found["combinations"]
    once = sum(combination["images"] == 1 for combination in combinations)
    lines += [
        f"The most frequent label has {found['imbalance']:.1f} times the images of the rarest.",
        "",
        f"{len(combinations):,} combinations, {once:,} of them in one image; the most frequent:",
    ]
    for combination in combinations[:_NUM_SHOWN]:
        lines.append(f"{combination['images']:9,}  {', '.join(combination['labels']) or '(none)'}")
    for title in ("warnings", "refusals"):
        if found[title]:
            lines += ["", f"{title.capitalize()}:", *(f"- {line}" for line in found[title])]
    if not found["refusals"]:
        lines += ["", "Nothing here keeps a training from starting."]
    return "\n".join(lines)


def _lines_of_files(found: dict[str, Any]) -> list[str]:
    """Says how large the images are and in what files; nothing where none of the files could be read."""
    if found["sizes"]:
        return [f"Sizes: {_shortened(found['sizes'])}", f"Files: {_shortened(found['formats'])}"]
    return [] if found["broken"] else ["Sizes: not those of files, the images are held in memory", "Files: none"]


def make_sheet(source: ImageSource, found: dict[str, Any], *, num_images: int = 48) -> Image.Image | None:
    """Lays out images of every label, in turn from the rarest one on, with their labels below; `None` of none.

    Args:
        source: The images.
        found: What `inspect_images` returned for them; broken images are left out.
        num_images: Images to show at most.
    """
    chosen: list[int] = []
    images: list[Image.Image] = []
    for i in _in_turn(source):
        if len(images) == num_images:
            break
        try:
            images.append(source.read_image(source.file_names[i], found["resolution"]))
            chosen.append(i)
        except (ValueError, OSError):
            continue
    if not images:
        return None
    names = source.vocabulary.names
    captions = []
    for i in chosen:
        shown = [names[k] for k in np.flatnonzero(source.class_labels[i])]
        captions.append("\n".join(shown[:3] + ([f"and {len(shown) - 3} more"] if len(shown) > 3 else [])))
    return make_grid(images, captions)


def _examine(source: ImageSource, file_name: str, resolution: int) -> dict[str, Any]:
    """Reads an image; `size` and `format` are empty where it is no file."""
    facts: dict[str, Any] = {"size": [], "format": []}
    image = source.read_image(file_name, resolution)
    if hasattr(source, "read_file"):
        with Image.open(io.BytesIO(source.read_file(file_name))) as file:
            facts = {"size": [f"{file.width}x{file.height}"], "format": [f"{file.format} {file.mode}"]}
    facts["pixels"] = hashlib.sha256(image.tobytes()).digest()
    thumbnail = on_white(image).resize((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE), Image.Resampling.BOX)
    facts["thumbnail"] = np.asarray(thumbnail).ravel()
    return facts


def _near_pairs(thumbnails: list[np.ndarray]) -> list[tuple[int, int]]:
    """Returns the images that differ by next to nothing, as by compression, from an earlier one, behind the first such.

    One pair an image: where all images are nearly the same, the pairs of each with each would not fit into memory.
    """
    if not thumbnails:
        return []
    values = np.stack(thumbnails).astype(np.float32)
    values -= values.mean(axis=0)  # what all have in common would cost digits
    squares = np.square(values).sum(axis=1)
    pairs = []
    for start in range(0, len(values), _CHUNK_SIZE):
        stop = min(start + _CHUNK_SIZE, len(values))
        distances = squares[start:stop, None] + squares[:stop] - 2 * values[start:stop] @ values[:stop].T
        is_near = np.tril(distances < _NEAR**2 * values.shape[1], start - 1)
        firsts = is_near.argmax(axis=1)
        pairs += [(int(firsts[i]), int(start + i)) for i in np.flatnonzero(is_near.any(axis=1))]
    return pairs


def _warnings(found: dict[str, Any]) -> Iterator[str]:
    """Says what a training takes, and its owner may not have meant."""
    if groups := found["duplicates"]:
        shown = [" = ".join(group[:4]) + (" = ..." if len(group) > 4 else "") for group in groups]
        num_copies = sum(map(len, groups)) - len(groups)
        yield f"Images that are the same as another at this size: {num_copies:,} ({_listed(shown)})."
    if pairs := found["near_duplicates"]:
        yield f"Images that are nearly the same as another: {len(pairs):,} ({_listed([' ~ '.join(pair) for pair in pairs])})."
    if found["near_duplicates"] is None:
        yield f"Near duplicates were not looked for: there are more than {MAX_COMPARED:,} images."
    if groups := found["duplicates_across_splits"]:
        yield (
            f"Groups of equal images that lie in several splits: {len(groups):,}. Scores on held-out images are too high"
            " by them; keep one image of each, or give them one value in a column `scene`."
        )
    if rows := found["unlabelled_rows"]:
        yield f"Images without a label: {len(rows):,}\n  " + "\n  ".join(_first_of_each_kind(rows))
    if found["unnamed_files"]:
        yield f"Image files that no row names: {len(found['unnamed_files']):,} ({_listed(found['unnamed_files'])})."
    if found["rare_labels"]:
        yield f"Labels of fewer than {RARE} training images: {_listed(found['rare_labels'])}."
    for split in ("validation", "held-out"):
        without = [name for name, counts in found["labels"].items() if counts["all"] and not counts[split]]
        if not found["splits"][split]:
            yield f"There is no {split} image; a judge has nothing to be tested on. More images, or a column `split`."
        elif without:
            yield (
                f"Labels without a {split} image, on which a judge cannot be tested: {_listed(without)}. More images of"
                " them, or a column `split`."
            )
    once = [name for name, counts in found["labels"].items() if counts["all"] == 1]
    if 2 * len(once) > len(found["labels"]):
        yield (
            f"Labels that occur once: {len(once):,} of {len(found['labels']):,} ({_listed([repr(name) for name in once])})."
            " Nothing can be learned of those; if they are captions or names, give the column of the labels as"
            " `label_column` in a YAML file."
        )
    if (separator := found["likely_separator"]) is not None:
        yield (
            f"Labels are made of other labels with {separator!r} between; did you mean label_separator:"
            f" {json.dumps(separator)}? It is a line of a YAML file beside `images`."
        )
    spellings = defaultdict(list)
    for name in found["labels"]:
        spellings["".join(name.casefold().split())].append(name)
    for alike in spellings.values():
        if len(alike) > 1:
            yield f"Labels that differ in capitals or spaces alone are different labels: {', '.join(map(repr, alike))}."
    unspeakable = [name for name in found["labels"] if "," in name or {"AND", "NOT"} & set(name.split())]
    if unspeakable:
        yield (
            "Labels with a comma, or the word AND or NOT, cannot be asked for in text, as these join labels there:"
            f" {_listed(list(map(repr, unspeakable)))}."
        )


def _refusals(found: dict[str, Any]) -> Iterator[str]:
    """Says for what a training would not start."""
    for title, faults in (
        ("Faults of rows, which are left out of all the counts here", found["row_faults"]),
        ("Images that cannot be read", found["broken"]),
    ):
        if faults:
            yield f"{title}: {len(faults):,}\n  " + "\n  ".join(_first_of_each_kind(faults))
    if not found["splits"]["train"]:
        yield "There is no training image; a set of a few images can have none, and a column `split` says which are."


def _first_of_each_kind(messages: Sequence[str]) -> list[str]:
    """Returns the first messages of each kind, that is of those alike but for names, numbers, what came and reasons in brackets."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for message in messages:
        kinds[re.sub(r"`[^`]*`|\bgot [^;]*|'[^']*'|\"[^\"]*\"|\([^)]*\)|\d+", "", message)].append(message)
    lines = []
    for alike in kinds.values():
        lines += alike[:_NUM_SHOWN]
        if len(alike) > _NUM_SHOWN:
            lines.append(f"and {len(alike) - _NUM_SHOWN:,} more, in inspection.json (--out)")
    return lines


def _in_turn(source: ImageSource) -> Iterator[int]:
    """Yields each image once: one of each label in turn, from the rarest on, and those without a label last."""
    queues = [iter(np.flatnonzero(column).tolist()) for column in source.class_labels.T]
    order = np.argsort(source.class_labels.sum(axis=0, dtype=np.int64), kind="stable")
    waiting, seen = [queues[k] for k in order], set()
    while waiting:
        for queue in list(waiting):
            i = next((i for i in queue if i not in seen), None)
            if i is None:
                waiting.remove(queue)
            else:
                seen.add(i)
                yield i
    yield from (i for i in range(len(source.file_names)) if i not in seen)


def _unnamed_files(source: ImageSource) -> list[str]:
    if isinstance(source, LabelledImages) and isinstance(source.table, MetadataFolder):
        return source.table.unnamed_files()
    return []


def _named(source: ImageSource, groups: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[source.file_names[i] for i in group] for group in groups]


def _sorted_counts(numbers: Sequence[int]) -> dict[str, int]:
    return {str(number): count for number, count in sorted(Counter(numbers).items())}


def _listed(words: Sequence[str]) -> str:
    more = len(words) - _NUM_SHOWN
    return ", ".join(words[:_NUM_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _shortened(counts: dict[str, int]) -> str:
    return _listed([f"{name} ({count:,})" for name, count in counts.items()])
