"""The pages: nothing from outside, nothing but what is theirs runs in them, and data never becomes markup.

The script runs in node against a document of its own small making, whose elements refuse what would parse markup.
"""

import asyncio
import base64
import hashlib
import itertools
import json
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest
from sanic import Sanic

from lucid.blueprints import docs

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")

_numbers = itertools.count()


@asynccontextmanager
async def served(document: bytes) -> AsyncIterator[httpx.AsyncClient]:
    app = Sanic(f"docs-{next(_numbers)}", configure_logging=False)
    app.config.AUTO_EXTEND = False
    app.config.TOUCHUP = False  # rewrites Sanic's own classes at start, once per process
    app.blueprint(docs.blueprint(document))
    listener = socket.create_server(("127.0.0.1", 0))
    server = await app.create_server(sock=listener, return_asyncio_server=True, access_log=False)
    assert server is not None
    await server.startup()
    await server.start_serving()
    try:
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=origin, trust_env=False) as client:
            yield client
    finally:
        server.close()
        await server.wait_closed()
        Sanic._app_registry.pop(app.name, None)


def fetched(method: str, path: str) -> httpx.Response:
    async def main() -> httpx.Response:
        async with served(b'{"openapi":"3.1.0"}') as client:
            return await client.request(method, path)

    return asyncio.run(main())


@pytest.fixture(scope="module")
def page() -> httpx.Response:
    return fetched("GET", "/docs")


def test_the_page_and_the_document_are_served(page: httpx.Response) -> None:
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    document = fetched("GET", "/openapi.json")
    assert (document.status_code, document.headers["content-type"]) == (200, "application/json")
    assert document.content == b'{"openapi":"3.1.0"}'
    head = fetched("HEAD", "/docs")
    assert (head.status_code, head.content) == (200, b"")


def test_the_policy_permits_this_style_and_this_script_and_nothing_else(page: httpx.Response) -> None:
    directives = dict(
        each.strip().split(" ", 1) for each in page.headers["content-security-policy"].split(";")
    )
    for element, directive in (("style", "style-src"), ("script", "script-src")):
        found = re.findall(rf"<{element}[^>]*>(.*?)</{element}>", page.text, re.DOTALL)
        assert len(found) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert directives.pop(directive) == f"'sha256-{digest}'"
    assert directives == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_the_page_needs_nothing_from_outside(page: httpx.Response) -> None:
    assert not re.search(r"https?:|wss?:|@import|url\(|<(?:link|img|iframe|object|base)\b", page.text)
    links = re.findall(r"(?:src|href|action)\s*=\s*[\"']?([^\"'\s>]*)", page.text.partition("<script>")[0])
    assert set(links) <= {"/openapi.json", "#main"}


def test_the_page_has_no_inline_handlers_and_no_inline_styles(page: httpx.Response) -> None:
    # The policy forbids them, so they would not work.
    for tag in re.findall(r"<[a-z][^>]*>", page.text.partition("<script>")[0]):
        assert not re.search(r"\s(?:on[a-z]+|style)\s*=", tag), tag


def test_the_page_can_be_read_by_everybody(page: httpx.Response) -> None:
    assert '<html lang="en">' in page.text
    assert 'name="viewport"' in page.text
    assert "prefers-color-scheme: dark" in page.text
    assert ":focus-visible" in page.text
    for field in re.findall(r"<(?:input|select)[^>]*>", page.text.partition("<script>")[0]):
        before = page.text.partition(field)[0]
        assert before.rfind("<label") > before.rfind("</label>"), f"{field} has no label"
    for landmark in ("<main", "<nav", "<header", "<h1", "<noscript"):
        assert landmark in page.text


def script() -> str:
    return resources.files("lucid.blueprints").joinpath("docs.js").read_text(encoding="utf-8")


def test_the_script_has_no_way_from_text_to_markup_or_code() -> None:
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
        r"|\beval\b|new Function|setTimeout|localStorage|sessionStorage|document\.cookie|indexedDB|</script|<!--"
    )
    assert re.findall(forbidden, script()) == []


@needs_node
def test_the_script_is_javascript(tmp_path: Path) -> None:
    file = tmp_path / "docs.js"
    file.write_text(script(), encoding="utf-8")
    assert NODE is not None
    checked = subprocess.run([NODE, "--check", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


# --- the script at work ---------------------------------------------------------------------------------------

STAGE = r"""
const fs = require("fs"), vm = require("vm");
const { script, document: told, play } = JSON.parse(fs.readFileSync(0, "utf8"));
const settle = async () => { for (let turn = 0; turn < 20; turn++) await new Promise(setImmediate); };

class Node {
  constructor(tag) {
    Object.assign(this, { tag, childNodes: [], attributes: {}, listeners: {}, value: "", id: "" });
  }
  append(...children) {
    for (const child of children) {
      if (child instanceof Node) { this.childNodes.push(child); child.parent = this; }
      else this.childNodes.push(String(child));
    }
  }
  setAttribute(name, value) {
    if (!/^(role|aria-[a-z]+)$/.test(name)) throw new Error(`setAttribute ${name}`);
    this.attributes[name] = value;
  }
  addEventListener(name, listener) { (this.listeners[name] ||= []).push(listener); }
  scrollIntoView() { this.seen = true; }
  set textContent(text) { this.childNodes = [String(text)]; }
  get textContent() { return this.childNodes.map((each) => (each instanceof Node ? each.textContent : each)).join(""); }
  *all() { yield this; for (const each of this.childNodes) if (each instanceof Node) yield* each.all(); }
  find(test) { for (const each of this.all()) if (test(each)) return each; return null; }
  fire(name) { return Promise.all((this.listeners[name] || []).map((each) => each({ preventDefault() {} }))); }
}
for (const name of ["innerHTML", "outerHTML", "insertAdjacentHTML", "style", "onclick"]) {
  Object.defineProperty(Node.prototype, name, { set() { throw new Error(name); }, get() { throw new Error(name); } });
}

const known = {};
for (const id of "title about state main contents find found credential credential-kind".split(" ")) {
  known[id] = new Node(id);
}
const calls = [];
const fetch = async (url, options) => {
  calls.push({ url, ...options });
  if (calls.length === 1) return { ok: true, status: 200, json: async () => told };
  const headers = new Map([["x-evil", "<i>"]]);
  return { status: 201, statusText: "<b>Created</b>", headers, text: async () => '{"a":"<script>"}' };
};
const globals = {
  document: { getElementById: (id) => known[id], createElement: (tag) => new Node(tag), title: "" },
  location: { hash: play.hash || "" }, addEventListener() {}, fetch, performance, URLSearchParams,
};
vm.runInNewContext(script, globals);

(async () => {
  await settle();
  const result = { state: known.state.textContent, hidden: known.state.hidden === true };
  known["credential-kind"].value = play.kind || "";
  await known["credential-kind"].fire("change");
  known.credential.value = play.credential || "";
  const article = known.main.find((each) => each.id === play.operation);
  if (article) {
    const button = article.find((each) => each.tag === "button");
    if (!play.hash) await button.fire("click");
    result.expanded = button.attributes["aria-expanded"];
    const form = article.find((each) => each.tag === "form");
    const inputs = [...form.all()].filter((each) => each.tag === "input");
    inputs.forEach((input, at) => { input.value = (play.inputs || [])[at] || ""; });
    const body = form.find((each) => each.tag === "textarea");
    result.sample = body ? body.value : null;
    await form.fire("submit");
    await settle();
    result.output = form.textContent;
  }
  known.find.value = play.words || "";
  await known.find.fire("input");
  result.found = known.found.textContent;
  result.title = known.title.textContent;
  result.text = known.about.textContent + known.contents.textContent + known.main.textContent;
  const made = [...known.main.all(), ...known.contents.all(), ...known.about.all()];
  result.tags = [...new Set(made.map((each) => each.tag))].sort();
  result.calls = calls;
  result.hrefs = [...known.contents.all()].filter((each) => each.href).map((each) => each.href);
  console.log(JSON.stringify(result));
})();
"""

EVIL = "<img src=x onerror=alert(1)>"


def document() -> dict[str, Any]:
    """A document whose every text is hostile."""
    return {
        "openapi": "3.1.0",
        "info": {"title": EVIL, "version": "1", "description": f"{EVIL} `{EVIL}`\n\n- {EVIL}"},
        "tags": [{"name": EVIL}],
        "paths": {
            "/things/{id}": {
                "post": {
                    "operationId": "things.make",
                    "tags": [EVIL],
                    "summary": EVIL,
                    "description": EVIL,
                    "parameters": [
                        {
                            "name": "id",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "pattern": EVIL},
                        },
                        {"name": "q", "in": "query", "schema": {"type": EVIL}, "description": EVIL},
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}},
                    },
                    "responses": {
                        "201": {"description": EVIL, "headers": {EVIL: {"schema": {"const": EVIL}}}},
                        "default": {"description": EVIL},
                    },
                    "security": [{EVIL: []}],
                    "x-lucid-access": EVIL,
                    "x-lucid-limits": [EVIL],
                }
            },
            "/other": {"get": {"operationId": EVIL, "tags": [EVIL], "responses": {}}},
        },
        "components": {
            "schemas": {
                "Thing": {
                    "type": "object",
                    "required": ["name", "kind"],
                    "properties": {
                        "name": {"type": "string", "minLength": 3, "maxLength": 3, "examples": ["abc"]},
                        "kind": {"enum": [EVIL, "b"]},
                        EVIL: {"anyOf": [{"$ref": "#/components/schemas/Thing"}, {"type": "null"}]},
                    },
                },
            }
        },
    }


def played(**play: Any) -> dict[str, Any]:
    assert NODE is not None
    told = json.dumps({"script": script(), "document": document(), "play": play})
    result = subprocess.run(
        [NODE, "-e", STAGE], input=told, capture_output=True, text=True, check=False, timeout=30
    )
    assert result.returncode == 0, result.stderr
    shown: dict[str, Any] = json.loads(result.stdout)
    return shown


@needs_node
def test_hostile_texts_stay_texts() -> None:
    shown = played(operation="things.make", inputs=["1"])
    assert shown["hidden"], shown["state"]
    assert shown["title"] == f"{EVIL} 1"
    assert shown["text"].count(EVIL) > 10
    assert "<b>Created</b>" in shown["output"]
    assert "x-evil: <i>" in shown["output"]
    assert '"a": "<script>"' in shown["output"]
    # The elements that the page itself makes, and none that a text names.
    assert set(shown["tags"]) <= set(
        "a article button code details div form h2 h3 h4 input label li main contents about p pre section span strong "
        "summary textarea ul".split()
    )
    assert all(href.startswith("#") and not re.search(r"[<>\"' ]", href) for href in shown["hrefs"])


@needs_node
def test_trying_sends_what_was_typed_and_nothing_else() -> None:
    shown = played(operation="things.make", inputs=["a/b c", "x&y"], kind="bearer", credential=" t.o.k ")
    read, sent = shown["calls"]
    assert read == {"url": "/openapi.json", "credentials": "omit"}
    assert sent["url"] == "/things/a%2Fb%20c?q=x%26y"
    assert sent["method"] == "POST"
    assert sent["headers"] == {"Authorization": "Bearer t.o.k", "Content-Type": "application/json"}
    assert json.loads(sent["body"]) == {"name": "abc", "kind": EVIL}
    assert (sent["credentials"], sent["cache"], sent["redirect"]) == ("omit", "no-store", "error")
    shown = played(operation="things.make", inputs=["1"], kind="key", credential="k")
    assert shown["calls"][1]["url"] == "/things/1"
    assert shown["calls"][1]["headers"]["X-API-Key"] == "k"
    assert "Authorization" not in shown["calls"][1]["headers"]


@needs_node
def test_a_link_opens_its_operation_and_finding_hides_the_others() -> None:
    shown = played(operation="things.make", inputs=["1"], hash="#things.make", words="post things")
    assert shown["expanded"] == "true"
    assert shown["found"] == "1 found"


@needs_node
def test_bounds_are_told() -> None:
    shown = played(operation="things.make", inputs=["1"])
    assert "name string, 3 characters required" in shown["text"]
    assert f"with the role {EVIL} or above" in shown["text"]
