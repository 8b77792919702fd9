"""The page in headless Chromium: upload, slices, stream, second turn, stop, retry, errors, phone and keyboard."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import MODEL, Served, endless, make_directory, png, serving, wait_until

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromium-driver")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(make_directory(tmp_path_factory.mktemp("page") / MODEL), max_pixels=1_000_000) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person does on the page."""

    def __init__(self, driver: object, url: str) -> None:
        self.driver = driver
        driver.get(url)
        assert wait_until(lambda: self.one("#model").text == MODEL)

    def one(self, css: str):
        return self.driver.find_element("css selector", css)

    def all(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def set(self, **values: object) -> None:
        for name, value in values.items():
            self.driver.execute_script(f"document.getElementById('{name}').value = arguments[0]", str(value))

    def upload(self, *paths: Path) -> None:
        count = len(self.all("#waiting figure"))
        self.one("#file").send_keys("\n".join(map(str, paths)))
        assert wait_until(lambda: len(self.all("#waiting figure")) == count + len(paths))

    def ask(self, text: str) -> None:
        self.one("#text").send_keys(text + "\n")

    def texts(self) -> list[str]:
        """The answers as they came, before they became elements."""
        return self.driver.execute_script("return turns.filter((t) => t.role === 'assistant').map((t) => t.text)")

    def answers(self) -> list[str]:
        return [node.text for node in self.all(".turn.assistant .said")]

    def idle(self, answers: int) -> bool:
        return wait_until(lambda: self.one("#send").is_displayed() and len(self.all(".assistant .note")) == answers)


@pytest.fixture
def page(chromium, served: Served) -> Page:
    chromium.set_window_size(1100, 900)
    return Page(chromium, served.url)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    (tmp_path / "blocks.png").write_bytes(png(1, (120, 80)))
    return tmp_path / "blocks.png"


def test_a_conversation_with_a_picture(page: Page, served: Served, picture: Path) -> None:
    page.set(max_tokens=10)
    page.upload(picture)
    assert "slices" in page.one("#waiting figcaption").text and len(page.all("#waiting .tiles canvas")) >= 2
    page.ask("What is it?")
    assert page.idle(1)
    served.session.reset()
    from mlx_llama3v.inference import Sampling

    expected = [list(served.session.ask("What is it?", [picture], Sampling(max_tokens=10)))[-1].answer.text]
    assert page.texts() == expected and not page.all("#waiting figure")
    page.ask("And now?")
    assert page.idle(2) and len(page.all(".turn.user")) == 2
    before = page.answers()
    retries = [node for node in page.all(".assistant .tools button") if node.text == "Retry" and node.is_displayed()]
    assert len(retries) == 1  # only the last answer can be had again
    retries[0].click()
    assert page.idle(2) and page.answers() == before
    (edit,) = page.all(".user .tools button")
    edit.click()
    assert page.one("#text").get_attribute("value") == "And now?" and len(page.all(".turn")) == 2
    page.one(".user .tools button").click()  # now the first question is the last one
    assert len(page.all("#waiting figure")) == 1 and not page.all(".turn")
    page.driver.execute_script("document.getElementById('text').value = ''")
    page.ask("What is it?")
    assert page.idle(1) and page.texts() == expected
    page.one("#new").click()
    assert not page.all(".turn") and page.one("#hint").is_displayed()


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_pictures_are_dropped_and_pasted(page: Page, how: str) -> None:
    script = """
    const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], "a.png", { type: "image/png" }));
    const how = { bubbles: true, cancelable: true, dataTransfer: carried, clipboardData: carried };
    const kind = arguments[1] === "drop" ? DragEvent : ClipboardEvent;
    document.body.dispatchEvent(new kind(arguments[1], how));
    """
    page.driver.execute_script(script, base64.b64encode(png(1)).decode(), how)
    assert wait_until(lambda: len(page.all("#waiting figure")) == 1)
    page.one("#waiting .remove").click()
    assert not page.all("#waiting figure")


def test_it_streams_and_stops(page: Page, served: Served) -> None:
    page.set(max_tokens=3000, temperature=2, seed=1)
    with endless(served):
        page.ask("Go on")
        assert wait_until(lambda: len(page.answers()) == 1 and len(page.answers()[0]) > 20)
        first = page.answers()[0]
        assert wait_until(lambda: len(page.answers()[0]) > len(first)) and page.one("#stop").is_displayed()
        page.one("#stop").click()
    assert page.idle(1) and "stopped" in page.one(".assistant .note").text
    assert wait_until(lambda: served.worker.load == 0, 2)


def test_what_goes_wrong_is_shown(page: Page, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.one("#file").send_keys(str(tmp_path / "broken.png"))
    assert wait_until(lambda: "picture" in page.one("#error").text)
    (tmp_path / "huge.png").write_bytes(png(0, (1500, 1500)))
    page.one("#file").send_keys(str(tmp_path / "huge.png"))
    assert wait_until(lambda: "1500 x 1500" in page.one("#error").text)
    page.set(max_tokens=999999)
    page.ask("Too much")
    assert wait_until(lambda: "max_tokens is 999999" in page.one("#error").text)
    assert page.one("#text").get_attribute("value") == "Too much" and not page.all(".turn")  # nothing is lost


def test_a_phone_and_the_keyboard(page: Page, picture: Path) -> None:
    page.driver.set_window_size(500, 800)
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    page.set(max_tokens=4)
    page.upload(picture, picture)
    page.ask("Two of them?")
    assert page.idle(1)
    width = "return [document.documentElement.scrollWidth, innerWidth]"
    needed, there = page.driver.execute_script(width)
    assert needed <= there == 360
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    reached = set()
    for _ in range(12):
        webdriver.ActionChains(page.driver).send_keys("\ue004").perform()
        reached.add(page.driver.switch_to.active_element.get_attribute("id"))
    assert {"new", "open-settings", "file", "text", "send"} <= reached


def test_by_keyboard_alone(page: Page, served: Served, picture: Path) -> None:
    def press(*keys: str) -> None:
        webdriver.ActionChains(page.driver).send_keys(*keys).perform()

    def focus(css: str) -> bool:
        for _ in range(15):
            if page.driver.execute_script("return document.activeElement.matches(arguments[0])", css):
                return True
            press("\ue004")
        return False

    page.upload(picture)
    assert focus("#waiting .view")
    press("\ue007")
    assert page.one("#viewer").is_displayed() and len(page.all("#viewer .tiles canvas")) >= 2
    press("\ue00c")
    assert not page.one("#viewer").is_displayed() and focus("#waiting .remove")
    press("\ue007")
    assert not page.all("#waiting figure")
    page.set(max_tokens=3000, temperature=2, seed=1)
    with endless(served):
        assert focus("#text")
        press("Go on", "\ue007")
        assert wait_until(lambda: page.answers() and len(page.answers()[0]) > 10)
        press("\ue00c")
        assert page.idle(1) and "stopped" in page.one(".assistant .note").text


def test_answers_become_elements_and_never_html(page: Page) -> None:
    text = (
        "## Head\nsome **bold** *light* `a<b` and [here](https://a.example/x) ![no](https://a.example/y.png)\n"
        "<img src=x onerror=alert(1)>\n\n1. one\n   - inner\n\n```py\n<b>x</b>\n```\n> said\n[bad](javascript:alert(1))"
    )
    script = "const made = document.createElement('div'); made.append(markdown(arguments[0])); return made"
    found = page.driver.execute_script(f"{script}.innerHTML", text)
    for part in (
        "<h4>Head</h4>", "<strong>bold</strong>", "<em>light</em>", "<code>a&lt;b</code>",
        'href="https://a.example/x"',
        "![no](https://a.example/y.png)", "&lt;img src=x", '<ol start="1"><li',
        "<pre><code>&lt;b&gt;x&lt;/b&gt;</code>",
        "<blockquote><p>said</p>", "[bad](javascript:alert(1))",
    ):  # fmt: skip
        assert part in found, (part, found)
    assert "<img" not in found and found.count("<a ") == 1
    whole = page.driver.execute_script(f"{script}.textContent", "a\n\n* b\n*c\n```\nopen **x")
    assert "".join(whole.split()) == "ab*copen**x"  # what is half written is shown, too


def test_colours_and_no_foreign_request(page: Page, served: Served) -> None:
    back = "return getComputedStyle(document.body).backgroundColor"
    found = set()
    for theme in ("light", "dark"):
        page.one("#open-settings").click()
        page.driver.execute_script(
            "const t = document.getElementById('theme'); t.value = arguments[0]; t.dispatchEvent(new Event('change'))",
            theme,
        )
        page.one("#settings button").click()
        found.add(page.driver.execute_script(back))
    assert len(found) == 2
    entries = [entry["message"] for entry in page.driver.get_log("performance")]
    urls = [part.split('"')[0] for text in entries if "requestWillBeSent" in text for part in text.split('"url":"')[1:]]
    assert urls and all(url.startswith((served.url, "data:", "about:", "chrome")) for url in urls)
    severe = [entry for entry in page.driver.get_log("browser") if "Content Security" in entry["message"]]
    assert not severe
