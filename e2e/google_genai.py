"""Tests google-genai through the proxy, against `llm-proxy demo`. google.test.mjs starts both: google_genai.py URL TOKEN.

A mistake ends the program with a traceback; at the end it prints "ok".
"""
import sys

from google import genai
from google.genai import errors, types

URL, TOKEN = sys.argv[1:3]
MODEL = "gemini-2.5-flash"
SHORT = {"max_output_tokens": 24}
short = types.GenerateContentConfig(**SHORT)
verified = types.GenerateContentConfig(**SHORT, http_options={"headers": {"X-LLM-Proxy-Stream": "verified"}})


def client(token=TOKEN, **options):
    return genai.Client(api_key=token, http_options={"base_url": URL, **options})


def equal(got, want):
    assert got == want, f"got {got!r}, want {want!r}"


def stream(contents, config=short):
    chunks = list(models.generate_content_stream(model=MODEL, contents=contents, config=config))
    return "".join(chunk.text or "" for chunk in chunks), len(chunks)


def failure(call, code, words):
    try:
        call()
    except errors.APIError as error:
        equal(error.code, code)
        assert words in str(error), str(error)
        return
    raise AssertionError(f"no error, want {code}")


def weather(city: str) -> str:
    """Returns the weather of a city."""
    cities.append(city)
    return "clear"


default_client = client()
models = default_client.models

answer = models.generate_content(model=MODEL, contents="Tell me about rivers", config=short)
assert "demo provider knows" in answer.text, answer.text
assert answer.usage_metadata.total_token_count > 0
for version in ["v1", "v1beta"]:  # the proxy serves both
    other = client(api_version=version)
    assert other.models.generate_content(model=MODEL, contents="Hello", config=short).text

text, chunks = stream("Tell me about rivers")
assert "demo provider knows" in text and chunks > 5, (text, chunks)
equal(stream("a [[slow 1s]] answer", verified), stream("a [[slow 1s]] answer"))  # with pings, which are not for the caller

cities = []
config = types.GenerateContentConfig(**SHORT, tools=[weather])
end = models.generate_content(model=MODEL, contents="What is the weather in Berlin? Use the tool.", config=config)
equal(cities, ["Berlin"])
assert "The tool says" in end.text, end.text

config = types.GenerateContentConfig(
    response_mime_type="application/json",
    response_schema={"type": "OBJECT", "properties": {"ok": {"type": "BOOLEAN"}}, "required": ["ok"]},
)
equal(models.generate_content(model=MODEL, contents="Is it?", config=config).parsed, {"ok": True})

equal(models.count_tokens(model=MODEL, contents="Tell me about rivers").total_tokens, 5)
config = types.EmbedContentConfig(output_dimensionality=8)
embedded = models.embed_content(model="gemini-embedding-001", contents=["a", "b"], config=config)
equal([len(e.values) for e in embedded.embeddings], [8, 8])
names = [m.name for m in models.list(config={"page_size": 2})]
assert len(names) > 4 and f"models/{MODEL}" in names, names
equal(models.get(model=MODEL).input_token_limit, 1048576)

other = client("sk-llmp_wrong")  # a client closes its connections when nothing refers to it
failure(lambda: other.models.generate_content(model=MODEL, contents="Hello"), 401, "INVALID_API_KEY")
failure(lambda: models.generate_content(model="no-such-model", contents="Hello"), 404, "NOT_FOUND")
failure(lambda: models.generate_content(model=MODEL, contents="[[error 418]]"), 418, "asked for a 418")
failure(lambda: stream("[[slow 1s]] [[error 400]]", verified), 400, "asked for a 400")  # after pings
print("ok")
