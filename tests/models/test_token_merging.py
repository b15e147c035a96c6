"""Token merging: against a loop written from the paper, in a timm ViT, in ONNX."""

import numpy as np
import pytest
import torch
from helpers.images import LABELS, colored_image
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO

from hfvit.errors import ModelError
from hfvit.export.onnx import export_onnx
from hfvit.inference.classifier import load_classifier
from hfvit.models.token_merging import apply_token_merging, match, merge, positions_after_merge

PREFIX = 2


def saved(folder, architecture=ARCHITECTURE, image_size=32, **kwargs):
    torch.manual_seed(0)
    args = {**MICRO, "depth": 3, **kwargs}
    model = build_model(LABELS, architecture=architecture, image_size=image_size, timm_kwargs=args).eval()
    for parameter in model.parameters():  # the initial keys are too similar
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def reference_merge(tokens, sizes, keys, r):
    """Merge one image by section 3 of arXiv:2210.09461, without prefix tokens.

    Returns (value, size) of each token by its members, a set of positions in `tokens`.
    """
    patches = list(range(PREFIX, len(tokens)))
    set_a, set_b = patches[0::2], patches[1::2]  # 1. two sets of roughly equal size, in alternation
    edges = []
    for a in set_a:  # 2. an edge from each token of A to its most similar token of B
        similar = [float(np.dot(keys[a], keys[b]) / np.linalg.norm(keys[a]) / np.linalg.norm(keys[b])) for b in set_b]
        edges.append((max(similar), a, set_b[int(np.argmax(similar))]))
    kept = sorted(edges, reverse=True)[:r]  # 3. the r most similar edges are kept
    groups = {b: [b] for b in set_b}
    for _, a, b in kept:  # 4. connected tokens are merged
        groups[b].append(a)
    merged = {a for _, a, _ in kept}
    groups |= {a: [a] for a in (*range(PREFIX), *set_a) if a not in merged}
    # "averaging their features", weighted by their number of patches (Appendix D)
    return {
        frozenset(group): (sum(tokens[i] * sizes[i] for i in group) / sum(sizes[i] for i in group),
                           sum(sizes[i] for i in group))
        for group in groups.values()
    }  # fmt: skip


@pytest.mark.parametrize(("patches", "r"), [(16, 1), (16, 8), (15, 5), (9, 4)])
def test_match_and_merge_equal_the_papers_algorithm(patches, r):
    rng = np.random.default_rng(patches)
    tokens, keys = rng.normal(size=(3, PREFIX + patches, 5)), rng.normal(size=(3, PREFIX + patches, 4))
    sizes = rng.integers(1, 4, size=(3, PREFIX + patches, 1)).astype(float)
    order, target = match(torch.from_numpy(keys[:, PREFIX:]), r)
    x, left = merge(torch.from_numpy(tokens), torch.from_numpy(sizes), order, target, PREFIX)
    positions = positions_after_merge(order, target, PREFIX + patches, PREFIX)
    assert x.shape == (3, PREFIX + patches - r, 5)
    for image in range(3):
        expected = reference_merge(tokens[image], sizes[image, :, 0], keys[image], r)
        members = {}
        for token, position in enumerate(positions[image].tolist()):
            members.setdefault(position, set()).add(token)
        assert {frozenset(group) for group in members.values()} == set(expected)
        for position, group in members.items():
            value, size = expected[frozenset(group)]
            np.testing.assert_allclose(x[image, position], value)
            assert left[image, position].item() == size
        assert positions[image, :PREFIX].tolist() == list(range(PREFIX))


@pytest.mark.parametrize(("pool", "depth", "left"), [("token", 2, 1 + 16 - 8 - 4), ("avg", 1, 16)])
def test_token_merging_of_equal_patches_keeps_the_logits(pool, depth, left, tmp_path):
    """Pairs of equal patches without position embeddings; merged tokens count twice."""
    model = saved(tmp_path, depth=depth, global_pool=pool, class_token=pool == "token", pos_embed="none")
    tiles = torch.randn(2, 3, 4, 2).repeat_interleave(2, dim=-1)
    pixel_values = torch.nn.functional.interpolate(tiles, scale_factor=8)
    with torch.inference_mode():
        expected = model(pixel_values).logits
        apply_token_merging(model, 8)
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=1e-4)
        assert model.timm_model.forward_features(pixel_values).shape[1] == left


def test_load_classifier_with_merge_tokens_keeps_the_weights(tmp_path):
    model = saved(tmp_path)
    image = colored_image(1, np.random.default_rng(0), size=32)
    classifier = load_classifier(tmp_path, device="cpu", merge_tokens=8)
    assert (classifier.name, classifier.merge_tokens) == (str(tmp_path), 8)
    assert classifier.backend.model.timm_model.state_dict().keys() == model.timm_model.state_dict().keys()
    plain = load_classifier(tmp_path, device="cpu").logits([image])
    assert np.isfinite(classifier.logits([image])).all()
    assert not np.allclose(classifier.logits([image]), plain)


@pytest.mark.parametrize("pool", ["token", pytest.param("map", marks=pytest.mark.slow)])
def test_export_onnx_with_token_merging_agrees(pool, tmp_path):
    architecture = {"token": ARCHITECTURE, "map": "vit_base_patch16_siglip_224"}[pool]
    model = saved(tmp_path / "model", architecture, depth=2)
    apply_token_merging(model, 3)
    record = export_onnx(model, tmp_path / "model.onnx")
    assert record.parity.max_abs_difference < 1e-4


def test_unsupported_token_merging_raises(tmp_path):
    swin = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "patch_size": 2}
    other = build_model(LABELS, architecture="swin_tiny_patch4_window7_224", image_size=32, timm_kwargs=swin)
    with pytest.raises(ModelError, match=r"^merge_tokens: .*\bSwinTransformer\b"):
        apply_token_merging(other, 2)
    model = saved(tmp_path)
    with pytest.raises(ModelError, match=r"^merge_tokens: .*\b1\b.*\b8\b.*\b16\b.*\b9\b"):
        apply_token_merging(model, 9)
