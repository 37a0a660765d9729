#!/usr/bin/env python3
"""Opens a report in headless Chromium and checks that it works for people.

At phone and desk width, light and dark: the overview table, plots, links, search and keyboard
work, nothing overflows sideways, no message reaches the console and nothing is requested.
Speaks the DevTools protocol over a pipe, so Python's standard library is enough.
"""

import argparse
import base64
import json
import os
import pathlib
import subprocess
import sys
import tempfile


class Browser:
    """A headless browser with one page; commands go out on its fd 3, answers come on its fd 4."""

    def __init__(self, program, profile):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def place():
            # Copies far away first: 3 and 4 may themselves be ends of the pipes.
            os.dup2(to_browser, 100)
            os.dup2(from_browser, 101)
            os.dup2(100, 3)
            os.dup2(101, 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--disable-background-networking", "--remote-debugging-pipe",
                 f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen([program, *flags], preexec_fn=place, close_fds=False,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._next = 0
        self._session = None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def _read(self):
        while b"\0" not in self._buffer:
            chunk = os.read(self._in, 1 << 16)
            if not chunk:
                raise SystemExit("the browser went away")
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, url):
        loads = sum(e.get("method") == "Page.loadEventFired" for e in self.events)
        self.call("Page.navigate", url=url)
        while sum(e.get("method") == "Page.loadEventFired" for e in self.events) == loads:
            self.events.append(self._read())

    def value(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise SystemExit(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def key(self, key, code):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def close(self):
        try:
            self.call("Browser.close")
        except (SystemExit, OSError):
            pass
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


CHECKED = 0


def check(condition, what):
    global CHECKED
    CHECKED += 1
    if not condition:
        raise SystemExit(f"failed: {what}")


# Smallest contrast ratio (WCAG) between text and its background over all text on the page.
CONTRAST = """(() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const luminance = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let worst = [99, ""];
  for (const node of document.querySelectorAll("body *")) {
    const svg = node.tagName.toLowerCase() === "text";
    const own = Array.from(node.childNodes).some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(node.tagName) || !node.getClientRects().length) continue;
    let back = node;
    while (back && parse(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
    const ground = parse(getComputedStyle(back || document.body).backgroundColor).slice(0, 3);
    const ink = parse(getComputedStyle(node)[svg ? "fill" : "color"]).slice(0, 3);
    const [a, b] = [luminance(ink), luminance(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.tagName + " " + node.textContent.trim().slice(0, 40)];
  }
  return worst;
})()"""

# Smallest font size on screen of any text in a plot.
FONT = """Math.min(...Array.from(document.querySelectorAll("figure svg")).map((svg) => {
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return Math.min(...Array.from(svg.querySelectorAll("text")).map((t) => parseFloat(t.getAttribute("font-size")) * scale));
}))"""

ROWS = "Array.from(document.querySelectorAll('#overview tbody tr')).filter((r) => r.getClientRects().length).length"


def page(browser, url, width, scheme, folder):
    name = f"{width} px, {scheme}"
    browser.events.clear()
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(url)

    check(browser.value("document.title") == "thalweg: results", f"{name}: title")
    rows = browser.value(ROWS)
    check(rows >= 1, f"{name}: the overview has rows")
    wide = browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    check(wide <= 0, f"{name}: {wide} px of the page lie beyond the right edge")
    sizes = browser.value("Array.from(document.querySelectorAll('figure svg')).map((s) => { const b = s.getBoundingClientRect(); return [b.width, b.height, s.querySelectorAll('text').length, b.right]; })")
    check(len(sizes) >= 2, f"{name}: plots")
    for w, h, texts, right in sizes:
        check(w >= 250 and h >= 60 and texts >= 3 and right <= width, f"{name}: a plot of {w} x {h} with {texts} labels")
    lines = browser.value("Array.from(document.querySelectorAll('figure svg polyline, figure svg circle')).length")
    check(lines >= 3, f"{name}: lines and dots in the plots")
    font = browser.value(FONT)
    check(font >= 9.5, f"{name}: plot text of {font} px")
    ratio, where = browser.value(CONTRAST)
    check(ratio >= 4.5, f"{name}: contrast {ratio:.2f} of `{where}`")
    shift = browser.value("Math.max(0, ...Array.from(document.querySelectorAll('.verdict')).map((v) => Math.abs(parseFloat(getComputedStyle(v, '::before').textIndent))))")
    check(shift == 0, f"{name}: a verdict's mark is shifted by {shift} px")
    red = browser.value("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    check((red < 128) == (scheme == "dark"), f"{name}: background follows the scheme")
    inks = browser.value("getComputedStyle(document.querySelector('figure svg polyline')).stroke")
    check(inks not in ("none", "rgb(0, 0, 0)"), f"{name}: stroke of a line is {inks}")

    # Every link inside the page leads to a place, and following one gets there.
    targets = browser.value("Array.from(document.querySelectorAll('a[href^=\"#\"]')).map((a) => [a.getAttribute('href'), !!document.querySelector(a.getAttribute('href'))])")
    for href, found in targets:
        check(found, f"{name}: {href} leads nowhere")
    browser.value("document.documentElement.style.scrollBehavior = 'auto'; document.querySelector('#overview tbody a').click()")
    top = browser.value("new Promise((r) => setTimeout(() => r(document.querySelector(location.hash).getBoundingClientRect().top), 50))")
    check(-5 <= top <= 450, f"{name}: after following a link its place is at {top} px")

    # The search box hides rows that do not match, and shows all again.
    search = "(text) => { const b = document.getElementById('search'); b.value = text; b.dispatchEvent(new Event('input')); }"
    browser.value(f"({search})('no such method')")
    check(browser.value(ROWS) == 0, f"{name}: search hides")
    browser.value(f"({search})('')")
    check(browser.value(ROWS) == rows, f"{name}: search shows again")

    # The keyboard alone: the first stop skips to the results, and a summary opens.
    browser.open("about:blank")
    browser.open(url)
    browser.key("Tab", 9)
    check(browser.value("document.activeElement.className") == "skip", f"{name}: first stop of the keyboard")
    browser.value("document.querySelector('details summary').focus()")
    browser.key("Enter", 13)
    check(browser.value("document.querySelector('details').open"), f"{name}: a summary opens by keyboard")
    regions = browser.value("Array.from(document.querySelectorAll('.scroll')).every((e) => e.tabIndex === 0)")
    check(regions, f"{name}: what scrolls can be reached by keyboard")
    headings = browser.value("Array.from(document.querySelectorAll('th')).every((t) => ['row', 'col'].includes(t.scope))")
    check(headings, f"{name}: headings of tables say what they head")

    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    foreign = [u for u in requests if u.split("#")[0] not in (url, "about:blank") and not u.startswith("data:")]
    check(not foreign, f"{name}: requests {foreign}")
    noise = [e for e in browser.events if e.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]
    check(not noise, f"{name}: console {noise}")
    if folder:
        browser.value("window.scrollTo(0, 0)")
        shot = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"report-{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--screenshots", type=pathlib.Path, help="folder for one picture of each form")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(args.browser, profile)
        try:
            for width in (390, 1280):
                for scheme in ("light", "dark"):
                    page(browser, args.report.resolve().as_uri(), width, scheme, args.screenshots)
        finally:
            browser.close()
    print(f"{CHECKED} checks passed")


if __name__ == "__main__":
    sys.exit(main())
