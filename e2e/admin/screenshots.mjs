// Takes the screenshots of the documents, docs/*.png, from `llm-proxy demo`, whose sample calls end now.
//
//	go build -o /tmp/llm-proxy . && LLM_PROXY_BINARY=/tmp/llm-proxy node e2e/admin/screenshots.mjs
import assert from 'node:assert/strict';
import { statSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { Demo } from '../proxy.mjs';
import { launch, Visitor } from './browser.mjs';

const docs = fileURLToPath(new URL('../../docs/', import.meta.url));
const demo = await Demo.start();
const browser = await launch();
try {
  const visitor = await Visitor.start(browser, demo, { viewport: { width: 1280, height: 860 } });
  await visitor.signIn();
  const { data: [token] } = await demo.manage('/manage/tokens?name=website%20chat');
  for (const [name, path, colorScheme, width, height] of [
    ['dashboard', '/admin/dashboard?period=7d&measure=cost&by=model', 'light', 1280, 860], ['calls', '/admin/requests?outcome=ok', 'dark', 1280, 560],
    ['token', `/admin/tokens/${token.id}`, 'light', 1280, 860], ['project-dark', `/admin/projects/${token.project_id}`, 'dark', 1280, 860],
    ['tokens-phone', '/admin/tokens', 'light', 375, 760],
  ]) {
    await visitor.page.emulateMedia({ colorScheme });
    await visitor.page.setViewportSize({ width, height });
    await visitor.page.goto(demo.url + path);
    const file = `${docs}${name}.png`;
    await visitor.page.screenshot({ path: file });
    assert.ok(statSync(file).size < 150_000, `${file} is too large`);
  }
  assert.deepEqual(visitor.problems, []);
} finally {
  await browser.close();
  await demo.stop();
}
