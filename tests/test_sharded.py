"A run whose branch FSDP cuts over two processes."

import json
import os

import torch
from conftest import ROOT, by_two
from test_train import curve, weights


def near(a, b, far=1e-9):
    return all((v - b[k]).abs().max() < far for k, v in a.items())


def test_in_pieces_is_the_same_run_and_either_goes_on_with_the_other(tmp_path, quick):
    "In float64: the curve and the weights of one process; resumed in pieces, bit-equal; resumed in pieces from a whole run's checkpoint, and whole from that of a run in pieces."
    from in_float64 import float64

    from masked_ldm.train import TrainConfig, train

    given = {
        **quick,
        "T": 600,
        "max_steps": 4,
        "batch_size": 8,
        "val_pictures": 0,
        "checkpointing_steps": 2,
        "stratified_t": True,
        "use_ema": True,
        "ema_decay": 0.5,
    }

    def half(name):
        return str(tmp_path / name / "checkpoints" / "step_000002")

    def told(name, frm=None, **kw):
        return {
            **given,
            "out_dir": str(tmp_path / name),
            **(dict(resume=half(frm)) if frm else {}),
            **kw,
        }

    with float64():
        one = train(TrainConfig.make(**told("one"))).history
    runs = [
        told("cut", gradient_accumulation_steps=2),
        told("cut from cut", "cut", gradient_accumulation_steps=2),
        told("cut from one", "one"),
    ]
    code, text = by_two(
        ROOT / "tests" / "sharded_on_cpu.py",
        json.dumps(runs),
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    assert code == 0, text
    with float64():
        train(TrainConfig.make(**told("one from cut", "cut")))
    want, cut, again = (weights(tmp_path / n) for n in ("one", "cut", "cut from cut"))
    assert all(torch.equal(v, again[k]) for k, v in cut.items()) and all(
        near(want, weights(tmp_path / n)) for n in ("cut", "cut from one", "one from cut")
    )
    for a, b in zip(one, curve(tmp_path / "cut")):
        assert a["bands"] == b["bands"] and all(
            abs(a[k] - b[k]) < 2e-6 for k in ("loss", "grad_norm")
        ), (a, b)
