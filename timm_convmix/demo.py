"""The web demo (the extra ``demo``, built with Gradio): an image's classes, its maps, and how much each tap counts."""

import html
import json
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from timm_convmix.errors import ConvMixError, ExtraError, InputError
from timm_convmix.inspection import Classifier, compare_cams, load_pair
from timm_convmix.pictures import draw_cams, new_figure, short
from timm_convmix.prediction import default_model, find_images, read_image
from timm_convmix.saliency import mixes, tap_contributions

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
PORT = 7860
MAX_MEGABYTES = 20
"""Of an uploaded file."""
MAX_PIXELS = 50_000_000
"""Of an image, as its header says: decoded, they take three bytes each."""
MAX_WAITING = 50
"""Requests in the queue; who comes after them is told to come back."""
KEPT = 3600
"""Seconds until an uploaded file is deleted."""
TOP = 5
PREDICTED = -1
"""Of the choice of a class: the one that the model predicts."""

INTRO = """# Where a network looks
A ConvMix network beside its plain baseline. An image goes to the machine that serves this page and nowhere else; it is
deleted there after an hour."""
TAPS = """### What each stage contributes
By how much the logit of the class falls if the mixer gets zeros instead of what it taps there; a negative number speaks
against the class. The stages share what they say, so the numbers do not add up to what the mixer does."""


def build(models: Sequence[str | Path] = (), *, examples: str | Path | None = None) -> "gradio.Blocks":
    """Load models, each with what stands beside it (``load_pair``), and build the page for them.

    Args:
        models: See ``load_model``; none is ``default_model``.
        examples: An image file or a folder of them, to choose from.

    Raises:
        ExtraError: Gradio or matplotlib is not installed.
        ConvMixError: A model cannot be loaded.
    """
    gr = import_gradio()
    new_figure(1, 1)  # before anything is loaded in vain
    named: Sequence[str | Path | None] = models or [default_model()]
    pairs = {str(name): load_pair(name) for name in named}
    first = next(iter(pairs))

    def look(file: str | None, model: str, wanted: int) -> list[Any]:
        try:
            return show(gr, pairs[model], file, None if wanted == PREDICTED else wanted)
        except ConvMixError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    with gr.Blocks(title="timm-convmix", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        gr.Markdown(INTRO)
        with gr.Row():
            upload = gr.File(label="Image", file_types=["image"], height=150)
            with gr.Column():
                model = gr.Dropdown(list(pairs), label="Model", visible=len(pairs) > 1)
                wanted = gr.Dropdown(**class_choices(pairs[first][0]), label="Class", interactive=True)
        if examples:
            files = list(map(str, find_images([examples])))
            gr.Examples(files, upload, example_labels=[Path(file).stem for file in files])
        with gr.Column(visible=False) as results:
            with gr.Row():
                tops = [gr.Label(num_top_classes=TOP, show_heading=False) for _ in range(2)]
            maps = gr.Plot(show_label=False)
            with gr.Column() as contributions:
                gr.Markdown(TAPS)
                taps = gr.Dataframe(headers=["stage", "the logit falls by"], interactive=False, buttons=[])
        # Grad-CAM and the taps hang hooks into a network, and visitors share it: one at a time, none past the queue.
        event: Mapping[str, Any] = dict(
            fn=look,
            inputs=[upload, model, wanted],
            outputs=[results, *tops, maps, contributions, taps],
            concurrency_limit=1,
            concurrency_id="networks",
        )
        gr.on([upload.change, wanted.input], **event, api_name="look")
        model.input(
            lambda name: gr.Dropdown(**class_choices(pairs[name][0])), model, wanted, api_visibility="private"
        ).then(**event, api_visibility="private")
    return blocks.queue(api_open=False, max_size=MAX_WAITING)


def serve(
    blocks: "gradio.Blocks",
    *,
    host: str = HOST,
    port: int = PORT,
    max_megabytes: int = MAX_MEGABYTES,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Show the page to whoever asks, until the process is interrupted.

    Nothing but the page's own files and what was uploaded is served, and nothing is fetched.

    Args:
        blocks: Of ``build``.
        host: Address to listen at; '0.0.0.0' is every one that the machine has.
        port: To listen at.
        max_megabytes: That an uploaded file may have.
        on_ready: Called with the address of the page as soon as it is there.

    Raises:
        OSError: Nothing can listen there.
    """
    gr = import_gradio()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none that is fetched
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{max_megabytes}mb",
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme.set(block_info_text_color="*neutral_600"),
            app_kwargs=dict(dependencies=[fetch_nothing()]),
        )
    except (OSError, OverflowError) as error:
        raise OSError(
            f"nothing can listen at {host}:{port}: the port is taken or is none, or the host is none of here."
        ) from error
    if on_ready:
        on_ready(str(blocks.local_url))
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


def import_gradio() -> Any:
    """Gradio itself.

    Raises:
        ExtraError: It is not installed.
    """
    try:
        import gradio  # noqa: PLC0415  (an extra: everything else works without it)
    except ImportError as error:
        raise ExtraError("the demo needs gradio: pip install 'timm-convmix[demo]'.") from error
    return gradio


def fetch_nothing() -> Any:
    """A dependency of every request: no address may stand where a file should, because Gradio would fetch it."""
    from fastapi import Depends, HTTPException, Request  # noqa: PLC0415  (it comes with Gradio)

    async def check(request: Request) -> None:
        named = request.scope["path"]
        if request.method == "POST" and not request.headers.get("content-type", "").startswith("multipart/"):
            named += json.dumps(json.loads(await request.body() or "null"))
        if "/file=http" in named or '"path": "http' in named:
            raise HTTPException(403, "An address is no file: upload the image.")

    return Depends(check)


def class_choices(classifier: Classifier) -> dict[str, Any]:
    """What a dropdown of a model's classes offers, and what it says about them."""
    labels = classifier.labels
    known = shorten(", ".join(labels), 150, placeholder=" ...")
    return dict(
        choices=[("what the model predicts", PREDICTED), *zip(labels, range(len(labels)), strict=True)],
        value=PREDICTED,
        info=f"{classifier.name} knows {len(labels)} classes and no others: {known}",
    )


def show(gr: Any, pair: Sequence[Classifier], file: str | None, wanted: int | None) -> list[Any]:
    """Everything that is found in an image, as new values of the page's results; no file hides them.

    Args:
        gr: Gradio.
        pair: Of ``load_pair``.
        file: That was uploaded.
        wanted: Index of a class; None is the predicted one.

    Raises:
        InputError: The file is no image, or too large a one.
        ConvMixError: A model has no maps, see ``grad_cam``.
    """
    if file is None:
        return [gr.Column(visible=False), *[gr.skip()] * 5]
    image = open_upload(Path(file))
    cams = compare_cams(pair, image, wanted)
    tops = [gr.Label(probabilities(each, image), label=each.name, visible=True) for each in pair]
    first = pair[0]
    mixing = mixes(first.net)
    return [
        gr.Column(visible=True),
        *[*tops, gr.Label(visible=False)][:2],
        draw_cams(cams),
        gr.Column(visible=mixing),
        tap_rows(first, image, wanted) if mixing else gr.skip(),
    ]


def open_upload(path: Path) -> Image.Image:
    """Decode an uploaded image file, RGB, once its header says that it is not too large.

    Raises:
        InputError: It is no image, or has too many pixels; the message is for the one who uploaded it.
    """
    if count_pixels(path) > MAX_PIXELS:
        raise InputError(f"{path.name} has more than {MAX_PIXELS:,} pixels: make it smaller.")
    try:
        return read_image(path)
    except InputError as error:
        raise InputError(f"{path.name}: {str(error).replace(str(path), path.name)}") from error


def count_pixels(path: Path) -> float:
    """Pixels of an image file, as its header says; 0 where it says nothing, which ``read_image`` finds words for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return opened.width * opened.height
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return float("inf")
    except Exception:  # noqa: BLE001  (Pillow's decoders meet bad bytes with errors of every kind)
        return 0


@torch.inference_mode()
def probabilities(classifier: Classifier, image: Image.Image) -> dict[str, float]:
    """Of the most probable classes of an RGB image; labels that several classes share carry their index."""
    labels = classifier.labels
    best = classifier.net(classifier.prepare(image))[0].float().softmax(0).topk(min(TOP, len(labels)))
    names = [labels[i] if labels.count(labels[i]) == 1 else f"{labels[i]} ({i})" for i in best.indices.tolist()]
    return dict(zip(names, best.values.tolist(), strict=True))


def tap_rows(classifier: Classifier, image: Image.Image, wanted: int | None) -> list[list[str]]:
    """Name of each tap, and by how much the logit falls without it, see ``tap_contributions``."""
    _, _, drops = tap_contributions(classifier.net, classifier.prepare(image), wanted)
    names = [short(classifier.net.feature_info[stage]["module"]) for stage in classifier.net.stages]
    return [[name, f"{drop:+.3f}"] for name, drop in zip(names, drops[0].tolist(), strict=True)]
