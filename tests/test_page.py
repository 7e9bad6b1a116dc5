"""The page as an attacker would ask for it, without a browser. Needs `pip install gradio`; skipped without."""

import http.client
import io
import json
import resource
import threading
from urllib.parse import urlsplit

import pytest
from PIL import Image

from extras import web

pytest.importorskip("gradio", reason="no Gradio: pip install gradio")
OTHERS = [
    *(dict(Host=host) for host in ("evil.com", "evil.com:7860", "127.0.0.1.evil.com", "", "localhost@evil.com", "[::1]",
                                   "0.0.0.0", "169.254.169.254")),
    *(dict(Origin=o) for o in ("http://evil.com", "null", "http://127.0.0.1", "https://localhost", "")),
    dict(Host="evil.com", Origin="http://evil.com"),
]  # fmt: skip
ENVIRONMENT = ["GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_SERVER_NAME", "GRADIO_ROOT_PATH", "GRADIO_NUM_WORKERS"]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The page in this process, without models: nobody asks them anything."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    for name in ENVIRONMENT:        # whatever it says, not one file more
        patch.setenv(name, "/")
    blocks = web.page(None, None)
    _, url, _ = web.launch(blocks, prevent_thread_lock=True, quiet=True)
    yield urlsplit(url)
    blocks.close()
    patch.undo()


def ask(url, method="GET", path="/", body=None, **headers):
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
    connection.putrequest(method, path, skip_host=True)
    for name, value in (dict(Host=url.netloc) | headers).items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    reply = connection.getresponse()
    return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()


def multipart(content, name="photo.png"):
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


@pytest.mark.parametrize("headers", OTHERS, ids=str)
def test_other_sites_are_refused(url, headers):
    for method, path in (("GET", "/"), ("GET", "/config"), ("OPTIONS", "/gradio_api/upload")):
        status, got, _ = ask(url, method, path, Access_Control_Request_Method="POST", **headers)
        assert status == 403 and not any(k.startswith("access-control") for k in got), (method, path)
    body, kind = multipart(b"x" * 1000)
    assert ask(url, "POST", "/gradio_api/upload", body, Content_Type=kind, **headers)[0] == 403


def test_this_machine_is_served(url):
    for host in (url.netloc, f"localhost:{url.port}"):
        status, got, text = ask(url, Host=host)
        assert status == 200 and "frame-ancestors 'none'" in got["content-security-policy"] and b"<html" in text
        assert ask(url, Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", web.__file__, "/work"])
def test_no_file_but_its_own(url, path):
    assert ask(url, path=f"/gradio_api/file={path}")[0] in (403, 404)


def test_twelve_photos_at_once(url, monkeypatch):
    """Of 64 megapixels each: one after the other is made small."""
    photo = io.BytesIO()
    Image.new("RGB", (8000, 8000), "teal").save(photo, "PNG")
    sizes, paths = [], []

    def upload():
        body, kind = multipart(photo.getvalue())
        status, _, text = ask(url, "POST", "/gradio_api/upload", body, Content_Type=kind)
        assert status == 200
        paths.append(json.loads(text)[0])
        sizes.append(web.show(web.uploaded, paths[-1])[0].size)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threads = [threading.Thread(target=upload) for _ in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"12 photos of 64 megapixels at once: {peak:.2f} GB more")
    assert sizes == [(1024, 1024)] * 12 and peak < 1.2


@pytest.mark.parametrize("index", [-1, 10**9, None, "0", 1.0, True, [0], {}, [0, 0]])
def test_a_gallery_index_made_by_hand(index):
    image, subject, line = web.show(web.nth, index)
    assert image is None and subject is None and "choose" in line


@pytest.mark.parametrize("path", [None, [], {}, 3, ["a.png"]])
def test_an_upload_made_by_hand(path):
    assert web.show(web.uploaded, path)[0] is None


@pytest.mark.parametrize("question", [None, [], {}, 0, "", " ", "<image>", "<im<image>age>"])
def test_a_question_made_by_hand(question):
    (shown,) = web.respond(None, None, ("sign", "Kenya"), question)
    assert "ask something" in shown[0]
