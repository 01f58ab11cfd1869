"""A real Chromium before a real server. Both are Debian's: apt-get install chromium chromium-driver."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = [shutil.which("chromium"), shutil.which("chromedriver")]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not all(PROGRAMS):
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(PROGRAMS[1]))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def fresh(browser: Any) -> Any:
    """The browser without cookies, at a desktop's width, in light colours."""
    browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
    look(browser)
    for log in ("browser", "performance"):
        browser.get_log(log)
    return browser


def look(browser: Any, width: int = 1280, scheme: str = "light", height: int = 900) -> None:
    """Set the width of the window, in CSS pixels, and the colour scheme that the person prefers."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture
def rate() -> Iterator[Callable[..., str]]:
    """Starts `trl-ext rate` as a process of its own, and gives its link."""
    running = []

    def start(*arguments: object) -> str:
        command = [sys.executable, "-m", "trl_ext.cli", "rate", *map(str, arguments), "--port", "0", "--no-browser"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        running.append(process)
        assert process.stdout is not None
        return next(line.strip() for line in process.stdout if line.startswith("http://"))

    yield start
    for process in running:
        process.kill()
        process.wait()


def write_answers(file: Path, conversations: bool = False) -> Path:
    """Answers of two policies to three prompts; one has markup, spaces and lines."""
    answers = {
        "Explain to a child why the sky is blue.": [
            "Sunlight looks white, but it is a mix of all colours. When it meets the air, the blue part bounces around "
            "the most, so blue light reaches your eyes from everywhere.",
            "The sky is blue because of Rayleigh scattering.",
            "It is blue because the sea is blue and the sky mirrors it, like a big bathroom mirror!",
            "Because.",
        ],
        "Write a polite note to a neighbour whose dog barks at night.\n\nKeep it under three sentences.": [
            "Dear neighbour, your dog has been barking around 2 a.m. this week. Could you keep it inside at night?",
            "Hi! STOP THE DOG.",
            "Hello! Your dog barks at night, which wakes our baby. Might we find a solution together?",
            "  <b>Dear</b> neighbour,\n\n    mind the <script>document.title='broken'</script>"
            "<img src=http://192.0.2.1/x onerror=\"document.title='broken'\"> dog.\n\nYours",
        ],
        "What is the difference between a list and a tuple in Python?": [
            "A list can change, a tuple cannot:\n\n    a = [1, 2]\n    a.append(3)      # fine\n    b = (1, 2)\n"
            "    b.append(3)      # AttributeError\n\nUse a tuple for what belongs together and stays.",
            "Lists use [] and tuples use ().",
            "They are the same thing.",
            "A list is a mutable sequence; a tuple is an immutable one.",
        ],
    }
    rows = []
    for number, (prompt, texts) in enumerate(answers.items()):
        for place, text in enumerate(texts):
            policy, sample = ("base", "ppo")[place // 2], place % 2
            row: dict[str, Any] = {"id": f"{number}-{policy}-{sample}", "prompt": prompt, "completion": text}
            if conversations:
                row["prompt"] = [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": "Do you want it short or long?"},
                    {"role": "user", "content": "Short, please."},
                ]
                row["completion"] = [{"role": "assistant", "content": text}]
            rows.append({**row, "policy": policy, "sample": sample, "tokens": len(text.split())})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
