"""A small model of each timm family: train, save, load, resize, export."""

import json
import os

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from helpers.timm_models import FAMILIES, FIXED_SIZE, build
from transformers import AutoModelForImageClassification

from hfvit.errors import ModelError
from hfvit.export.client_config import family_config
from hfvit.export.onnx import export_onnx
from hfvit.models.freezing import classifier_parameters, layer_ids
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.pipeline import main
from hfvit.training.losses import cross_entropy
from hfvit.training.param_groups import build_param_groups

SLOW_EXPORTS = (
    "swinv2", "mobilevitv2", "efficientformerv2", "maxvit", "hiera", "fastvit", "siglip", "eva02", "deit_distilled",
    "naflex",
)  # fmt: skip


def tensors(model):
    """Return all parameters and buffers by name, non-persistent ones included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_tensors(model, expected):
    assert tensors(model).keys() == tensors(expected).keys()
    different = [name for name, value in tensors(expected).items() if not torch.equal(tensors(model)[name], value)]
    assert not different


def pixels(model, images=4):
    return torch.randn(images, 3, *model.config.image_size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model, pixel_values):
    return model.eval()(pixel_values=pixel_values).logits


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """Train a model of each family for two steps and save it."""
    model = build(request.param)
    before = {name: value.clone() for name, value in model.named_parameters()}
    groups = build_param_groups(model.timm_model, learning_rate=1e-3, weight_decay=0.05, layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups)
    model.train()
    for _ in range(2):
        cross_entropy(model(pixel_values=pixels(model)).logits, torch.tensor([0, 1, 2, 0]), 0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Matrices only: a bias before batch normalization has no gradient.
    unchanged = [name for name, p in model.named_parameters() if p.ndim > 1 and torch.equal(p, before[name])]
    assert not unchanged, f"{request.param}: not trained"
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model.eval(), folder, groups


def test_save_pretrained_loads_with_transformers_and_timm(trained):
    _, model, folder, _ = trained
    weights, pixel_values = model.timm_model.state_dict(), pixels(model)
    expected = logits(model, pixel_values)
    for cls in (HFViTForImageClassification, AutoModelForImageClassification):
        loaded = cls.from_pretrained(folder)
        assert_same(loaded.timm_model.state_dict(), weights)
        torch.testing.assert_close(logits(loaded, pixel_values), expected, atol=1e-6, rtol=0)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_same(plain.state_dict(), weights)
    with torch.inference_mode():
        torch.testing.assert_close(plain(pixel_values), expected, atol=1e-6, rtol=0)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_build_param_groups_has_layer_wise_learning_rates(trained):
    _, model, _, groups = trained
    layer_of = layer_ids(model.timm_model)
    top = max(layer_of.values())
    assert top >= 3  # a stem, two blocks, a head
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.timm_model.named_parameters():
        assert rate[id(parameter)] == pytest.approx(1e-3 * 0.5 ** (top - layer_of[name])), name


def test_freeze_of_blocks_or_backbone(trained):
    family, *_ = trained
    model = build(family, freeze=1)
    layer_of = layer_ids(model.timm_model)
    assert {n for n, p in model.timm_model.named_parameters() if p.requires_grad} == {
        name for name, layer in layer_of.items() if layer > 1
    }
    blocks = max(layer_of.values()) - 1
    with pytest.raises(ModelError, match=rf"^freeze: .*\b{blocks}\b.*\b{blocks + 1}\b"):
        build(family, freeze=blocks + 1)
    model = build(family, freeze="backbone")
    head = {id(parameter) for parameter in classifier_parameters(model.timm_model)}
    assert head == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_output_attentions_of_plain_attention_blocks(trained):
    family, model, *_ = trained
    if "embed_dim" not in FAMILIES[family][2] or "depth" not in FAMILIES[family][2]:
        with pytest.raises(ModelError, match=rf"^output_attentions: .*\b{type(model.timm_model).__name__}\b"):
            model(pixels(model), output_attentions=True)
        return
    with torch.inference_mode():
        maps = model(pixels(model), output_attentions=True).attentions
    tokens = 16 + model.timm_model.num_prefix_tokens
    assert [tuple(one.shape) for one in maps] == [(4, 2, tokens, tokens)] * 2
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(4, 2, tokens))


def test_from_pretrained_with_image_size_or_error(trained, tmp_path):
    family, model, folder, _ = trained
    size = 2 * model.config.image_size[0]
    if family in FIXED_SIZE:
        with pytest.raises(ModelError, match=rf"^image_size: .*\b{size // 2}\b"):
            HFViTForImageClassification.from_pretrained(folder, image_size=size)
        return
    resized = HFViTForImageClassification.from_pretrained(folder, image_size=size)
    resized.save_pretrained(tmp_path)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixel_values = pixels(resized)
    torch.testing.assert_close(logits(stock, pixel_values), logits(resized, pixel_values), atol=1e-6, rtol=0)


def test_export_onnx_of_family_agrees(trained, tmp_path):
    family, model, *_ = trained
    if family in SLOW_EXPORTS and not os.environ.get("RUN_SLOW"):
        pytest.skip("takes seconds; set RUN_SLOW=1")
    record = export_onnx(model, tmp_path / "model.onnx")
    assert record.parity.max_abs_difference < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    pixel_values = pixels(model, images=3)
    (found,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
    np.testing.assert_allclose(found, logits(model, pixel_values), atol=1e-5)
    assert family_config(model)["id2label"] == {"0": "red", "1": "green", "2": "blue"}


def test_from_pretrained_with_image_size_resizes_swin_windows_like_timm(tmp_path):
    """Compare position biases for windows of 8 instead of 4 with timm's loader."""
    model = build("swin")
    for layer in model.timm_model.modules():
        if hasattr(layer, "relative_position_bias_table"):
            torch.nn.init.normal_(layer.relative_position_bias_table)
    model.save_pretrained(tmp_path)
    resized = HFViTForImageClassification.from_pretrained(tmp_path, image_size=64)
    assert resized.config.model_args["window_size"] == [[8, 8], [8, 8]]
    reference = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64, window_size=8).eval()
    pixel_values = pixels(resized)
    with torch.inference_mode():
        torch.testing.assert_close(logits(resized, pixel_values), reference(pixel_values))


@pytest.mark.parametrize("family", [*FAMILIES, "swin"])
def test_init_weights_after_to_empty_equals_a_new_model(family):
    """Compare computed buffers too: rotary embeddings and relative positions."""
    config = build(family).config
    torch.manual_seed(1)
    expected = HFViTForImageClassification(config)
    with torch.device("meta"):
        model = HFViTForImageClassification(config)
    model.init_weights()
    assert all(tensor.is_meta for tensor in tensors(model).values())
    model.to_empty(device="cpu")
    for tensor in tensors(model).values():
        tensor.data.fill_(7)
    torch.manual_seed(1)
    model.init_weights()
    assert_same_tensors(model, expected)
    pixel_values = pixels(model)
    assert torch.equal(logits(model, pixel_values), logits(expected, pixel_values))


@pytest.mark.parametrize("family", [*FAMILIES, "swin"])
def test_from_pretrained_equals_the_saved_model(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    for loaded in (
        HFViTForImageClassification.from_pretrained(tmp_path),
        HFViTForImageClassification.from_pretrained(None, config=model.config, state_dict=model.state_dict()),
    ):
        loaded.init_weights()  # keeps loaded weights
        assert_same_tensors(loaded, model)


@pytest.mark.parametrize(("name", "family"), [("swin_tiny", "swin"), ("hiera_tiny", "hiera")])
def test_shipped_recipe_trains_at_32_px(name, family, tmp_path, colors):
    """Use a micro checkpoint with the windows and strides of the recipe for 32 px."""
    build(family).save_pretrained(tmp_path / "micro")
    main([name, "--model_name_or_path", str(tmp_path / "micro"), "--dataset_name", str(colors), "--image_size", "32",
          "--output_dir", str(tmp_path / "out"), "--global_batch_size", "8", "--num_train_epochs", "8",
          "--learning_rate", "2e-3", "--drop_path_rate", "0", "--validation_fraction", "0.2", "--layer_decay", "0.9",
          "--disable_tqdm", "true", "--plots", "false"])  # fmt: skip
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["metrics"]["test"]["accuracy"] > 0.6  # chance is 1/3
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert logits(stock, torch.zeros(1, 3, 32, 32)).shape == (1, 3)
