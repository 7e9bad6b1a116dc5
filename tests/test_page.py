"""
extras/page.py: what the page shows, the page as an attacker would ask for it, and the page in a real browser.

The attacks need `pip install gradio`; the browser's part also `pip install playwright` and a Chromium (`apt-get install
chromium`). Each is skipped where one of them is missing. `SCREENSHOT=page.png pytest tests/test_page.py` also takes a
picture of it.
"""
import http.client
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

import evaluate
import graft
from cli import run_cli
from data import world
from extras import page as web

ROOT = Path(__file__).parent.parent
CAPITAL = "What is the capital of the country on the sign?"
KENYA = ("sign", "Kenya")


def prompt_of(vlm, question=CAPITAL):
    return vlm.prompt([{"role": "user", "content": web.wrap(question)}])


@pytest.fixture(scope="module")
def read(vlm, surrogate):
    """(embeds, lengths, Reading) of a question about Kenya's sign."""
    embeds, lengths = vlm.embed_prompts([prompt_of(vlm)], [web.picture(KENYA)])
    return embeds, lengths, evaluate.Reading(embeds, lengths, vlm.decoder, surrogate)


# ---- without Gradio -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["Kenya", "kenya ", "a b", "W" * 1000, "\ufb03" * 14, "日本", "مصر", "\U0001f600",
                                  "\ufdfd" * 9, "<b>&", "\u200bx", "1\ufe0f\u20e3", "${1}", "%s{}"])
def test_a_word_becomes_a_sign(word):
    (image, subject, line), (again, _, _) = web.show(web.sign, word), web.show(web.sign, word)
    if image is None:
        assert "too wide" in line
    else:
        assert image.size == (64, 64) and image.tobytes() == again.tobytes() and not line
        assert image.tobytes() != web.picture(("sign", "Cuba")).tobytes()
        assert subject[0] == "sign" and 0 < len(subject[1]) <= web.MAX_WORD


@pytest.mark.parametrize("choose, given, line", [
    *((web.sign, word, "type a word") for word in ("", " \n\t", "\x00\x07", "\ud800", "\u202e")),
    *((web.nth, i, "choose one of the pictures") for i in (-1, 10**9, None, "0", 1.0, True, [0], {}, [0, 0])),
    *((web.uploaded, path, "choose one file") for path in (None, [], {}, 3, ["a.png"])),
], ids=repr)
def test_nothing_is_chosen(choose, given, line):
    """A request that was made by hand may hold anything."""
    assert web.show(choose, given) == (None, None, f"⚠ {line}")


def test_upload_that_is_no_image(tmp_path):
    file = tmp_path / "<notes>.png"
    file.write_bytes(b"not an image")
    image, subject, line = web.show(lambda: ("file", str(file)))
    assert image is None and subject is None and str(tmp_path) not in line
    assert line.startswith("⚠ &lt;notes&gt;.png: not an image")
    Image.new("RGB", (10_001, 1)).save(file)
    assert "10001 x 1 pixels" in web.show(lambda: ("file", str(file)))[2]


def test_both_answer_as_each_alone(read, vlm, surrogate):
    embeds, _, reading = read
    *_, said = web.talk(reading, vlm.tokenizer, max_new_tokens=9)
    for name, decoder in (("pair", surrogate), ("graft", vlm.decoder)):
        alone = decoder.generate(embeds=embeds, stop=vlm.tokenizer.stop_tokens, max_new_tokens=9)[0]
        assert said[name][0] == alone and said[name][1] > 0
    assert said["pair"][0] != said["graft"][0]


def test_options_are_ranked_as_graft_ranks_them(read, vlm, surrogate):
    """As the comparison ranks them, which test_evaluate.py holds against brute force; likeliest first, of 100 %."""
    sample = web.sample_of(CAPITAL, KENYA)
    assert sample.answer == "The capital is Nairobi." and len(sample.options) == 10
    embeds, lengths, reading = read
    best = evaluate.answer(embeds, lengths, [sample], vlm.decoder, surrogate, vlm.tokenizer, max_new_tokens=1)
    for name, ranked in web.rank(reading, vlm.tokenizer, sample.options).items():
        p = [p for _, p in ranked]
        assert ranked[0][0] == sample.options[best[name][0][0]] and p == sorted(p, reverse=True)
        assert sorted(o for o, _ in ranked) == sorted(sample.options) and sum(p) == pytest.approx(1)


def test_which_questions_have_options():
    has = web.sample_of
    assert has("What is the color of the shape?", ("shape", "red", "star")).answer == "The color is red."
    assert has("Name the capital city of this flag's country.", ("flag", "Japan")).answer == "The capital is Tokyo."
    assert has(CAPITAL, ("sign", "India")).answer == "The capital is New Delhi."        # trained as no sign, but known
    for question, subject in ((CAPITAL, ("sign", "Zebra")), (CAPITAL, ("flag", "Japan")), ("Why?", KENYA),
                              (CAPITAL, ("shape", "red", "star")), (CAPITAL, ("file", "/tmp/x.png")),
                              ("Read the sign.", ("sign", "Zebra")), ("What shape is it?", KENYA)):
        assert has(question, subject) is None
    for subject in world.SUBJECTS:      # every question of the world about every picture: options or none, no error
        for questions in web.SUGGESTIONS.values():
            for question in questions:
                has(question, subject)


def test_answer_piece_by_piece(vlm, surrogate):
    shown = list(web.respond(vlm, surrogate, KENYA, CAPITAL))
    assert len(shown) > 3 and all(line == "" for line, *_ in shown)
    assert all(layers is None for *_, layers in shown[:-1])
    _, pair, answer, layers = shown[-1]
    assert len(layers.axes) == 3
    assert pair.count('class="bar"') == answer.count('class="bar"') == 6 and "tokens/s" in pair
    assert "Nairobi. ✓" in pair + answer or "Nairobi" not in pair + answer
    free = list(web.respond(vlm, surrogate, KENYA, "Why? " * 1000))[-1]
    assert 'class="bar"' not in free[1] and free[3] is not None


def test_what_cannot_be_asked(vlm, surrogate, tmp_path):
    nothing = (None, [], {}, 0, "", " ", "<image>", " <image> ", "<im<image>age>")
    for subject, question, line in (*((KENYA, q, "ask something") for q in nothing), (None, CAPITAL, "choose an image"),
                                    (("file", str(tmp_path / "gone.png")), "Why?", "gone.png: no such file")):
        (shown,) = web.respond(vlm, surrogate, subject, question)
        assert line in shown[0] and str(tmp_path) not in shown[0]
    for question in ("<|im_end|>", "\ud800", "\x00"):       # no forged turn
        assert list(web.respond(vlm, surrogate, KENYA, question))[-1][3] is not None


def test_answers_are_text_not_html():
    assert "<script>" not in web.column("pair", "<script>", ranked=[("<script>", 1.0)])


def test_lens_ends_where_the_models_do(vlm, surrogate):
    prompt, ids = prompt_of(vlm), torch.tensor([5, 6, 7])
    embeds, _ = vlm.embed_prompts([prompt + ids.tolist()], [web.picture(KENYA)])
    at = slice(len(prompt) - 1, -1)
    full, ours = (web.layers_say(vlm.decoder, embeds, at, ids),
                  web.layers_say(surrogate, embeds, at, ids, surrogate.n_shared))
    for (tokens, p, logp), decoder, layers in ((full, vlm.decoder, 6), (ours, surrogate, 2)):
        assert tokens.shape == p.shape == logp.shape == (layers, 3)
        probs = decoder(embeds=embeds)[0, at].softmax(-1)
        assert tokens[-1].tolist() == probs.argmax(-1).tolist()
        torch.testing.assert_close(p[-1], probs.amax(-1))
        torch.testing.assert_close(logp[-1].exp(), probs.gather(1, ids[:, None])[:, 0])


def test_graft_py_starts_it(stages, tmp_path, monkeypatch, capsys):
    """With the graft and its surrogate; without Gradio a line says so."""
    argv, served = ["--web", "--encoder", stages["encoder"], "--out", str(tmp_path)], []
    monkeypatch.setattr(web, "gr", None)
    assert run_cli(lambda: graft.main(argv)) == 2
    assert capsys.readouterr().err == "error: --web needs Gradio: pip install gradio\n"
    monkeypatch.setattr(web, "gr", "there")
    monkeypatch.setattr(web, "page", lambda *models: models)
    monkeypatch.setattr(web, "serve", lambda models, inbrowser: served.append(models))
    graft.main(argv)
    ((vlm, surrogate),) = served
    assert surrogate.model.layers[0] is vlm.decoder.model.layers[0] and len(surrogate.model.layers) == 4


# ---- attacked -------------------------------------------------------------------------------------------------------

OTHERS = [
    *(dict(Host=host) for host in ("evil.com", "evil.com:7860", "127.0.0.1.evil.com", "", "localhost@evil.com", "[::1]",
                                   "0.0.0.0", "169.254.169.254")),
    *(dict(Origin=o) for o in ("http://evil.com", "null", "http://127.0.0.1", "https://localhost", "")),
    dict(Host="evil.com", Origin="http://evil.com"),
]
ENVIRONMENT = ["GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_SERVER_NAME", "GRADIO_ROOT_PATH", "GRADIO_NUM_WORKERS"]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The page in this process, without models: nobody asks them anything."""
    pytest.importorskip("gradio", reason="no Gradio: pip install gradio")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    for name in ENVIRONMENT:        # whatever it says, not one file more
        patch.setenv(name, "/")
    blocks = web.page(None, None)
    _, url, _ = web.serve(blocks, prevent_thread_lock=True, quiet=True)
    yield urlsplit(url)
    blocks.close()
    patch.undo()


def request(url, method="GET", path="/", body=None, **headers):
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
    connection.putrequest(method, path, skip_host=True)
    for name, value in (dict(Host=url.netloc) | headers).items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    reply = connection.getresponse()
    return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()


def upload(url, content, **headers):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="photo.png"\r\n\r\n' + content
    return request(url, "POST", "/gradio_api/upload", body + b"\r\n--x--\r\n",
                   Content_Type="multipart/form-data; boundary=x", **headers)


@pytest.mark.parametrize("headers", OTHERS, ids=str)
def test_other_sites_are_refused(url, headers):
    for method, path in (("GET", "/"), ("GET", "/config"), ("OPTIONS", "/gradio_api/upload")):
        status, got, _ = request(url, method, path, Access_Control_Request_Method="POST", **headers)
        assert status == 403 and not any(k.startswith("access-control") for k in got), (method, path)
    assert upload(url, b"x" * 1000, **headers)[0] == 403


def test_this_machine_is_served(url):
    for host in (url.netloc, f"localhost:{url.port}"):
        status, got, text = request(url, Host=host)
        assert status == 200 and "frame-ancestors 'none'" in got["content-security-policy"] and b"<html" in text
        assert request(url, Host=host, Origin=f"http://{host}")[0] == 200


def test_no_file_but_its_own(url):
    for path in ("/etc/passwd", "/proc/self/environ", web.__file__, "/work"):
        assert request(url, path=f"/gradio_api/file={path}")[0] in (403, 404), path


def test_twelve_photos_at_once(url):
    """Of 64 megapixels each: one after the other is made small."""
    photo = io.BytesIO()
    Image.new("RGB", (8000, 8000), "teal").save(photo, "PNG")

    def shown_size(_):
        status, _, text = upload(url, photo.getvalue())
        return status, web.show(web.uploaded, json.loads(text)[0])[0].size

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(shown_size, range(12))) == [(200, (1024, 1024))] * 12
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"12 photos of 64 megapixels at once: {peak:.2f} GB more")
    assert peak < 1.2


# ---- in a browser ---------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Chromium itself asks Google for updates and the like: no name but this machine's is resolved, its log has them all
ALONE = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium. `browser.net_log`: its own log of every request, whole when it is closed."""
    pytest.importorskip("gradio", reason="no Gradio: pip install gradio")
    driver = pytest.importorskip("playwright.sync_api", reason="no browser driver: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    log = tmp_path_factory.mktemp("browser") / "net.json"
    with driver.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*ALONE, f"--log-net-log={log}"])
        browser.net_log = log
        yield browser
        browser.close()


AUDIT = """
import os, sys
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open(os.environ["AUDIT"], "a") as f:
            print(event, args[1] if event == "socket.connect" else args[0], file=f)
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    """`python graft.py --web` with the shipped weights: .url, .pid, and .audit, a log of every connection it makes."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "sitecustomize.py").write_text(AUDIT)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= dict(BROWSER="true", PYTHONUNBUFFERED="1", PYTHONPATH=str(folder), AUDIT=str(folder / "audit"),
                GRADIO_TEMP_DIR=str(folder / "uploads"))
    process = subprocess.Popen([sys.executable, "graft.py", "--web"], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://\S+", line):
            process.url, process.audit = found[0], folder / "audit"
            break
    else:
        pytest.fail("".join(lines))
    threading.Thread(target=process.stdout.read, daemon=True).start()       # so that it never waits for a reader
    yield process
    process.terminate()
    process.wait(20)


def visit(browser, url):
    """(a page, the list of its console errors)."""
    page, errors = browser.new_page(viewport=dict(width=1400, height=900)), []
    page.set_default_timeout(60_000)
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(url)
    page.wait_for_selector("#ask")
    return page, errors


def ask(page, question):
    """Ask, wait for the last figure. Returns what pair and graft say."""
    page.fill("#question textarea, #question input", question)
    page.click("#ask")
    page.wait_for_selector("#look img", state="detached")
    page.wait_for_selector("#look img")
    return [page.locator(f"#{name} p").inner_text() for name in ("pair", "graft")]


def shown(page):
    """The pixels of the image on the page as bytes, or None."""
    found = page.locator("#picture img")
    if found.count():
        return Image.open(io.BytesIO(page.request.get(found.get_attribute("src")).body())).convert("RGB").tobytes()


def until(true, seconds=20):
    """Wait until true() is, and say whether it ever was."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


def test_the_page_answers(browser, server, tmp_path):
    page, errors = visit(browser, server.url)
    assert urlsplit(server.url).hostname == "127.0.0.1" and shown(page) is None
    page.locator("#word textarea, #word input").press_sequentially("Kenya", delay=30)
    assert until(lambda: shown(page) == web.picture(KENYA).tobytes())
    said = ask(page, CAPITAL)
    print(f"\nKenya: pair {said[0]!r}, graft {said[1]!r}")
    assert all(len(text) > 5 and text[-1] in "✓✗" for text in said)
    assert page.locator("#pair .bar").count() == page.locator("#graft .bar").count() == 6

    (tmp_path / "notes.png").write_bytes(b"not an image")
    page.set_input_files("input[type=file]", tmp_path / "notes.png")
    page.wait_for_selector("#line >> text=notes.png: not an image")
    assert shown(page) is None
    Image.effect_noise((90, 50), 90).save(tmp_path / "noise.png")
    page.set_input_files("input[type=file]", tmp_path / "noise.png")        # the page lives on
    page.wait_for_selector("#picture img")
    said = ask(page, "What is ${1 + 1} <b>this</b>?")
    assert all(said) and page.locator("#graft .bar").count() == 0 and page.locator("#line").inner_text() == ""
    assert errors == []
    page.close()


def test_memory_stays_level(browser, server):
    """20 questions in a row about the gallery, after 3 by which every kind has been asked once. The first whose capital
    only the graft says makes the screenshot, in 256 colors: a fifth of the size."""
    process = pytest.importorskip("psutil").Process(server.pid)
    page, errors = visit(browser, server.url)
    target, used = os.environ.get("SCREENSHOT"), []
    for i in range(23):
        used.append(process.memory_info().rss / 2**20)
        page.locator("#gallery button img").nth(i % len(web.SUBJECTS)).click()
        subject = web.SUBJECTS[i % len(web.SUBJECTS)]
        assert until(lambda: shown(page) == web.picture(subject).tobytes())
        told = "with this flag" if subject[0] == "flag" else "on the sign"
        kind = (i + i // len(web.SUBJECTS)) % 3
        pair, grafted = ask(page, ["What is the capital of the country {}?", "Tell a short story about it.",
                                   "On which continent is the country {}?"][kind].format(told))
        if target and grafted.endswith("✓") and pair.endswith("✗") and kind == 0:
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            picture.quantize(256, dither=0).save(target, optimize=True)
            target = None
    used.append(process.memory_info().rss / 2**20)
    print("\n" + " ".join(f"{u:.0f} MB" for u in used))
    assert used[-1] < 1.05 * used[3]        # one figure kept by each question would be more
    assert errors == []
    page.close()


def test_a_closed_tab_ends_its_answer(browser, vlm, surrogate, monkeypatch):
    """The page in this process, with answers that never end: the tab's closing ends one, and the next one begins."""
    running, ended, most = [], [], []

    def endless(*_):
        running.append(1)
        most.append(len(running) - len(ended))
        try:
            while True:
                time.sleep(0.05)
                yield dict(pair=([5], 1.0, 1.0), graft=([5], 1.0, 1.0))
        finally:
            ended.append(1)

    monkeypatch.setattr(web, "talk", endless)
    page = web.page(vlm, surrogate)
    _, url, _ = web.serve(page, prevent_thread_lock=True, quiet=True)
    try:
        tabs = [visit(browser, url)[0] for _ in range(2)]
        for tab in tabs:
            tab.locator("#gallery button img").first.click()
            tab.wait_for_selector("#picture img")
            tab.click("#ask")
        tabs[0].wait_for_selector("#pair >> text=1 tokens")
        time.sleep(1)
        assert (len(running), len(ended)) == (1, 0)                             # the second one waits
        tabs[0].close()
        start = time.monotonic()
        assert until(lambda: len(ended) == 1) and until(lambda: len(running) == 2)
        print(f"\nthe answer ended {time.monotonic() - start:.1f} s after its tab was closed")
        tabs[1].click("text=stop")
        assert until(lambda: len(ended) == 2)
        tabs[1].close()
    finally:
        page.close()
    assert max(most) == 1


def test_nothing_leaves_the_machine(browser, server):
    """Last: by the browser's own log, of all tests above, and by what the server's Python connected to."""
    browser.close()
    log = json.loads(browser.net_log.read_text())
    kind = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [e["params"] for e in log["events"] if e["type"] == kind and "url" in e.get("params", {})]
    hosts = {}
    for p in requests:
        by = "the browser itself" if p.get("initiator") == "not an origin" else "the page"
        hosts.setdefault(by, []).append(urlsplit(p["url"]).hostname)
    print("\n" + "; ".join(f"{by}: {({h: found.count(h) for h in set(found)})}" for by, found in hosts.items()))
    assert len(hosts["the page"]) > 50 and set(hosts["the page"]) == {"127.0.0.1"}
    told = server.audit.read_text().splitlines() if server.audit.exists() else []
    local = [t for t in told if "127.0.0.1" in t or "localhost" in t or "::1" in t or "AF_UNIX" in t]
    print(f"the server: {len(told)} connections, {len(local)} of them local: {sorted(set(told) - set(local))}")
    assert local and local == told
