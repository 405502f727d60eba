// Walks the journeys of docs/pages.md and counts what they take: clicks, with the choices of lists and the key Enter, and
// fields that are typed. The table there must say the same.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { before, test } from 'node:test';
import { Proxy } from '../proxy.mjs';
import { describePages } from './browser.mjs';

// table returns the rows of docs/pages.md's table of journeys: name -> "clicks, fields".
function table() {
  const text = readFileSync(new URL('../../docs/pages.md', import.meta.url), 'utf8');
  const section = text.split('\n## Journeys\n')[1].split('\n## ')[0];
  const rows = section.split('\n').filter((line) => /^\| [^|]+ \| \d+ \| \d+ \|/.test(line));
  return new Map(rows.map((line) => line.split('|').map((cell) => cell.trim())).map(([, name, clicks, fields]) => [name, `${clicks}, ${fields}`]));
}

// A Walk is one journey. It begins on the dashboard, signed in.
class Walk {
  clicks = 0;
  fields = 0;

  constructor(page) {
    this.page = page;
  }

  async click(locator) {
    await locator.click();
    this.clicks++;
  }

  // to follows a link of the navigation.
  to(name) {
    return this.click(this.page.getByRole('navigation', { name: 'Main' }).getByRole('link', { name, exact: true }));
  }

  link(name) {
    return this.click(this.page.locator('main').getByRole('link', { name, exact: true }).first());
  }

  button(name) {
    return this.click(this.page.getByRole('button', { name, exact: true }).first());
  }

  field(label) {
    return this.page.getByLabel(new RegExp(`^${label}( optional)?$`)).first();
  }

  async choose(label, option) {
    await this.field(label).selectOption(option);
    this.clicks++;
  }

  async type(label, text) {
    await this.field(label).fill(text);
    this.fields++;
  }

  async enter() {
    await this.page.keyboard.press('Enter');
    this.clicks++;
  }

  see(text) {
    return this.page.locator('main').getByText(text).first().waitFor();
  }
}

describePages('the journeys', new Proxy(), (proxy, visit) => {
  const rows = table(), walked = new Set();
  let visitor;
  before(async () => {
    visitor = await visit();
    await visitor.signIn();
  });

  const newProject = (name, policy = {}) => proxy.manage('POST', '/manage/projects', { name, openai_api_key: proxy.provider.openaiKey, policy });
  const newToken = (project, name) => proxy.manage('POST', '/manage/tokens', { project_id: project.id, name });
  // settled waits until a call is on record.
  const settled = async (answer) => {
    const res = await answer;
    await res.text();
    for (;;) {
      const { data } = await proxy.manage('GET', '/manage/requests?limit=10');
      const row = data.find((r) => r.id === res.headers.get('x-llm-proxy-request-id'));
      if (row && row.outcome !== 'open') return row;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  };
  const journey = (name, walk) => test(name, async () => {
    walked.add(name);
    const w = new Walk(visitor.page);
    await walk(w, () => visitor.page.goto(`${proxy.url}/admin/dashboard`));
    assert.deepEqual(visitor.problems, []);
    assert.equal(`${w.clicks}, ${w.fields}`, rows.get(name), 'clicks and fields are those of docs/pages.md');
  });

  journey('create a token for a program, with one project', async (w, start) => {
    await start();
    await w.to('Tokens');
    await w.link('New token');
    await w.type('Name', 'a program');
    await w.button('Create token');
    await w.button('Copy token');
    const token = await w.page.evaluate(() => navigator.clipboard.readText());
    assert.equal((await settled(proxy.call(token))).outcome, 'ok');
  });

  journey('create a project with a provider\'s key, and ask a model', async (w, start) => {
    await start();
    await w.to('Projects');
    await w.link('New project');
    await w.type('Name', 'fresh');
    await w.type('API key', proxy.provider.openaiKey);
    await w.button('Create project');
    await w.link('Try it');
    await w.type('Message', 'Hello');
    await w.button('Send');
    await w.page.getByRole('region', { name: 'The last call' }).getByText('ok', { exact: true }).waitFor();
  });

  journey('create a token with a budget of dollars per month', async (w, start) => {
    await start();
    await w.to('Tokens');
    await w.link('New token');
    await w.choose('Project', 'fresh');
    await w.type('Name', 'on a budget');
    await w.type('Maximum', '50'); // the first line is in dollars per month
    await w.button('Create token');
    await w.button('Copy token');
    await w.link('Done, open on a budget');
    w.clicks--; // that is to see it
    await w.page.getByRole('cell', { name: /of \$50\.00/ }).waitFor();
  });

  journey('find why a call was refused, by its request ID', async (w, start) => {
    const project = await newProject('strict', { models: ['gpt-4o'] });
    const { token } = await newToken(project, 'refused');
    const { id } = await settled(proxy.call(token));
    await start();
    await w.to('Calls');
    await w.type('Search', id);
    await w.enter();
    await w.see('This token may not use this model');
  });

  journey('find why calls fail, and raise the limit', async (w, start) => {
    const project = await newProject('small', { limits: [{ count: 'requests', max: 1, per: 'day' }] });
    const { token } = await newToken(project, 'limited');
    await settled(proxy.call(token));
    assert.equal((await settled(proxy.call(token))).outcome, 'refused');
    await start();
    await w.link(/^\d+ refused$/);
    await w.click(w.page.getByRole('row', { name: /small limited/ }).getByRole('link').first());
    await w.link('Change the rule');
    await w.type('Maximum', '100');
    await w.button('Save');
    await w.see('Changes saved');
    assert.equal((await settled(proxy.call(token))).outcome, 'ok');
  });

  journey('find what cost most last week', async (w, start) => {
    await start();
    await w.choose('Metric', 'cost');
    await w.click(w.page.getByText('More periods').first());
    await w.click(w.page.getByText('Last week', { exact: true }));
    await w.page.waitForURL(/measure=cost.*period=last-week/);
    await w.page.getByLabel('Last week', { exact: true }).and(w.page.locator(':checked')).waitFor({ state: 'attached' });
  });

  journey('see the spend of each team', async (w, start) => {
    const project = await newProject('teams', { attribution: { tags: ['team'] } });
    const { token } = await newToken(project, 'shared');
    await settled(proxy.call(token, {}, { 'x-llm-proxy-tags': 'team=search' }));
    await start();
    await w.page.getByRole('region', { name: 'Tag team' }).getByText('search').waitFor();
  });

  journey('revoke a leaked token, by its first characters', async (w, start) => {
    const { token } = await newToken({ id: proxy.project }, 'leaked');
    await start();
    await w.to('Tokens');
    await w.type('Search', token.slice(0, 20));
    await w.enter();
    await w.link('Revoke');
    await w.button('Revoke token');
    await w.see('1 token revoked, effective immediately');
    assert.equal((await proxy.call(token)).status, 401);
  });

  journey('rotate a token', async (w, start) => {
    await newToken({ id: proxy.project }, 'to be rotated');
    await start();
    await w.to('Tokens');
    await w.link('to be rotated');
    await w.link('Rotate');
    await w.button('Rotate');
    await w.button('Copy token');
    const token = await w.page.evaluate(() => navigator.clipboard.readText());
    assert.equal((await settled(proxy.call(token))).outcome, 'ok');
  });

  journey('end a running call', async (w, start) => {
    proxy.provider.script((c) => { c.sse(); c.event({ choices: [{ index: 0, delta: { content: 'Hel' } }] }); });
    const stream = (await proxy.call(proxy.token, { stream: true })).body.getReader();
    await stream.read();
    await start();
    await w.to('Running calls');
    await w.click(w.page.getByRole('link', { name: /^End req_/ }));
    await w.button('End call');
    await w.see('The call was ended');
    await assert.rejects((async () => { while (!(await stream.read()).done); })());
  });

  journey('set up a webhook', async (w, start) => {
    await start();
    await w.to('Webhooks');
    await w.click(w.page.getByRole('link', { name: 'New webhook' }).or(w.page.getByRole('link', { name: 'Create a webhook' })).first());
    await w.type('Name', 'ops');
    await w.type('URL', `${proxy.provider.url}/hook`);
    await w.button('Create webhook');
    assert.match(await w.page.locator('#secret').textContent(), /^whsec_/);
  });

  journey('download the calls as CSV', async (w, start) => {
    await start();
    await w.to('Calls');
    const file = w.page.waitForEvent('download');
    await w.button('Download as CSV');
    assert.match(readFileSync(await (await file).path(), 'utf8'), /^id,started_at,/);
  });

  journey('see who changed a project', async (w, start) => {
    await start();
    await w.to('Projects');
    await w.link('fresh');
    await w.page.getByRole('region', { name: 'History' }).getByText('project.create').waitFor();
  });

  journey('look up a model\'s price', async (w, start) => {
    await start();
    await w.to('Prices');
    await w.type('Look up a model', 'gpt-4o-mini');
    await w.enter();
    await w.see('gpt-4o-mini');
    assert.match(w.page.url(), /model=gpt-4o-mini/);
  });

  journey('add a second provider key to a project', async (w, start) => {
    await start();
    await w.to('Projects');
    await w.link('fresh');
    await w.link('Add upstream');
    await w.type('Name', 'spare');
    await w.type('API key', proxy.provider.openaiKey);
    await w.button('Add upstream');
    await w.see('Upstream added');
  });

  journey('ask a model', async (w, start) => {
    await start();
    await w.to('Playground');
    await w.type('Message', 'Hello');
    await w.button('Send');
    await w.page.getByRole('region', { name: 'The last call' }).waitFor();
  });

  journey('create a management key for a colleague', async (w, start) => {
    await start();
    await w.to('Management keys');
    await w.link('New key');
    await w.type('Name', 'Grace');
    await w.choose('Role', 'operator');
    await w.button('Create key');
    assert.match(await w.page.locator('#secret').textContent(), /^llmpm_/);
  });

  journey('find the calls of an end user', async (w, start) => {
    await settled(proxy.call(proxy.token, {}, { 'x-llm-proxy-end-user': 'alice@example.com' }));
    await start();
    await w.to('Calls');
    await w.type('Search', 'alice');
    await w.enter();
    await w.page.getByRole('link', { name: 'alice@example.com' }).waitFor();
  });

  journey('stop all calls of a project', async (w, start) => {
    const { id } = await newProject('to be stopped');
    const { token } = await newToken({ id }, 'stopped');
    await start();
    await w.to('Projects');
    await w.link('to be stopped');
    await w.link('Deactivate');
    await w.button('Deactivate');
    await w.see('Project deactivated');
    assert.equal((await proxy.call(token)).status, 403);
  });

  journey('verify the audit trail', async (w, start) => {
    await start();
    await w.to('Audit trail');
    await w.link('Verify the trail');
    await w.see('none is missing');
  });

  journey('end all sessions of a key', async (w, start) => {
    await start();
    await w.click(w.page.getByRole('link', { name: 'MANAGEMENT_TOKEN', exact: true }));
    await w.button('Sign out everywhere');
    await w.see('All sessions of this key have ended');
  });

  test('every journey of the table is walked', () => assert.deepEqual([...walked].sort(), [...rows.keys()].sort()));
});
