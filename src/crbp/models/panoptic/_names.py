"""What the tensors of our panoptic models are called in detectron2 and in the released R-FPN."""

from __future__ import annotations

import re

_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^backbone\.body\.conv1\.", "backbone.bottom_up.stem.conv1."),
        (r"^backbone\.body\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
        (r"^(backbone\.bottom_up\.res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
        (r"^(backbone\.bottom_up\.res\d\.\d+)\.downsample\.0\.", r"\1.shortcut."),
        (r"^(backbone\.bottom_up\.res\d\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
        (r"^rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
        (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
        (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
        (r"^roi_heads\.box_head\.fc6\.", "roi_heads.box_head.fc1."),
        (r"^roi_heads\.box_head\.fc7\.", "roi_heads.box_head.fc2."),
        (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_heads.mask_head.deconv."),
        (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_heads.mask_head.predictor."),
        (r"^roi_heads\.mask_head\.output_norm\.", "roi_heads.mask_head.horizontal_norm."),
        (r"^semantic_head\.levels\.(p\d\.\d)\.0\.", r"sem_seg_head.\1."),
        (r"^semantic_head\.levels\.(p\d\.\d)\.1\.", r"sem_seg_head.\1.norm."),
        (r"^semantic_head\.predictor\.", "sem_seg_head.predictor."),
    )
]
_CELL = {
    "inhibition.weight": "w_gate_inh",
    "excitation.weight": "w_gate_exc",
    "channel_squeeze.weight": "u0_channel_gate_0.weight",
    "channel_squeeze.bias": "u0_channel_gate_0.bias",
    "channel_expand.weight": "u0_channel_gate_1.weight",
    "spatial_squeeze.weight": "u0_spatial_gate_0",
    "spatial_squeeze.bias": "u0_spatial_bias",
    "spatial_map.weight": "u0_spatial_gate_1",
    "attention_bias": "u0_combine_bias",
    "update_gate.weight": "u1_gate.weight",
    "update_gate.bias": "u1_gate.bias",
    "inhibition_norm.weight": "bn.0.weight",
    "inhibition_norm.bias": "bn.0.bias",
    "excitation_norm.weight": "bn.1.weight",
    "excitation_norm.bias": "bn.1.bias",
    "alpha": "alpha",
    "mu": "mu",
}
_OURS_OF_CELL = "roi_heads.mask_head.cell."
_LAYER = re.compile(r"^backbone\.body\.layer(\d)\.")
_PYRAMID = re.compile(r"^backbone\.fpn\.(inner|layer)_blocks\.(\d)\.0\.")
_MASK = re.compile(r"^roi_heads\.mask_head\.(\d)\.0\.")


def detectron2_name(ours: str) -> str:
    """The name in detectron2 of a tensor of `PanopticFPN` or `RFPN`."""
    if ours.startswith(_OURS_OF_CELL):
        return f"roi_heads.mask_head.recurrent.{_CELL[ours.removeprefix(_OURS_OF_CELL)]}"
    # The first stage of a ResNet is its second part, and its features are the pyramid's level 2.
    name = _LAYER.sub(lambda found: f"backbone.bottom_up.res{int(found[1]) + 1}.", ours)
    name = _PYRAMID.sub(
        lambda found: f"backbone.fpn_{'lateral' if found[1] == 'inner' else 'output'}{int(found[2]) + 2}.", name
    )
    name = _MASK.sub(lambda found: f"roi_heads.mask_head.mask_fcn{int(found[1]) + 1}.", name)
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name


_CAFFE2 = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^res\.conv1\.bn\.", "stem.conv1.bn."),
        (r"^conv1\.", "stem.conv1."),
        (r"\.branch1\.", ".shortcut."),
        (r"\.branch2a\.", ".conv1."),
        (r"\.branch2b\.", ".conv2."),
        (r"\.branch2c\.", ".conv3."),
        (r"\.bn\.(s|gamma)$", ".norm.weight"),
        (r"\.bn\.(b|beta|bias)$", ".norm.bias"),
        (r"\.bn\.(rm|running\.mean)$", ".norm.running_mean"),
        (r"\.bn\.(riv|running\.var)$", ".norm.running_var"),
        (r"\.w$", ".weight"),
        (r"\.b$", ".bias"),
    )
]


def caffe2_name(name: str) -> str:
    """``res2_0_branch2a_bn_s`` of MSRA's ImageNet weights as ``res2.0.conv1.norm.weight``."""
    # Digits follow the branch as in branch2a_bn; the dot after it is what the patterns look for.
    renamed = name.replace("_", ".")
    for pattern, replacement in _CAFFE2:
        renamed = pattern.sub(replacement, renamed)
    return renamed
