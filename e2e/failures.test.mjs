// This file tests failures: the official openai package must throw the error that its users expect, and retry only when
// that helps.
import assert from 'node:assert/strict';
import { after, afterEach, before, describe, test } from 'node:test';
import OpenAI from 'openai';
import { chatChunk, text } from './answers.mjs';
import { Proxy, countingFetch, promptCanary, within } from './proxy.mjs';

let proxy, provider;
before(async () => {
  proxy = await Proxy.start();
  provider = proxy.provider;
});
after(() => proxy.stop());
afterEach(() => provider.reset());

const ask = { model: 'gpt-4o-mini', messages: [{ role: 'user', content: promptCanary }] };

// make returns a client with the SDK's default retries, and a counter of the requests that it sends.
function make(options = {}) {
  const counter = countingFetch();
  return { counter, client: new OpenAI({ apiKey: proxy.token, baseURL: `${proxy.url}/v1`, fetch: counter, ...options }) };
}

async function failure(promise, type) {
  const error = await promise.then(() => assert.fail('no error'), (e) => e);
  assert.ok(error instanceof type, `${error.constructor.name} instead of ${type.name}: ${error.message}`);
  return error;
}

describe('refusals of the proxy', () => {
  test('a wrong token is AuthenticationError, whatever is wrong with it', async () => {
    const revoked = await proxy.manage('POST', '/manage/tokens', { project_id: proxy.project, name: 'revoked' });
    await proxy.manage('DELETE', `/manage/tokens/${revoked.id}`);
    const messages = new Set();
    for (const apiKey of ['sk-nothing', `${proxy.token}x`, revoked.token]) {
      const { client, counter } = make({ apiKey });
      const error = await failure(client.chat.completions.create(ask), OpenAI.AuthenticationError);
      assert.deepEqual([error.status, error.code, error.type, counter.count], [401, 'invalid_api_key', 'invalid_request_error', 1]);
      assert.match(error.requestID, /^req_/);
      messages.add(error.message);
    }
    assert.equal(messages.size, 1, 'all refusals read the same');
    assert.equal(provider.calls.length, 0);
  });

  test('a model that is not allowed is PermissionDeniedError', async () => {
    const { client, counter } = make({ apiKey: await proxy.newToken({ policy: { models: ['gpt-4o'] } }) });
    const error = await failure(client.chat.completions.create(ask), OpenAI.PermissionDeniedError);
    assert.deepEqual([error.code, error.param, counter.count, provider.calls.length], ['model_not_allowed', 'model', 1, 0]);
  });

  test('an endpoint that is not allowed is PermissionDeniedError', async () => {
    const { client } = make();
    const stateful = await failure(client.files.list(), OpenAI.PermissionDeniedError);
    assert.equal(stateful.code, 'endpoint_not_allowed');
    const { client: narrow } = make({ apiKey: await proxy.newToken({ policy: { endpoints: ['/v1/embeddings'] } }) });
    await failure(narrow.chat.completions.create(ask), OpenAI.PermissionDeniedError);
    assert.equal(provider.calls.length, 0);
  });

  test('an unsupported endpoint is NotFoundError', async () => {
    const { client } = make();
    for (const path of ['/nonesuch', '/organization/users', '/realtime/sessions']) {
      const error = await failure(client.post(path, { body: {} }), OpenAI.NotFoundError);
      assert.equal(error.code, 'unknown_endpoint', path);
    }
    assert.equal(provider.calls.length, 0);
  });

  test('a used-up token is RateLimitError and not retried', async () => {
    const { client, counter } = make({ apiKey: await proxy.newToken({ max_requests: 1 }) });
    assert.equal((await client.chat.completions.create(ask)).choices[0].message.content, text);
    const error = await failure(client.chat.completions.create(ask), OpenAI.RateLimitError);
    assert.deepEqual([error.code, error.type], ['project_spend_limit_exceeded', 'insufficient_quota']);
    assert.equal(error.headers.get('x-should-retry'), 'false');
    assert.equal(error.headers.get('retry-after'), null);
    assert.equal(counter.count, 2, 'one request for each call');
    assert.equal(provider.calls.length, 1);
  });
});

describe('policies of the proxy', () => {
  test('a model that the policy does not name is PermissionDeniedError, which lists the allowed models', async () => {
    const { client, counter } = make({ apiKey: await proxy.newToken({ policy: { models: ['gpt-5*'] } }) });
    const error = await failure(client.chat.completions.create(ask), OpenAI.PermissionDeniedError);
    assert.match(error.message, /gpt-5\*/);
    assert.equal(counter.count, 1);
  });
});

describe('errors of the provider', () => {
  for (const [status, type, code] of [
    [400, OpenAI.BadRequestError, 'context_length_exceeded'], [404, OpenAI.NotFoundError, 'model_not_found'],
    [409, OpenAI.ConflictError, 'conflict'], [422, OpenAI.UnprocessableEntityError, 'unprocessable'],
    [429, OpenAI.RateLimitError, 'rate_limit_exceeded'], [500, OpenAI.InternalServerError, 'server_error'], [503, OpenAI.InternalServerError, 'overloaded'],
  ]) {
    test(`${status} passes as ${type.name}`, async () => {
      const { client } = make({ maxRetries: 0 });
      provider.script((call) => call.fail(status, { message: 'of the provider', type: 'some_type', param: 'messages', code }));
      const error = await failure(client.chat.completions.create(ask), type);
      assert.deepEqual([error.status, error.code, error.param, error.type, error.requestID], [status, code, 'messages', 'some_type', 'req_of_provider']);
      assert.match(error.message, /of the provider/);
    });
  }

  test('a model that the provider does not have', async () => {
    const { client } = make();
    const error = await failure(client.models.retrieve('nonesuch'), OpenAI.NotFoundError);
    assert.equal(error.code, 'model_not_found');
  });

  for (const [name, headers, least] of [['Retry-After', { 'retry-after': '3' }, 2950], ['retry-after-ms', { 'retry-after-ms': '2500' }, 2450]]) {
    test(`429 is retried by the SDK after a longer ${name}`, async () => {
      const { client } = make();
      provider.script((call) => call.fail(429, { message: 'slow down', type: 'requests', param: null, code: 'rate_limit_exceeded' }, headers));
      const answer = await client.chat.completions.create(ask);
      assert.equal(answer.choices[0].message.content, text);
      const [first, second] = provider.calls;
      assert.equal(provider.calls.length, 2);
      assert.ok(second.at - first.at >= least, `retried after ${second.at - first.at} ms`); // without Retry-After the SDK waits at most 500 ms
      assert.deepEqual([first.headers['x-stainless-retry-count'], second.headers['x-stainless-retry-count']], ['0', '1']);
    });
  }

  test('without another upstream, the SDK waits for a short Retry-After of a 429', async () => {
    const { client } = make();
    provider.script((call) => call.fail(429, { message: 'slow down', type: 'requests', param: null, code: 'rate_limit_exceeded' }, { 'retry-after': '1' }));
    const answer = await client.chat.completions.create(ask);
    assert.equal(answer.choices[0].message.content, text);
    const [first, second] = provider.calls;
    assert.equal(provider.calls.length, 2);
    assert.ok(second.at - first.at >= 950, `retried after ${second.at - first.at} ms`);
    assert.deepEqual([first.headers['x-stainless-retry-count'], second.headers['x-stainless-retry-count']], ['0', '1']);
  });

  test('the SDK obeys the provider’s x-should-retry', async () => {
    const { client } = make();
    provider.script((call) => call.fail(429, { message: 'no more credit', type: 'insufficient_quota', param: null, code: 'insufficient_quota' }, { 'x-should-retry': 'false' }));
    const error = await failure(client.chat.completions.create(ask), OpenAI.RateLimitError);
    assert.equal(error.code, 'insufficient_quota');
    assert.equal(provider.calls.length, 1);
  });

  for (const status of [401, 403]) {
    test(`the provider’s ${status} is InternalServerError, not retried, and does not show the key`, async () => {
      const { client, counter } = make();
      provider.script((call) => call.fail(status, { message: `Incorrect API key provided: ${provider.openaiKey}`, type: 'invalid_request_error', param: null, code: 'invalid_api_key' }));
      const error = await failure(client.chat.completions.create(ask), OpenAI.InternalServerError);
      assert.deepEqual([error.status, error.code], [502, 'upstream_auth_error']);
      assert.ok(!JSON.stringify([error.message, error.error]).includes(provider.openaiKey));
      assert.deepEqual([counter.count, provider.calls.length], [1, 1]);
    });
  }
});

describe('broken connections', () => {
  test('a provider that disconnects before it answers is retried', async () => {
    const { client, counter } = make();
    provider.script((call) => call.cut());
    const answer = await client.chat.completions.create(ask);
    assert.equal(answer.choices[0].message.content, text);
    assert.deepEqual([counter.count, provider.calls.length], [2, 2]);
  });

  test('a cut stream ends with an error, after everything that arrived', async () => {
    const { client, counter } = make();
    provider.script((call) => {
      call.sse();
      call.event(chatChunk(call.json, { content: 'first' }));
      call.response.write('data: {"cut', () => call.cut());
    });
    const seen = [];
    const stream = await client.chat.completions.create({ ...ask, stream: true });
    await assert.rejects(async () => {
      for await (const event of stream) seen.push(event.choices[0].delta.content);
    });
    assert.deepEqual(seen, ['first']);
    assert.equal(counter.count, 1);
    assert.equal((await proxy.settled()).outcome, 'truncated');
  });

  test('a cut answer is an error', async () => {
    const { client } = make({ maxRetries: 0 });
    provider.script((call) => {
      call.head(200, { 'content-type': 'application/json', 'content-length': 1000 });
      call.response.write('{"id":', () => call.cut());
    });
    await assert.rejects(client.chat.completions.create(ask).asResponse().then((r) => r.text()));
    assert.equal((await proxy.settled()).outcome, 'truncated');
  });

  test('an error event in a stream is APIError', async () => {
    const { client } = make();
    provider.script((call) => {
      call.sse();
      call.event({ error: { message: 'the model broke', type: 'server_error', param: null, code: 'model_error' } });
      call.end();
    });
    const stream = await client.chat.completions.create({ ...ask, stream: true });
    const error = await failure(stream[Symbol.asyncIterator]().next(), OpenAI.APIError);
    assert.equal(error.code, 'model_error');
  });

  test('the client’s timeout is APIConnectionTimeoutError, and ends the call to the provider', async () => {
    const { client } = make({ timeout: 150, maxRetries: 0 });
    let call;
    provider.script((c) => { call = c; });
    await failure(client.chat.completions.create(ask), OpenAI.APIConnectionTimeoutError);
    await within(1000, call.gone, 'the provider’s connection closed');
    assert.equal((await proxy.settled()).outcome, 'client_gone');
  });

  test('an unreachable proxy is APIConnectionError', async () => {
    const { client, counter } = make({ baseURL: 'http://127.0.0.1:1/v1', maxRetries: 0 });
    await failure(client.chat.completions.create(ask), OpenAI.APIConnectionError);
    assert.equal(counter.count, 1);
  });
});
