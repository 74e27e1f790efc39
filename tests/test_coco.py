"Real photographs: set MASKED_LDM_COCO to a (small) COCO 2017 root to run these."

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

COCO_ROOT = os.environ.get("MASKED_LDM_COCO")
pytestmark = pytest.mark.skipif(not COCO_ROOT, reason="MASKED_LDM_COCO names no COCO root")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    from masked_ldm.data.manifest import build_manifest

    tmp = tmp_path_factory.mktemp("manifests")
    return {s: build_manifest(COCO_ROOT, s, tmp / s) for s in ("train", "val")}


@pytest.mark.parametrize("split", ["train", "val"])
def test_counts_are_pycocotools_own(split, built):
    from masked_ldm.data.manifest import load_manifest

    rows, info = load_manifest(built[split])
    coco = COCO(f"{COCO_ROOT}/annotations/instances_{split}2017.json")
    person = coco.getCatIds(["person"])
    kept, none, small, share = set(), 0, 0, {}
    for i in coco.imgs:
        anns = coco.loadAnns(coco.getAnnIds(i, person))
        solo = [coco.annToMask(a) for a in anns if not a["iscrowd"]]
        if not anns:
            none += 1
            continue
        share[i] = np.any(solo, 0).mean() if solo else 0.0
        if share[i] >= 0.05:
            kept.add(i)
        elif solo:
            small += 1
    assert (
        {r["image_id"] for r in rows} == kept
        and info["dropped"].get("no person", 0) == none
        and info["dropped"].get("people below min_area", 0) == small
    )
    for r in rows:
        assert abs(r["area_fraction"] - share[r["image_id"]]) < 1e-6
    for r in rows:
        for p in r["people"]:
            assert (rle.decode(p["segmentation"]) == coco.annToMask(coco.anns[p["id"]])).all()


def test_faces_sit_on_noses(built):
    "Nearly every detected face holds a nose that COCO has marked, and then the same person's marked eyes too."
    from masked_ldm.data.manifest import load_manifest

    rows, info = load_manifest(built["train"])
    faces = noses = eyes = 0
    for r in rows:
        heads = [
            h[h[:, 2] > 0]
            for h in (np.array(p["keypoints"]).reshape(17, 3)[:3] for p in r["people"])
            if h[0, 2] > 0
        ]  # nose first
        for x0, y0, x1, y1 in (f["box"] for f in r["faces"]):
            inside = [
                (h[:, 0] >= x0) & (h[:, 0] <= x1) & (h[:, 1] >= y0) & (h[:, 1] <= y1) for h in heads
            ]
            faces += 1
            noses += any(i[0] for i in inside)
            eyes += any(i.all() for i in inside)
    print(
        f"{faces} faces in {info['pictures_with_face']} of {info['kept']} pictures; {noses} hold a marked nose, {eyes} the marked eyes too"
    )
    assert faces >= 15 and noses / faces >= 0.8 and eyes / noses >= 0.9


def test_geometry_on_photographs(built):
    from masked_ldm.data.dataset import PersonDataset, collate

    ds = PersonDataset(built["train"], 128)
    b = collate([ds[(0, i)] for i in range(len(ds))])
    assert (
        b.pixels.shape == (len(ds), 3, 128, 128)
        and b.mask.min() >= 0
        and b.mask.max() <= 1
        and (b.boxes[:, 3:] > b.boxes[:, 1:3]).all()
        and b.boxes[:, 1:].max() <= 128
    )
    seen = b.joints[b.joints[..., 2] > 0]
    inside = [
        b.people[k, 0, int(y), int(x)] > 0
        for k, js in enumerate(b.joints)
        for x, y, v in js.tolist()
        if v == 2
    ]
    assert (
        len(seen) > 50 and np.mean(inside) > 0.8
    )  # visible joints lie on their own person's mask, also after a flip


def test_a_run_on_photographs(tmp_path):
    from masked_ldm.train import TrainConfig, train

    given = dict(
        data_root=COCO_ROOT,
        max_steps=2,
        T=1000,
        size=64,
        batch_size=4,
        log_steps=1,
        sample_interval=100,
        sample_steps=1,
        val_pictures=0,
        report_to="none",
        out_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
    )
    rows = train(TrainConfig.make(**given)).history
    assert len(rows) == 2 and all(r["lpips"] and r["ldm"] for r in rows)
    assert any(r["face"] for r in rows)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(norm > 0 for norm in metrics["gradient_norms"].values())
    assert not (
        Path(COCO_ROOT) / "train2017" / "metadata.jsonl"
    ).exists()  # a run leaves the data set alone


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("area_rule", ["union", "sum"])
@pytest.mark.parametrize("crowd", ["ignore", "drop"])
def test_counts_per_rule_are_pycocotools_own(split, area_rule, crowd):
    from masked_ldm.data.filtering import FilterRule, select_images

    rows, report = select_images(COCO_ROOT, split, FilterRule(0.05, area_rule, crowd=crowd))
    coco = COCO(f"{COCO_ROOT}/annotations/instances_{split}2017.json")
    person = coco.getCatIds(["person"])
    want, kept = {}, set()

    def drop(why):
        want[why] = want.get(why, 0) + 1

    for i, im in coco.imgs.items():
        anns = coco.loadAnns(coco.getAnnIds(i, person))
        solo = [a for a in anns if not a["iscrowd"]]
        hw = im["height"] * im["width"]
        if not anns:
            drop("no person")
        elif crowd == "drop" and len(solo) < len(anns):
            drop("crowd region")
        elif not solo:
            drop("only crowds")
        elif (
            sum(a["area"] for a in solo)
            if area_rule == "sum"
            else np.any([coco.annToMask(a) for a in solo], 0).sum()
        ) < 0.05 * hw:
            drop("people below min_area")
        else:
            kept.add(i)
    print(split, area_rule, crowd, len(kept), want)
    assert (
        {r["image_id"] for r in rows} == kept
        and report["dropped"] == want
        and not report["bad_annotations"]
    )
    for r in rows:
        for p in r["people"]:
            assert (rle.decode(p["segmentation"]) == coco.annToMask(coco.anns[p["id"]])).all()


def test_calibration_keeps_what_is_wanted():
    from masked_ldm.data.filtering import FilterRule, calibrate_min_area, select_images

    for area_rule in ("union", "sum"):
        for k, v in calibrate_min_area(COCO_ROOT, dict(train=20, val=7), area_rule).items():
            kept, _ = select_images(COCO_ROOT, k, FilterRule(v.min_area, area_rule))
            assert v.kept == v.wanted == len(kept)
