"""Gradio app with attention maps."""

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

INSTALL = 'pip install "hfvit[demo]"'
FONTS, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the visitor's system, none of Google's
SEEN = "Bright where the model looked"


def load_gradio():
    """The module, with its statistics off; raises `HFViTError` where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise HFViTError(f"The app needs gradio ({one_line(error)}); install it with: {INSTALL}") from None
    return gradio


def build_app(gradio, classifier: Classifier, top_k: int = 5, examples: list[str] = ()):
    """Blocks with the endpoint `/classify`: a picture -> its classes, and the attention map where there is one."""

    view = AttentionView.of(classifier)

    def classify(content: bytes | None):
        if content is None:
            return (None, None) if view else None
        try:
            picture = read_bytes(content, "This file is no picture that can be read")
        except DataError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        logits, seen = view.look(picture) if view else (classifier.logits([picture]), None)
        if not np.isfinite(logits).all():
            raise gradio.Error("The model's logits are NaN or infinite.", print_exception=False)
        best = classifier.best(logits, top_k)[0]
        return (best, seen) if view else best

    name = Path(classifier.name).name or classifier.name
    with gradio.Blocks(title=name, analytics_enabled=False) as app:
        gradio.Markdown(
            f"# {name}\n{len(classifier.labels)} classes. It answers with some of them whatever it is shown."
        )
        with gradio.Row():
            with gradio.Column():
                upload = upload_component(gradio)
                picture = upload(label="Picture", sources=["upload", "webcam", "clipboard"], height=420)
                if examples:
                    gradio.Examples([[str(example)] for example in examples], picture, cache_examples=False)
            with gradio.Column():
                answers = [gradio.Label(label="Classes", num_top_classes=top_k)]
                if view:
                    answers.append(gradio.Image(label=SEEN, interactive=False, height=300, buttons=["fullscreen"]))
        picture.change(classify, picture, answers, api_name="classify", show_progress="minimal")
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
    """Serve the app until Ctrl-C or a termination; raises `HFViTError` where the address cannot be had."""
    with _upload_folder():
        _serve(gradio, classifier, host, port, share, top_k, examples)


@contextmanager
def _upload_folder() -> Iterator[None]:
    """A folder of this app alone for what is uploaded, deleted at its end; or the one that GRADIO_TEMP_DIR names."""
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
            theme=gradio.themes.Default(font=FONTS, font_mono=MONO),
        )
    except OSError as error:
        where = f"{host}:{port}" if port else host
        raise HFViTError(f"{where} cannot be listened on: {one_line(error)}") from None
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        for line in filter(None, (address, tunnel)):
            print(f"{printable(classifier.name)}: {line} (Ctrl-C stops it)", flush=True)
        with suppress(KeyboardInterrupt):
            stopped.wait()
    finally:
        app.close(verbose=False)


SHOWN_PIXELS = 448  # the shorter side at least; a crop of 32 pixels would be a stamp
DARKEST = 0.2  # of the brightness, where nothing was looked at


class AttentionView:
    """Logits and attention of one picture, in one pass through a timm model with plain attention blocks."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self.network = classifier.backend.model.timm_model
        self.grid = tuple(self.network.patch_embed.grid_size)

    @classmethod
    def of(cls, classifier: Classifier) -> "AttentionView | None":
        """The view of a classifier; None for graphs, other families, and attention that leads to no patches."""
        try:
            view = cls(classifier)
            view.look(Image.new("RGB", (64, 64)))
        except (AttributeError, ModelError):
            return None
        return view

    def look(self, picture: Image.Image) -> tuple[np.ndarray, Image.Image]:
        """Logits `(1, classes)`, and the model's own crop of the picture, darkened where it did not look."""
        values = self.classifier.prepare([picture])
        with recorded_attention(self.network) as maps:
            logits = self.classifier.run(values)
        with torch.inference_mode():
            seen = attention_rollout(tuple(maps), self.grid)[0].float().cpu().numpy()
        return logits, self._picture(values[0], seen)

    def _picture(self, values: np.ndarray, seen: np.ndarray) -> Image.Image:
        mean, std = (np.reshape(self.classifier.processor.data_config[key], (3, 1, 1)) for key in ("mean", "std"))
        pixels = ((values * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        height, width = pixels.shape[:2]
        scale = max(1, round(SHOWN_PIXELS / min(height, width)))
        size = (width * scale, height * scale)
        low, high = np.percentile(seen, [2, 98])  # a single patch that takes nearly all would leave the rest black
        share = ((seen - low) / max(high - low, 1e-9)).clip(0, 1).astype(np.float32)
        light = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
        large = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        return Image.fromarray((large * (DARKEST + (1 - DARKEST) * light[..., None])).astype(np.uint8))
