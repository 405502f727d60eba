// Tests of the look of the pages with sample data, and after forms were sent: every page has no accessibility violation
// and fits the window at two widths, in light and dark mode, and a title of its own. With LLM_PROXY_PICTURES it saves a
// picture of each.
import assert from 'node:assert/strict';
import { before, test } from 'node:test';
import { Demo } from '../proxy.mjs';
import { describePages } from './browser.mjs';

describePages('the look of the pages', new Demo(), (demo, visit) => {
  let visitor;
  const titles = new Map();
  before(async () => {
    visitor = await visit();
    await visitor.signIn();
  });

  // look checks the page that is open, whichever request led to it. Lists have the same title with any filter.
  const look = async (name, title, of = name) => {
    const shown = await visitor.page.title();
    assert.match(shown, title ?? /^[^·]+.* · llm-proxy$/, name);
    assert.ok(!titles.has(shown) || titles.get(shown) === of, `${name} and ${titles.get(shown)} have the title ${shown}`);
    titles.set(shown, of);
    await visitor.look(`demo-${name}`);
  };
  const open = async (name, path, title) => {
    assert.equal((await visitor.page.goto(demo.url + path)).status(), 200, path);
    await look(name, title, path.replace(/\?.*/, ''));
  };
  // send fills in a form, with names of inputs, and sends it, even if the browser finds a mistake.
  const send = async (name, path, fields, status, title) => {
    const { page } = visitor;
    await page.goto(demo.url + path);
    for (const [field, value] of Object.entries(fields)) {
      const input = page.locator(`main [name="${field}"]`).first();
      if (await input.evaluate((e) => e.tagName === 'SELECT')) await input.evaluate((e, v) => { e.value = v; }, value);
      else await input.evaluate((e, v) => { if (e.type === 'checkbox') e.checked = v; else e.value = v; }, value);
    }
    await page.locator('main form[method=post]').first().evaluate((form) => { form.noValidate = true; });
    const answer = page.waitForResponse((r) => r.request().method() === 'POST');
    await page.locator('main form[method=post] .primary[type=submit]:visible').last().click();
    assert.equal((await answer).status(), status, name);
    await page.waitForLoadState();
    await look(name, title);
  };

  test('pages with data', async () => {
    const { data: [token] } = await demo.manage('/manage/tokens?name=website%20chat');
    const { data: [ok] } = await demo.manage('/manage/requests?limit=1&outcome=ok');
    const { data: [refused] } = await demo.manage('/manage/requests?limit=1&outcome=refused');
    await open('dashboard', '/admin/dashboard', /^Dashboard · llm-proxy$/);
    await open('project', `/admin/projects/${token.project_id}`, /^Support bot · Projects · llm-proxy$/);
    await open('token', `/admin/tokens/${token.id}`, /^website chat · Tokens · llm-proxy$/);
    for (const [name, title] of [['projects', 'Projects'], ['tokens', 'Tokens'], ['requests', 'Calls'], ['streams', 'Running calls'], ['prices', 'Prices'],
      ['keys', 'Management keys'], ['webhooks', 'Webhooks'], ['audit', 'Audit trail'], ['settings', 'Settings'], ['account', 'Your access']]) {
      await open(name, `/admin/${name}`, new RegExp(`^${title} · llm-proxy$`));
    }
    await open('call', `/admin/requests/${ok.id}`, new RegExp(`${ok.id} · llm-proxy$`));
    await open('refused-call', `/admin/requests/${refused.id}`, new RegExp(`${refused.id} · llm-proxy$`));
    await open('costliest-calls', '/admin/requests?order=-cost&period=30d', /^Calls/);
    await open('routing', `/admin/projects/${token.project_id}/route?model=gpt-4o-mini`);
    await open('confirm-delete-project', `/admin/projects/${token.project_id}/delete`);
    await open('confirm-revoke-token', `/admin/tokens/${token.id}/revoke`);
    await open('edit-project', `/admin/projects/${token.project_id}/edit`);
    await open('edit-token', `/admin/tokens/${token.id}/edit`);
    await open('rotate-token', `/admin/tokens/${token.id}/rotate`);
    assert.deepEqual(visitor.problems, []);
  });

  test('pages after forms were sent', async () => {
    const { data: [token] } = await demo.manage('/manage/tokens?name=website%20chat');
    const { page } = visitor;
    await send('token-mistakes', '/admin/tokens/new', { name: '', expires_at: '2020-01-01T00:00' }, 400);
    await send('token-once', '/admin/tokens/new', { name: 'pictured' }, 200);
    await send('project-mistakes', '/admin/projects/new', { name: '', api_key: 'sk-****' }, 400);
    await send('upstream-mistakes', `/admin/projects/${token.project_id}/upstreams/new`, { name: '', base_url: 'ftp://x' }, 400);
    await send('price-mistakes', '/admin/prices/new', { match: '', input: '-1' }, 400);
    await send('key-mistakes', '/admin/keys/new', { name: '' }, 400);
    await send('key-once', '/admin/keys/new', { name: 'pictured' }, 200);
    await send('webhook-mistakes', '/admin/webhooks/new', { name: '', url: 'ftp://x' }, 400);
    await send('webhook-once', '/admin/webhooks/new', { name: 'pictured', url: 'https://example.com/hook' }, 200);
    await page.goto(`${demo.url}/admin/tokens`);
    await page.locator('main [name=id]').first().check();
    await page.getByRole('button', { name: 'Revoke selected' }).click();
    await page.waitForLoadState();
    await look('confirm-revoke-tokens');
    assert.equal((await page.goto(`${demo.url}/admin/tokens/tok_none`)).status(), 404);
    await look('not-found');
    await page.goto(`${demo.url}/admin/account`);
    await page.getByRole('button', { name: 'Sign out', exact: true }).last().click();
    await page.getByText('You are signed out').waitFor();
    await look('signed-out');
    await page.getByLabel('Management key').fill('wrong');
    await page.getByRole('button', { name: 'Sign in' }).click();
    await page.getByText('This key is not valid').waitFor();
    titles.delete('Sign in · llm-proxy');
    await look('sign-in-mistake');
    assert.deepEqual(visitor.problems, []);
  });
});
