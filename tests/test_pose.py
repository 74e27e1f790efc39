"The pose loss: bad input, and weights that are or are not there."

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from masked_ldm.objective import MaskAwareObjective
from masked_ldm.pose_loss import PoseLoss, PoseTerm, load_pose_net, people_boxes

PICTURE = torch.zeros(1, 3, 64, 64)
BOX = torch.tensor([[0.0, 5, 5, 40, 60]])
JOINTS = torch.full((1, 17, 3), 2.0)


class Returns(nn.Module):
    "A pose network that returns what it was told to."

    def __init__(self, heat):
        super().__init__()
        self.heat = heat

    def forward(self, crops):
        return self.heat


def with_joints(change):
    joints = JOINTS.clone()
    joints[0, 3, 2] = change
    return joints


@pytest.mark.parametrize(
    "people, joints, said",
    [
        (BOX[:, 1:], JOINTS, r"boxes must be \(M,5\)"),
        (BOX + 1, JOINTS, "one of the 1 pictures"),
        (BOX * float("nan"), JOINTS, "must be finite"),
        (BOX, JOINTS[:, :16], r"joints must be \(P,17,3\) for the 1 people, not \(1, 16, 3\)"),
        (BOX, JOINTS[:0], r"joints must be \(P,17,3\)"),
        (BOX, with_joints(3.0), "visibility of 0, 1 or 2, not 3"),
        (BOX, with_joints(float("nan")), "visibility of 0, 1 or 2, not nan"),
    ],
)
def test_people_and_joints_have_to_fit(people, joints, said):
    loss = PoseLoss(Returns(torch.zeros(1, 17, 4, 3)))
    with pytest.raises(ValueError, match=said):
        loss(PICTURE, PICTURE, people, joints)
    term = PoseTerm(loss)
    objective = MaskAwareObjective(100, 0, 0, None, None, lambda z: z, more=[(0.1, term)])
    mask = torch.ones(1, 1, 64, 64)
    with pytest.raises(ValueError, match=said):
        given = (torch.ones(1), PICTURE, 5, PICTURE, mask, torch.zeros(0, 5))
        objective(*given, joints=(people, joints))


def test_pictures_have_to_fit():
    loss = PoseLoss(Returns(torch.zeros(1, 17, 4, 3)))
    with pytest.raises(ValueError, match="must both be"):
        loss(PICTURE, PICTURE[..., :32], BOX, JOINTS)


@pytest.mark.parametrize("heat", [torch.zeros(1, 16, 4, 3), torch.zeros(17, 4, 3), [1, 2]])
def test_a_network_without_heatmaps(heat):
    with pytest.raises(TypeError, match=r"must return heatmaps \(1,17,h,w\), not"):
        PoseLoss(Returns(heat))(PICTURE, PICTURE, BOX, JOINTS)


@pytest.mark.parametrize("masks, image_of", [((2, 64, 64), 2), ((2, 1, 64, 64), 3)])
def test_masks_have_to_fit(masks, image_of):
    with pytest.raises(ValueError, match="masks must be"):
        people_boxes(torch.zeros(masks), torch.zeros(image_of))


def test_nobody_has_no_boxes():
    assert people_boxes(torch.zeros(0, 1, 64, 64), torch.zeros(0)).shape == (0, 5)


def test_parts_of_a_batch_keep_their_people():
    "Decoded one at a time, people and joints go with their pictures, also where one has none."
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(3, 17, 1))
    latents, truth = torch.rand(2, 4, 3, 64, 64)
    people = torch.tensor(
        [[3.0, 5, 5, 40, 60], [0, 2, 9, 30, 50], [3, 20, 4, 60, 50], [1, 3, 3, 60, 60]]
    )
    joints = torch.randint(0, 3, (4, 17, 3)).float()
    found = []
    for few in (0, 1, 3):
        z = latents.clone().requires_grad_()
        terms = MaskAwareObjective(
            100,
            0,
            0,
            None,
            None,
            lambda z: z,
            decode_batch=few,
            more=[(0.5, PoseTerm(PoseLoss(net)))],
        )(torch.ones(4), z, 5, truth, truth[:, :1], torch.zeros(0, 5), joints=(people, joints))
        found.append((terms.values["pose"], torch.autograd.grad(terms.total, z)[0]))
    alone = [PoseLoss(net)(latents, truth, people[[i]], joints[[i]]) for i in range(4)]
    expected = torch.stack(
        [alone[1][0], alone[3][1], torch.zeros(()), (alone[0] + alone[2])[3] / 2]
    )
    for values, gradient in found:
        assert (values - expected).abs().max() < 1e-6 < expected[:2].min()
        assert (gradient - found[0][1]).abs().max() < 1e-8 < gradient.abs().max()


def test_an_unknown_network():
    with pytest.raises(ValueError, match="'mine' is not one of vitpose-base"):
        load_pose_net("mine")


LOADS = """
import torch
from pathlib import Path
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation
from masked_ldm.pose_loss import PoseLoss
try:
    PoseLoss()
except FileNotFoundError as e:
    print(e)
folder = Path(HF_HUB_CACHE) / "models--usyd-community--vitpose-base-simple"
(folder / "refs").mkdir(parents=True)
(folder / "refs" / "main").write_text("0" * 40)
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
backbone = VitPoseBackboneConfig(image_size=[64, 48], patch_size=[16, 16], **sizes)
model = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17))
model.save_pretrained(folder / "snapshots" / ("0" * 40))
loss = PoseLoss("vitpose-base")
same = all(map(torch.equal, model.state_dict().values(), loss.net.net.state_dict().values()))
print(same, loss.size, any(weight.requires_grad for weight in loss.parameters()))
"""


def test_weights_come_from_the_cache_and_are_named_where_missing(tmp_path):
    environment = os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", LOADS], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    missing, loaded = done.stdout.splitlines()
    assert missing.startswith(f"the pose loss' vitpose-base needs the weights {tmp_path}")
    assert "vitpose-base-simple, which are not there" in missing
    assert loaded == "True (64, 48) False"
