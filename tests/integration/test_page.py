"""The page in a real Chromium, against toy pipelines slow enough to be watched."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from outrider import Client

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement
    from tests.integration.conftest import Cli, Oracle, Serve, Served

pytestmark = [
    pytest.mark.timeout(60),  # a browser takes its time where others work, too
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs chromium and chromedriver (in Debian: chromium, chromium-driver)",
    ),
]
SLOW = ("--toy-step-ms=30", "--toy-draft-ms=4")
HTTP = ("--no-gateway=false", "--port=0")
WIDE, NARROW = (1280, 800), (360, 700)
KINDS = ("drafted", "corrected", "bonus", "plain")
COLOURS = """
const canvas = document.getElementById("lanes"), found = new Set();
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
for (let n = 0; n < pixels.length; n += 4)
  if (pixels[n + 3] === 255) found.add(`${pixels[n]} ${pixels[n + 1]} ${pixels[n + 2]}`);
return [...found];
"""


class Page:
    """What somebody sees of the page, and does there."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, served: Served, **fields: str) -> None:
        """Open it, wait until it can be used, and fill in these settings."""
        self.driver.get(f"{served.url}/")
        self.until("the model's name", lambda: self.text("model") == "toy-target")
        self.set(**fields)

    def set(self, **fields: str) -> None:
        for name, value in fields.items():
            script = "document.getElementById(arguments[0]).value = arguments[1]"
            self.driver.execute_script(script, name, value)

    def at(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        """Also of what is not shown."""
        return str(self.at(name).get_property("textContent"))

    def all(self, css: str) -> list[str]:
        """The text of each element that fits."""
        script = "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent)"
        found: list[str] = self.driver.execute_script(script, css)
        return found

    @property
    def answer(self) -> str:
        return self.all(".assistant .text")[-1]

    def ask(self, text: str) -> None:
        """Ask it, and wait until its answer comes."""
        count = len(self.all("article"))
        self.at("say").send_keys(text, Keys.ENTER)
        self.until("an answer", lambda: len(self.all("article")) > count and self.answer)

    def ended(self) -> str:
        """Wait for the answer's end; the line below it."""
        self.until("the answer's end", lambda: not self.all("[aria-busy]"))
        return self.all(".assistant .small")[-1]

    def press(self, *keys: str) -> None:
        """Keys for whatever has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def focus(self) -> str:
        return str(self.driver.switch_to.active_element.get_attribute("id"))

    def until(self, what: str, check: Callable[[], Any], within_s: float = 20.0) -> None:
        deadline = time.monotonic() + within_s
        while not check():
            assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
            time.sleep(0.03)

    def until_told(self, words: str) -> None:
        """Wait for a sentence about what went wrong."""
        self.until(words, lambda: words in self.text("problem"))

    def complaints(self) -> list[str]:
        """What its console has, but for the statuses of refused requests."""
        driver: Any = self.driver
        logged: list[dict[str, str]] = driver.get_log("browser")
        return [one["message"] for one in logged if one.get("source") != "network"]


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)  # a container's root has no sandbox and little shared memory
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as found:
        found.set_window_size(*WIDE)
        yield found


@pytest.fixture
def page(driver: webdriver.Chrome) -> Iterator[Page]:
    found = Page(driver)
    yield found
    driver.get("about:blank")  # nothing of it goes on
    assert found.complaints() == []


def until_idle(served: Served, within_s: float = 1.0) -> None:
    """The coordinator generates nothing any more."""
    deadline = time.monotonic() + within_s
    with Client(served.ipc) as other:
        while any((requests := other.health()["requests"]).values()):
            assert time.monotonic() < deadline, requests


# ---- answers ------------------------------------------------------------------------------------


def test_an_answer_comes_in_parts_and_shows_where_each_token_is_from(
    page: Page, slow: Served, oracle: Oracle
) -> None:
    page.open(slow, temperature="0", max_tokens="90")
    page.ask("Hi")
    page.until("a request that runs", lambda: page.text("running") == "1")
    early = page.answer
    assert "90 tokens" in page.ended()
    first = oracle("<|user|>Hi<|end|><|assistant|>", 90).text
    assert page.answer == first
    assert first.startswith(early)
    assert 0 < len(early) < len(first)
    told = {kind: int(page.text(kind)) for kind in KINDS}
    assert sum(told.values()) == 90
    for kind in KINDS:  # where no character has several bytes, a token is a piece
        shown = len(page.all(f".assistant .{kind}"))
        assert shown == told[kind] if first.isascii() else 0 < shown <= told[kind]
    assert min(told["drafted"], told["corrected"], told["bonus"]) > 0
    assert len(page.driver.execute_script(COLOURS)) > 5, "the lanes are empty"
    assert "the target computed" in str(page.at("lanes").get_attribute("aria-label"))
    for name in ("acceptance", "speed", "speedup", "overlap"):
        assert page.text(name) != "–"

    page.ask("And?")  # the conversation goes on
    page.ended()
    text = f"<|user|>Hi<|end|><|assistant|>{first}<|end|><|user|>And?<|end|><|assistant|>"
    assert page.answer == oracle(text, 90).text


def test_stopping_ends_the_request_at_the_coordinator(page: Page, slow: Served) -> None:
    page.open(slow, max_tokens="1500")
    page.ask("Hi")
    page.at("stop").click()
    until_idle(slow)
    assert page.ended().startswith("Stopped")
    assert page.answer
    assert page.focus() == "say"
    page.ask("Again")
    page.at("fresh").click()  # so does another conversation
    until_idle(slow)
    assert page.all("article") == []


def test_the_keyboard_is_enough(page: Page, slow: Served) -> None:
    page.open(slow)
    assert page.focus() == "say"
    page.press("Hi")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(
        Keys.SHIFT
    ).perform()
    page.press("you")
    assert page.at("say").get_property("value") == "Hi\nyou"
    page.press(Keys.ENTER)
    page.until("an answer", lambda: page.all(".assistant") and page.answer)
    assert page.all(".user .text") == ["Hi\nyou"]
    page.press(Keys.ESCAPE)
    until_idle(slow)
    page.ended()
    reached = []
    for _ in range(12):
        page.press(Keys.TAB)
        tag = page.driver.switch_to.active_element.tag_name
        reached.append(page.focus() or tag)
        if tag == "summary" and "temperature" not in reached and "fresh" in reached:
            page.press(Keys.SPACE)  # unfolds the settings
    assert {"send", "fresh", "system", "temperature", "top_p", "max_tokens", "seed"} <= set(reached)


def test_everything_has_a_name_and_nothing_is_wider_than_the_window(
    page: Page, slow: Served
) -> None:
    page.open(slow)
    for element in page.driver.find_elements(By.CSS_SELECTOR, "details"):
        page.driver.execute_script("arguments[0].open = true", element)
    for element in page.driver.find_elements(By.CSS_SELECTOR, "input, textarea, button, canvas"):
        assert element.accessible_name or not element.is_displayed(), element.get_attribute("id")
    width = "return [document.documentElement.scrollWidth, innerWidth]"
    try:
        for size in (WIDE, NARROW):
            metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": True}
            page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            found, most = page.driver.execute_script(width)
            assert found <= most == size[0]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---- what goes wrong ----------------------------------------------------------------------------


def test_a_mistake_is_a_sentence_and_loses_nothing(page: Page, slow: Served) -> None:
    page.open(slow, temperature="-1")
    for words, wanted in (("-1", "Temperature should be"), ("warm", "must be a number")):
        page.set(temperature=words, say="")
        page.at("say").send_keys("<b>Hi</b>", Keys.ENTER)
        page.until_told(wanted)
        assert page.at("say").get_property("value") == "<b>Hi</b>"
        assert page.all("article") == []
    page.set(temperature="0", max_tokens="5", say="")
    page.ask("<b>Hi</b><img src=x onerror=document.title=1>")  # and text stays text
    page.ended()
    assert page.text("problem") == ""
    assert page.all(".user .text") == ["<b>Hi</b><img src=x onerror=document.title=1>"]
    assert page.all("b b, article b, img") == []
    assert page.driver.title == "outrider"
    with pytest.raises(JavascriptException, match="TrustedHTML"):  # the browser sees to it, too
        page.driver.execute_script("document.body.innerHTML = 'x'")
    assert [one for one in page.complaints() if "TrustedHTML" not in one] == []


def test_a_lost_draft_is_shown_and_the_answer_goes_on(
    page: Page, slow: Served, oracle: Oracle
) -> None:
    page.open(slow, temperature="0", max_tokens="160")
    page.until("ready", lambda: page.text("state") == "ready")
    page.ask("Hi")
    os.kill(slow.pids()["draft"], signal.SIGKILL)
    page.until("a notice", lambda: "draft worker was lost" in page.text("notice"))
    assert page.at("notice").is_displayed()
    page.until("its return", lambda: "is back since" in page.text("notice"))
    page.ended()
    assert page.answer == oracle("<|user|>Hi<|end|><|assistant|>", 160).text


def test_a_draft_that_stays_away_is_shown_as_lost(page: Page, cli: Cli, serve: Serve) -> None:
    served = serve("remote", "--draft-place=remote", *SLOW, *HTTP)
    page.open(served)
    page.until("no draft", lambda: page.text("state") == "without a draft")
    flags = ("--backend=toy", "--toy-draft-ms=4", f"--connect={served.tcp}")
    draft = cli.start("worker", "draft", *flags)
    page.until("ready", lambda: page.text("state") == "ready")
    draft.kill()
    page.until("lost", lambda: page.text("state") == "draft lost")
    assert any("draft lost" in one for one in page.all("#workers li"))
    page.driver.get("about:blank")  # its connection would be waited for
    assert served.stop() == 143


def test_a_wrong_key_is_told_and_the_right_one_is_kept_for_the_tab(
    page: Page, slow: Served, cli: Cli, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha\n")
    keys.chmod(0o600)
    process = cli.start("gateway", f"--connect={slow.ipc}", "--port=0", f"--api-key-file={keys}")
    assert process.stderr
    url = process.stderr.readline().split()[1]  # Ready: …
    page.driver.get(f"{url}/")
    page.until("the question", lambda: page.at("key").is_displayed())
    assert page.focus() == "key"
    assert page.text("key-problem") == ""
    page.press("beta", Keys.ENTER)
    page.until("a sentence", lambda: "does not know that key" in page.text("key-problem"))
    page.press("alpha", Keys.ENTER)  # over the wrong one, which is selected
    page.until("the model's name", lambda: page.text("model") == "toy-target")
    page.set(max_tokens="5")
    page.ask("Hi")
    assert "5 tokens" in page.ended()
    stored = "return [sessionStorage.length, localStorage.length, document.cookie, location.href]"
    assert page.driver.execute_script(stored) == [1, 0, "", f"{url}/"]
    page.driver.get(f"{url}/")
    page.until("the model's name", lambda: page.text("model") == "toy-target")
    assert not page.at("key").is_displayed()
    page.driver.get("about:blank")
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 0
