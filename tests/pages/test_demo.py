"""`trl-ext demo` with a Chromium that judges by the truth: the exam rises."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pages.conftest import ROOT
from tests.pages.test_rating_page import press, wait_for
from trl_ext import demo
from trl_ext.demo.grading import rating
from trl_ext.demo.world import COUNTRIES

PAIRS = 60


def capital_asked_for(prompt: str) -> str:
    named = [country for country in COUNTRIES if country.name in prompt]
    return max(named, key=lambda country: len(country.name)).capital


@pytest.mark.browser
@pytest.mark.long
def test_the_exam_rises_with_true_judgements(fresh: Any, tmp_path: Path) -> None:
    demo.model_path()  # another test's time
    command = [sys.executable, "-m", "trl_ext.cli", "demo", "--out", str(tmp_path / "demo"), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen([*command, "--no-browser"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        fresh.get(next(line.strip() for line in process.stdout if line.startswith("http://")))
        first = time.monotonic() - started
        for number in range(1, PAIRS + 1):
            prompt, *answers = (
                element.get_attribute("textContent")
                for element in fresh.find_elements("css selector", ".prompt .text, .answer .text")
            )
            a, b = (rating(answer, capital_asked_for(prompt)) for answer in answers)
            press(fresh, "a" if a > b else "b" if b > a else "t")
            wait_for(fresh, f"{number} by you" if number < PAIRS else "Everything is judged")
        rated = time.monotonic()
        said, _ = process.communicate(timeout=900)
        print(f"first item after {first:.0f} s, exam {time.monotonic() - rated:.0f} s after the last rating")
        print(said[-1500:])
    finally:
        process.kill()
        process.wait()
    before, after = map(float, re.search(r"Exam: ([\d.]+)% right before, ([\d.]+)% after", said).groups())
    assert after - before >= 30
