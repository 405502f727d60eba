// This file tests webhooks with an independent receiver: the code in docs/notifications.md verifies what the proxy sends,
// in each of its languages, and refuses anything else.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { createHmac } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { Proxy } from './proxy.mjs';

const doc = readFileSync(new URL('../docs/notifications.md', import.meta.url), 'utf8');
const code = (language) => doc.match(new RegExp(`\`\`\`${language}\n([\\s\\S]*?)\`\`\``))[1];
const dir = mkdtempSync(join(tmpdir(), 'llm-proxy-webhooks-'));
const received = [];
let proxy, receiver, hook;

before(async () => {
  proxy = await Proxy.start();
  receiver = createServer((req, res) => {
    const parts = [];
    req.on('data', (part) => parts.push(part));
    req.on('end', () => {
      received.push({ headers: req.headers, body: Buffer.concat(parts) });
      res.writeHead(204).end();
    });
  }).listen(0, '127.0.0.1');
  await new Promise((resolve) => receiver.once('listening', resolve));
  hook = await proxy.manage('POST', '/manage/webhooks', {
    name: 'e2e', format: 'standard', url: `http://127.0.0.1:${receiver.address().port}/hook`,
  });
  const sent = await proxy.manage('POST', `/manage/webhooks/${hook.id}/test`);
  assert.equal(sent.state, 'delivered');
});

after(async () => {
  receiver?.close();
  rmSync(dir, { recursive: true, force: true });
  await proxy?.stop();
});

// arguments returns what a verifier takes, as text.
const args = (change = {}) => {
  const { headers, body } = received[0];
  const all = { secret: hook.secret, id: headers['webhook-id'], timestamp: headers['webhook-timestamp'], signatures: headers['webhook-signature'], body: body.toString(), ...change };
  return [all.secret, all.id, all.timestamp, all.signatures, all.body];
};

const sign = (secret, id, timestamp, body) => `v1,${createHmac('sha256', Buffer.from(secret.slice(6), 'base64')).update(`${id}.${timestamp}.${body}`).digest('base64')}`;

const verifiers = {
  js: async () => {
    const file = join(dir, 'verify.mjs');
    writeFileSync(file, code('js'));
    const { verify } = await import(pathToFileURL(file));
    return (...a) => verify(...a);
  },
  python: async () => {
    const file = join(dir, 'verify.py');
    writeFileSync(file, `${code('python')}
import sys
print(verify(*sys.argv[1:5], sys.argv[5].encode()))
`);
    return (...a) => execFileSync('python3', [file, ...a], { encoding: 'utf8' }).trim() === 'True';
  },
  go: async () => {
    const file = join(dir, 'main.go');
    writeFileSync(file, `package main

import ("crypto/hmac"; "crypto/sha256"; "encoding/base64"; "fmt"; "os"; "strconv"; "strings"; "time")

func main() { fmt.Println(verify(os.Args[1], os.Args[2], os.Args[3], os.Args[4], []byte(os.Args[5]))) }

${code('go')}`);
    const program = join(dir, 'verify');
    execFileSync('go', ['build', '-o', program, file], { cwd: dir });
    return (...a) => execFileSync(program, a, { encoding: 'utf8' }).trim() === 'true';
  },
};

for (const [language, make] of Object.entries(verifiers)) {
  test(`the ${language} code of the document verifies a delivery, and nothing else`, async () => {
    const verify = await make();
    assert.equal(verify(...args()), true);
    const [secret, id, , , body] = args();
    const old = String(Math.floor(Date.now() / 1000) - 3600);
    for (const change of [
      { body: `${body} ` }, { id: `${id}x` }, { secret: `whsec_${Buffer.alloc(32).toString('base64')}` }, { signatures: 'v1,' }, { signatures: '' },
      { timestamp: old, signatures: sign(secret, id, old, body) },
    ]) assert.equal(verify(...args(change)), false, JSON.stringify(change));
  });
}

test('after a rotation both secrets verify', async () => {
  const rotated = await proxy.manage('POST', `/manage/webhooks/${hook.id}/rotate`, { overlap_minutes: 60 });
  await proxy.manage('POST', `/manage/webhooks/${hook.id}/test`);
  const { headers, body } = received.at(-1);
  const signatures = headers['webhook-signature'].split(' ');
  assert.equal(signatures.length, 2);
  for (const secret of [hook.secret, rotated.secret]) {
    assert.ok(signatures.includes(sign(secret, headers['webhook-id'], headers['webhook-timestamp'], body)));
  }
});

test('a limit that is used up is notified once', async () => {
  const before = received.length;
  const token = await proxy.newToken({ max_requests: 2 });
  for (let i = 0; i < 2; i++) {
    const res = await fetch(`${proxy.url}/v1/chat/completions`, {
      method: 'POST', headers: { authorization: `Bearer ${token}`, 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'gpt-4o-mini', messages: [{ role: 'user', content: 'hi' }] }),
    });
    assert.equal(res.status, 200);
    await res.text();
  }
  const reached = () => received.slice(before).map((r) => JSON.parse(r.body)).filter((v) => v.data.percent === 100);
  for (let i = 0; i < 3000 && reached().length === 0; i++) await new Promise((resolve) => setTimeout(resolve, 20));
  assert.equal(reached().length, 1);
  assert.equal(reached()[0].type, 'limit.threshold');
  assert.ok(!JSON.stringify(reached()).includes(token));
});
