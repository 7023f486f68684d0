"""Shell completion, by the protocol of typer's completion scripts, and in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpuprep.cli.app import app
from gpuprep.core.recipe import PRESETS


def completions(shell: str, line: str) -> str:
    """Return what the program prints for a shell when Tab is pressed at the end of a line."""
    words = line.split(" ")
    env = {
        "_GPUPREP_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,  # bash
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,  # zsh and fish
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    result = CliRunner().invoke(app, [], env=env, prog_name="gpuprep", catch_exceptions=False)
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gpuprep rec", ["recipes"]),
        ("gpuprep convert dicom --recipe ", list(PRESETS)),
        ("gpuprep convert dicom --recipe so", ["soft-tissue"]),
        ("gpuprep scan --recipe cl", ["classic"]),
        ("gpuprep recipes bo", ["bone", "body"]),
        ("gpuprep convert dicom --format ", ["tif", "tif-stack", "nifti", "zarr", "npy"]),
        ("gpuprep convert dicom --format tif-", ["tif-stack"]),
        ("gpuprep convert dicom --dtype u", ["uint8", "uint16"]),
        ("gpuprep convert dicom --compression z", ["zlib", "zstd"]),
        ("gpuprep convert dicom --masks outlines --dty", ["--dtype"]),
        ("gpuprep convert dicom --recipe mine.t", []),
        ("gpuprep convert dicom --masks ", []),
    ],
)
def test_bash_completion_prints_one_word_per_line(line: str, expected: list[str]) -> None:
    assert completions("bash", line).split() == expected


def test_zsh_completion_prints_words_with_descriptions() -> None:
    answer = completions("zsh", "gpuprep convert dicom --recipe lun")
    assert answer.startswith("_arguments '*: :((")
    assert '"lung":"the window for lungs' in answer
    assert '"luna16":"lung nodules' in answer


def test_fish_completion_prints_words_with_descriptions() -> None:
    assert completions("fish", "gpuprep recipes bon").startswith(f"bone\t{PRESETS['bone'].why}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_completion_script(shell: str) -> None:
    env = {"_GPUPREP_COMPLETE": f"source_{shell}"}
    result = CliRunner().invoke(app, [], env=env, prog_name="gpuprep", catch_exceptions=False)
    assert f"_GPUPREP_COMPLETE=complete_{shell}" in result.stdout
    assert "gpuprep" in result.stdout


def test_help_lists_the_options_for_completion() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).stdout
    assert "--install-completion" in shown
    assert "--show-completion" in shown


def test_completion_works_in_a_real_bash(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    program = tmp_path / "gpuprep"
    program.write_text(f"#!{sys.executable}\nfrom gpuprep.cli.app import main\nmain()\n")
    program.chmod(0o755)
    script = """
        eval "$(_GPUPREP_COMPLETE=source_bash gpuprep)"
        COMP_WORDS=(gpuprep convert dicom --recipe lu) COMP_CWORD=4
        _gpuprep_completion gpuprep
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }  # fmt: skip
    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, check=False, env=env)
    assert (done.stdout.split(), done.stderr) == (["lung", "luna16", "luna16-lungs"], "")
