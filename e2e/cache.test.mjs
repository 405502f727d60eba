// This file tests the official SDKs over answers from the proxy's cache: they cannot tell them from the provider's, and the
// provider gets one call.
import assert from 'node:assert/strict';
import { after, afterEach, before, describe, test } from 'node:test';
import Anthropic from '@anthropic-ai/sdk';
import OpenAI from 'openai';
import { Proxy, promptCanary } from './proxy.mjs';

let proxy, provider, openai, anthropic;
before(async () => {
  proxy = await Proxy.start();
  provider = proxy.provider;
  await proxy.manage('PATCH', `/manage/projects/${proxy.project}`, { policy: { cache: { ttl_seconds: 600 } } });
  openai = new OpenAI({ apiKey: proxy.token, baseURL: `${proxy.url}/v1`, maxRetries: 0 });
  anthropic = new Anthropic({ apiKey: proxy.token, authToken: null, baseURL: proxy.url, maxRetries: 0 });
});
after(() => proxy.stop());
afterEach(() => provider.reset());

const messages = [{ role: 'user', content: promptCanary }];
const chat = { model: 'gpt-4o-mini', temperature: 0, messages };
const claude = { model: 'claude-sonnet-5', max_tokens: 64, temperature: 0, messages };
const schema = { type: 'object', properties: { city: { type: 'string' }, days: { type: 'integer' } } };

async function collect(stream) {
  const all = [];
  for await (const event of stream) all.push(event);
  return all;
}

// plain is a value without what belongs to a single call.
function plain(value) {
  const copy = JSON.parse(JSON.stringify(value));
  delete copy._request_id;
  return copy;
}

const calls = {
  'chat': () => openai.chat.completions.create(chat),
  'chat with tools': () => openai.chat.completions.create({ ...chat, tools: [{ type: 'function', function: { name: 'forecast', parameters: schema } }] }),
  'a chat stream': async () => collect(await openai.chat.completions.create({ ...chat, stream: true })),
  'a chat stream with usage': async () => collect(await openai.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } })),
  'the stream helper': () => openai.chat.completions.stream({ ...chat, seed: 1 }).finalChatCompletion(),
  'embeddings': () => openai.embeddings.create({ model: 'text-embedding-3-small', input: ['a', 'b'] }),
  'a response': () => openai.responses.create({ model: 'gpt-4o-mini', input: promptCanary, store: false, temperature: 0 }),
  'a response stream': async () => collect(await openai.responses.create({ model: 'gpt-4o-mini', input: promptCanary, store: false, temperature: 0, stream: true })),
  'messages': () => anthropic.messages.create(claude),
  'messages with tools': () => anthropic.messages.create({ ...claude, tools: [{ name: 'forecast', input_schema: schema }] }),
  'a message stream': async () => collect(await anthropic.messages.create({ ...claude, stream: true })),
  'the message stream helper': () => anthropic.messages.stream({ ...claude, top_k: 1 }).finalMessage(),
};

describe('the second answer', () => {
  for (const [name, call] of Object.entries(calls)) {
    test(name, async () => {
      const first = await call();
      const second = await call();
      assert.deepEqual(plain(second), plain(first));
      assert.equal(provider.calls.length, 1);
    });
  }
});

test('says that it is from the cache, and has an id of its own', async () => {
  const ask = () => openai.chat.completions.create({ ...chat, seed: 7 }).withResponse();
  const first = await ask();
  const second = await ask();
  assert.equal(first.request_id, 'req_of_provider');
  assert.equal(first.response.headers.get('cache-status'), 'llm-proxy; fwd=miss; stored');
  assert.match(second.response.headers.get('cache-status'), /^llm-proxy; hit; ttl=\d+; key="[0-9a-f]{16}"$/);
  assert.match(second.response.headers.get('age'), /^\d+$/);
  assert.equal(second.request_id, second.response.headers.get('x-llm-proxy-request-id'));
});

test('only-if-cached fails at once where there is no answer', async () => {
  const retrying = openai.withOptions({ maxRetries: 2 });
  const error = await retrying.chat.completions.create({ ...chat, seed: 8 }, { headers: { 'Cache-Control': 'only-if-cached' } }).then(() => assert.fail('no error'), (e) => e);
  assert.deepEqual([error.status, error.code], [504, 'not_cached']);
  assert.equal(provider.calls.length, 0);
});
