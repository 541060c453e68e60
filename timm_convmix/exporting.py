"""A classifier to one file for deployment: ONNX or torch.export, dynamic batch, with what its user has to know inside.

What is kept has proved itself: the file was opened again and gave eager's logits, on random input and on real images.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from itertools import chain, islice, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]
from timm.data import create_transform
from timm.models import get_model_args
from torch import Tensor, nn

from timm_convmix.convmix import manifest
from timm_convmix.errors import ExportError, ExtraError, InputError
from timm_convmix.inspection import resized
from timm_convmix.prediction import (
    MODES,
    default_model,
    find_images,
    input_config,
    label_names,
    load_model,
    read_images,
    registered_name,
)
from timm_convmix.saliency import as_convmix
from timm_convmix.version import __version__
from timm_convmix.weights.hub import WEIGHTS_NAME
from timm_convmix.weights.measuring import evaluate, open_dataset

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
"""Format -> ending of its file."""
INPUT, OUTPUT = "images", "logits"
TRACED = 2
"""Images in the batch that a model is traced with; 0 and 1 mean something special to torch.export."""
MAX_BATCH = 2**31 - 1
"""Images in the largest batch; torch 2.7 and older do not trace every model without a limit."""
ONNX_TORCH = "2.7"
"""The oldest torch that translates batch norm to ONNX, as the extra ``export`` declares."""
RANDOM = (1, 3)
"""Sizes of the random batches that a file is compared on."""
BATCH = 32
"""Real images a step."""
TOLERANCE = 1e-3
"""By how much a logit may differ from eager's, in parts of eager's largest: that of the manifest's probes. Rounding
alone makes about 1e-6."""
ONNX_LIMIT = 2**31
"""Bytes that a protobuf file may have."""
CALIBRATION = 512
"""Images that are taken of a data set."""

Run = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) to logits (B, classes)."""


def export(
    model: str | Path | nn.Module | None = None,
    *,
    to: str = "onnx",
    images: str | Path | Iterable[str | Path] = (),
    data_dir: str | Path | None = None,
    output: str | Path | None = None,
    int8: bool = False,
    max_loss: float = 1.0,
    size: tuple[int, int] | None = None,
    arch: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a classifier as one file that takes batches of any size: float32 ``images`` to ``logits``.

    Args:
        model: See ``load_model``; or a timm model on the CPU, which is put into eval mode.
        to: A key of ``SUFFIXES``.
        images: Real images to compare on, and to take the ranges of int8 from: files, and folders whose image files are
            taken, those of subfolders too.
        data_dir: Holds ``train/CLASS/*``, of which ``CALIBRATION`` images are taken where none are named, and for int8
            ``validation/CLASS/*``, which the accuracy is measured on.
        output: The file, which is replaced; or a folder for ``NAME.onnx``, ``NAME.int8.onnx`` or ``NAME.pt2``. None is
            the current one.
        int8: Quantise weights and activations.
        max_loss: Points of top-1 that this may cost.
        size: Height and width of the images; None is what the model is made for.
        arch: See ``load_model``.
        quiet: Show no progress bar.

    Returns:
        A row: file, format, bytes, sha256, images (real ones that were compared), and the largest difference of a
        logit to eager, difference_random and difference_images; of int8 also top1 (eager's, in percent), top1_int8,
        and measured (images).

    Raises:
        ExportError: The model cannot be exported, or its file does not give the same; nothing is written.
        InputError: There are no real images, one cannot be read, or the arguments do not go together.
        ExtraError: ONNX is not installed, or torch is too old for it.
        ConvMixError: The model or the data cannot be loaded.
    """
    check_request(to, data_dir, int8=int8)
    net: Any = model if isinstance(model, nn.Module) else load_model(model, arch=arch)
    net.eval()
    config = input_config(net)
    if size:
        config = config | dict(input_size=(config["input_size"][0], *size))
        resized(as_convmix(net), size)
    source = None if isinstance(model, nn.Module) else str(model or default_model())
    facts = describe(net, config, source)
    photos = Photos(find_photos(images, data_dir, net), config, quiet=quiet)
    held_out = open_split(data_dir, "validation", net) if int8 and data_dir else None
    place = choose_place(output, facts["model"], ".int8.onnx" if int8 else SUFFIXES[to])

    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
        file = Path(temporary) / f"model{SUFFIXES[to]}"
        write(net, config["input_size"], facts, file)
        differences = compare(net, file, photos)
        check_same(differences, place.name)
        measured = {}
        if int8:
            quantize(file, photos, facts)
            differences = compare(net, file, photos)
            measured = measure(net, file, held_out, config, quiet=quiet)
            check_loss(measured, max_loss, place.name)
        data = file.read_bytes()
        row = dict(file=str(place), format=to, bytes=len(data), sha256=sha256(data).hexdigest())
        row |= dict(
            images=len(photos.files), **{f"difference_{name}": each.largest for name, each in differences.items()}
        )
        file.replace(place)
    return row | measured


def check_request(to: str, data_dir: str | Path | None, *, int8: bool) -> None:
    """Refuse what cannot be done before anything is computed; arguments as of ``export``."""
    if to not in SUFFIXES:
        raise InputError(f"to={to!r} is none of {', '.join(SUFFIXES)}.")
    if int8 and (to != "onnx" or data_dir is None):
        raise InputError("int8 is a kind of onnx, and needs a data set (data_dir, --data): it is measured on images.")
    missing = [f"torch {ONNX_TORCH} or newer"] if torch.__version__ < ONNX_TORCH else []
    missing += [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if to == "onnx" and missing:
        raise ExtraError(f"ONNX needs {', '.join(missing)}: pip install 'timm-convmix[export]'.")


def choose_place(output: str | Path | None, model: Mapping[str, Any], suffix: str) -> Path:
    """The file to write, its folder made; arguments as of ``export``, and as in ``describe``."""
    place = Path(output or "")
    if place.is_dir():
        place /= f"{model['architecture']}{'.' + model['tag'] if model['tag'] else ''}{suffix}"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


# What goes with it ----------------------------------------------------------------------------------------------------


def describe(net: Any, config: Mapping[str, Any], source: str | None) -> dict[str, Any]:
    """What the user of a file has to know of it: JSON values.

    Args:
        net: A timm model.
        config: See ``input_config``.
        source: What it was loaded from, as of ``load_model``; None where it was not.

    Returns:
        labels, a name a class; preprocessing, arguments of ``timm.data.create_transform``; model; weights, with the
        sha256 of their file where that is known; versions.
    """
    cfg = net.pretrained_cfg
    registered = source and registered_name(source)
    model = dict(architecture=cfg["architecture"], tag=cfg.get("tag") if registered else None)
    return dict(
        labels=label_names(net),
        preprocessing=dict(config),
        model=model | get_model_args(net) | dict(num_classes=net.num_classes),
        weights=dict(source=source, sha256=source and source_digest(cfg)),
        versions=dict(timm_convmix=__version__, timm=timm.__version__, torch=str(torch.__version__)),
    )


def source_digest(cfg: Mapping[str, Any]) -> str | None:
    """The sha256 of the weight file that a model was loaded from; None where it is not at hand.

    Args:
        cfg: The model's ``pretrained_cfg``.
    """
    name = f"{cfg['architecture']}.{cfg.get('tag')}"
    if cfg.get("file"):
        path = Path(cfg["file"])
        path = path / WEIGHTS_NAME if path.is_dir() else path
        return sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    if cfg.get("source") != "hf-hub" and name in manifest:
        return manifest[name].sha256
    repo, _, revision = (cfg.get("hf_hub_id") or "").partition("@")
    filename = cfg.get("hf_hub_filename") or WEIGHTS_NAME
    cached = try_to_load_from_cache(repo, filename, revision=revision or None) if repo else None
    return sha256(Path(cached).read_bytes()).hexdigest() if isinstance(cached, str) else None


# Real images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photos:
    """Real images.

    Args:
        files: Of the images.
        config: How they are prepared, see ``input_config``.
        quiet: Show no progress bar.
    """

    files: list[Path]
    config: dict[str, Any]
    quiet: bool = False

    def batches(self, purpose: str) -> Iterator[Tensor]:
        """The images as a model reads them, (B, C, H, W), B up to ``BATCH``.

        Args:
            purpose: For the progress bar.

        Raises:
            InputError: A file cannot be read.
        """
        transform = create_transform(**self.config)
        progress = tqdm(self.files, desc=purpose, unit="image", disable=self.quiet or None)
        tensors = (transform(image) for _, image in read_images(progress, MODES[self.config["input_size"][0]]))
        while batch := list(islice(tensors, BATCH)):
            yield torch.stack(batch)


def find_photos(images: str | Path | Iterable[str | Path], data_dir: str | Path | None, net: Any) -> list[Path]:
    """The files of real images; arguments as of ``export``, and the model."""
    files = list(find_images([images] if isinstance(images, str | Path) else images))
    if not files and data_dir is not None:
        files = balanced_sample(open_split(data_dir, "train", net).reader.samples, CALIBRATION)
    if not files:
        raise InputError("there is no real image to compare on: name some (images, --images), or a data set (--data).")
    return files


def open_split(data_dir: str | Path, split: str, net: Any) -> Any:
    """A part of a data set, as of ``open_dataset``, whose classes are as many as the model's."""
    dataset = open_dataset(data_dir, split, channels=net.in_chans)
    if (found := len(dataset.reader.class_to_idx)) != net.num_classes:
        raise InputError(f"{data_dir}: {split} holds {found} classes, and the model knows {net.num_classes}.")
    return dataset


def balanced_sample(samples: list[tuple[str, int]], count: int) -> list[Path]:
    """A random sample, the same every time, to which the classes give in turn.

    Args:
        samples: File and class of each image.
        count: Images that are wanted.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    classes: dict[int, list[Path]] = {}
    for file, index in (samples[position] for position in order):
        classes.setdefault(index, []).append(Path(file))
    turns = chain.from_iterable(zip_longest(*(classes[index] for index in sorted(classes))))
    return list(islice(filter(None, turns), count))


# The file -------------------------------------------------------------------------------------------------------------


def write(net: nn.Module, input_size: tuple[int, int, int], facts: Mapping[str, Any], file: Path) -> None:
    """Trace a model and write it.

    Args:
        net: In eval mode.
        input_size: (C, H, W) of an image.
        facts: See ``describe``; each becomes a JSON text inside.
        file: To write; its ending is the format.

    Raises:
        ExportError: The model cannot be traced, or is too large for the format.
    """
    name = f"{facts['model']['architecture']} at {input_size[1]}x{input_size[2]}"
    size = sum(tensor.nbytes for tensor in net.state_dict().values())
    if file.suffix == ".onnx" and size >= ONNX_LIMIT:
        raise ExportError(f"{name}: its {size} bytes are more than one ONNX file holds; take --to torch-export.")
    shapes = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about torch's own insides
            program = torch.export.export(net, (torch.randn(TRACED, *input_size),), dynamic_shapes=shapes)
            if file.suffix == ".onnx":
                write_onnx(program, facts, file)
            else:
                torch.export.save(program, file, extra_files=texts(facts))
    except Exception as error:  # what the tracer meets in a model comes in many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"{name} cannot be exported by torch {torch.__version__} ({reason}). A newer torch may be able to."
        ) from error


def write_onnx(program: torch.export.ExportedProgram, facts: Mapping[str, Any], file: Path) -> None:
    """Translate what was traced to ONNX and write it, the weights inside."""
    import onnx  # noqa: PLC0415  (an extra)

    names: dict[str, Any] = dict(input_names=[INPUT], output_names=[OUTPUT])
    translated = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    model = translated.model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(model, texts(facts))
    onnx.save(model, file)


def texts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Each value as JSON; what JSON has no words for, a layer's class in a model's arguments, as Python prints it."""
    return {name: json.dumps(value, default=str) for name, value in facts.items()}


def open_file(file: Path) -> Run:
    """What a file computes, on the CPU."""
    if file.suffix != ".onnx":
        return torch.export.load(file).module()
    import onnxruntime  # noqa: PLC0415  (an extra)

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


# Its proof ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far logits are from eager's.

    Args:
        largest: Absolute; not a number where one of them is none.
        scale: The largest magnitude of eager's logits.
    """

    largest: float
    scale: float


def compare(net: nn.Module, file: Path, photos: Photos) -> dict[str, Difference]:
    """Compare a file with eager on random input, in batches of the sizes ``RANDOM``, and on real images."""
    run = open_file(file)
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(count, *photos.config["input_size"], generator=generator) for count in RANDOM)
    return dict(random=difference(net, run, noise), images=difference(net, run, photos.batches("compare")))


@torch.no_grad()
def difference(net: nn.Module, run: Run, batches: Iterable[Tensor]) -> Difference:
    """Compare over batches of images, (B, C, H, W)."""
    pairs = ((net(images), run(images)) for images in batches)
    found = torch.stack([torch.stack([(own - wanted).abs().max(), wanted.abs().max()]) for wanted, own in pairs])
    largest, scale = found.amax(dim=0).tolist()  # not Python's max, which may pass over what is no number
    return Difference(largest, scale)


def check_same(differences: Mapping[str, Difference], name: str) -> None:
    """Judge what was compared.

    Args:
        differences: See ``compare``.
        name: Of the file, for the message.

    Raises:
        ExportError: A logit differs by more than ``TOLERANCE``.
    """
    for kind, found in differences.items():
        if not found.largest <= TOLERANCE * found.scale:
            raise ExportError(
                f"{name}: on {kind.replace('random', 'random input')} a logit differs by {found.largest:.3g} from"
                f" eager, whose largest is {found.scale:.3g}; {TOLERANCE:g} of that is allowed, nothing was written."
            )


# int8 -----------------------------------------------------------------------------------------------------------------


def quantize(file: Path, photos: Photos, facts: Mapping[str, Any]) -> None:
    """Turn an ONNX file into one of int8: static, a scale a channel of weights, as QuantizeLinear/DequantizeLinear.

    Weights take 7 of the 8 bits, as ONNX Runtime advises for processors without VNNI: two products of 8 bits each
    overflow the 16 bits that AVX2 adds them in (microsoft/onnxruntime#5849).

    Args:
        file: Is replaced.
        photos: To take the ranges of activations from.
        facts: See ``describe``.
    """
    import onnx  # noqa: PLC0415  (an extra)
    from onnxruntime.quantization import QuantType, quantize_static  # noqa: PLC0415
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    prepared = file.with_name("prepared.onnx")
    quant_pre_process(file, prepared, skip_symbolic_shape=True)  # which does not know ReduceMax; ONNX's own does
    batches = ({INPUT: batch.numpy()} for batch in photos.batches("calibrate"))
    quantize_static(
        prepared,
        file,
        SimpleNamespace(get_next=lambda: next(batches, None)),
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    model = onnx.load(file)
    onnx.helper.set_model_props(model, texts(facts))
    onnx.save(model, file)


class Runner(nn.Module):
    """What a file computes, for ``evaluate``."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.place = nn.Parameter(torch.empty(0))  # where to compute is asked of a parameter

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, classes)."""
        return self.run(images)


def measure(net: Any, file: Path, dataset: Any, config: dict[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """The accuracy of eager and of a file on a data set, as ``export`` states it."""
    eager, own = (evaluate(each, dataset, config, quiet=quiet) for each in (net, Runner(open_file(file))))
    return dict(top1=eager.top1, top1_int8=own.top1, measured=eager.count)


def check_loss(measured: Mapping[str, Any], max_loss: float, name: str) -> None:
    """Judge what was measured.

    Args:
        measured: See ``measure``.
        max_loss: See ``export``.
        name: Of the file, for the message.

    Raises:
        ExportError: int8 costs more.
    """
    before, after = measured["top1"], measured["top1_int8"]
    if not before - after <= max_loss:
        raise ExportError(
            f"{name}: int8 costs {before - after:.2f} points of top-1 ({before:.2f} to {after:.2f} % of"
            f" {measured['measured']} images), and {max_loss:g} are allowed; nothing was written."
        )
