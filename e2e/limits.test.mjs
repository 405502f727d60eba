// This file tests how the official SDKs react to the limits of the proxy: they wait for a limit that refills soon, and a
// used-up quota is an error immediately.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import Anthropic from '@anthropic-ai/sdk';
import OpenAI from 'openai';
import { Proxy, countingFetch, promptCanary } from './proxy.mjs';

let proxy;
before(async () => { proxy = await Proxy.start(); });
after(() => proxy.stop());

const messages = [{ role: 'user', content: promptCanary }];
const sdks = {
  openai: (apiKey, fetch) => {
    const client = new OpenAI({ apiKey, baseURL: `${proxy.url}/v1`, fetch });
    return () => client.chat.completions.create({ model: 'gpt-4o-mini', messages });
  },
  anthropic: (apiKey, fetch) => {
    const client = new Anthropic({ apiKey, authToken: null, baseURL: proxy.url, fetch });
    return () => client.messages.create({ model: 'claude-sonnet-5', max_tokens: 64, messages });
  },
};

for (const [name, make] of Object.entries(sdks)) {
  const { RateLimitError } = name === 'openai' ? OpenAI : Anthropic;
  const limited = (limit) => proxy.newToken({ policy: { limits: [limit] } });

  test(`${name}: the SDK waits once for a limit that refills soon`, async () => {
    const counter = countingFetch();
    const call = make(await limited({ count: 'requests', max: 10, per: 'minute' }), counter);
    const before = proxy.provider.calls.length;
    for (let i = 0; i < 10; i++) await call();
    const asked = performance.now();
    await call();
    assert.equal(proxy.provider.calls.length - before, 11);
    // One more call is allowed 6 s after the first; without Retry-After an SDK would retry after half a second and be
    // refused again.
    assert.equal(counter.count, 12, `${counter.count - 10} requests for the last call, in ${performance.now() - asked} ms`);
  });

  for (const limit of [{ count: 'requests', max: 1, per: 'lifetime' }, { count: 'tokens', max: 1, per: 'month' }, { count: 'dollars', max: 0, per: 'month' }]) {
    test(`${name}: used-up ${limit.count} are not retried`, async () => {
      const counter = countingFetch();
      const call = make(await limited(limit), counter);
      for (let left = limit.max; left > 0; left--) await call().catch(() => {});
      const before = [counter.count, proxy.provider.calls.length];
      const error = await call().then(() => assert.fail('no error'), (e) => e);
      assert.ok(error instanceof RateLimitError, `${error.constructor.name}: ${error.message}`);
      assert.equal(error.headers.get('x-should-retry'), 'false');
      assert.equal(error.headers.get('retry-after'), null);
      assert.deepEqual([counter.count, proxy.provider.calls.length], [before[0] + 1, before[1]]);
    });
  }
}
