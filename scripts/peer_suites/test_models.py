"""Common tests of transformers on hfvit's models; run by scripts/peer_suites.sh.

`PEER_FAMILY` chooses the network, `PEER_WORK` is the folder with transformers' `tests`.
"""

import json
import os
import sys
import types
import unittest
from pathlib import Path

import transformers
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)
from transformers.pipelines import ImageClassificationPipeline

from hfvit.models.configuration import HFViTConfig
from hfvit.models.image_text import HFViTFusionConfig, HFViTFusionForImageClassification
from hfvit.models.modeling import HFViTForImageClassification

SIZE = 32  # pixels
VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "beit": ("beit_base_patch16_224", VIT),
    "eva02": ("eva02_tiny_patch14_224", VIT),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": SIZE, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "volo": ("volo_d1_224", {"img_size": SIZE}),
    "image_text": ("vit_tiny_patch16_224", VIT),
}
FAMILY = os.environ["PEER_FAMILY"]
WORK = Path(os.environ["PEER_WORK"])
TEXT = BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=16,
)  # fmt: skip


class PipelineTests(unittest.TestCase):
    """Replace transformers' tests of the pipeline, which download their images."""

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **processors):
        pipeline = ImageClassificationPipeline(model=model, image_processor=image_processor, dtype=dtype, top_k=2)
        return pipeline, [Image.new(mode, (40, 30)) for mode in ("RGB", "RGBA", "LA", "L")]

    def run_pipeline_test(self, pipeline, examples):
        for answers in pipeline(examples):
            assert [set(answer) for answer in answers] == [{"score", "label"}] * 2


def stub(name: str, **attributes) -> None:
    """Register a module that the source distribution lacks."""
    parent = name.rpartition(".")[0]
    sys.modules.setdefault(parent, types.ModuleType(parent))
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)


def pipeline_model(model_class, config) -> None:
    """Save a model where transformers' pipeline tests look for it."""
    folder = WORK / "models" / FAMILY / config.model_type / model_class.__name__
    model_class(config).save_pretrained(folder)
    TimmWrapperImageProcessor(config.pretrained_cfg).save_pretrained(folder)


def new_config(config_class, **values):
    architecture, model_args = FAMILIES[FAMILY]
    own = HFViTConfig.from_architecture(architecture, ["a", "b", "c"], **model_args)
    own.pretrained_cfg["input_size"] = [3, SIZE, SIZE]
    return config_class(
        architecture=architecture, model_args=dict(model_args), pretrained_cfg=own.pretrained_cfg,
        id2label=dict(own.id2label), label2id=dict(own.label2id), **values,
    )  # fmt: skip


CLASSES = {
    "hfvit": (HFViTForImageClassification, HFViTConfig, {}),
    "stock": (TimmWrapperForImageClassification, TimmWrapperConfig, {}),
}
if FAMILY == "image_text":
    fusion = {"text_encoder_config": TEXT.to_dict(), "fusion_layers": 1, "max_text_length": 8}
    CLASSES["hfvit"] = (HFViTFusionForImageClassification, HFViTFusionConfig, fusion)

(WORK / "src").mkdir(exist_ok=True)
if not (WORK / "src" / "transformers").exists():
    (WORK / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
reports = WORK / "models" / FAMILY / "reports"
reports.mkdir(parents=True, exist_ok=True)
summary = {"tokenizer_classes": [], "processor_classes": ["TimmWrapperImageProcessor"]}
(reports / "tiny_model_summary.json").write_text(json.dumps({kind.__name__: summary for kind, *_ in CLASSES.values()}))
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(WORK / "models" / FAMILY)
for model_class, config_class, values in CLASSES.values():
    pipeline_model(model_class, new_config(config_class, **values))
stub("tests.exporters.test_export", ExportTesterMixin=object)
stub("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
stub("tests.pipelines.test_pipelines_image_classification", ImageClassificationPipelineTests=PipelineTests)

from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402
from tests.test_pipeline_mixin import PipelineTesterMixin  # noqa: E402


class Tester:
    """Build configuration and inputs, as the model testers of transformers do."""

    batch_size = 3
    image_size = SIZE
    is_training = True

    def __init__(self, config_class, values):
        self.config_class = config_class
        self.values = values

    def get_config(self):
        return new_config(self.config_class, **self.values)

    def prepare_config_and_inputs_for_common(self):
        inputs = {"pixel_values": floats_tensor([self.batch_size, 3, SIZE, SIZE])}
        if self.values:
            inputs["input_ids"] = ids_tensor([self.batch_size, 5], TEXT.vocab_size)
        return self.get_config(), inputs


class CommonTests(ModelTesterMixin, PipelineTesterMixin):
    """Tests of transformers, without those of parts that timm's networks do not have."""

    test_resize_embeddings = False
    has_attentions = False

    def setUp(self):
        model_class, config_class, values = CLASSES[self.kind]
        self.model_tester = Tester(config_class, values)
        self.all_model_classes = (model_class,)
        self.pipeline_model_mapping = {} if values else {"image-classification": model_class}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:
            inputs["labels"] = ids_tensor([Tester.batch_size], 3)
        return inputs

    def test_hidden_states_output(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0](config).eval()
        expected = model.timm_model.forward_intermediates(inputs["pixel_values"], intermediates_only=True)
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == len(expected)
        assert len(model(**inputs, output_hidden_states=[-1]).hidden_states) == 1

    def test_auto_class(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        assert AutoModelForImageClassification.from_config(config).eval()(**inputs).logits.isfinite().all()


class HFViTTest(CommonTests, unittest.TestCase):
    kind = "hfvit"


class StockTest(CommonTests, unittest.TestCase):
    kind = "stock"
