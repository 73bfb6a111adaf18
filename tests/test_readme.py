"""The README says what the committed results say, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_tables_are_those_of_the_result_files():
    changed = subprocess.run(["git", "status", "--porcelain", "outputs/embedded"], cwd=ROOT, capture_output=True).stdout
    if changed:
        pytest.skip("the results are of this machine, not those committed (tools/update_readme.py, before you commit)")
    check = [sys.executable, "tools/update_readme.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "run python tools/update_readme.py"


def test_its_links_and_figure_are_there():
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert local and [link for link in local if not (ROOT / link).exists()] == []


def test_its_make_targets_are_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets


def test_its_versions_are_those_of_the_lock():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for package in ("torch", "torchvision"):
        (version,) = set(re.findall(rf"\b{package}==([\d.]+)", README))
        assert f"\n{package}=={version}" in lock
