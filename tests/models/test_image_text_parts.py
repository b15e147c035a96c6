"""Parts of image-text models, and errors."""

import numpy as np
import pytest
import torch
from helpers.image_text import WORDS, tokenizer, write_encoder, write_set
from helpers.images import LABELS
from helpers.messages import assert_names, option_of
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from transformers import CLIPConfig, CLIPModel, T5Config, T5EncoderModel

from hfvit.data.text import load_tokenizer, tokenize
from hfvit.errors import ModelError, one_line, run
from hfvit.export.onnx import export_onnx
from hfvit.export.text_inputs import check_reads_texts
from hfvit.models.image_text import HFViTFusionForImageClassification, add_text_encoder
from hfvit.pipeline import main
from hfvit.recipe.arguments import ModelArguments
from hfvit.training.param_groups import groups_beside


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def fusion(encoder, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO, **options):
    image = build_model(LABELS, architecture=architecture, image_size=image_size, timm_kwargs=timm_kwargs)
    options = {"text_encoder": str(encoder), "max_text_length": 8, **options}
    return add_text_encoder(image, ModelArguments(architecture=architecture, **options))


FAMILIES = {
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "mobilenetv3_small_050": {},  # the pooled features are wider than the feature map
}


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("way", ["cross_attention", "concatenation"])
def test_fusion_with_any_image_tower_trains_and_round_trips(encoder, tmp_path, architecture, way):
    model = fusion(encoder, architecture, 32, FAMILIES[architecture], fusion=way)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), **model.example_texts(2, 5)}
    logits = model(**batch, labels=torch.tensor([0, 2]))
    logits.loss.backward()
    assert logits.logits.shape == (2, 3)
    assert all(parameter.grad is not None for parameter in model.parameters())  # DDP fails otherwise
    model.save_pretrained(tmp_path)
    loaded = HFViTFusionForImageClassification.from_pretrained(tmp_path).eval()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-6)


def test_fusion_logits_depend_on_text_but_not_on_padding(encoder):
    model = fusion(encoder).eval()
    image = torch.randn(1, 3, 16, 16)
    short = model(image, torch.tensor([[3, 4]])).logits
    padded = model(image, torch.tensor([[3, 4, 5, 0]]), torch.tensor([[1, 1, 0, 0]])).logits
    torch.testing.assert_close(padded, short, rtol=0, atol=1e-6)
    assert (model(image, torch.tensor([[3, 7]])).logits - short).abs().max() > 1e-3


def test_groups_beside_covers_trainable_weights_once(encoder):
    model = fusion(encoder, freeze="backbone")
    model.train()
    assert not model.text_model.training
    assert not model.timm_model.training
    assert model.fusion.training
    groups = groups_beside(model, model.timm_model, 1e-3, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(n for n, _ in model.named_parameters() if n.startswith(("fusion.", "classifier.")))
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    marked = groups_beside(model, model.timm_model, 1e-3, 0.05, with_fallback=True)
    assert [group.pop("use_fallback") for group in marked] == [True, True]
    assert marked == groups
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])
    assert groups_beside(build_model(LABELS, architecture=ARCHITECTURE, timm_kwargs=MICRO), model, 1, 1)  # all of it
    assert fusion(encoder, freeze="1").text_model.encoder.layer[0].attention.self.query.weight.requires_grad


def test_tokenize_pads_to_the_batch_and_truncates():
    table = tokenize(["dawn", None, "a picture taken at dusk in town", "zebra"], tokenizer(), 4)
    batch = table.batch(np.array([0, 1, 3]))
    number = {word: index for index, word in enumerate(WORDS, start=2)}
    assert batch["input_ids"].tolist() == [[number["dawn"]], [0], [1]]
    assert batch["attention_mask"].tolist() == [[1], [1], [1]]  # an empty text is one padding token
    batch = table.batch(np.array([2, 0]))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["input_ids"][0].tolist() == [number[word] for word in ("a", "picture", "taken", "at")]


def test_fusion_with_clip_text_model(tmp_path):
    text = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 9}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8})
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path)
    model = fusion(tmp_path)
    assert model.config.text_encoder_config["model_type"] == "clip_text_model"
    for name, value in clip.text_model.state_dict().items():
        (own,) = [weight for key, weight in model.text_model.state_dict().items() if key.endswith(name)]
        torch.testing.assert_close(own, value)


def test_fusion_returns_hidden_states_and_attentions(encoder):
    model = fusion(encoder).eval()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), **model.example_texts(2, 5)}
    logits = model(**batch).logits
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    tower = model.timm_model
    for hidden, expected in zip(
        outputs.hidden_states, tower.forward_intermediates(batch["pixel_values"], intermediates_only=True), strict=True
    ):
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-6)  # attention is not fused
    assert len(outputs.attentions) == len(tower.blocks)
    torch.testing.assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-6)
    assert len(model(**batch, output_hidden_states=[0], return_dict=False)[1]) == 1
    with pytest.raises(TypeError, match="output_hidden_state'"):
        model(**batch, output_hidden_state=True)


def test_attn_implementation_reaches_the_text_encoder(encoder, tmp_path):
    fusion(encoder).save_pretrained(tmp_path)
    model = HFViTFusionForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.text_model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.text_model.config._attn_implementation == "sdpa"


def test_init_weights_after_to_empty_equals_a_new_model(encoder):
    config = fusion(encoder).config
    torch.manual_seed(1)
    expected = HFViTFusionForImageClassification(config)
    with torch.device("meta"):
        model = HFViTFusionForImageClassification(config)
    model.to_empty(device="cpu")
    torch.manual_seed(1)
    model.init_weights()
    values = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(value, values[name]), name


def test_fusion_with_unsuitable_encoder_or_tokenizer_raises(encoder, tmp_path):
    with pytest.raises(ModelError, match=r"^max_text_length: .*\b17\b.*\bmax_position_embeddings\b.*\b16\b"):
        fusion(encoder, max_text_length=17)
    with pytest.raises(ModelError, match=r"^text_encoder: .*/nowhere\b"):
        fusion("/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"^text_encoder: .*/empty\b"):
        fusion(tmp_path / "empty")
    small = T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(small).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"^text_encoder: .*/t5\b"):
        fusion(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"/unpadded\b.*\bpad_token\b"):
        load_tokenizer(write_encoder(tmp_path / "unpadded", pad=None), 10)
    with pytest.raises(ModelError, match=r"\b10\b.*\b9\b") as caught:
        load_tokenizer(encoder, 9)
    assert_names(caught.value, encoder)
    with pytest.raises(ModelError, match=r"/empty\b") as caught:
        load_tokenizer(tmp_path / "empty", 10)
    assert one_line(caught.value.__cause__) in str(caught.value)


def test_export_of_fusion_with_unsupported_option_raises(encoder, tmp_path):
    model = fusion(encoder)
    with pytest.raises(ModelError, match=r"^optimize: "):
        export_onnx(model, tmp_path / "model.onnx", optimize=True)
    for option in ("quantize", "tensorrt", "with_preprocessing"):
        with pytest.raises(ModelError, match=f"^{option}: "):
            check_reads_texts(model, **{option: True})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def recipe(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    data = write_set(folder / "set")
    (folder / "r.yaml").write_text(
        f"architecture: {ARCHITECTURE}\nimage_size: 16\ndataset_name: {data}\nvalidation_split: validation\n"
        f"text_column: caption\ntext_encoder: {encoder}\nmax_text_length: 8\n"
    )
    return folder / "r.yaml"


@pytest.mark.parametrize(
    ("options", "option", "data"),
    [
        (("--text_column", "captoin"), "text_column", ["'captoin'", "image, caption, label", "'caption'"]),
        (("--text_column", "image"), "text_column", ["'image'", "'train'", "Image"]),
        (("--mixup_alpha", "0.2"), "mixup_alpha", []),
        (("--cutmix_alpha", "1"), "cutmix_alpha", []),
        (("--fusion", "sum"), "fusion", ["'sum'", "cross_attention, concatenation"]),
        (("--max_text_length", "0"), "max_text_length", [0]),
        (("--streaming", "true", "--max_steps", "2"), "streaming", []),
    ],
)
def test_training_with_texts_and_a_wrong_value_names_option_and_data(recipe, tmp_path, capsys, options, option, data):
    assert run(lambda: main([str(recipe), "--output_dir", str(tmp_path), *options])) == 2
    printed = capsys.readouterr().err
    message = printed[printed.index("hfvit: error: ") :]
    assert option_of(message) == option
    assert_names(message, *data)
    assert printed.count("hfvit: error") == 1


def test_text_column_without_text_encoder_raises(recipe, tmp_path, capsys):
    alone = tmp_path / "alone.yaml"
    alone.write_text("".join(line for line in recipe.open() if not line.startswith("text_encoder")))
    assert run(lambda: main([str(alone), "--output_dir", str(tmp_path)])) == 2
    error = capsys.readouterr().err
    assert option_of(error) == "text_column"
    assert_names(error, "text_encoder")
