// This file tests the official @anthropic-ai/sdk through the proxy. Nothing is translated, and failures are the errors that
// its users expect.
import assert from 'node:assert/strict';
import { after, afterEach, before, describe, test } from 'node:test';
import Anthropic from '@anthropic-ai/sdk';
import { text, toolArguments, words } from './answers.mjs';
import { Provider } from './provider.mjs';
import { Proxy, countingFetch, promptCanary, within } from './proxy.mjs';

let proxy, provider, client;
before(async () => {
  proxy = await Proxy.start();
  provider = proxy.provider;
  client = make({ maxRetries: 0 }).client;
});
after(() => proxy.stop());
afterEach(() => provider.reset());

const ask = { model: 'claude-sonnet-5', max_tokens: 64, messages: [{ role: 'user', content: promptCanary }] };
const tools = [{ name: 'forecast', input_schema: { type: 'object', properties: { city: { type: 'string' }, days: { type: 'integer' } } } }];
const forecast = { city: 'Oslo', days: 3 };

function make(options = {}) {
  const counter = countingFetch();
  return { counter, client: new Anthropic({ apiKey: proxy.token, authToken: null, baseURL: proxy.url, fetch: counter, ...options }) };
}

async function failure(promise, type) {
  const error = await promise.then(() => assert.fail('no error'), (e) => e);
  assert.ok(error instanceof type, `${error.constructor.name} instead of ${type.name}: ${error.message}`);
  return error;
}

describe('messages', () => {
  test('unary, on record with exact usage', async () => {
    const { data, response } = await client.messages.create(ask, { headers: { 'anthropic-beta': 'beta-1' } }).withResponse();
    assert.deepEqual(data.content, [{ type: 'text', text }]);
    assert.equal(data._request_id, 'req_of_provider');
    assert.equal(response.headers.get('anthropic-ratelimit-requests-remaining'), null); // of a key that tokens share
    assert.equal(response.headers.get('anthropic-organization-id'), null);
    const { headers, json, url } = provider.last;
    assert.equal(url, '/v1/messages');
    assert.match(headers['anthropic-version'], /^\d{4}-\d\d-\d\d$/);
    assert.equal(headers['anthropic-beta'], 'beta-1');
    assert.equal(headers['x-stainless-lang'], 'js');
    assert.deepEqual(json, ask);
    const row = await proxy.settled();
    assert.deepEqual([row.outcome, row.usage_source, row.output_tokens, row.cached_tokens], ['ok', 'exact', 8, 4]);
  });

  test('the token also works as a bearer token', async () => {
    const { client: bearer } = make({ apiKey: null, authToken: proxy.token });
    assert.equal((await bearer.messages.create(ask)).content[0].text, text);
  });

  test('tool use', async () => {
    const answer = await client.messages.create({ ...ask, tools });
    assert.equal(answer.stop_reason, 'tool_use');
    assert.deepEqual(answer.content[0].input, forecast);
  });

  test('count_tokens', async () => {
    const { max_tokens, ...question } = ask;
    assert.equal((await client.messages.countTokens(question)).input_tokens, 14);
  });
});

describe('streams', () => {
  test('every event, in order', async () => {
    const types = [], deltas = [];
    for await (const event of await client.messages.create({ ...ask, stream: true })) {
      types.push(event.type);
      if (event.type === 'content_block_delta') deltas.push(event.delta.text);
    }
    assert.deepEqual(deltas, words);
    assert.deepEqual([types[0], types[1], ...types.slice(-3)], ['message_start', 'content_block_start', 'content_block_stop', 'message_delta', 'message_stop']);
    assert.deepEqual(provider.last.json, { ...ask, stream: true }, 'nothing is added');
    const row = await proxy.settled();
    assert.deepEqual([row.outcome, row.stream, row.usage_source, row.output_tokens, row.cached_tokens], ['ok', true, 'exact', 8, 4]);
  });

  test('the streaming helper, with tool use in pieces', async () => {
    assert.equal(await client.messages.stream(ask).finalText(), text);
    const pieces = [];
    const final = await client.messages.stream({ ...ask, tools }).on('inputJson', (piece) => pieces.push(piece)).finalMessage();
    assert.deepEqual(final.content[0].input, forecast);
    assert.deepEqual(pieces, toolArguments);
  });

  test('an abort cancels the call to the provider within a second', async () => {
    let gone;
    provider.script((call) => {
      gone = call.gone;
      call.sse();
      call.event({ type: 'content_block_delta', index: 0, delta: { type: 'text_delta', text: 'first' } }, 'content_block_delta');
    });
    const stream = await client.messages.create({ ...ask, stream: true });
    for await (const event of stream) {
      assert.equal(event.delta.text, 'first');
      stream.controller.abort();
    }
    await within(1000, gone, 'the provider’s connection closed');
    assert.equal((await proxy.settled()).outcome, 'client_gone');
  });

  test('a cut stream ends with an error', async () => {
    provider.script((call) => {
      call.sse();
      call.response.write('event: ping\ndata: {"type":"ping"}\n\n', () => call.cut());
    });
    const stream = await client.messages.create({ ...ask, stream: true });
    await assert.rejects(async () => {
      for await (const _ of stream);
    });
    assert.equal((await proxy.settled()).outcome, 'truncated');
  });
});

describe('models of several providers', () => {
  const list = ['claude-opus-5', 'claude-sonnet-5', 'claude-haiku-5', 'claude-sonnet-4', 'claude-haiku-4', 'glm-5', 'glm-4'];
  const ids = async (pages) => {
    const found = [];
    for await (const model of pages) found.push(model.id);
    return found;
  };
  let other, project, united;
  before(async () => {
    other = await Provider.start();
    provider.claudes = list.slice(0, 5);
    other.claudes = ['glm-5', 'claude-haiku-5', 'glm-4'];
    project = (await proxy.manage('POST', '/manage/projects', { name: 'lists' })).id;
    for (const [priority, p] of [provider, other].entries()) {
      await proxy.manage('POST', `/manage/projects/${project}/upstreams`, {
        name: `claude ${priority}`, provider: 'anthropic', base_url: p.url, api_key: p.anthropicKey, priority, connect_ms: 5000, answer_ms: 20000,
      });
    }
    united = make({ apiKey: await proxy.newToken({ project_id: project }) });
  });
  after(() => other.close());

  test('the pager returns one list, whatever the page size', async () => {
    for (const limit of [1, 2, 3, 7, undefined]) {
      united.counter.count = 0;
      assert.deepEqual(await ids(united.client.models.list({ limit })), list);
      assert.equal(united.counter.count, Math.ceil(list.length / (limit ?? 20)));
    }
    const row = await proxy.settled();
    assert.deepEqual([row.outcome, row.attempts], ['ok', 3]);
  });

  test('the same, backwards', async () => {
    const pages = [];
    for await (const page of (await united.client.models.list({ limit: 2, before_id: 'glm-4' })).iterPages()) pages.push(page.data.map((model) => model.id));
    assert.deepEqual(pages, [list.slice(4, 6), list.slice(2, 4), list.slice(0, 2)]);
  });

  test('only models that the token may use, in full pages', async () => {
    const { client: narrow, counter } = make({ apiKey: await proxy.newToken({ project_id: project, policy: { models: ['claude-haiku*', 'glm*'] } }) });
    assert.deepEqual(await ids(narrow.models.list({ limit: 2 })), ['claude-haiku-5', 'claude-haiku-4', 'glm-5', 'glm-4']);
    assert.equal(counter.count, 2);
    await failure(narrow.models.list({ after_id: 'claude-opus-5' }), Anthropic.BadRequestError);
  });

  test('one model, from the provider that has it', async () => {
    assert.equal((await united.client.models.retrieve('glm-5')).display_name, 'GLM-5');
    assert.equal((await united.client.models.retrieve('claude-opus-5')).display_name, 'CLAUDE-OPUS-5');
    await failure(united.client.models.retrieve('nonesuch'), Anthropic.NotFoundError);
  });
});

describe('errors', () => {
  test('a wrong token is AuthenticationError', async () => {
    const { client: other, counter } = make({ apiKey: 'sk-ant-nothing' });
    const error = await failure(other.messages.create(ask), Anthropic.AuthenticationError);
    assert.deepEqual([error.type, counter.count, provider.calls.length], ['authentication_error', 1, 0]);
    assert.match(error.requestID, /^req_/);
  });

  test('a model that is not allowed is PermissionDeniedError', async () => {
    const { client: narrow } = make({ apiKey: await proxy.newToken({ policy: { models: ['claude-haiku*'] } }) });
    const error = await failure(narrow.messages.create(ask), Anthropic.PermissionDeniedError);
    assert.equal(error.type, 'permission_error');
    assert.match(error.message, /claude-haiku\*/);
  });

  test('a used-up token is RateLimitError and not retried', async () => {
    const { client: limited, counter } = make({ apiKey: await proxy.newToken({ max_requests: 1 }) });
    await limited.messages.create(ask);
    const error = await failure(limited.messages.create(ask), Anthropic.RateLimitError);
    assert.equal(error.type, 'rate_limit_error');
    assert.deepEqual([counter.count, provider.calls.length], [2, 1]);
  });

  for (const [status, type, kind] of [
    [400, 'BadRequestError', 'invalid_request_error'], [404, 'NotFoundError', 'not_found_error'], [413, 'ContentTooLargeError', 'request_too_large'],
    [429, 'RateLimitError', 'rate_limit_error'], [500, 'InternalServerError', 'api_error'], [529, 'OverloadedError', 'overloaded_error'],
  ]) {
    test(`the provider’s ${status} passes as ${type}`, async () => {
      provider.script((call) => call.reply(status, { type: 'error', error: { type: kind, message: 'of the provider' }, request_id: 'req_of_provider' }));
      const error = await failure(client.messages.create(ask), Anthropic[type]);
      assert.deepEqual([error.status, error.type, error.requestID], [status, kind, 'req_of_provider']);
      assert.match(error.message, /of the provider/);
    });
  }

  test('429 is retried after Retry-After', async () => {
    const { client: patient } = make();
    provider.script((call) => call.reply(429, { type: 'error', error: { type: 'rate_limit_error', message: 'slow down' } }, { 'retry-after': '1' }));
    assert.equal((await patient.messages.create(ask)).content[0].text, text);
    const [first, second] = provider.calls;
    assert.ok(second.at - first.at >= 950, `retried after ${second.at - first.at} ms`);
  });

  test('the provider’s 401 is InternalServerError, not retried, and does not show the key', async () => {
    const { client: other, counter } = make();
    provider.script((call) => call.reply(401, { type: 'error', error: { type: 'authentication_error', message: `invalid x-api-key ${provider.anthropicKey}` } }));
    const error = await failure(other.messages.create(ask), Anthropic.InternalServerError);
    assert.deepEqual([error.status, error.type, counter.count], [502, 'api_error', 1]);
    assert.ok(!JSON.stringify([error.message, error.error]).includes(provider.anthropicKey));
  });
});

describe('the response cache', () => {
  let cached;
  before(async () => {
    const project = await proxy.manage('POST', '/manage/projects', { name: 'cached', policy: { cache: { ttl_seconds: 3600 } } });
    await proxy.manage('POST', `/manage/projects/${project.id}/upstreams`, { name: 'claude', provider: 'anthropic', base_url: provider.url, api_key: provider.anthropicKey });
    cached = make({ apiKey: await proxy.newToken({ project_id: project.id }), maxRetries: 0 }).client;
  });

  // twice makes a call twice: the provider gets it once, and the program sees the same both times. It returns what it saw.
  const twice = async (create, read = (data) => data) => {
    const answers = [];
    for (const status of [/^llm-proxy; fwd=miss; stored$/, /^llm-proxy; hit; ttl=3\d+; key="[0-9a-f]{16}"$/]) {
      const { data, response } = await create().withResponse();
      assert.match(response.headers.get('cache-status'), status);
      answers.push(JSON.parse(JSON.stringify(await read(data), (key, v) => (key === '_request_id' ? undefined : v))));
      await proxy.settled();
    }
    assert.deepEqual(answers[1], answers[0]);
    assert.equal(provider.calls.length, 1);
    const row = await proxy.settled();
    assert.deepEqual([row.outcome, row.cache, row.output_tokens, row.cost], ['ok', 'hit', 0, 0]);
    assert.ok(row.saved > 0);
    return answers[1];
  };
  const exact = { ...ask, temperature: 0 };

  test('a message', async () => {
    assert.deepEqual((await twice(() => cached.messages.create(exact))).content, [{ type: 'text', text }]);
  });

  test('a stream', async () => {
    const events = await twice(() => cached.messages.create({ ...exact, stream: true }), async (stream) => {
      const all = [];
      for await (const event of stream) all.push(event);
      return all;
    });
    assert.equal(events[0].type, 'message_start');
    assert.equal(events.at(-1).type, 'message_stop');
  });

  test('the stream helper', async () => {
    for (let i = 0; i < 2; i++) {
      const message = await cached.messages.stream({ ...exact, metadata: { user_id: 'helper' } }).finalMessage();
      assert.equal(message.content[0].text, text);
      await proxy.settled();
    }
    assert.equal(provider.calls.length, 1);
  });

  test('another beta or version is another answer', async () => {
    for (const beta of ['a-2025-01-01', 'b-2025-01-01']) {
      const { response } = await cached.messages.create(exact, { headers: { 'anthropic-beta': beta } }).withResponse();
      assert.match(response.headers.get('cache-status'), /fwd=miss/);
    }
  });
});
