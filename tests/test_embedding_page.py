"""The web page of the embedding service, in a real browser against the real service.

Not here: the service without its page (`test_embedding_service.py`).
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from dspylite.testing import FakeServer, Reply

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="needs `chromium` and `chromedriver`"
    ),
    pytest.mark.timeout(180),
]
ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 40  # far above what anything here takes
KEY = "key-of-the-page-0123456789"
PROGRESS_STEP = 256  # must match `SLICE` of the service's pipeline
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


# --- The service, in a process of its own ------------------------------------------------------


def is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def service(port: int, **settings: str) -> Generator[str]:
    """Run the service as a user does, with its data in memory unless told where; give its address.

    It is asked to end politely, and must do so.
    """
    ours = ("DSPYLITE_", "OPENAI_", "EMBEDDING_SERVICE_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    chosen = {"PORT": str(port), "DATA": "", **settings}
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.embedding_service"],
        cwd=ROOT,
        env={
            **inherited,
            "PYTHONPATH": str(ROOT),
            "DSPYLITE_CACHE": "off",
            **{f"EMBEDDING_SERVICE_{name}": value for name, value in chosen.items()},
        },
    )
    try:
        WebDriverWait(process, LIMIT_S).until(
            lambda running: running.poll() is not None or is_up(port)
        )
        assert process.poll() is None, "the service did not start"
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
    assert process.returncode in {0, -signal.SIGTERM}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Model(FakeServer):
    """An embedding server that refuses texts with a word in them."""

    def __init__(self) -> None:
        super().__init__(answer=self._refuse, dimensions=32)
        self.poison = ""

    @contextmanager
    def gate(self) -> Generator[Callable[[int], bool]]:
        """Hold what arrives.

        What is given lets in what stands at the gate, unless more texts than it is told have
        arrived in all; it tells whether they have.
        """
        held = ExitStack()
        held.enter_context(self.hold())

        def let_in(texts: int) -> bool:
            nonlocal held
            if sum(len(request.json["input"]) for request in self.requests) > texts:
                return True
            following = ExitStack()
            following.enter_context(self.hold())
            held.close()
            held = following
            return False

        try:
            yield let_in
        finally:
            held.close()

    def _refuse(self, body: Mapping[str, object]) -> Reply:
        if self.poison and self.poison in json.dumps(body["input"]):
            return Reply(status=400, text="This input is not allowed.")
        return Reply()


@pytest.fixture(scope="module")
def models() -> Iterator[Model]:
    with Model() as running:
        yield running


@pytest.fixture
def model(models: Model) -> Model:
    """Give the model with an empty log, and no word that it refuses."""
    models.poison = ""
    models.clear()
    return models


@pytest.fixture(scope="module")
def address(models: Model) -> Iterator[str]:
    """Run an open service that asks the model."""
    settings = {"MODEL": "openai/m", "API_BASE": models.base_url, "EMBEDDING_KEY": "sk-any-key"}
    with service(free_port(), RATE_LIMIT="0", **settings) as running:
        yield running


Files = Callable[..., Sequence[Path]]
Serve = Callable[..., str]

# --- The browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page in a tab of its own, with what a user sees and does there."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser
        self.origin = ""
        self.expected_statuses: set[str] = set()  # of which the browser's console may complain

    def open(self, address: str) -> None:
        self.origin = address
        self.browser.get(address)
        self.wait(lambda: self.text("#health-text") == "Ready")

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Wait until it is true, and give what it gave; else say what was on the page."""
        try:
            return WebDriverWait(self.browser, LIMIT_S, 0.05).until(lambda _: condition())
        except Exception as error:
            error.add_note(self.browser.find_element(By.TAG_NAME, "body").text)
            raise

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def script(self, code: str, *arguments: object) -> Any:
        return self.browser.execute_script(code, *arguments)

    def text(self, selector: str) -> str:
        return str(self.script("return document.querySelector(arguments[0]).textContent", selector))

    def is_shown(self, selector: str) -> bool:
        return self.find(selector).is_displayed()

    def documents(self) -> list[tuple[str, str, str]]:
        """Read title, state and detail of each document, all at the same moment."""
        rows = self.script(
            """return [...document.querySelectorAll("#documents > li")].map((row) =>
                [".document-title", ".badge", ".document-detail"].map(
                    (part) => row.querySelector(part).textContent))"""
        )
        return [(title, state, detail) for title, state, detail in rows]

    def states(self) -> dict[str, str]:
        return {title: state for title, state, _ in self.documents()}

    def choose(self, *files: Path) -> None:
        self.find("#files").send_keys("\n".join(map(str, files)))

    def drop(self, *files: Path) -> None:
        """Let the browser itself drop files of the disk in the middle of the frame."""
        spot = self.script(
            """const box = document.getElementById("drop").getBoundingClientRect();
               return [box.x + box.width / 2, box.y + box.height / 2]"""
        )
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": spot[0], "y": spot[1], "data": data}
            self.browser.execute_cdp_cmd("Input.dispatchDragEvent", event)

    def drop_as(self, *files: tuple[str, str]) -> None:
        """Drop files of any name, of which the disk need not know."""
        self.script(
            """const transfer = new DataTransfer();
               for (const [name, text] of arguments[0]) transfer.items.add(new File([text], name));
               for (const kind of ["dragenter", "dragover", "drop"]) {
                 const options = { bubbles: true, cancelable: true, dataTransfer: transfer };
                 const ours = !document.getElementById("drop").dispatchEvent(
                   new DragEvent(kind, options));
                 if (!ours && kind !== "dragenter") throw new Error(`${kind} is not taken`);
               }""",
            files,
        )

    def paste(self, title: str, text: str) -> None:
        if not self.is_shown("#paste-text"):
            self.find(".paste > summary").click()
        self.find("#paste-title").send_keys(title)
        self.find("#paste-text").send_keys(text)
        self.find("#paste-form button").click()

    def search(self, query: str) -> None:
        self.find("#query").clear()
        self.find("#query").send_keys(query, Keys.ENTER)

    def results(self) -> list[tuple[str, str]]:
        rows = self.script(
            """return [...document.querySelectorAll("#results > li")].map((row) =>
                [".result-title", ".result-text"].map(
                    (part) => row.querySelector(part).textContent))"""
        )
        return [(title, text) for title, text in rows]

    def enter_key(self, key: str) -> None:
        if not self.is_shown("#key"):
            self.find("#key-panel > summary").click()
        self.find("#key").send_keys(key, Keys.ENTER)

    def requests(self, path: str) -> list[str]:
        """List the addresses under a path that this page asked for since it was loaded."""
        return [
            name
            for name in self.script(
                """return performance.getEntriesByType("resource").map((entry) => entry.name)"""
            )
            if name.startswith(self.origin + path)
        ]

    def watch(self) -> None:
        """Remember from now on all that the list of documents ever says."""
        self.script(
            """const list = document.getElementById("documents");
               window.seen = [];
               new MutationObserver(() => window.seen.push(list.textContent)).observe(
                 list, { subtree: true, childList: true, characterData: true })"""
        )


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Give a test services with settings of its own, which end after its page was closed."""
    with ExitStack() as running:
        yield lambda **settings: running.enter_context(service(free_port(), **settings))


@pytest.fixture
def page(browser: webdriver.Chrome, serve: Serve) -> Iterator[Page]:
    """Give a new tab; afterwards nothing of it has failed, and nothing has left the origin."""
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    for log in ("browser", "performance"):
        browser.get_log(log)  # which empties it
    opened = Page(browser)
    try:
        yield opened
        complaints = [entry["message"] for entry in browser.get_log("browser")]
        sent = asked_for(browser)
    finally:
        browser.close()
        browser.switch_to.window(first)
    assert [
        complaint
        for complaint in complaints
        if not any(status in complaint for status in opened.expected_statuses)
    ] == []
    assert [url for url in sent if not url.startswith(opened.origin)] == []
    assert [url for url in sent if KEY in url] == []
    assert opened.origin + "healthz" in sent  # so the log is of this page


def asked_for(browser: webdriver.Chrome) -> list[str]:
    """List the addresses of all requests in the log."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[Path]]:
    def write(**contents: str | bytes) -> list[Path]:
        paths = []
        for name, content in contents.items():
            path = tmp_path / f"{name}.txt"
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            paths.append(path)
        return paths

    return write


# --- In and out again --------------------------------------------------------------------------


def by_chooser(page: Page, file: Path) -> None:
    page.choose(file)


def by_drop(page: Page, file: Path) -> None:
    page.drop(file)


def by_event(page: Page, file: Path) -> None:
    page.drop_as((file.name, file.read_text("utf-8")))


def by_pasting(page: Page, file: Path) -> None:
    page.paste(file.name, file.read_text("utf-8"))


@pytest.mark.parametrize("way", [by_chooser, by_drop, by_event, by_pasting])
def test_document_comes_in_by_every_way_and_is_found(
    way: Callable[[Page, Path], None], page: Page, address: str, model: Model, files: Files
) -> None:
    """What a user drops, chooses or pastes is stored, and a search shows it."""
    text = f"Größe and 大きさ, brought {way.__name__}: a heron stands in the reeds."
    (file,) = files(heron=text)
    page.open(address)
    way(page, file)
    page.wait(lambda: page.documents() == [("heron.txt", "Done", "1 chunk")])
    page.search(text)
    page.wait(lambda: page.results()[:1] == [("heron.txt", text)])
    assert page.text("#results .score") == "Score 1.000"
    assert page.text("#results mark") == "Größe"


def test_several_files_are_sent_at_once_and_counted(
    page: Page, address: str, model: Model, files: Files
) -> None:
    """Each has a row of its own, in the order given, and the page says how many are stored."""
    many = files(**{f"note-{number:02}": f"Note number {number}." for number in range(12)})
    page.open(address)
    before = int(page.text("#fact-documents").replace(",", ""))
    page.drop(*many)
    page.wait(lambda: page.text("#summary") == "12 of 12 done")
    assert list(page.states()) == [file.name for file in many]
    page.wait(lambda: page.text("#fact-documents") == str(before + 12))
    page.find("#clear").click()
    assert page.documents() == []


def test_progress_is_shown_and_asked_for_no_longer_than_needed(
    page: Page, address: str, model: Model, files: Files
) -> None:
    """A bar counts the chunks while the model works; what is done is not asked about again."""
    many = " ".join(f"Sentence {number} of them is about rain." for number in range(9_000))
    long, short = files(long=many, short="Rain.")
    page.open(address)
    with model.gate() as let_in:
        page.choose(long)
        page.wait(lambda: page.is_shown("#documents progress[value]"))
        assert page.states() == {"long.txt": "Running"}
        bar = page.find("#documents progress")
        assert bar.accessible_name == "Progress of long.txt"
        total = int(str(bar.get_property("max")))
        assert (page.documents()[0][2], bar.get_property("value")) == (f"0 of {total} chunks", 0)
        page.wait(lambda: let_in(PROGRESS_STEP))
        page.wait(lambda: page.documents()[0][2] == f"{PROGRESS_STEP} of {total} chunks")
        assert bar.get_property("value") == PROGRESS_STEP
    page.wait(lambda: page.documents() == [("long.txt", "Done", f"{total} chunks")])
    assert not bar.is_displayed()
    asked = page.requests("tasks/")
    assert len(set(asked)) == 1
    page.choose(short)
    page.wait(lambda: page.states() == {"short.txt": "Done", "long.txt": "Done"})
    assert page.requests("tasks/").count(asked[0]) == len(asked)


def test_reload_keeps_the_documents_of_the_tab(
    page: Page, address: str, model: Model, files: Files
) -> None:
    """Neither what was done nor what is under way is forgotten, and it is followed to its end."""
    first, second = files(first="First of all.", second="Second to none.")
    page.open(address)
    page.choose(first)
    page.wait(lambda: page.states() == {"first.txt": "Done"})
    with model.hold():
        page.choose(second)
        page.wait(lambda: page.states()["second.txt"] in {"Queued", "Running"})
        page.open(address)
        page.wait(lambda: page.states().get("first.txt") == "Done")
        assert list(page.states()) == ["second.txt", "first.txt"]
        assert page.states()["second.txt"] in {"Queued", "Running"}
    page.wait(lambda: page.states() == {"second.txt": "Done", "first.txt": "Done"})


# --- What goes wrong ---------------------------------------------------------------------------


def test_failed_document_shows_its_reason_and_can_be_tried_again(
    page: Page, address: str, model: Model, files: Files
) -> None:
    """One that the model refuses says so; its neighbours are stored."""
    model.poison = "hemlock"
    page.open(address)
    page.choose(*files(good="A cup of tea.", bad="A cup of hemlock.", fine="A cup of milk."))
    ended = {"good.txt": "Done", "bad.txt": "Failed", "fine.txt": "Done"}
    page.wait(lambda: page.states() == ended)
    reasons = {title: detail for title, _, detail in page.documents()}
    assert reasons["bad.txt"].startswith("Chunk 1 of 1 could not be embedded: ")
    assert page.text("#summary") == "2 of 3 done, 1 not stored"
    model.poison = ""
    page.find("[data-state=failed] .again").click()
    page.wait(lambda: page.text("#summary") == "3 of 3 done")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xd8\xff\xe0 a picture", "It is not UTF-8 text."),
        ("text in UTF-16".encode("utf-16"), "It is not UTF-8 text."),
        (b"PK\x03\x04\x00\x00", "It holds binary data, not text."),
        (b" \n\t ", "It is empty."),
        (b"a" * 2_200_000, "Too large: 2.1 MiB"),
        # Small enough as a file, but each of its bytes takes six in the request.
        (b"\x01" * 300_000, "Too large: 1.7 MiB"),
    ],
    ids=["picture", "utf-16", "binary", "blank", "large", "large as JSON"],
)
def test_unusable_file_is_refused_before_it_is_sent(
    content: bytes, reason: str, page: Page, address: str, files: Files
) -> None:
    """The user hears what is wrong at once, and the service nothing at all."""
    page.open(address)
    page.drop(*files(unusable=content))
    page.wait(lambda: page.states() == {"unusable.txt": "Not sent"})
    assert page.documents()[0][2].startswith(reason)
    assert page.requests("documents") == []


def test_blank_text_is_refused_beside_its_field(page: Page, address: str) -> None:
    """A form that cannot be sent says why, and takes the user to the field."""
    page.open(address)
    page.paste("Nothing", "  ")
    assert page.find("#paste-problem").text == "It is empty."
    assert page.browser.switch_to.active_element == page.find("#paste-text")
    assert page.documents() == []


def test_blank_search_asks_nobody(page: Page, address: str) -> None:
    """The page says what is missing instead of showing an error of the service."""
    page.open(address)
    page.search("  ")
    assert page.text("#search-status") == "Enter what to search for."
    assert page.requests("search") == []


def test_task_that_the_service_does_not_know_is_said_to_be_unknown(
    page: Page, address: str
) -> None:
    """A service that lost its memory leaves no bar that waits for ever."""
    page.open(address)
    page.script(
        """sessionStorage.setItem("embedding-service.tasks",
             JSON.stringify([{ taskId: "no-such-task", title: "gone.txt" }]))"""
    )
    page.expected_statuses = {"404"}
    page.open(address)
    page.wait(lambda: page.states() == {"gone.txt": "Unknown"})


def test_everything_goes_on_once_the_right_key_is_entered(
    page: Page, serve: Serve, files: Files
) -> None:
    """Without a key nothing is lost: it waits. A wrong one is named; the right one is kept."""
    (file,) = files(secret="The treasure lies under the oak.")
    page.expected_statuses = {"401"}
    locked = serve(API_KEYS=f"ann:{KEY}")
    page.open(locked)
    page.choose(file)
    page.wait(lambda: page.is_shown("#banner"))
    assert page.find("#banner-text").text.startswith("The service asks for an API key.")
    assert page.documents() == [("secret.txt", "Waiting", "Goes on when an API key is entered.")]
    page.enter_key("schlüssel")
    assert page.find("#key-problem").text.startswith("A key has only plain letters")
    page.find("#key").clear()
    page.enter_key("not-the-key-0123456789")
    page.wait(lambda: "does not accept this API key" in page.text("#banner-text"))
    page.enter_key(KEY)
    page.wait(lambda: page.states() == {"secret.txt": "Done"})
    assert not page.is_shown("#banner")
    page.open(locked)
    page.wait(lambda: page.states() == {"secret.txt": "Done"})
    page.search("treasure under the oak")
    page.wait(lambda: page.results() == [("secret.txt", "The treasure lies under the oak.")])
    page.find("#key-panel > summary").click()
    page.find("#key-forget").click()
    kept = """return JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie,
                document.documentElement.outerHTML, location.href])"""
    assert KEY not in page.script(kept)
    page.search("oak")
    page.wait(lambda: page.is_shown("#banner"))


def test_busy_service_is_asked_again_when_it_says_so(
    page: Page, serve: Serve, files: Files
) -> None:
    """Above the rate limit the page says how long it waits, and sends everything in the end."""
    many = files(**{f"note-{number}": f"Note number {number}." for number in range(5)})
    page.expected_statuses = {"429"}
    limited = serve(RATE_LIMIT="4", RATE_WINDOW_S="5")
    page.open(limited)
    page.watch()
    page.choose(*many)
    page.wait(lambda: page.text("#summary") == "5 of 5 done")
    assert "Next try in " in page.script("return window.seen.join()")


def test_full_queue_is_waited_for(page: Page, serve: Serve, model: Model, files: Files) -> None:
    """What finds no place is sent again later, and nothing is lost."""
    settings = {"MODEL": "openai/m", "API_BASE": model.base_url, "EMBEDDING_KEY": "sk-any-key"}
    page.expected_statuses = {"503"}
    small = serve(QUEUE_SIZE="1", **settings)
    page.open(small)
    with model.hold():
        page.choose(*files(first="First come.", second="First served."))
        page.wait(lambda: any(" Next try in " in detail for _, _, detail in page.documents()))
        assert "Done" not in page.states().values()
    page.wait(lambda: page.text("#summary") == "2 of 2 done")


@pytest.mark.parametrize(("limit", "state"), [("1000", "Not sent"), ("3000000", "Done")])
def test_limit_of_the_service_is_the_limit_of_the_page(
    limit: str, state: str, page: Page, serve: Serve, model: Model, files: Files
) -> None:
    """A smaller one is known before anything is sent, and a larger one can be used."""
    page.open(serve(MAX_BODY_BYTES=limit, CHUNK_TOKENS="8000"))
    page.choose(*files(large=b"word " * (300 if limit == "1000" else 300_000)))
    page.wait(lambda: page.states() == {"large.txt": state})


def test_document_that_only_the_service_finds_too_large_says_so(
    page: Page, serve: Serve, model: Model, files: Files
) -> None:
    """A limit that the page does not know is no endless wait."""
    page.expected_statuses = {"413"}
    strict = serve(MAX_BODY_BYTES="1000")
    page.open(strict)
    page.browser.execute_async_script(  # as if it were the limit of a proxy
        """const done = arguments[0];
           import("/static/intake.js").then(({ limits }) => { limits.bytes = 1e6; done(); })"""
    )
    page.choose(*files(large="word " * 300))
    page.wait(lambda: page.states() == {"large.txt": "Failed"})
    assert page.documents()[0][2].startswith("Too large for the service: ")


def test_outage_is_shown_and_waited_out(page: Page, files: Files, tmp_path: Path) -> None:
    """While the service is away the page says so; back again, it goes on by itself."""
    port, data = free_port(), str(tmp_path / "data")
    (file,) = files(later="Sent while nobody was there.")
    page.expected_statuses = {
        "ERR_CONNECTION_REFUSED",
        "ERR_CONNECTION_RESET",
        "ERR_EMPTY_RESPONSE",
    }
    with service(port, DATA=data) as running:
        page.open(running)
    page.choose(file)
    page.wait(lambda: page.is_shown("#banner"))
    assert page.find("#banner-text").text.startswith("The service cannot be reached.")
    page.wait(lambda: page.text("#health-text") == "Unreachable")
    page.wait(lambda: page.states() == {"later.txt": "Waiting"})
    with service(port, DATA=data):
        page.wait(lambda: page.states() == {"later.txt": "Done"})
        assert not page.is_shown("#banner")
        page.wait(lambda: page.text("#health-text") == "Ready")


# --- Hostile documents -------------------------------------------------------------------------


def test_hostile_document_is_shown_and_does_nothing(page: Page, address: str, model: Model) -> None:
    """Title, text and query are text wherever they are shown."""
    text = f"</p></li>{HOSTILE}<a href='javascript:window.hacked=1'>click</a>"
    title = HOSTILE.replace("/", ":")  # a file's name has no slash
    page.open(address)
    page.drop_as((title, text))
    page.wait(lambda: page.documents() == [(title, "Done", "1 chunk")])
    page.search(text)
    page.wait(lambda: page.results()[:1] == [(title, text)])
    assert text in page.text("#search-status")
    page.open(address)
    page.wait(lambda: page.documents() == [(title, "Done", "1 chunk")])
    assert page.script("return window.hacked") is None
    assert page.script("return document.querySelectorAll('img, main a, body script').length") == 0


def test_browser_itself_forbids_markup_from_text_and_foreign_addresses(
    page: Page, address: str, model: Model
) -> None:
    """Should the page ever be wrong, its policy still holds."""
    page.open(address)
    refusal = """try { %s; return "allowed" } catch (error) { return error.name }"""
    assert page.script(refusal % "document.body.innerHTML = '<b>bold</b>'") == "TypeError"
    fetched = page.browser.execute_async_script(
        """const done = arguments[1];
           fetch(arguments[0], { mode: "no-cors" }).then(
             () => done("sent"), () => done("refused"))""",
        f"{model.base_url}/models",
    )
    assert fetched == "refused"
    assert [request.path for request in model.requests if "models" in request.path] == []
    page.expected_statuses = {"Content Security Policy", "TrustedHTML"}


# --- For everybody -----------------------------------------------------------------------------

# The least contrast of the texts that are shown, by class, with what is painted behind them.
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (color) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (color) => {
  const [r, g, b] = rgba(color).slice(0, 3).map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (rgba(color)[3] === 255) return color;
  }
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = {};
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
  const [ink, ground] = [light(getComputedStyle(element).color), light(behind(element))];
  const ratio = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  const name = element.className || element.id || element.tagName;
  found[name] = Math.min(ratio, found[name] ?? ratio);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_small_screen_and_can_be_read(
    scheme: str, page: Page, address: str, model: Model, files: Files
) -> None:
    """360 pixels need no scrolling sideways, and texts have the contrast of WCAG's level AA.

    Source:
        https://www.w3.org/TR/WCAG22/#contrast-minimum
    """
    screen = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    model.poison = "hemlock"
    wide = "W" * 100 + " !!!"
    page.open(address)
    page.drop_as(("W" * 190, wide), ("bad.txt", "hemlock"), ("blank.txt", " "))
    page.wait(lambda: sorted(page.states().values()) == ["Done", "Failed", "Not sent"])
    page.search(wide)
    page.wait(lambda: page.results())
    page.find("#key-panel > summary").click()
    page.find(".paste > summary").click()
    assert page.script("return document.documentElement.scrollWidth") == 360
    for banner in ("key", "offline"):
        page.script(
            """const banner = document.getElementById("banner");
               banner.hidden = false;
               banner.dataset.kind = arguments[0];
               document.getElementById("banner-text").textContent = "Trouble"
               document.getElementById("banner-action").textContent = "Act" """,
            banner,
        )
        contrasts = page.script(CONTRAST)
        assert {"banner-text", "banner-action", "result-text", "MARK", "badge"} <= set(contrasts)
        assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}
    ground = page.script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(244, 246, 248)") == (scheme == "light")


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page: Page, address: str) -> None:
    """Who sees nothing hears what each is for; who has no mouse gets there, and sees where."""
    page.open(address)
    page.find("#key-panel > summary").click()
    page.find(".paste > summary").click()
    selector = "input, select, textarea, button:not(:disabled)"
    controls = [
        control
        for control in page.browser.find_elements(By.CSS_SELECTOR, selector)
        if control.get_attribute("id") == "files" or control.is_displayed()
    ]
    assert len(controls) >= 8
    assert [
        control.get_attribute("outerHTML") for control in controls if not is_named(control)
    ] == []
    page.script("document.activeElement.blur()")
    reached = []
    for _ in range(30):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        focused = page.browser.switch_to.active_element
        if focused in reached:
            break
        if focused.tag_name != "body":
            reached.append(focused)
            shown_on = "arguments[0].closest('.drop') ?? arguments[0]"
            style = page.script(f"return getComputedStyle({shown_on}).outlineStyle", focused)
            assert style == "solid", focused.get_attribute("outerHTML")
    assert [
        control.get_attribute("outerHTML") for control in controls if control not in reached
    ] == []


def is_named(control: WebElement) -> bool:
    """Tell whether a control has a name that stays when something is typed, as a hint does not."""
    labels = control.get_property("labels")
    return bool(labels or control.text or control.get_attribute("aria-label"))


def test_what_happens_is_announced(page: Page, address: str, model: Model, files: Files) -> None:
    """A screen reader hears the end of a document without looking for it."""
    page.open(address)
    page.choose(*files(heard="Hear, hear."))
    page.wait(lambda: page.text("#announcer") == "heard.txt: Done. 1 chunk")
    assert page.find("#announcer").get_attribute("role") == "status"
