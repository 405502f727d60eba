// Takes the screenshots of the documents, docs/*.png, from `llm-proxy demo`, whose sample calls end now.
//
//	go build -o /tmp/llm-proxy . && LLM_PROXY_BINARY=/tmp/llm-proxy node e2e/admin/screenshots.mjs
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { statSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { launch, Visitor } from './browser.mjs';

const docs = fileURLToPath(new URL('../../docs/', import.meta.url));
const key = randomBytes(32).toString('hex');
const demo = spawn(process.env.LLM_PROXY_BINARY, ['demo'], {
  env: { ...process.env, LISTEN_ADDR: '127.0.0.1:0', MANAGEMENT_TOKEN: key, LOG_FORMAT: 'json' }, stdio: ['ignore', 'pipe', 'pipe'],
});
demo.stdout.resume();
const browser = await launch();
try {
  const url = await new Promise((resolve, reject) => {
    demo.once('exit', (code) => reject(new Error(`the demo ended with ${code}`)));
    createInterface({ input: demo.stderr }).on('line', (line) => {
      if (line.includes('"msg":"listening"')) resolve(`http://${JSON.parse(line).address}`);
    });
  });
  const manage = async (path) => (await fetch(url + path, { headers: { authorization: `Bearer ${key}` } })).json();
  const visitor = await Visitor.start(browser, url, { viewport: { width: 1280, height: 860 } });
  await visitor.signIn(key);
  const { data: [token] } = await manage('/manage/tokens?name=website%20chat');
  for (const [name, path, colorScheme, width, height] of [
    ['dashboard', '/admin/dashboard?period=7d&measure=cost&by=model', 'light', 1280, 860], ['calls', '/admin/requests?outcome=ok', 'dark', 1280, 560],
    ['token', `/admin/tokens/${token.id}`, 'light', 1280, 860], ['project-dark', `/admin/projects/${token.project_id}`, 'dark', 1280, 860],
    ['tokens-phone', '/admin/tokens', 'light', 375, 760],
  ]) {
    await visitor.page.emulateMedia({ colorScheme });
    await visitor.page.setViewportSize({ width, height });
    await visitor.page.goto(url + path);
    const file = `${docs}${name}.png`;
    await visitor.page.screenshot({ path: file });
    assert.ok(statSync(file).size < 150_000, `${file} is too large`);
  }
  assert.deepEqual(visitor.problems, []);
} finally {
  await browser.close();
  demo.kill();
  await once(demo, 'exit');
}
