"""The commands on data and runs: ``e3va data``, ``train``, ``eval``, ``predict``, ``export``."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from e3va.data.folder import Data
from e3va.data.images import SUFFIXES, check_images, list_images, read_image
from e3va.data.instances import CLIPPED
from e3va.files import write_json
from e3va.runs import pictures
from e3va.runs.folder import (
    CONFIG,
    CURVES,
    DATA_PAGE,
    EVALUATION,
    METRICS,
    PREDICTED,
    PREDICTIONS,
    Found,
    check_same_data,
    engine_of,
    evaluation_after,
    folder_for,
    is_run,
    map_values,
    read_metrics,
    validation_images,
    write_data,
)
from e3va.runs.plan import Plan
from e3va.words import quoted


def default_engine() -> str:
    """ "detectron2" where it is installed, else "torchvision"."""
    return "detectron2" if importlib.util.find_spec("detectron2") else "torchvision"


def config_of_plan(path: Path, wanted: str | None = None) -> tuple[str, str]:
    """The config file that is ``path``, or in that folder of a run, and the engine that it is of.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another engine's than ``wanted`` (default: any), or damaged.
    """
    path = path / CONFIG if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no config file {str(path)!r}: give one with --config")
    found = engine_of(path)
    if wanted and wanted != found:
        raise ValueError(f"{path} is a config of {found}, not of {wanted}")
    return str(path), found


def engine(name: str) -> Any:
    """The module that trains, evaluates, predicts and exports by ``name``."""
    return importlib.import_module(f"e3va.{name}.engine")


def describe(data: Data) -> str:
    """The report on data, for reading."""
    report = data.report()
    splits = ", ".join(f"{name} {number}" for name, number in report["splits"].items())
    lines = [
        f"{report['format']}, for {report['task']}: {report['images']} images ({splits}), "
        f"{report['instances']} instances of {len(report['classes'])} classes"
    ]
    found = {name: number for name, number in report["classes"].items() if number}
    width = max(map(len, found), default=0)
    lines += [f"  {name:{width}}  {number}" for name, number in found.items()]
    if missing := [name for name in report["classes"] if name not in found]:
        lines.append(f"  without an instance: {quoted(missing)}")
    lines.append(_sizes(data))
    if empty := sum(len(split.empty()) for split in data.distinct.values()):
        what = "a labelled pixel" if data.task == "semantic" else "an instance"
        lines.append(f"  {empty} images without {what}")
    told = [("dropped", why, number) for why, number in report["dropped"].items()]
    if report["clipped"]:
        told.append(("clipped", CLIPPED, report["clipped"]))
    for what, why, number in told:
        example = report["examples"].get(why)
        lines.append(f"  {what} {number}: {why}" + (f", such as {example}" if example else ""))
    lines += [f"  note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def show(data: Data, output: Path, json_file: Path | None) -> None:
    """Print the report, write the page of pictures, and the report as JSON where it is wanted."""
    print(describe(data))
    if json_file:
        write_json(json_file, data.report())
    pictures.data_page(data, output)
    print(f"pictures: {output}")


def prepare(
    data: Data, plan: Plan, name: str, folder: Path, *, resume: bool, overrides: Sequence[str]
) -> Any:
    """Make ``folder`` the folder of a run that :func:`train` can begin with, or, to be resumed, see
    that it is of such a run: config.yaml, the data as they are trained on, and data.png.

    Args:
        plan: what is trained; name: of the engine; overrides: of its settings: KEY, VALUE, ….

    Returns:
        The config, as the engine has it.

    Raises:
        KeyError, ValueError: the folder holds a run already, and it is not to be resumed or is
            another; or a setting is wrong.
        FileNotFoundError, ImportError: there are no such weights.
    """
    if resume:
        check_same_data(data, folder / "data")
        if (folder / CONFIG).is_file() and (other := engine_of(folder)) != name:
            raise ValueError(f"{folder} is a run by {other}: resume it by --engine {other}")
    elif (folder / CONFIG).exists():
        go_on = f"{command('train', folder)}{' --resume' * _has_begun(folder)}"
        raise ValueError(
            f"{folder} holds a run already: go on with it by {go_on}, or name another by --output"
        )
    by = engine(name)
    config = by.config_of(data, plan, folder, overrides)
    if resume:
        by.check_same(config, folder)
        if _finished(folder, by.iterations_of(config)) is not None:
            return config
    by.check(config)
    write_data(data, folder / "data")
    if not (folder / CONFIG).exists():
        by.write_config(config, data, folder)
    pictures.data_page(data, folder / DATA_PAGE)
    return config


def read(folder: Path, overrides: Sequence[str]) -> Any:
    """The config of the run that lies in ``folder``, as its engine has it.

    Raises:
        KeyError, ValueError: the config is damaged, or a setting is wrong.
    """
    return engine(engine_of(folder)).read_config(folder, overrides)


def train(folder: Path, config: Any, *, resume: bool) -> dict[str, float]:
    """Train the run in ``folder``; returns the last evaluation's metrics. One that has finished is
    left as it is.

    Args:
        folder: as :func:`prepare` made it.
        config: as :func:`prepare` or :func:`read` gave it; config.yaml tells it when it begins.
        resume: go on where it has stopped.

    Raises:
        KeyError, ValueError: the run has begun and is not to be resumed, or a setting is wrong.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was trained is kept, and the message says how to
            go on.
    """
    by = engine(engine_of(folder))
    if resume:
        by.check_same(config, folder)
        iterations = by.iterations_of(config)
        if (done := _finished(folder, iterations)) is not None:
            print(f"{folder} has finished its {iterations} iterations, and is left as it is")
            return done
        if not by.has_checkpoint(folder):
            print(f"{folder} has no checkpoint yet: from the start")
    elif _has_begun(folder):
        raise ValueError(f"{folder} holds a run that has begun: go on with it by --resume")
    try:
        metrics = by.train(config, folder, resume=resume)
        draw_examples(folder, validation_images(folder / "data"), folder / PREDICTIONS)
        pictures.curves(read_metrics(folder / METRICS), folder / CURVES)  # the last, see _finished
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on by {command('train', folder)} --resume") from None
    return metrics


def _has_begun(folder: Path) -> bool:
    return (folder / METRICS).exists()


def _finished(folder: Path, iterations: int) -> dict[str, float] | None:
    """The last metrics of a run of so many iterations, if :func:`train` has come to its end."""
    metrics, curves = folder / METRICS, folder / CURVES
    if not (metrics.is_file() and curves.is_file()):
        return None
    if curves.stat().st_mtime_ns < metrics.stat().st_mtime_ns:  # it went on, and was stopped
        return None
    return evaluation_after(read_metrics(metrics), iterations)


def command(name: str, folder: Path) -> str:
    """What applies the command ``name`` to the run in ``folder``, to be typed."""
    return f"e3va {name} {shlex.quote(str(folder))}"


def evaluate(folder: Path, data: Data | None, name: str) -> dict[str, float]:
    """Score a run's model on the validation split of ``data`` (default: the run's own), and write
    evaluation.json and predictions.png into ``folder``, of other data into its folder
    ``evaluation/NAME``, which :func:`folder_for` numbers.

    Args:
        name: of the data; of the run's own it has no meaning.

    Raises:
        ValueError: the data have other classes, or the run has nothing to be evaluated on.
    """
    by = engine(engine_of(folder))
    if data is not None and data.classes != (trained := by.classes_of(folder)):
        raise ValueError(
            f"the data have the classes {quoted(data.classes)}, but {folder} has trained "
            f"{quoted(trained)} (see --classes)"
        )
    place, own = folder, folder / "data"
    if data is not None:
        place = own = folder_for(data, folder / EVALUATION, name)
        write_data(data, own)
    metrics = by.evaluate(folder, None if data is None else place)
    write_json(place / "evaluation.json", metrics)
    print(f"results: {place / 'evaluation.json'}")
    if data is not None or is_run(folder):  # a run from Python has no such record
        draw_examples(folder, validation_images(own), place / PREDICTIONS)
        print(f"pictures: {place / PREDICTIONS}")
    return metrics


def draw_examples(folder: Path, images: Sequence[Path], target: Path) -> None:
    """Write a page of what a run finds on some images."""
    by = engine(engine_of(folder))
    find, classes = by.predictor(folder), by.classes_of(folder)
    drawn = []
    for path in images[: pictures.EXAMPLES]:
        pixels, size = pictures.read_cell(path)
        drawn.append((path.name, draw(pixels, find(pixels), classes, size=size)))
    pictures.save(pictures.page(drawn), target)


def draw(
    pixels: np.ndarray,
    found: Found,
    classes: Sequence[str],
    least: float = 0.5,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """An image with what was found on it, scores below ``least`` left out; ``size`` as
    :func:`e3va.runs.pictures.draw_instances`."""
    if found.labels is not None:
        return pictures.draw_map(pixels, found.labels, classes, size)
    shown = [instance for instance in found.instances if instance["score"] >= least]
    return pictures.draw_instances(pixels, shown, classes, size)


def predict(folder: Path, sources: Sequence[str], output: Path | None, min_score: float) -> str:
    """Predict on images; writes a picture of each, and predictions.json.

    Args:
        folder: the run's.
        sources: files, folders, globs, or "-" for names on standard input, a line each.
        output: folder to write to (default: ``predictions`` in the run's); images of a folder keep
            their places below it. Semantic maps go to ``NAME_classes.png``, with the values of the
            run's own maps where it knows them, else positions in the classes.
        min_score: of what is drawn and written.

    Returns:
        What was written and found, in a line.

    Raises:
        FileNotFoundError: an image is missing; nothing has been predicted then.
        ValueError: there is no image, one cannot be read, or two pictures would have one name.
    """
    if not 0 <= min_score <= 1:
        raise ValueError(f"--min-score must be in [0, 1], got {min_score}")
    images = _images(sources)
    output = output or folder / PREDICTED
    targets = {(output / place.with_suffix(".png")).resolve() for _, place in images}
    if any(path.resolve() in targets for path, _ in images):
        raise ValueError(f"{output} holds the images themselves: name another folder by --output")
    by = engine(engine_of(folder))
    check_images([path for path, _ in images])
    find, names = by.predictor(folder), by.classes_of(folder)
    values = map_values(folder / "data")
    entries: list[dict[str, Any]] = []
    scores: list[float] = []
    try:
        for path, place in tqdm(images, unit="image", disable=None):
            pixels = read_image(path)
            found = find(pixels)
            target = output / place.with_suffix(".png")
            size = pictures.enlarged(pixels)
            pictures.save(draw(pixels, found, names, min_score, size), target)
            height, width = pixels.shape[:2]
            entry: dict[str, Any] = {"file_name": str(path), "height": height, "width": width}
            if found.labels is not None:
                classes = target.with_name(f"{target.stem}_classes.png")
                labels = found.labels if values is None else values[found.labels]
                pictures.save(Image.fromarray(labels), classes)
                entry["classes_file"] = str(classes)
            else:
                scores += [i["score"] for i in found.instances]
                entry["instances"] = [
                    {
                        "category": names[i["label"]],
                        **{k: v for k, v in i.items() if k != "label"},
                    }
                    for i in found.instances
                    if i["score"] >= min_score
                ]
            entries.append(entry)
    finally:  # what was found before Ctrl-C, or an image that is damaged within
        if entries:
            write_json(output / f"{PREDICTED}.json", entries)
    written = f"{len(entries)} pictures and {PREDICTED}.json are in {output}"
    return written if "classes_file" in entries[0] else f"{written}: {_count(scores, min_score)}"


def _count(scores: Sequence[float], least: float) -> str:
    """How many objects have been found, and, where there is none, how some would be."""
    number = sum(score >= least for score in scores)
    text = f"{number} objects at {least:g} or above"
    if scores and not number:
        best = math.floor(100 * max(scores)) / 100
        text += f"; the best is {best:g}: try --min-score {best / 2:.1g}"
    return text


def _images(sources: Sequence[str]) -> list[tuple[Path, Path]]:
    """Files, and where below the output their pictures go."""
    found = [pair for source in sources for pair in _expand(source)]
    if not found:
        raise ValueError(f"no image at {', '.join(sources)}: of a folder are taken {SUFFIXES}")
    places: dict[Path, Path] = {}
    for path, place in found:
        stem = place.with_suffix("")
        if places.setdefault(stem, path) != path:
            raise ValueError(
                f"{places[stem]} and {path} have one name, and so would their pictures: name a "
                "folder above both, which keeps their places"
            )
    return list(dict.fromkeys(found))


def _expand(source: str) -> Iterator[tuple[Path, Path]]:
    if source == "-":
        for line in filter(None, map(str.strip, sys.stdin)):
            yield from _expand(line)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        for image in list_images(path):
            yield image, image.relative_to(path)
    elif path.is_file():
        yield path, Path(path.name)
    elif glob.has_magic(source):
        for name in sorted(glob.glob(os.path.expanduser(source), recursive=True)):
            if Path(name).suffix.lower() in SUFFIXES:
                yield Path(name), Path(Path(name).name)
    else:
        raise FileNotFoundError(f"no image at {source}")


def _sizes(data: Data) -> str:
    splits, boxes = data.distinct.values(), []
    if data.task == "semantic":
        sizes = check_images([image for split in splits for image, _ in split.pairs])
    else:
        sizes = [(image["height"], image["width"]) for split in splits for image in split.images]
        boxes = sorted(min(a["bbox"][2:]) for split in splits for a in split.annotations)
    heights, widths = map(_range, zip(*sizes, strict=True))
    text = f"  images {heights} pixels high, {widths} wide"
    if boxes:
        text += f", boxes' shorter sides {boxes[0]:.0f} to {boxes[-1]:.0f}, half of them below "
        text += f"{boxes[len(boxes) // 2]:.0f}"
    return text


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"
