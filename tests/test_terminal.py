"""What others wrote never steers a terminal, and no output is a reason to fail."""

import contextlib
import csv
import io
import json
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from elastic_lightning import terminal
from elastic_lightning.callbacks.samples import _markdown
from elastic_lightning.cli import main
from elastic_lightning.evaluation import frontier, generate, report
from elastic_lightning.evaluation.progress import tail
from elastic_lightning.terminal import PlainConsole, Screen, cell, json_line, plain

CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"  # OSC 52: what is pasted next
ANSWER = "\x1b[6n"  # the terminal types where its cursor is
SPELLED = r"\x1b]52;c;cm0gLXJmIH4=\x07"


def write_runs(folder, *names):
    from torch.utils.tensorboard import SummaryWriter

    for name in names:
        with SummaryWriter(str(folder / name / "seed_1")) as writer:
            for step, (reward, kl) in enumerate([(0.1, 0.0), (0.5, 1.0)]):
                writer.add_scalar("val/reward", reward, step)
                writer.add_scalar("val/kl", kl, step)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 中文 👩‍🚀 a\\b", "naïve 中文 👩‍🚀 a\\b"),
        (CLIPBOARD, SPELLED),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("\u202eevil\u2066\u2028", r"\u202eevil\u2066\u2028"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_control_characters_are_spelled_out(text, shown):
    assert plain(text) == shown
    line = json_line({"text": text})
    assert json.loads(line) == {"text": text} and plain(line[:-1]) == line[:-1]


@pytest.mark.parametrize("console", [Console, PlainConsole])
def test_a_cell_is_text(console):
    table = Table("method")
    table.add_row(cell(f"q[/x] [bold]b[/bold] :smile: {CLIPBOARD}"))
    file = io.StringIO()
    console(file=file, width=100).print(table)
    assert f"q[/x] [bold]b[/bold] :smile: {SPELLED}" in file.getvalue()


def test_a_plain_console_prints_any_text_in_any_encoding():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    PlainConsole(file=file, width=100).print(f"q[/x] :smile: 0.9 ± 0.1 … é {CLIPBOARD}")
    file.flush()
    assert file.buffer.getvalue().decode("ascii") == rf"q[/x] :smile: 0.9 +- 0.1 ... \xe9 {SPELLED}" + "\n"


def through_screen(text, encoding):
    near, far = os.pipe()
    with Screen(far, encoding, at_once=True) as screen:
        print(text, end="", file=screen)
    os.close(far)
    with open(near, "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    ("text", "encoding", "bytes_"),
    [
        (
            "\x1b[1;31mred\x1b[0m\r\x1b[2K\x1b[1A\x1b[?25l\n",
            "utf-8",
            b"\x1b[1;31mred\x1b[0m\r\x1b[2K\x1b[1A\x1b[?25l\n",
        ),
        (CLIPBOARD + ANSWER + "\x9b", "utf-8", rf"{SPELLED}\x1b[6n\x9b".encode()),
        ("\x1bP+q\x1b\\ \x1bc \x1b[>c", "utf-8", rb"\x1bP+q\x1b\ \x1bc \x1b[>c"),
        ("0.9 ± 0.1 é 中 \ud800", "ascii", rb"0.9 +- 0.1 \xe9 \u4e2d \ud800"),
        ("0.9 ± 0.1 é 中", "latin-1", b"0.9 \xb1 0.1 \xe9 " + rb"\u4e2d"),
    ],
)
def test_a_screen_takes_any_text_and_only_draws(text, encoding, bytes_):
    assert through_screen(text, encoding) == bytes_


def test_errors_and_warnings_draw_nothing_but_a_bar(tmp_path):
    script = "import runpy, sys; runpy.run_path(sys.argv[1])['use_any_output'](); sys.stderr.write(sys.argv[2])"
    command = [sys.executable, "-c", script, terminal.__file__, f"\r50%\x1b[A\n\x1b[2J\x1b[8m{CLIPBOARD}"]
    run = subprocess.run(command, capture_output=True, check=True)
    assert run.stderr.decode() == f"\r50%\x1b[A\n\\x1b[2J\\x1b[8m{SPELLED}"


def test_a_reader_that_has_gone_ends_nothing_and_a_full_disk_is_said():
    near, far = os.pipe()
    os.close(near)
    screen = Screen(far, "utf-8", at_once=False)
    for _ in range(100):
        print("x" * 2**12, file=screen)
    screen.close()
    os.close(far)
    with open("/dev/full", "wb") as full:
        screen = Screen(full.fileno(), "utf-8", at_once=True)
        with pytest.raises(OSError, match="No space left"):
            print("a", file=screen)
        screen.close()  # as python does at its end: not said again


def test_closed_streams_are_no_streams_of_the_files_opened_next(tmp_path):
    script = "import runpy, sys; runpy.run_path(sys.argv[1])['use_any_output'](); f = open(sys.argv[2], 'w'); "
    script += "assert f.fileno() > 2; assert not sys.stdout.isatty(); print('lost'); print('lost', file=sys.stderr)"
    command = [sys.executable, "-c", script, terminal.__file__, str(tmp_path / "file")]
    run = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], check=False)
    assert run.returncode == 0 and (tmp_path / "file").read_text() == ""


def test_log_tails_errors_and_samples(tmp_path, capsys, monkeypatch):
    (tmp_path / "log.txt").write_text(f"\x1b[32mgreen\x1b[0m\n[/x] {CLIPBOARD}\n")
    assert tail(tmp_path / "log.txt", 2) == ["green", f"[/x] {SPELLED}"]

    assert main(["report", f"{tmp_path}/[/x]{CLIPBOARD}\nerror: another"]) == 1
    error = capsys.readouterr().err
    assert error == f"error: report: no such folder: {tmp_path}/[/x]{SPELLED} error: another\n"

    response = f"b|[i](http://x)<b>_{CLIPBOARD}"
    row = _markdown([{"prompt": "a\nb", "response": response, "reward": 0.5}]).splitlines()[2]
    assert row == r"| a b | b\|\[i\]\(http://x\)&lt;b&gt;\_\\x1b\]52;c;cm0gLXJmIH4=\\x07 | 0.500 |"


def test_a_report_of_names_that_are_made_to_harm(tmp_path, capsys):
    names = ["q[x]", f"[bold]$\\frac{CLIPBOARD}", "=HYPERLINK(1)", "_hidden", "@a\nb"]
    write_runs(tmp_path / "runs", *names)
    output = tmp_path / f"[/out]{CLIPBOARD}"
    assert report.main([str(tmp_path / "runs"), f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and f"[/out]{SPELLED}" in printed
    for name in ("q[x]", rf"[bold]$\frac{SPELLED}", "=HYPERLINK(1)", "_hidden", r"@a\nb"):
        assert name in printed
    with (output / "summary.csv").open() as file:
        methods = {row["method"] for row in csv.DictReader(file)}
    assert methods == {"q[x]", rf"[bold]$\frac{SPELLED}", "'=HYPERLINK(1)", "_hidden", r"'@a\nb"}
    assert (frontier.as_label("_hidden"), frontier.as_label("a$b$")) == (" _hidden", r"a\$b\$")


def test_the_command_itself_prints_in_ascii(tmp_path):
    write_runs(tmp_path, "[b]ŵ", CLIPBOARD)
    command = [sys.executable, "-m", "elastic_lightning.cli", "report", str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    run = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (run.returncode, run.stderr) == (0, b"") and (tmp_path / "report/table.csv").exists()
    printed = run.stdout.decode("ascii")
    assert r"[b]\u0175" in printed and SPELLED in printed and "\x1b" not in printed


def test_a_terminal_is_sent_no_sequence_of_others():
    process, terminal_ = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "elastic_lightning.cli", "report", CLIPBOARD])
    shown = b""
    with contextlib.suppress(OSError):  # its end, on Linux
        while piece := os.read(terminal_, 4096):
            shown += piece
    os.waitpid(process, 0)
    os.close(terminal_)
    assert shown.decode() == f"error: report: no such folder: {SPELLED}\r\n"


def test_a_folder_whose_name_is_not_utf8_is_one_line(tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder)
    open(folder + b"/events.out.tfevents.1", "wb").close()
    assert main(["report", str(tmp_path)]) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ") and r"caf\udce9 is not UTF-8" in error and error.count("\n") == 1


def test_generated_text(tmp_path, capsys, monkeypatch):
    row = {"prompt": "a\n[/x]", "response": f"{CLIPBOARD}\u202e", "complete": True, "tokens": 1}

    class Policy:
        class lm:
            separator = "\t"

    monkeypatch.setattr(generate, "load", lambda *arguments: (Policy, None))
    monkeypatch.setattr(generate, "_place", lambda policy, device: None)
    monkeypatch.setattr(generate, "generate", lambda *arguments: [row])
    assert main(["generate", "--model=m", "--prompt=a"]) == 0
    assert capsys.readouterr().out == f"a\n[/x]\t{SPELLED}\\u202e\n"
    assert main(["generate", "--model=m", "--prompt=a", f"--output={tmp_path}/o.jsonl"]) == 0
    assert json.loads((tmp_path / "o.jsonl").read_text()) == row
    assert "\u202e" not in (tmp_path / "o.jsonl").read_text()
