"Where networks run: what is chosen, what is refused, and that every command asks. No GPU is needed: what PyTorch finds is given."

import pytest
import torch
from conftest import in_process

from masked_ldm.device import choose_device, to_float64
from masked_ldm.settings import ConfigError
from masked_ldm.training import processes


@pytest.fixture
def machine(monkeypatch):
    "Make a machine that has these devices beside its CPU."
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def have(*devices):
        real = torch.zeros

        def zeros(*size, device="cpu"):
            if str(device) not in ("cpu", *devices):
                raise RuntimeError("no such device")
            return real(*size)

        monkeypatch.setattr(torch, "zeros", zeros)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in devices)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in devices)

    return have


@pytest.mark.parametrize(
    "there, asked, chosen",
    [
        ((), "auto", "cpu"),
        (("cuda", "cuda:1"), "auto", "cuda"),
        (("cuda", "cuda:1"), "cuda:1", "cuda:1"),
        (("cuda", "cuda:1"), "cpu", "cpu"),
        (("mps",), "auto", "cpu"),  # never unasked
        (("mps",), "mps", "mps"),
        (("cuda", "mps"), "auto", "cuda"),
    ],
    ids=str,
)
def test_the_choice(machine, there, asked, chosen):
    machine(*there)
    assert choose_device(asked) == torch.device(chosen)


@pytest.mark.parametrize("there", [(), ("cuda",), ("mps",)], ids=str)
def test_what_is_not_there_is_one_sentence(machine, there):
    machine(*there)
    for name in {"cuda", "mps", "cuda:99", "banana", ""} - set(there):
        with pytest.raises(ConfigError, match=f"^device '{name}' is not there .*; cpu always is$"):
            choose_device(name)


def test_accelerate_launch_on_the_cpu_is_followed_unless_a_device_is_named(machine, monkeypatch):
    machine("cuda")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_device("auto").type == "cpu" and choose_device("cuda").type == "cuda"


@pytest.mark.parametrize(
    "main, line, code",
    [
        ("train:main", "--preset tiny", 1),
        ("sample:main", "nowhere", 1),
        ("evaluate:main", "nowhere", 1),
        ("training.distillation:main", "--out {tmp}/out", 1),
        ("data.command:main", "build nowhere --faces mtcnn", 2),
        ("data.command:main", "faces nowhere", 2),
        ("data.command:main", "cache nowhere", 2),
    ],
)
def test_every_command_asks_before_it_loads(main, line, code, tmp_path, monkeypatch):
    from importlib import import_module

    monkeypatch.chdir(tmp_path)
    module, _, name = main.partition(":")
    command = getattr(import_module(f"masked_ldm.{module}"), name)
    words = line.format(tmp=tmp_path).split()
    got, text = in_process(command, *words, "--device", "cuda:99")
    assert got == code and "device 'cuda:99' is not there" in text.splitlines()[-1], text
    assert not any(tmp_path.iterdir())


def test_a_run_may_go_on_elsewhere():
    from masked_ldm.training.config import TrainConfig, resume_differences

    assert not resume_differences(TrainConfig.make(device="cpu"), vars(TrainConfig.make()))


@pytest.mark.parametrize("asked", ["cuda:1", "mps"])
def test_processes_cannot_share_one_device(asked, machine, monkeypatch):
    machine("cuda", "cuda:1", "mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"device '{asked}' is one device, and 2 processes"):
        processes.join_processes(asked)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_process_takes_a_card_of_its_own(asked, machine, monkeypatch):
    machine("cuda")
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in (0, 3, 5):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert processes._device_of(asked, 8) == torch.device("cuda")
    assert taken == [0, 3, 1]


def test_accelerate_follows_the_setting(monkeypatch, tmp_path, capsys):
    "Also in the second run of one kernel, and whatever its environment says."
    from masked_ldm.training.config import TrainConfig

    choose = processes.choose_device
    monkeypatch.setattr(
        processes,
        "choose_device",
        lambda name: torch.device(name) if name == "meta" else choose(name),
    )
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "mps")
    for device in ("cpu", "meta", "cpu"):
        config = TrainConfig.make(device=device, report_to="none")
        assert processes.make_accelerator(config, tmp_path).device == torch.device(device)
        assert processes.join_processes().device == torch.device(device)
    assert "not followed" in (said := capsys.readouterr().out) and "TORCH_DEVICE=mps" in said


def test_float64_is_made_where_it_exists():
    class OnApple(torch.Tensor):
        device = torch.device("mps")

        def double(self):
            raise TypeError("MPS has no float64")

        def cpu(self):
            return torch.Tensor(self.as_subclass(torch.Tensor))

    assert to_float64(torch.ones(2).as_subclass(OnApple)).dtype == torch.float64
