"""Gradio app that shows predictions and what speaks for them."""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from PIL import Image

from hfvit.data.decode import read_bytes
from hfvit.data.labels import normalized
from hfvit.data.open_image import UPLOAD_LIMITS
from hfvit.demo.run_results import UNLIKE_NOTE, RunResults
from hfvit.demo.uploads import RequestGuard, upload_component
from hfvit.errors import DataError, HFViTError, ModelError, one_line, printable
from hfvit.inference.classifier import Classifier
from hfvit.models.explain import Explanation, explain
from hfvit.utils.markup import markdown
from hfvit.utils.optional import import_optional
from hfvit.utils.overlay import highlight
from hfvit.utils.threads import torch_threads

# System fonts, since Gradio's default theme loads fonts from Google.
FONTS = ["system-ui", "sans-serif"]
MONOSPACE_FONTS = ["ui-monospace", "monospace"]
CLASSES_NOTE = "The model predicts one of its classes for any image, even one of something else."
LABELS_NOTE = "The model looks for its classes only, each by itself."
NOTHING_FOUND = "none"
MAX_LISTED = 200  # classes in the list
# One design for report, static page and app.
COLORS = {
    "body_background_fill": "#f6f8fa", "body_background_fill_dark": "#0d1117",
    "body_text_color": "#1f2328", "body_text_color_dark": "#f0f6fc",
    "body_text_color_subdued": "#59636e", "body_text_color_subdued_dark": "#9198a1",
    "block_background_fill": "#ffffff", "block_background_fill_dark": "#151b23",
    "block_border_color": "#d1d9e0", "block_border_color_dark": "#3d444d",
    "border_color_primary": "#d1d9e0", "border_color_primary_dark": "#3d444d",
    "color_accent": "#0069a6", "slider_color": "#0069a6", "slider_color_dark": "#56b4e9",
}  # fmt: skip
# Break long names without spaces, which would push the probability out of a narrow page.
STYLE = ".output-class, .confidence-set .text { overflow-wrap: anywhere; }"


def load_gradio():
    """Import gradio with analytics off.

    Raises:
        HFViTError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import
    return import_optional("gradio", "demo", "The demo")


def build_app(
    gradio, classifier: Classifier, top_k: int = 5, examples: list[str] = (), results: RunResults | None = None
):
    """Build the app, a `gradio.Blocks` with the endpoint `/classify`.

    The endpoint returns the classes, of a model with thresholds those that reach them, a note on images that are
    unlike the training data, and an image with what speaks for the predicted class where the model allows it.

    Args:
        gradio: the module, from `load_gradio`.
        classifier: classifier of images, without texts.
        top_k: number of classes shown.
        examples: paths of example images.
        results: results of the run that trained the model. Default: unknown.
    """
    results = results or RunResults()
    view = ExplanationView.create(classifier)
    # Gradio's queue runs one call at a time, but its route `run` has no queue.
    lock = view.lock if view else threading.Lock()
    has_thresholds = classifier.thresholds is not None
    has_note = results.out_of_distribution is not None

    def output_values(
        best: dict[str, float] | None, found: str | None, is_unlike: bool = False, image: Image.Image | None = None
    ):
        """Return the values of the app's outputs, of which some depend on the model.

        Args:
            best: probability of each shown class, None to clear the output.
            found: classes that reach their thresholds, separated by commas.
            is_unlike: whether the image is unlike the training data.
            image: image with what speaks for the predicted class.
        """
        values = [best, *([found] if has_thresholds else [])]
        if has_note:
            values.append(gradio.Markdown(f"**{UNLIKE_NOTE}**" if is_unlike else "", visible=is_unlike))
        values += [image] if view else []
        return tuple(values) if len(values) > 1 else best

    def classify(content: bytes | None):
        if content is None:
            return output_values(None, None)
        try:
            image = read_bytes(content, "The file cannot be read as an image")
        except DataError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        with lock:
            logits = classifier.logits([image])
        if not np.isfinite(logits).all():
            raise gradio.Error("The model's logits are NaN or infinite.", print_exception=False)
        explained = view.explain(image, int(logits[0].argmax())) if view else None
        found = ", ".join(classifier.best(logits)[0]) or NOTHING_FOUND
        is_unlike = results.is_unlike(logits, classifier.multi_label)
        return output_values(classifier.best(logits, top_k)[0], found, is_unlike, explained)

    name = Path(classifier.name).name or classifier.name
    with gradio.Blocks(title=name, analytics_enabled=False) as app:
        gradio.Markdown(_head(name, classifier, results))
        with gradio.Row():
            with gradio.Column():
                upload = upload_component(gradio)
                image_input = upload(label="Image", sources=["upload", "webcam", "clipboard"], height=360)
                if examples:
                    labels = example_labels(examples, classifier.labels)
                    gradio.Examples(
                        [[str(example)] for example in examples], image_input, cache_examples=False,
                        example_labels=labels, label="Examples",
                    )  # fmt: skip
            with gradio.Column():
                confidence = "Calibrated confidence" if classifier.temperature != 1 else "Confidence, not calibrated"
                outputs = [gradio.Label(label=confidence, num_top_classes=top_k)]
                if has_thresholds:
                    outputs.append(gradio.Textbox(label="Classes that reach their thresholds", interactive=False))
                if has_note:
                    outputs.append(gradio.Markdown(visible=False))
                if view:
                    outputs.append(
                        gradio.Image(label=view.title, interactive=False, height=300, buttons=["fullscreen"])
                    )
        with gradio.Accordion(f"All {len(classifier.labels):,} classes", open=False):
            gradio.Markdown(_class_list(classifier.labels))
        image_input.change(classify, image_input, outputs, api_name="classify", show_progress="minimal")
    return app


def _head(name: str, classifier: Classifier, results: RunResults) -> str:
    """Return the heading of the app, as Markdown: classes, score and limits."""
    note = LABELS_NOTE if classifier.multi_label else CLASSES_NOTE
    lines = [f"# {markdown(name)}", f"{len(classifier.labels):,} classes. {note}"]
    if results.score:
        lines.append(f"{results.score.title} **{results.score_text}** ({results.score_note}).")
    return "\n\n".join(lines)


def _class_list(labels: list[str]) -> str:
    more = f" and {len(labels) - MAX_LISTED:,} more" if len(labels) > MAX_LISTED else ""
    return ", ".join(map(markdown, labels[:MAX_LISTED])) + more


def example_labels(examples: list[str], labels: list[str]) -> list[str]:
    """Return the class of each example by its folder, else its file's name."""
    folders = [normalized(Path(example).parent.name) for example in examples]
    return [
        folder if folder in labels else Path(example).stem for folder, example in zip(folders, examples, strict=True)
    ]


def serve(
    gradio,
    classifier: Classifier,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    top_k: int = 5,
    examples: list[str] = (),
    results: RunResults | None = None,
) -> None:
    """Serve the app until Ctrl-C or SIGTERM.

    Args:
        gradio: the module, from `load_gradio`.
        classifier: classifier of images, without texts.
        host: address to listen on.
        port: port to listen on. Default: the first free one from 7860 on.
        share: open a public tunnel through Gradio's servers.
        top_k: number of classes shown.
        examples: paths of example images.
        results: results of the run that trained the model. Default: unknown.

    Raises:
        HFViTError: the address is not available.
    """
    with _upload_folder():
        _serve(
            gradio, classifier, build_app(gradio, classifier, top_k, examples, results), host, port, share, examples
        )


@contextmanager
def _upload_folder() -> Iterator[None]:
    """Store uploads in a temporary folder, unless GRADIO_TEMP_DIR is set."""
    if "GRADIO_TEMP_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="hfvit-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read at each use
        try:
            yield
        finally:
            del os.environ["GRADIO_TEMP_DIR"]


def _serve(gradio, classifier: Classifier, app, host: str, port: int | None, share: bool, examples: list[str]) -> None:
    try:
        _, address, tunnel = app.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            max_file_size=UPLOAD_LIMITS.max_bytes,
            app_kwargs={"middleware": [(RequestGuard, (), {})]},  # as FastAPI takes them: class and arguments
            allowed_paths=[str(Path(example).resolve()) for example in examples],
            css=STYLE,
            theme=gradio.themes.Default(primary_hue="sky", font=FONTS, font_mono=MONOSPACE_FONTS).set(**COLORS),
        )
    except (OSError, OverflowError, UnicodeError) as error:
        option = "--port" if port else "--host"
        where = f"{host}:{port}" if port else host
        raise HFViTError(f"{option}: cannot listen on {where} ({one_line(error)}).") from None
    stopped = SimpleQueue()  # reentrant, unlike an Event, which a second signal could lock for ever
    previous = {
        number: signal.signal(number, lambda *_: stopped.put(None)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for line in filter(None, (address, tunnel)):
            print(f"{printable(classifier.name)}: {line} (Ctrl-C stops it)", flush=True)
        stopped.get()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        app.close(verbose=False)  # waits at most five seconds
        if app.server.thread.is_alive():  # for the event streams of open pages
            logging.getLogger("uvicorn.error").disabled = True  # it would log what is canceled
            app.server.force_exit = True
            app.server.thread.join(5)


DISPLAY_PIXELS = 448  # minimum shorter side of the explained image, for models with small inputs


class ExplanationView:
    """What speaks for a class, in color on the model's crop of an image.

    Only for checkpoints, of models with an explanation map. It changes the model while it runs.

    Attributes:
        lock: held during `explain`; other threads that use the model must hold it, too.
    """

    def __init__(self, classifier: Classifier):
        self.lock = threading.Lock()
        self.classifier = classifier
        self.model = classifier.backend.model
        # All steps after resizing and cropping are linear: solid colors show what they do to a pixel.
        solid = [Image.new("RGB", (64, 64), color) for color in ("black", "red", "lime", "blue")]
        values = classifier.pixel_values(solid)
        self.black, *colors = values[:, :, values.shape[2] // 2, values.shape[3] // 2].astype(np.float64)
        self.to_rgb = np.linalg.pinv(np.transpose(colors - self.black))
        self.title = f"{self._explain(values[:1]).method}: orange parts speak for the class"

    @classmethod
    def create(cls, classifier: Classifier) -> "ExplanationView | None":
        """Create the view, None for models without explanation maps, such as exports."""
        try:
            return cls(classifier)
        except (AttributeError, ModelError):
            return None

    def explain(self, image: Image.Image, label: int) -> Image.Image:
        """Return the crop of an image with the parts that speak for a class in color.

        Args:
            image: image to explain.
            label: index of the class.
        """
        values = self.classifier.pixel_values([image])
        with self.lock:
            found = self._explain(values, torch.tensor([label]))
        crop = self.pixels(values[0])
        scale = max(1, round(DISPLAY_PIXELS / min(crop.shape[:2])))
        size = (crop.shape[1] * scale, crop.shape[0] * scale)
        enlarged = np.asarray(Image.fromarray(crop).resize(size, Image.Resampling.BICUBIC))
        return Image.fromarray(highlight(enlarged, found.maps[0]))

    def _explain(self, values: np.ndarray, labels: torch.Tensor | None = None) -> Explanation:
        backend = self.classifier.backend
        with torch_threads(backend.threads):
            return explain(self.model, torch.from_numpy(values).to(backend.device), labels)

    def pixels(self, values: np.ndarray) -> np.ndarray:
        """Return the pixel values of an image as uint8 (height, width, 3)."""
        rgb = (values.transpose(1, 2, 0) - self.black) @ self.to_rgb.T
        return (rgb.clip(0, 1) * 255).round().astype(np.uint8)
