// This file tests the official @google/genai through the proxy, against `llm-proxy demo`: answers, streams, tools,
// embeddings, lists of models, and failures as the errors that its users expect. google_genai.py does the same with the
// official google-genai for Python, if LLM_PROXY_PYTHON names a Python that has it.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { after, before, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { ApiError, GoogleGenAI, Type } from '@google/genai';
import { Demo } from './proxy.mjs';

let demo, client;
before(async () => {
  demo = await Demo.start({ STREAM_PING_INTERVAL: '200ms' });
  client = make();
});
after(() => demo.stop());

const model = 'gemini-2.5-flash', config = { maxOutputTokens: 24 }, ask = { model, contents: 'Tell me about rivers', config };
const verified = { config: { ...config, httpOptions: { headers: { 'X-LLM-Proxy-Stream': 'verified' } } } };

function make(options = {}) {
  return new GoogleGenAI({ apiKey: demo.token, httpOptions: { baseUrl: demo.url }, ...options });
}

// stream returns the text of a streamed answer, the number of its chunks and the last one.
async function stream(request) {
  let text = '', chunks = 0, last;
  for await (const chunk of await client.models.generateContentStream(request)) {
    text += chunk.text ?? '';
    chunks++;
    last = chunk;
  }
  return { text, chunks, last };
}

async function failure(promise, status, reason) {
  const error = await promise.then(() => assert.fail('no error'), (e) => e);
  assert.ok(error instanceof ApiError, `${error.constructor.name}: ${error.message}`);
  assert.equal(error.status, status, error.message);
  assert.ok(error.message.includes(reason), error.message);
}

describe('content', () => {
  test('unary, on record with exact usage', async () => {
    const since = new Date().toISOString();
    const answer = await client.models.generateContent(ask);
    assert.match(answer.text, /demo provider knows/);
    const [row] = await demo.calls(since);
    assert.deepEqual([row.endpoint, row.model, row.outcome, row.usage_source], ['POST /v1beta/models/{model}:generateContent', model, 'ok', 'exact']);
    assert.equal(row.output_tokens, answer.usageMetadata.candidatesTokenCount);
  });

  test('a stream', async () => {
    const { text, chunks, last } = await stream(ask);
    assert.match(text, /demo provider knows/);
    assert.ok(chunks > 5);
    assert.equal(last.candidates[0].finishReason, 'MAX_TOKENS');
  });

  test('a verified stream, with pings', async () => {
    const plain = await stream({ ...ask, contents: 'a [[slow 1s]] answer' });
    const held = await stream({ ...ask, contents: 'a [[slow 1s]] answer', ...verified });
    assert.deepEqual([held.text, held.chunks], [plain.text, plain.chunks]);
  });

  test('a tool, and its result', async () => {
    const tools = [{ functionDeclarations: [{
      name: 'get_weather', parameters: { type: Type.OBJECT, properties: { city: { type: Type.STRING } }, required: ['city'] },
    }] }];
    const question = { role: 'user', parts: [{ text: 'What is the weather in Berlin?' }] };
    const answer = await client.models.generateContent({ model, contents: [question], config: { tools } });
    assert.equal(answer.functionCalls[0].name, 'get_weather');
    assert.deepEqual(answer.functionCalls[0].args, { city: 'Berlin' });
    const result = { role: 'user', parts: [{ functionResponse: { name: 'get_weather', response: { sky: 'clear' } } }] };
    const end = await client.models.generateContent({ model, contents: [question, answer.candidates[0].content, result], config: { tools, ...config } });
    assert.match(end.text, /The tool says/);
  });

  test('JSON by a schema', async () => {
    const responseSchema = { type: Type.OBJECT, properties: { ok: { type: Type.BOOLEAN } } };
    const answer = await client.models.generateContent({ ...ask, config: { responseMimeType: 'application/json', responseSchema } });
    assert.deepEqual(JSON.parse(answer.text), { ok: true });
  });

  test('a chat', async () => {
    const chat = client.chats.create({ model, config });
    await chat.sendMessage({ message: 'Hello' });
    assert.match((await chat.sendMessage({ message: 'And bread?' })).text, /And bread/);
  });
});

describe('the other methods', () => {
  test('tokens are counted', async () => {
    assert.equal((await client.models.countTokens({ model, contents: ask.contents })).totalTokens, 5);
  });

  test('embeddings', async () => {
    const { embeddings } = await client.models.embedContent({
      model: 'gemini-embedding-001', contents: ['a', 'b'], config: { outputDimensionality: 8 },
    });
    assert.deepEqual(embeddings.map((e) => e.values.length), [8, 8]);
  });

  test('models, page by page', async () => {
    const names = [];
    for await (const m of await client.models.list({ config: { pageSize: 2 } })) names.push(m.name);
    assert.ok(names.length > 4 && names.includes(`models/${model}`), names.join(' '));
    assert.equal((await client.models.get({ model })).inputTokenLimit, 1048576);
  });
});

describe('failures', () => {
  test('a wrong token', () => failure(make({ apiKey: 'sk-llmp_wrong' }).models.generateContent(ask), 401, 'INVALID_API_KEY'));
  test('an unknown model', () => failure(client.models.generateContent({ ...ask, model: 'no-such-model' }), 404, 'NOT_FOUND'));
  test('a URL that is not served', () => failure(client.files.list(), 404, 'UNKNOWN_ENDPOINT'));
  test('a number that is none', () => failure(client.models.generateContent({ ...ask, config: { maxOutputTokens: 'many' } }), 400, 'INVALID_ARGUMENT'));
  test('the provider fails', () => failure(client.models.generateContent({ ...ask, contents: '[[error 418]]' }), 418, 'asked for a 418'));
  test('the provider fails after pings', () => failure(stream({ ...ask, contents: '[[slow 1s]] [[error 400]]', ...verified }), 400, 'asked for a 400'));
  test('a stream that is cut', async () => {
    await assert.rejects(stream({ ...ask, contents: '[[cut]]' }));
  });
});

const python = process.env.LLM_PROXY_PYTHON;
test('google-genai for Python', { skip: python ? false : 'LLM_PROXY_PYTHON is not set', timeout: 58_000 }, async () => {
  const since = new Date().toISOString(), program = fileURLToPath(new URL('google_genai.py', import.meta.url));
  const { stdout } = await promisify(execFile)(python, [program, demo.url, demo.token], { timeout: 50_000 });
  assert.match(stdout, /ok\n$/);
  const streams = (await demo.calls(since)).filter((row) => row.endpoint.endsWith(':streamGenerateContent') && row.status === 200);
  assert.ok(streams.length >= 3 && streams.every((row) => row.usage_source === 'exact'), JSON.stringify(streams));
});
