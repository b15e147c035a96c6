"""Gradio app that shows predictions and attention maps."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hfvit.data.decode import read_bytes
from hfvit.data.open_image import UPLOAD_LIMITS
from hfvit.demo.uploads import RequestGuard, upload_component
from hfvit.errors import DataError, HFViTError, ModelError, one_line, printable
from hfvit.inference.classifier import Classifier
from hfvit.models.attention import attention_rollout, recorded_attention
from hfvit.utils.markup import markdown

INSTALL = 'pip install "hfvit[demo]"'
# System fonts, since Gradio's default theme loads fonts from Google.
FONTS = ["system-ui", "sans-serif"]
MONOSPACE_FONTS = ["ui-monospace", "monospace"]
ATTENTION_LABEL = "Attention (bright: high)"
CLASSES_NOTE = "The model predicts one of them for any image, even one of something else."
LABELS_NOTE = "The model looks for these only, each by itself."
NOTHING_FOUND = "none"


def load_gradio():
    """Import gradio with analytics off.

    Raises:
        HFViTError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import
    try:
        import gradio
    except ImportError as error:
        raise HFViTError(f"The demo needs gradio ({one_line(error)}). Install it with: {INSTALL}") from None
    return gradio


def build_app(gradio, classifier: Classifier, top_k: int = 5, examples: list[str] = ()):
    """Build the app, a `gradio.Blocks` with the endpoint `/classify`.

    The endpoint returns the classes, of a model with thresholds those that reach them, and an attention map where
    there is one.

    Args:
        gradio: the module, from `load_gradio`.
        classifier: classifier of images, without texts.
        top_k: number of classes shown.
        examples: paths of example images.
    """
    attention_view = AttentionView.create(classifier)

    has_thresholds = classifier.thresholds is not None

    def output_values(best: dict[str, float] | None, found: str | None, attention_image: Image.Image | None):
        """Return the values of the app's outputs, of which some depend on the model.

        Args:
            best: probability of each shown class, None to clear the output.
            found: classes that reach their thresholds, separated by commas.
            attention_image: image with its attention map.
        """
        values = [best, *([found] if has_thresholds else []), *([attention_image] if attention_view else [])]
        return tuple(values) if len(values) > 1 else best

    def classify(content: bytes | None):
        if content is None:
            return output_values(None, None, None)
        try:
            image = read_bytes(content, "The file cannot be read as an image")
        except DataError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        if attention_view:
            logits, attention_image = attention_view.classify(image)
        else:
            logits = classifier.logits([image])
            attention_image = None
        if not np.isfinite(logits).all():
            raise gradio.Error("The model's logits are NaN or infinite.", print_exception=False)
        found = ", ".join(classifier.best(logits)[0]) or NOTHING_FOUND
        return output_values(classifier.best(logits, top_k)[0], found, attention_image)

    name = Path(classifier.name).name or classifier.name
    note = LABELS_NOTE if classifier.multi_label else CLASSES_NOTE
    with gradio.Blocks(title=name, analytics_enabled=False) as app:
        gradio.Markdown(f"# {markdown(name)}\n{len(classifier.labels)} classes. {note}")
        with gradio.Row():
            with gradio.Column():
                upload = upload_component(gradio)
                image_input = upload(label="Image", sources=["upload", "webcam", "clipboard"], height=420)
                if examples:
                    gradio.Examples([[str(example)] for example in examples], image_input, cache_examples=False)
            with gradio.Column():
                outputs = [gradio.Label(label="Classes", num_top_classes=top_k)]
                if has_thresholds:
                    outputs.append(gradio.Textbox(label="Classes that reach their thresholds", interactive=False))
                if attention_view:
                    outputs.append(
                        gradio.Image(label=ATTENTION_LABEL, interactive=False, height=300, buttons=["fullscreen"])
                    )
        image_input.change(classify, image_input, outputs, api_name="classify", show_progress="minimal")
    return app


def serve(
    gradio,
    classifier: Classifier,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    top_k: int = 5,
    examples: list[str] = (),
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

    Raises:
        HFViTError: the address is not available.
    """
    with _upload_folder():
        _serve(gradio, classifier, host, port, share, top_k, examples)


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


def _serve(
    gradio, classifier: Classifier, host: str, port: int | None, share: bool, top_k: int, examples: list[str]
) -> None:
    app = build_app(gradio, classifier, top_k, examples)
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
            theme=gradio.themes.Default(font=FONTS, font_mono=MONOSPACE_FONTS),
        )
    except OSError as error:
        option = "--port" if port else "--host"
        where = f"{host}:{port}" if port else host
        raise HFViTError(f"{option}: cannot listen on {where} ({one_line(error)}).") from None
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        for line in filter(None, (address, tunnel)):
            print(f"{printable(classifier.name)}: {line} (Ctrl-C stops it)", flush=True)
        with suppress(KeyboardInterrupt):
            stopped.wait()
    finally:
        app.close(verbose=False)


DISPLAY_PIXELS = 448  # minimum shorter side of the attention image, for models with small inputs
DARKEST = 0.2  # brightness factor where the attention is lowest


class AttentionView:
    """Logits and attention map of an image in one forward pass.

    Only for checkpoints of timm models with plain attention blocks.
    """

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self.network = classifier.backend.model.timm_model
        self.grid = tuple(self.network.patch_embed.grid_size)

    @classmethod
    def create(cls, classifier: Classifier) -> "AttentionView | None":
        """Create the view, None for models without attention maps, such as exports."""
        try:
            view = cls(classifier)
            view.classify(Image.new("RGB", (64, 64)))
        except (AttributeError, ModelError):
            return None
        return view

    def classify(self, image: Image.Image) -> tuple[np.ndarray, Image.Image]:
        """Return the logits `(1, classes)` and the image with its attention rollout.

        The returned image is the model's crop, darker where the attention is lower.
        """
        values = self.classifier.prepare([image])
        with recorded_attention(self.network) as maps:
            logits = self.classifier.run(values)
        with torch.inference_mode():
            rollout = attention_rollout(tuple(maps), self.grid)[0].float().cpu().numpy()
        return logits, self._attention_image(values[0], rollout)

    def _attention_image(self, values: np.ndarray, rollout: np.ndarray) -> Image.Image:
        mean, std = (np.reshape(self.classifier.processor.data_config[key], (3, 1, 1)) for key in ("mean", "std"))
        pixels = ((values * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        height, width = pixels.shape[:2]
        scale = max(1, round(DISPLAY_PIXELS / min(height, width)))
        size = (width * scale, height * scale)
        low, high = np.percentile(rollout, [2, 98])  # a single outlier patch would leave the others black
        weights = ((rollout - low) / max(high - low, 1e-9)).clip(0, 1).astype(np.float32)
        brightness = np.asarray(Image.fromarray(weights).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
        enlarged = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        return Image.fromarray((enlarged * (DARKEST + (1 - DARKEST) * brightness[..., None])).astype(np.uint8))
