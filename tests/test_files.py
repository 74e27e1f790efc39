"Files and sentences: what is written, what is damaged, what a user is told."

import errno
import os

import pytest

from masked_ldm.files import read_json, write_text
from masked_ldm.settings import is_user_error, run_command


@pytest.mark.parametrize("umask, mode", [(0o022, "0o644"), (0o007, "0o660")], ids=str)
def test_a_file_has_the_mode_of_any_new_file(tmp_path, umask, mode):
    "Whatever the library that writes it thinks: safetensors makes files private."
    import torch
    from safetensors.torch import save_file

    from masked_ldm.files import write_whole

    old = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "a")
        with write_whole(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(old)
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[" * 99_999, b"[]", b"1" * 5_000, b"null", b'{"a": "\xe9"}'],
    ids=repr,
)
def test_json_that_is_no_good_is_named(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match="state.json (is damaged|holds a)"):
        read_json(tmp_path / "state.json")


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "a.json") == {}


def no_folder():
    os.mkdir("/proc/nothing")


def a_file(tmp_path):
    (tmp_path / "a\nb").write_text("", encoding="utf-8")
    os.listdir(tmp_path / "a\nb")


def said(work, capsys):
    with pytest.raises(SystemExit) as end:
        run_command("command", work)
    return str(end.value)


def test_what_a_disk_says_is_one_sentence_with_the_path(tmp_path, capsys):
    "Also of a path with a line break in it."
    assert said(no_folder, capsys).startswith("command: /proc/nothing: No such")
    sentence = said(lambda: a_file(tmp_path), capsys)
    assert sentence == f"command: {tmp_path}/a\\nb: Not a directory"

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert "No space left on device" in said(full, capsys)


def test_an_error_of_the_program_keeps_its_traceback():
    assert not is_user_error(KeyError("a")) and not is_user_error(TypeError("a"))
    with pytest.raises(ZeroDivisionError):
        run_command("command", lambda: 1 // 0)


@pytest.mark.parametrize("line", ["1 / 0", "int('x')", "dict(zip([1], [], strict=True))"])
def test_a_line_of_ours_that_the_interpreter_stopped_keeps_its_traceback_too(line):
    with pytest.raises((ValueError, ZeroDivisionError)) as e:
        eval(line, {"__name__": "masked_ldm.somewhere"})
    assert not is_user_error(e.value)


def test_a_sentence_that_is_raised_again_stays_a_sentence():
    names = {"__name__": "masked_ldm.somewhere"}
    exec("def f():\n try:\n  raise ValueError('so')\n except ValueError:\n  raise\n", names)
    exec("def g():\n try:\n  f()\n finally:\n  print()\n", names)
    for function in ("f", "g"):
        with pytest.raises(ValueError) as e:
            names[function]()
        assert is_user_error(e.value)


def test_the_ranges_of_a_class_with_its_own_check_are_checked_too():
    from dataclasses import dataclass

    from masked_ldm.settings import ConfigError, make_settings, setting

    @dataclass
    class Own:
        steps: int = setting(1, "steps", least=1)

        def check(self) -> None:
            pass

    with pytest.raises(ConfigError, match="steps must be 1 or more, not 0"):
        make_settings(Own, dict(steps=0))
