"""tools/rate.py's page in headless Chromium, as a person uses it: make browser.

A right answer of a test is what the log in OUT holds afterwards, compared with the texts that were
on the screen. Every test ends with the browser's own log, which must be free of errors: a script
that the policy had to stop would stand there.
"""

import json
import re
import shutil
import threading
from functools import partial

import pytest
import tiny
from tiny import user
from tqdm import tqdm

from tools import rate, ratings
from tools.ratings import Ratings

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

ATTACK = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    "</script><svg onload='window.hacked = 1'></textarea></title>\u2028window.hacked = 1\u2029"
    "<a href='javascript:window.hacked = 1'>x</a>&lt;b&gt; ${window.hacked = 1} {{7*7}} \u202e"
)


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,800"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(300)
    yield driver
    driver.quit()


class Rating:
    """A server at work, and a browser that has its page open."""

    def __init__(self, driver, folder, pairs):
        self.driver, self.folder, self.out = driver, folder, folder / "out"
        for i, name in enumerate("ab"):
            rows = [{"prompt": user(p[0]), "answer": p[1 + i]} for p in pairs]
            tiny.write(folder / f"{name}.jsonl", rows)
        self.pairs = ratings.read_pairs(folder / "a.jsonl", folder / "b.jsonl")
        self.start()

    def start(self, port=0):
        self.server = rate.Server(port)
        self.server.ratings, self.server.bar = Ratings(self.pairs, self.out), tqdm(disable=True)
        serve = partial(self.server.serve_forever, 0.02)
        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()

    def stop(self) -> str:
        """→ what the terminal would show."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        self.server.ratings.write()
        self.server.ratings.log.close()
        return rate.summary(self.server.ratings)

    def open(self, name=None):
        self.driver.get("about:blank")
        self.driver.get(self.server.address)
        if name:
            self.wait(lambda: self.find("#name").is_displayed())
            self.find("#name").send_keys(name + Keys.ENTER)
            self.wait(lambda: self.find("#choices").is_displayed())

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def js(self, script, *values):
        return self.driver.execute_script(script, *values)

    def wait(self, condition):
        WebDriverWait(self.driver, 60, 0.02).until(lambda _: condition())

    def press(self, key):
        """A key, on whatever has the focus."""
        webdriver.ActionChains(self.driver).send_keys(key).perform()

    def answers(self):
        return [self.js(f"return a{i}.textContent") for i in (1, 2)]

    def at(self, done):
        """Waits until the page says so many are rated."""
        self.wait(lambda: self.find("#count").text.startswith(f"{done} of {len(self.pairs)} "))

    def said(self, text):
        self.wait(lambda: text in self.find("#said").text)

    def lines(self):
        return [json.loads(x) for x in (self.out / "ratings.jsonl").read_bytes().splitlines()]

    def preferred(self, line):
        """The text that won a line of the log."""
        return self.pairs[line["pair"]]["responses"]["ab".index(line["winner"])]


@pytest.fixture
def rating(chromium, tmp_path):
    running = []

    def start(pairs):
        running.append(Rating(chromium, tmp_path, pairs))
        return running[-1]

    chromium.get_log("browser")
    yield start
    chromium.get("about:blank")
    wrong = [entry["message"] for entry in chromium.get_log("browser")]
    for r in running:
        if r.thread.is_alive():
            r.stop()
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wrong == []


def questions(n):
    return [(f"question {i}?", f"yes, {i}", f"no, {i}") for i in range(n)]


# ---------------------------------------------------------------- keyboard and mouse
def test_all_by_keyboard(rating):
    r = rating(questions(8))
    r.open("Ann")
    r.at(0)
    wanted = []
    for done, key in enumerate(["1", "2", Keys.ARROW_LEFT, Keys.ARROW_RIGHT, "t", "s"], 1):
        one, two = r.answers()
        wanted.append({"1": one, "2": two, Keys.ARROW_LEFT: one, Keys.ARROW_RIGHT: two}.get(key))
        r.press(key)
        r.at(done)
    assert [r.preferred(s) for s in r.lines()[:4]] == wanted[:4]
    assert [s["winner"] for s in r.lines()[4:]] == ["tie", "skip"]
    r.press("c")
    r.press("1 u t s")  # in a comment these are letters
    before = r.answers()
    r.press(Keys.ESCAPE)
    r.press("2")
    r.at(7)
    assert r.lines()[6]["comment"] == "1 u t s" and r.preferred(r.lines()[6]) == before[1]
    assert r.find("#comment").get_attribute("value") == ""
    r.press("u")
    r.at(6)
    r.said("Taken back.")
    assert r.answers() == before and r.find("#comment").get_attribute("value") == "1 u t s"
    r.press("t")
    r.at(7)
    r.press("t")
    r.said("All rated. Thank you!")
    r.press("1")  # nothing is left to choose
    assert "about" not in r.find("#count").text and len(r.lines()) == 10
    out = r.stop()
    assert "of 7 pairs" in out and "500 ratings are the usual least" in out
    figures = json.loads((r.out / "ratings.json").read_text())
    assert figures["ratings"]["skip"] == 1 and figures["n"] == 7


def test_keys_can_be_turned_off_and_a_modifier_is_no_choice(rating):
    r = rating(questions(3))
    r.open("Ann")
    r.at(0)
    chain = webdriver.ActionChains(r.driver)
    chain.key_down(Keys.CONTROL).send_keys("1").key_up(Keys.CONTROL).perform()
    r.find("#keys").click()
    r.press("1")
    r.find("#keys").click()
    r.press("t")
    r.at(1)
    assert [s["winner"] for s in r.lines()] == ["tie"]


def test_mouse_and_a_double_click_is_one_choice(rating):
    r = rating(questions(6))
    r.open("Ann")
    r.at(0)
    one, two = r.answers()
    webdriver.ActionChains(r.driver).double_click(r.find('[data-do="2"]')).perform()
    r.at(1)
    for done, button in enumerate(["tie", "skip", "1"], 2):
        r.find(f'[data-do="{button}"]').click()
        r.at(done)
    r.find('[data-do="undo"]').click()
    r.at(3)
    assert r.preferred(r.lines()[0]) == two
    assert [s["winner"] for s in r.lines()][1:3] == ["tie", "skip"] and len(r.lines()) == 5
    assert "about 1 min left" in r.find("#count").text
    assert re.search(r"2 pairs rated; .* ±\d+\.\d points. 500", r.find("#together").text)


# ---------------------------------------------------------------- nothing is lost
def test_reload_in_the_middle_keeps_the_rater_the_pair_and_the_comment(rating):
    r = rating(questions(4))
    r.open("Ann")
    r.at(0)
    r.press("1")
    r.at(1)
    before = r.answers()
    r.find("#comment").send_keys("half a tho")
    r.driver.refresh()
    r.at(1)
    assert r.answers() == before and r.find("#comment").get_attribute("value") == "half a tho"
    r.find("#comment").send_keys("ught" + Keys.ESCAPE)
    r.press("2")
    r.at(2)
    assert r.lines()[1]["comment"] == "half a thought" and r.preferred(r.lines()[1]) == before[1]


def test_two_tabs_of_one_rater_count_nothing_twice(rating):
    r = rating(questions(4))
    r.open("Ann")
    r.at(0)
    first, seen = r.driver.current_window_handle, r.answers()
    r.driver.switch_to.new_window("tab")
    second = r.driver.current_window_handle
    try:
        r.open("ann")
        r.at(0)
        assert r.answers() == seen
        r.press("1")
        r.at(1)
        r.driver.switch_to.window(first)
        r.at(1)  # the tab that comes to the front looks again
        assert r.answers() != seen
        asked = {"do": "rate", "pair": r.lines()[0]["pair"], "choice": "2", "comment": "late"}
        r.js("ask(arguments[0])", asked)  # a tab that had not looked
        r.said("Rated already")
        assert len(r.lines()) == 1 and r.preferred(r.lines()[0]) == seen[0]
        r.press("t")
        r.at(2)
        assert len({s["pair"] for s in r.lines()}) == 2 and len(r.lines()) == 2
    finally:
        r.driver.switch_to.window(second)
        r.driver.close()
        r.driver.switch_to.window(first)


def test_a_server_that_is_gone_is_said_and_a_new_start_goes_on(rating, chromium):
    r = rating(questions(3))
    r.open("Ann")
    r.at(0)
    r.press("1")
    r.at(1)
    before = r.answers()
    r.stop()
    r.press("2")
    r.said("Not saved: no answer from rate.py")
    assert r.answers() == before
    r.start(r.server.server_port)
    r.press("2")
    r.said("This page is of an earlier start")
    r.open()
    r.at(1)
    assert r.answers() == before and len(r.lines()) == 1
    failed = [e["message"] for e in chromium.get_log("browser")]
    assert failed and all("/api - Failed to load" in m for m in failed)


def test_a_second_rater_and_their_agreement(rating):
    r = rating(questions(12))
    r.open("Ann")
    r.at(0)
    for done in range(1, 13):  # Ann likes every yes
        r.press("1" if r.answers()[0].startswith("yes") else "2")
        r.at(done)
    r.find("#leave").click()
    r.find("#name").send_keys("Ben" + Keys.ENTER)
    r.at(0)
    assert r.find("#leave").text == "Not Ben?"
    for done in range(1, 11):  # Ben too, but for two ties
        r.press("t" if done < 3 else "1" if r.answers()[0].startswith("yes") else "2")
        r.at(done)
    assert "12 pairs rated" in r.find("#together").text
    out = r.stop()
    figures = json.loads((r.out / "ratings.json").read_text())
    assert figures["raters"] == {"Ann": 12, "Ben": 10} and figures["n"] == 12
    assert figures["agreement"] == [
        {"raters": ["Ann", "Ben"], "n": 10, "equal": 0.8, "kappa": 0.0}  # chance: 1 · 0.8
    ]
    assert "Ann and Ben: 80.0% equal of 10 pairs" in out
    orders = [[s["pair"] for s in r.lines() if s["rater"] == who] for who in ("Ann", "Ben")]
    assert orders[0][:10] != orders[1]


RATE_SOME = """
const [start, n, over] = arguments, seen = [];
const count = document.getElementById("count");
const look = () => {
  const done = start + seen.length;
  if (!count.textContent.startsWith(`${done} of`)) return;
  if (done === n) return watch.disconnect(), over(seen);
  const choice = ["1", "2", "tie", "skip"][done % 4];
  seen.push([a1.textContent, a2.textContent, choice]);
  setTimeout(() => document.querySelector(`[data-do="${choice}"]`).click());
};
const watch = new MutationObserver(look);
watch.observe(count, { childList: true, characterData: true, subtree: true });
look();
"""


def test_a_thousand_pairs(rating):
    r = rating([(f"{i}? {ATTACK}", f"{i} a {ATTACK}", f"{i} b {ATTACK}") for i in range(1000)])
    r.open("Ann")
    r.at(0)
    seen = []
    for n in range(100, 1001, 100):  # with reloads in between
        r.at(len(seen))
        seen += r.driver.execute_async_script(RATE_SOME, len(seen), n)
        r.driver.refresh()
    r.said("All rated. Thank you!")
    assert r.js("return window.hacked === undefined")
    r.stop()
    assert len(r.lines()) == len({s["pair"] for s in r.lines()}) == len(seen) == 1000
    for line, (one, two, choice) in zip(r.lines(), seen, strict=True):
        wanted = {"1": one, "2": two}.get(choice)
        assert line["winner"] == choice if wanted is None else r.preferred(line) == wanted
    rows = [json.loads(x) for x in (r.out / "rankings.jsonl").read_bytes().split(b"\n")[:-1]]
    assert len(rows) == 750 and sum(row["ranks"] == [0, 0] for row in rows) == 250


# ---------------------------------------------------------------- nothing is executed
def test_html_and_scripts_stay_text(rating, chromium):
    r = rating([(f"{i} {ATTACK}", f"{i} a {ATTACK}", f"{i} b {ATTACK}") for i in range(3)])
    name = "<script>hacked=1</script><img src=x onerror=hacked=1>"
    r.open(name)
    r.at(0)
    assert sorted(r.answers())[0].endswith(ATTACK)
    assert r.js("return document.querySelector('#prompt .text').textContent").endswith(ATTACK)
    for part in ("#prompt .text", "#a1", "#a2", "#leave"):
        assert r.js("return document.querySelector(arguments[0]).children.length", part) == 0
    r.js("arguments[0].value = arguments[1]", r.find("#comment"), ATTACK)
    r.press("1")
    r.at(1)
    r.press("u")
    r.at(0)
    assert r.find("#comment").get_attribute("value") == ATTACK
    r.press("t")
    r.at(1)
    assert r.find("#leave").text == f"Not {name}?"
    assert [s["comment"] for s in r.lines()] == [ATTACK, "", ATTACK]
    assert {s["rater"] for s in r.lines()} == {name}
    assert len(r.js("return [...document.scripts]")) == 1
    assert r.js("return window.hacked === undefined && document.images.length === 0")
    r.find("#leave").click()
    r.find("#name").send_keys("a\u202eb" + Keys.ENTER)  # it would turn round what stands after it
    r.said("a name of 1 to 60 letters was expected")
    [refused] = chromium.get_log("browser")
    assert "400 (Bad Request)" in refused["message"]


def test_the_policy_stops_what_the_page_does_not_bring(rating, chromium):
    """Beneath textContent there is a second floor: even markup that got in would not run."""
    r = rating(questions(2))
    r.open("Ann")
    r.at(0)
    r.js(
        "const s = document.createElement('script');"
        "try { s.text = 'window.hacked = 1'; document.body.append(s); } catch {}"
        "try { document.body.innerHTML += '<img src=x onerror=\"window.hacked = 1\">'; } catch {}"
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x'; document.body.append(i);"
    )
    stopped = "return fetch('http://127.0.0.1:9/').then(() => 0, () => 1)"
    assert r.js(stopped) == 1 and r.js("return window.hacked === undefined")
    said = " ".join(e["message"] for e in chromium.get_log("browser"))
    assert "TrustedScript" in said and "img-src" in said and "connect-src" in said


# ---------------------------------------------------------------- sizes, and who cannot see
LONG = "word " * 400 + "x" * 3000 + "\n\n\tif a < b:\n" + "    return" + " very" * 80


@pytest.mark.parametrize("width", [390, 320])
def test_phone_width(rating, width):
    pairs = [("p" * 500, LONG, LONG + "!"), ("p" * 400, LONG + "?", "")]
    r = rating(pairs)
    size = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    r.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    r.open("A" * 60)
    r.at(0)
    assert r.js("return document.documentElement.scrollWidth") <= width
    wide = r.js(
        "return [...document.querySelectorAll('body *')].filter(e => e.offsetParent && "
        "(e.getBoundingClientRect().right > innerWidth + 0.5 || e.scrollWidth > e.clientWidth + 1)"
        " && e.clientWidth).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    for button in r.driver.find_elements("css selector", "button, textarea"):
        if button.is_displayed():
            assert button.size["height"] >= 44 and button.size["width"] >= 44
    bottom = "return document.querySelector('#choices').getBoundingClientRect().bottom"
    assert r.js(bottom) <= 844  # at hand however long the answers are
    assert r.js("return a1.getBoundingClientRect().bottom <= a2.getBoundingClientRect().top")
    r.find('[data-do="1"]').click()
    r.at(1)
    assert r.js("return scrollY") == 0


LUMINANCE = """
const parse = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => {
  v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
const light = (c) => { const [r, g, b] = parse(c); return 0.2126*r + 0.7152*g + 0.0722*b; };
const behind = (e) => { const c = getComputedStyle(e).backgroundColor;
  return c === "rgba(0, 0, 0, 0)" && e.parentElement ? behind(e.parentElement) : c; };
return [...document.querySelectorAll("h1, h2, p, label, .text, button:enabled, textarea")]
  .filter((e) => e.offsetParent && e.textContent).map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 60)]; });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_names_and_focus(rating, scheme):
    r = rating(questions(3))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    r.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    r.open("Ann")
    r.at(0)
    r.press("t")
    r.at(1)
    contrasts = r.js(LUMINANCE)
    assert len(contrasts) > 10 and min(contrasts)[0] >= 4.5, min(contrasts)  # WCAG 2.1, AA
    assert r.js("return document.activeElement.id") == "ask"  # a screen reader reads on from here
    for e in r.driver.find_elements("css selector", "button, textarea, progress, #keys, #name"):
        if e.is_displayed():
            assert e.accessible_name.strip()
    assert r.find("#said").get_attribute("aria-live") == "polite"
    assert [r.find(s).accessible_name for s in (".pair > :first-child", "#choices")] == [
        "Answer 1",
        "Your choice",
    ]
    r.find("#comment").click()
    r.press(Keys.TAB + Keys.TAB + Keys.ENTER)  # past the keys' box, on "1 is better"
    r.at(2)
