// This file tests the official openai package through the proxy: everything works after changing only the base URL and the
// key.
import assert from 'node:assert/strict';
import { after, afterEach, before, describe, test } from 'node:test';
import OpenAI, { toFile } from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { embedding, speech, text, toolArguments, words } from './answers.mjs';
import { Proxy, promptCanary, within } from './proxy.mjs';

let proxy, provider, client;
before(async () => {
  proxy = await Proxy.start();
  provider = proxy.provider;
  client = new OpenAI({ apiKey: proxy.token, baseURL: `${proxy.url}/v1`, maxRetries: 0 });
});
after(() => proxy.stop());
afterEach(() => provider.reset());

const ask = { model: 'gpt-4o-mini', messages: [{ role: 'user', content: promptCanary }] };
const tools = [{ type: 'function', function: { name: 'forecast', parameters: { type: 'object', properties: { city: { type: 'string' }, days: { type: 'integer' } } } } }];
const forecast = { city: 'Oslo', days: 3 };

async function collect(stream) {
  const all = [];
  for await (const event of stream) all.push(event);
  return all;
}

describe('chat', () => {
  test('unary, on record with exact usage', async () => {
    const { data, response, request_id } = await client.chat.completions.create(ask).withResponse();
    assert.equal(data.choices[0].message.content, text);
    assert.equal(data._request_id, 'req_of_provider');
    assert.equal(request_id, 'req_of_provider');
    assert.equal(response.headers.get('x-ratelimit-remaining-requests'), null); // it describes the key's limit, not the token's
    assert.equal(response.headers.get('openai-processing-ms'), '12');
    assert.equal(response.headers.get('openai-organization'), null);
    assert.match(response.headers.get('x-llm-proxy-request-id'), /^req_/);
    assert.deepEqual(provider.last.json, ask);
    const row = await proxy.settled();
    assert.deepEqual([row.outcome, row.usage_source, row.input_tokens, row.output_tokens, row.cached_tokens], ['ok', 'exact', 11, 8, 4]);
  });

  test('the SDK’s own headers reach the provider, account headers do not', async () => {
    const of = client.withOptions({ organization: 'org-of-client', project: 'proj-of-client' });
    await of.chat.completions.create(ask, { headers: { 'Idempotency-Key': 'idem-1', 'OpenAI-Beta': 'beta-1', 'X-Client-Request-Id': 'trace-1', Cookie: 'a=b' } });
    const { headers } = provider.last;
    assert.match(headers['idempotency-key'], /^[0-9a-f]{64}$/); // bound to the project: an HMAC of the client's key
    assert.equal(headers['openai-beta'], 'beta-1');
    assert.equal(headers['x-client-request-id'], 'trace-1');
    assert.equal(headers['x-stainless-lang'], 'js');
    assert.equal(headers['x-stainless-retry-count'], '0');
    assert.ok(headers['x-stainless-package-version'] && headers['x-stainless-runtime-version']);
    assert.match(headers['user-agent'], /^OpenAI\/JS /);
    for (const name of ['openai-organization', 'openai-project', 'cookie', 'x-forwarded-for']) assert.equal(headers[name], undefined, name);
  });

  test('the token also works as x-api-key and as api-key', async () => {
    for (const name of ['x-api-key', 'api-key']) {
      const other = new OpenAI({ apiKey: 'unused', baseURL: `${proxy.url}/v1`, maxRetries: 0, defaultHeaders: { Authorization: null, [name]: proxy.token } });
      const answer = await other.chat.completions.create(ask);
      assert.equal(answer.choices[0].message.content, text, name);
    }
  });

  test('tool calls', async () => {
    const answer = await client.chat.completions.create({ ...ask, tools });
    const [call] = answer.choices[0].message.tool_calls;
    assert.deepEqual([call.id, call.function.name, JSON.parse(call.function.arguments)], ['call_1', 'forecast', forecast]);
  });

  test('structured outputs are parsed', async () => {
    const shape = z.object({ city: z.string(), days: z.number() });
    const answer = await client.chat.completions.parse({ ...ask, response_format: zodResponseFormat(shape, 'forecast') });
    assert.deepEqual(answer.choices[0].message.parsed, forecast);
    assert.equal(provider.last.json.response_format.json_schema.strict, true);
  });

  test('completions', async () => {
    const answer = await client.completions.create({ model: 'gpt-3.5-turbo-instruct', prompt: promptCanary });
    assert.equal(answer.choices[0].text, text);
  });
});

describe('chat streams', () => {
  test('every event, in order, and only what was asked for', async () => {
    const events = await collect(await client.chat.completions.create({ ...ask, stream: true }));
    assert.deepEqual(events.map((e) => e.choices[0].delta.content), ['', ...words, undefined]);
    assert.equal(events.at(-1).choices[0].finish_reason, 'stop');
    assert.ok(events.every((e) => !e.usage && e.choices.length === 1), 'usage was not asked for');
    assert.deepEqual(provider.last.json.stream_options, { include_usage: true }, 'the proxy asks for it');
    const row = await proxy.settled();
    assert.deepEqual([row.outcome, row.stream, row.usage_source, row.output_tokens], ['ok', true, 'exact', 8]);
  });

  test('usage if the client asks for it', async () => {
    const events = await collect(await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } }));
    assert.equal(events.length, words.length + 3);
    assert.deepEqual(events.at(-1).choices, []);
    assert.equal(events.at(-1).usage.total_tokens, 19);
  });

  test('the streaming helper', async () => {
    const seen = [];
    const runner = client.chat.completions.stream(ask).on('content', (delta) => seen.push(delta));
    const final = await runner.finalChatCompletion();
    assert.equal(final.choices[0].message.content, text);
    assert.equal(seen.join(''), text);
  });

  test('tool calls in pieces', async () => {
    const events = await collect(await client.chat.completions.create({ ...ask, tools, stream: true }));
    const pieces = events.flatMap((e) => e.choices[0].delta.tool_calls ?? []);
    assert.deepEqual([pieces[0].id, pieces[0].function.name], ['call_1', 'forecast']);
    assert.deepEqual(pieces.slice(1).map((p) => p.function.arguments), toolArguments);
    const final = await client.chat.completions.stream({ ...ask, tools }).finalChatCompletion();
    assert.deepEqual(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments), forecast);
  });

  test('events arrive at once, not when the answer is complete', async () => {
    let release;
    const held = new Promise((resolve) => { release = resolve; });
    provider.script(async (call) => {
      call.sse();
      call.event({ id: 'c', object: 'chat.completion.chunk', created: 1, model: 'm', choices: [{ index: 0, delta: { content: 'first' }, finish_reason: null }] });
      await held;
      call.event('[DONE]');
      call.end();
    });
    const stream = await client.chat.completions.create({ ...ask, stream: true });
    const it = stream[Symbol.asyncIterator]();
    const first = await within(30_000, it.next(), 'the first event, while the provider pauses');
    assert.equal(first.value.choices[0].delta.content, 'first');
    release();
    assert.equal((await it.next()).done, true);
  });

  test('an abort cancels the call to the provider within a second', async () => {
    let gone;
    provider.script((call) => {
      gone = call.gone;
      call.sse();
      call.event({ id: 'c', object: 'chat.completion.chunk', created: 1, model: 'm', choices: [{ index: 0, delta: { content: 'first' }, finish_reason: null }] });
    });
    for await (const event of await client.chat.completions.create({ ...ask, stream: true })) {
      assert.equal(event.choices[0].delta.content, 'first');
      break;
    }
    await within(1000, gone, 'the provider’s connection closed');
    assert.equal((await proxy.settled()).outcome, 'client_gone');
  });
});

describe('responses', () => {
  const input = { model: 'gpt-4o-mini', input: promptCanary };

  test('create', async () => {
    const answer = await client.responses.create(input);
    assert.equal(answer.output_text, text);
    assert.equal((await proxy.settled()).output_tokens, 8);
  });

  test('stream with its events', async () => {
    const events = await collect(await client.responses.create({ ...input, stream: true }));
    assert.deepEqual(events.map((e) => e.sequence_number), events.map((_, i) => i));
    assert.deepEqual(events.filter((e) => e.type === 'response.output_text.delta').map((e) => e.delta), words);
    assert.equal(events.at(-1).type, 'response.completed');
    const row = await proxy.settled();
    assert.deepEqual([row.outcome, row.usage_source, row.output_tokens], ['ok', 'exact', 8]);
  });

  test('the streaming and parsing helpers', async () => {
    const final = await client.responses.stream(input).finalResponse();
    assert.equal(final.output_text, text);
    const format = zodTextFormat(z.object({ city: z.string(), days: z.number() }), 'forecast');
    provider.script((call) => call.reply(200, {
      id: 'resp_1', object: 'response', created_at: 1, status: 'completed', model: 'm',
      output: [{ id: 'msg_1', type: 'message', status: 'completed', role: 'assistant', content: [{ type: 'output_text', text: toolArguments.join(''), annotations: [] }] }],
    }));
    const parsed = await client.responses.parse({ ...input, text: { format } });
    assert.deepEqual(parsed.output_parsed, forecast);
  });

  test('input_tokens.count', async () => {
    assert.equal((await client.responses.inputTokens.count(input)).input_tokens, 11);
  });
});

describe('other endpoints', () => {
  test('embeddings, base64 by default', async () => {
    const answer = await client.embeddings.create({ model: 'text-embedding-3-small', input: ['a', promptCanary] });
    assert.equal(provider.last.json.encoding_format, 'base64');
    assert.equal(answer.data.length, 2);
    assert.deepEqual([...answer.data[1].embedding], [...new Float32Array(embedding)]);
    const plain = await client.embeddings.create({ model: 'text-embedding-3-small', input: 'a', encoding_format: 'float' });
    assert.deepEqual(plain.data[0].embedding, embedding);
  });

  test('audio transcription: the upload arrives complete', async () => {
    const file = await toFile(speech, 'spéech.mp3', { type: 'audio/mpeg' });
    const sum = speech.reduce((a, b) => (a * 31 + b) % 1_000_003, 7);
    const answer = await client.audio.transcriptions.create({ file, model: 'gpt-4o-transcribe' });
    assert.equal(answer.text, `spéech.mp3 ${speech.length} ${sum} gpt-4o-transcribe`);
    const row = await proxy.settled();
    assert.deepEqual([row.model, row.usage_source, row.input_tokens], ['gpt-4o-transcribe', 'exact', 14]);
  });

  test('speech: bytes pass unchanged', async () => {
    const response = await client.audio.speech.create({ model: 'gpt-4o-mini-tts', voice: 'alloy', input: promptCanary });
    assert.equal(response.headers.get('content-type'), 'audio/mpeg');
    assert.ok(speech.equals(Buffer.from(await response.arrayBuffer())));
  });

  test('images', async () => {
    const answer = await client.images.generate({ model: 'gpt-image-1', prompt: promptCanary });
    assert.equal(answer.data[0].b64_json, speech.subarray(0, 300).toString('base64'));
    assert.equal((await proxy.settled()).output_tokens, 200);
  });

  test('moderations', async () => {
    const answer = await client.moderations.create({ input: promptCanary });
    assert.equal(answer.results[0].flagged, true);
  });

  test('models: list', async () => {
    const ids = (await collect(client.models.list())).map((m) => m.id);
    assert.deepEqual(ids, ['gpt-4o-mini', 'gpt-4o', 'meta/llama-3-70b']);
    const narrow = client.withOptions({ apiKey: await proxy.newToken({ policy: { models: ['gpt-4o*'] } }) });
    assert.deepEqual((await collect(narrow.models.list())).map((m) => m.id), ['gpt-4o-mini', 'gpt-4o']);
  });

  for (const id of ['gpt-4o-mini', 'meta/llama-3-70b', 'ft:gpt-4o-mini-2024-07-18:acme::9XyZ']) {
    test(`models: retrieve ${id}`, async () => {
      assert.equal((await client.models.retrieve(id)).id, id);
    });
  }
});

describe('the response cache', () => {
  let cached;
  before(async () => {
    const project = await proxy.manage('POST', '/manage/projects', { name: 'cached', openai_api_key: provider.openaiKey, policy: { cache: { ttl_seconds: 3600 } } });
    cached = new OpenAI({ apiKey: await proxy.newToken({ project_id: project.id }), baseURL: `${proxy.url}/v1`, maxRetries: 0 });
  });

  // twice makes a call twice: the provider gets it once, and the program sees the same both times. It returns what it saw.
  const twice = async (create, read = (data) => data) => {
    const first = await create().withResponse();
    assert.match(first.response.headers.get('cache-status'), /^llm-proxy; fwd=miss; stored$/);
    const want = await read(first.data);
    await proxy.settled();
    const second = await create().withResponse();
    assert.match(second.response.headers.get('cache-status'), /^llm-proxy; hit; ttl=3\d+; key="[0-9a-f]{16}"$/);
    assert.match(second.response.headers.get('age'), /^\d+$/);
    const got = await read(second.data);
    assert.deepEqual(clean(got), clean(want));
    assert.equal(provider.calls.length, 1);
    const row = await proxy.settled();
    assert.deepEqual([row.outcome, row.cache, row.input_tokens, row.output_tokens, row.cost], ['ok', 'hit', 0, 0, 0]);
    assert.ok(row.saved >= 0 && row.saved_ms >= 0);
    return got;
  };
  // The SDK adds the request ID, which is each call's own.
  const clean = (value) => JSON.parse(JSON.stringify(value, (key, v) => (key === '_request_id' ? undefined : v)));

  test('unary chat', async () => {
    const answer = await twice(() => cached.chat.completions.create({ ...ask, temperature: 0 }));
    assert.equal(answer.choices[0].message.content, text);
  });

  test('a chat stream, with and without usage', async () => {
    for (const more of [{}, { stream_options: { include_usage: true } }]) {
      const events = await twice(() => cached.chat.completions.create({ ...ask, seed: 7, stream: true, ...more }), collect);
      assert.equal(events.map((e) => e.choices[0]?.delta.content ?? '').join(''), text);
      assert.equal(events.some((e) => e.usage), 'stream_options' in more);
      provider.reset();
    }
  });

  test('the stream helper', async () => {
    for (let i = 0; i < 2; i++) {
      const answer = await cached.chat.completions.stream({ ...ask, temperature: 0, user: 'helper' }).finalChatCompletion();
      assert.equal(answer.choices[0].message.content, text);
      await proxy.settled();
    }
    assert.equal(provider.calls.length, 1);
  });

  test('embeddings', async () => {
    const answer = await twice(() => cached.embeddings.create({ model: 'text-embedding-3-small', input: promptCanary }));
    assert.deepEqual(answer.data[0].embedding.map(Math.fround), embedding.map(Math.fround));
  });

  test('responses, unary and as a stream', async () => {
    const body = { model: 'gpt-4o-mini', input: promptCanary, store: false, temperature: 0 };
    assert.equal((await twice(() => cached.responses.create(body))).output_text, text);
    provider.reset();
    const events = await twice(() => cached.responses.create({ ...body, stream: true }), collect);
    assert.equal(events.at(-1).type, 'response.completed');
  });
});
